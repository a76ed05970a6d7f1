package picker

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// TestTokens has tokens of several keyrings told apart.
func TestTokens(t *testing.T) {
	old, both, open := NewKeyring("old"), NewKeyring("new", "old"), NewKeyring()
	for _, id := range []string{"a", "orders-1", strings.Repeat("x", 1000)} {
		token := old.Token(id)
		if len(token) != TokenLength || token != NewKeyring("old").Token(id) {
			t.Errorf("the token of %.9s is %q, and another proxy has another one", id, token)
		}
		for k, want := range map[*Keyring]bool{old: true, both: true, open: false, NewKeyring("OLD"): false} {
			if k.Authentic(token) != want {
				t.Errorf("whether the token of %.9s is authentic: %v, want %v", id, !want, want)
			}
		}
	}
	// The format is that of every proxy of a fleet, whatever version it runs.
	if got := NewKeyring("secret").Token("orders-1"); got != "t65gD_HLMTqrrx2UqoMf6vPD2HzZjlbO" {
		t.Errorf("the token is %q", got)
	}
	token := old.Token("a")
	for i := range token {
		other := []byte(token)
		if other[i]++; old.Authentic(string(other)) {
			t.Errorf("%q counts as authentic beside %q", other, token)
		}
	}
	if old.Authentic("") || old.Authentic(token+"A") {
		t.Error("a token of another length is authentic")
	}
}

// TestTokensFollowTheFleet compares what is found through joins, changes and leaves with
// what the snapshots have.
func TestTokensFollowTheFleet(t *testing.T) {
	m := discoverytest.NewMemory()
	for _, n := range plain(20) {
		put(t, m, n)
	}
	d := follow(t, m)
	k := NewKeyring("new", "old")
	tokens := NewTokens(k)
	old := NewKeyring("old")
	look := func() {
		t.Helper()
		s := d.Snapshot()
		for i := range 40 {
			id := fmt.Sprintf("n%05d", i)
			want := s.Node(id)
			for token, outdated := range map[string]bool{k.Token(id): false, old.Token(id): true} {
				f := tokens.Find(s, token)
				if f.Node != want || f.Lost != (want == nil) || f.Outdated != (outdated && want != nil) {
					t.Fatalf("%s is found as %+v, want %v", id, f, want)
				}
			}
		}
		n := 0
		tokens.holders.Range(func(any, any) bool { n++; return true })
		if n != 2*len(s.Nodes()) {
			t.Errorf("there are %d tokens of %d nodes", n, len(s.Nodes()))
		}
	}
	look()
	for i := range 40 {
		before := d.Snapshot()
		switch id := fmt.Sprintf("n%05d", (i*7)%40); {
		case before.Node(id) == nil:
			put(t, m, node(id))
		case i%2 == 0:
			put(t, m, node(id, "version", fmt.Sprint(i)))
		default:
			if err := m.Open().Withdraw(t.Context(), node(id)); err != nil {
				t.Fatal(err)
			}
		}
		<-before.Superseded()
		look()
	}
	if f := tokens.Find(d.Snapshot(), "x"); f != (Finding{}) {
		t.Errorf("a made-up token is found as %+v", f)
	}
}

// TestTokensAreFoundByMany has many look for the token of a node that has just joined.
func TestTokensAreFoundByMany(t *testing.T) {
	m := discoverytest.NewMemory()
	d := follow(t, m)
	k := NewKeyring("s")
	tokens := NewTokens(k)
	for i := range 50 {
		id := fmt.Sprint("n", i)
		before := d.Snapshot()
		put(t, m, node(id))
		<-before.Superseded()
		s := d.Snapshot()
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				if f := tokens.Find(s, k.Token(id)); f.Node == nil || f.Node.Node.ID != id {
					t.Errorf("%s is found as %+v", id, f)
				}
			})
		}
		group.Wait()
	}
}

func TestWhoKeeps(t *testing.T) {
	b := newBuilder()
	reason := Reason("")
	b.Check = func(*discovery.Entry) Reason { return reason }
	q := &Query{ByService: true, Service: "orders"}
	for _, test := range []struct {
		node  discovery.Node
		check Reason
		want  bool
	}{
		{node("a", "service", "orders"), "", true},
		{node("a", "service", "bills"), "", false},
		{node("a", "service", "orders", "state", "draining"), "", true},
		{node("a", "service", "orders", "weight", "0"), "", true},
		{node("a", "service", "orders", "state", "maintenance"), "", false},
		{node("a", "service", "orders"), Unhealthy, false},
		{node("a", "service", "orders", "state", "draining"), Unhealthy, false},
		{node("a", "service", "orders"), NotChecked, true},
	} {
		reason = test.check
		if got := b.Keeps(snapshotOf(t, test.node).Nodes()[0], q); got != test.want {
			t.Errorf("%v with the check %q keeps its sessions: %v, want %v", test.node.Metadata, reason, got, test.want)
		}
	}
}
