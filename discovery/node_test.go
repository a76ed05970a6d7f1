package discovery

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"
)

func mustEndpoint(tb testing.TB, s string) Endpoint {
	tb.Helper()
	e, err := ParseEndpoint(s)
	if err != nil {
		tb.Fatal(err)
	}
	return e
}

func TestNodeMetadata(t *testing.T) {
	for _, test := range []struct {
		key, value string
		get        func(n *Node) any
		want       any
	}{
		{KeyWeight, "2", func(n *Node) any { return n.Weight() }, 2.0},
		{KeyWeight, "0", func(n *Node) any { return n.Weight() }, 0.0},
		{KeyWeight, "0.25", func(n *Node) any { return n.Weight() }, 0.25},
		{KeyWeight, "-1", func(n *Node) any { return n.Weight() }, 1.0},
		{KeyWeight, "", func(n *Node) any { return n.Weight() }, 1.0},
		{KeyWeight, "0,5", func(n *Node) any { return n.Weight() }, 1.0},
		{KeyWeight, "NaN", func(n *Node) any { return n.Weight() }, 1.0},
		{KeyWeight, "Inf", func(n *Node) any { return n.Weight() }, 1.0},
		{KeyWeight, "1e308", func(n *Node) any { return n.Weight() }, MaxWeight},
		{KeyWeight, "1e400", func(n *Node) any { return n.Weight() }, 1.0},
		{"other", "2", func(n *Node) any { return n.Weight() }, 1.0},

		{KeyLease, "45s", func(n *Node) any { return n.Lease() }, 45 * time.Second},
		{KeyLease, "1ms", func(n *Node) any { return n.Lease() }, MinLease},
		{KeyLease, "1000h", func(n *Node) any { return n.Lease() }, MaxLease},
		{KeyLease, "0s", func(n *Node) any { return n.Lease() }, time.Duration(0)},
		{KeyLease, "-5s", func(n *Node) any { return n.Lease() }, time.Duration(0)},
		{KeyLease, "30", func(n *Node) any { return n.Lease() }, time.Duration(0)},
		{KeyLease, "00:00:30", func(n *Node) any { return n.Lease() }, time.Duration(0)},
		{KeyLease, "99999999999h", func(n *Node) any { return n.Lease() }, time.Duration(0)},
		{"other", "45s", func(n *Node) any { return n.Lease() }, time.Duration(0)},

		{KeyState, "up", func(n *Node) any { return n.State() }, StateUp},
		{KeyState, "Draining", func(n *Node) any { return n.State() }, StateDraining},
		{KeyState, "maintenance", func(n *Node) any { return n.State() }, StateMaintenance},
		{KeyState, "california", func(n *Node) any { return n.State() }, StateUp},
		{"other", "draining", func(n *Node) any { return n.State() }, StateUp},

		{KeyService, "orders", func(n *Node) any { return n.Service() }, "orders"},
		{KeyInstance, "i", func(n *Node) any { return n.Instance() }, "i"},
		{KeyRole, RoleProxy, func(n *Node) any { return n.Role() }, "proxy"},
		{KeyCapacity, "7", func(n *Node) any { return n.Capacity() }, 7},
		{KeyCapacity, "7.9", func(n *Node) any { return n.Capacity() }, 7},
		{KeyCapacity, "1e99", func(n *Node) any { return n.Capacity() }, MaxCapacity},
		{KeyCapacity, "0", func(n *Node) any { return n.Capacity() }, 0},
		{KeyCapacity, "-1", func(n *Node) any { return n.Capacity() }, 0},
		{KeyCapacity, "NaN", func(n *Node) any { return n.Capacity() }, 0},
		{KeyCapacity, "much", func(n *Node) any { return n.Capacity() }, 0},
		{"other", "x", func(n *Node) any { return n.Service() + n.Instance() + n.Role() }, ""},
	} {
		n := &Node{Metadata: map[string]string{test.key: test.value}}
		if got := test.get(n); got != test.want {
			t.Errorf("%s %q: got %v, want %v", test.key, test.value, got, test.want)
		}
	}
	var bare Node
	if bare.Weight() != 1 || bare.Lease() != 0 || bare.State() != StateUp || bare.Service() != "" {
		t.Errorf("without metadata: weight %v, lease %v, state %v, service %q", bare.Weight(), bare.Lease(), bare.State(), bare.Service())
	}
}

func TestValidate(t *testing.T) {
	valid := func() Node {
		return Node{ID: "a", Endpoint: mustEndpoint(t, "http://h:1"), Metadata: map[string]string{"k": "v"}}
	}
	for _, test := range []struct {
		name  string
		spoil func(n *Node)
	}{
		{"no id", func(n *Node) { n.ID = "" }},
		{"id not UTF-8", func(n *Node) { n.ID = "\xff" }},
		{"id with DEL", func(n *Node) { n.ID = "a\x7f" }},
		{"id with C1", func(n *Node) { n.ID = "a\u009b31m" }},
		{"id with a new line", func(n *Node) { n.ID = "a\nb" }},
		{"id with a line separator", func(n *Node) { n.ID = "a\u2028b" }},
		{"id that turns round", func(n *Node) { n.ID = "a\u202eb" }},
		{"value with C1", func(n *Node) { n.Metadata["k"] = "\u0085" }},
		{"value that turns round", func(n *Node) { n.Metadata["k"] = "\u2066x" }},
		{"key that turns round", func(n *Node) { n.Metadata["\u202dx"] = "" }},
		{"no endpoint", func(n *Node) { n.Endpoint = Endpoint{} }},
		{"another scheme", func(n *Node) { n.Endpoint.Scheme = "ftp" }},
		{"NaN", func(n *Node) { n.Load = math.NaN() }},
		{"infinite load", func(n *Node) { n.Load = math.Inf(1) }},
		{"negative load", func(n *Node) { n.Load = -1 }},
		{"value not UTF-8", func(n *Node) { n.Metadata["k"] = "\xff" }},
		{"key not UTF-8", func(n *Node) { n.Metadata["\xff"] = "" }},
	} {
		n := valid()
		if err := n.Validate(); err != nil {
			t.Fatal(err)
		}
		test.spoil(&n)
		if err := n.Validate(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", test.name, err)
		}
		if b, err := AppendRecord([]byte("x"), n, time.Now()); !errors.Is(err, ErrInvalid) || string(b) != "x" {
			t.Errorf("%s: AppendRecord returned %q, %v", test.name, b, err)
		}
	}
}

func TestAppendRecord(t *testing.T) {
	at := time.Date(2025, 10, 10, 14, 0, 0, 123456789, time.FixedZone("", 7200))
	n := Node{
		ID: "orders-1", Endpoint: mustEndpoint(t, "http://10.0.0.7:5001"), Load: 0.35,
		Metadata: map[string]string{"zone": "eu-1", "service": "orders"},
	}
	got, err := AppendRecord([]byte(">"), n, at)
	if err != nil {
		t.Fatal(err)
	}
	want := `>{"nodeId":"orders-1","endpoint":"http://10.0.0.7:5001","lastSeen":"2025-10-10T12:00:00.1234567Z","load":0.35,"metadata":{"service":"orders","zone":"eu-1"},"isOnline":true}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for range 20 {
		if again, _ := AppendRecord([]byte(">"), n, at); string(again) != want {
			t.Fatalf("equal arguments gave %s", again)
		}
	}
	n.Metadata["note"] = strings.Repeat("x", MaxRecord)
	if b, err := AppendRecord(nil, n, at); !errors.Is(err, ErrInvalid) || len(b) != 0 {
		t.Errorf("a record past the limit: %d bytes, %v", len(b), err)
	}
}
