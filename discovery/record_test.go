package discovery

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// softHyphens is a metadata object with keys of which an escaped one takes three
// times as much, and with no texts.
func softHyphens() string {
	parts := make([]string, MaxMetadata)
	for i := range parts {
		parts[i] = fmt.Sprintf(`"%02d%s":{}`, i, strings.Repeat("\u00ad", 31))
	}
	return "{" + strings.Join(parts, ",") + "}"
}

func TestWireSamples(t *testing.T) {
	date := func(nanosecond int) time.Time { return time.Date(2025, 10, 10, 12, 0, 0, nanosecond, time.UTC) }
	want := map[string]Node{
		"camel-full.json": {
			ID: "orders-1", Endpoint: mustEndpoint(t, "http://127.0.0.1:5001"), Load: 0.35, LastSeen: date(123456700),
			Metadata: map[string]string{"service": "orders", "zone": "eu-1", "weight": "2"},
		},
		"camel-no-metadata.json": {
			ID: "orders-2", Endpoint: mustEndpoint(t, "http://127.0.0.1:5002"), LastSeen: date(0),
		},
		"camel-offset-unicode.json": {
			ID: "pay-1", Endpoint: mustEndpoint(t, "https://pay-1.internal:8443"), Load: 12.75, LastSeen: date(500000000),
			Metadata: map[string]string{"service": "pay", "region": "欧洲"},
		},
		"pascal-null-metadata.json": {
			ID: "orders-3", Endpoint: mustEndpoint(t, "http://127.0.0.1:5003"), Load: 0.1, LastSeen: date(100000000),
		},
		"pascal-unspecified-time-ipv6.json": {
			ID: "orders-4", Endpoint: mustEndpoint(t, "http://[::1]:5004"), Load: 1e-5, LastSeen: date(123456700),
			Metadata: map[string]string{"service": "orders"},
		},
	}
	lenient := Node{
		ID: "42", Endpoint: mustEndpoint(t, "http://127.0.0.1:5006"), Load: 0.5, LastSeen: date(0),
		Metadata: map[string]string{"Service": "orders", "service": "orders", "weight": "2", "canary": "true"},
		LeftOut:  []string{"tags"},
	}
	want["lenient-scalars.json"] = lenient
	lenient.ID = "43"
	want["lenient-byte-order-mark.json"] = lenient
	// What is wrong with each, as the error must say it.
	reasons := map[string]string{
		"invalid-empty-id.json":         "node id: it is empty",
		"invalid-endpoint-unknown.json": "the port is missing",
		"invalid-path.json":             "a path is not accepted",
		"invalid-placeholder.json":      "placeholders are not accepted",
		"invalid-port-range.json":       "want http://host:port",
		"invalid-truncated.json":        "unexpected end of JSON input",
		"invalid-unix.json":             "want http://host:port",
		"invalid-userinfo.json":         "user info is not accepted",
		"invalid-load-object.json":      "load: have an object, want a finite number",
		"invalid-metadata-array.json":   "metadata: have array, want an object",
		// These two are messages of the pub/sub layout and no records.
		"heartbeat-camel.json": "it is empty",
		"leave.json":           "it is empty",
	}
	files, err := filepath.Glob("testdata/wire/*.json")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != len(want)+len(reasons) {
		t.Errorf("%d samples, %d of them are tested", len(files), len(want)+len(reasons))
	}
	for _, file := range files {
		name := filepath.Base(file)
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			n, err := ParseNode(data)
			if reason, ok := reasons[name]; ok {
				if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), reason) {
					t.Errorf("got %v, want ErrInvalid and %q", err, reason)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(n, want[name]) {
				t.Errorf("got %+v, want %+v", n, want[name])
			}
		})
	}
}

// withValue returns a record that is valid but for one of its values, which is
// the given piece of JSON.
func withValue(name, value string) string {
	fields := map[string]string{
		"nodeId": `"a"`, "endpoint": `"10.0.0.1:80"`, "load": "0", "metadata": "null", "lastSeen": "null", "isOnline": "true",
	}
	fields[name] = value
	var pairs []string
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		pairs = append(pairs, fmt.Sprintf("%q:%s", name, fields[name]))
	}
	return "{" + strings.Join(pairs, ",") + "}"
}

func pairs(n int) string {
	var b strings.Builder
	b.WriteByte('{')
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `"k%d":"v"`, i)
	}
	b.WriteByte('}')
	return b.String()
}

func TestParseNode(t *testing.T) {
	deep := strings.Repeat("[", 30000) + strings.Repeat("]", 30000)
	tests := []struct {
		name, record string
		reason       string // of the rejection; "" means accepted
		check        func(n Node) bool
	}{
		{name: "the least there can be", record: `{"nodeid":"a","ENDPOINT":"h:1"}`},
		{name: "spaces around", record: " \t\r\n" + withValue("load", "1") + "\r\n "},
		{name: "unknown names", record: `{"nodeId":"a","endpoint":"h:1","more":{"x":[1,2]}}`},
		{name: "a time of no use", record: withValue("lastSeen", `"yesterday"`), check: func(n Node) bool { return n.LastSeen.IsZero() }},
		{name: "a time that is a number", record: withValue("lastSeen", `1760097600`), check: func(n Node) bool { return n.LastSeen.IsZero() }},
		{name: "online, whatever that is", record: withValue("isOnline", `{"since":1}`)},
		{name: "an unpaired surrogate", record: withValue("nodeId", `"\ud800"`), check: func(n Node) bool { return n.ID == "\uFFFD" }},
		{name: "no load", record: withValue("load", "null"), check: func(n Node) bool { return n.Load == 0 }},
		{name: "a metadata value that is null", record: withValue("metadata", `{"a":null}`), check: func(n Node) bool { return len(n.Metadata) == 0 }},
		{name: "as many pairs as may be", record: withValue("metadata", pairs(MaxMetadata)), check: func(n Node) bool { return len(n.Metadata) == MaxMetadata }},
		{name: "the longest id", record: withValue("nodeId", `"`+strings.Repeat("x", MaxID)+`"`)},
		{name: "as large as may be", record: withValue("load", "0"+strings.Repeat(" ", MaxRecord-len(withValue("load", "0"))))},

		// Names that stand twice: the last one counts, and pairs add up.
		{name: "id twice", record: `{"nodeId":"a","endpoint":"h:1","NodeId":"b"}`, check: func(n Node) bool { return n.ID == "b" }},
		{name: "endpoint twice", record: `{"nodeId":"a","endpoint":"{x}:1","Endpoint":"h:1"}`, check: func(n Node) bool { return n.Endpoint.Address() == "h:1" }},
		{name: "endpoint twice, the last one bad", record: `{"nodeId":"a","Endpoint":"h:1","endpoint":"{x}:1"}`, reason: "placeholders"},
		{name: "metadata twice", record: `{"nodeId":"a","endpoint":"h:1","metadata":{"x":"1","y":"1"},"Metadata":{"x":"2"}}`, check: func(n Node) bool {
			return maps.Equal(n.Metadata, map[string]string{"x": "2", "y": "1"})
		}},
		{name: "too many pairs in two halves", record: `{"nodeId":"a","endpoint":"h:1","metadata":` + pairs(MaxMetadata) + `,"Metadata":{"another":"1"}}`, reason: "65 pairs"},

		// What writers in other languages make of it.
		{name: "a byte order mark", record: "\ufeff" + withValue("load", "1")},
		{name: "an id that is a number", record: withValue("nodeId", `7`), check: func(n Node) bool { return n.ID == "7" }},
		{name: "load in quotes", record: withValue("load", `"0.5"`), check: func(n Node) bool { return n.Load == 0.5 }},
		{name: "metadata values that are scalars", record: withValue("metadata", `{"weight":2,"canary":true,"ratio":1.50,"gone":null}`), check: func(n Node) bool {
			return maps.Equal(n.Metadata, map[string]string{"weight": "2", "canary": "true", "ratio": "1.50"})
		}},
		{name: "metadata values that are none", record: withValue("metadata", `{"tags":["a"],"\u001b[2J":{},"zone":"z"}`), check: func(n Node) bool {
			return maps.Equal(n.Metadata, map[string]string{"zone": "z"}) && slices.Equal(n.LeftOut, []string{`\x1b[2J`, "tags"})
		}},
		{name: "very many metadata values that are none", record: withValue("metadata", strings.ReplaceAll(pairs(3*MaxMetadata), `"v"`, `[]`)), check: func(n Node) bool {
			return len(n.Metadata) == 0 && len(n.LeftOut) == 8 && cap(n.LeftOut) <= 16
		}},
		{name: "metadata values that are none under keys that escape", record: withValue("metadata", softHyphens()), check: func(n Node) bool {
			kept := 0
			for _, k := range n.LeftOut {
				kept += len(k)
			}
			bare := n
			bare.LeftOut = nil
			return len(n.LeftOut) == 8 && kept <= 8*(maxClip+len("…")) && n.footprint() >= bare.footprint()+kept &&
				len((&Entry{Node: Node{LeftOut: n.LeftOut, Metadata: map[string]string{"notes": strings.Repeat("x", largeRecord)}}}).brief().Node.LeftOut) == 0
		}},
		{name: "an escaped text", record: withValue("metadata", `{"a":"\u0041\\\""}`), check: func(n Node) bool { return n.Metadata["a"] == `A\"` }},
		{name: "reserved keys in another case", record: withValue("metadata", `{"Service":"orders","WEIGHT":2,"Zone":"a","zone":"b"}`), check: func(n Node) bool {
			return n.Service() == "orders" && n.Weight() == 2 && n.Metadata["zone"] == "b" && n.Metadata["Service"] == "orders"
		}},
		{name: "a reserved key in two other cases", record: withValue("metadata", `{"service":null,"sERVICE":"x","Service":"y"}`), check: func(n Node) bool { return n.Service() == "y" }},
		{name: "a reserved key in another case where there is no room", record: withValue("metadata", `{"Service":"orders",`+pairs(MaxMetadata - 1)[1:]), check: func(n Node) bool {
			_, spelled := n.Metadata["Service"]
			return n.Service() == "orders" && len(n.Metadata) == MaxMetadata && !spelled
		}},

		{name: "nothing", record: "", reason: "want a JSON object"},
		{name: "null", record: "null", reason: "want a JSON object"},
		{name: "an array", record: `[{"nodeId":"a"}]`, reason: "want a JSON object"},
		{name: "a string", record: `"a"`, reason: "want a JSON object"},
		{name: "two objects", record: withValue("load", "0") + "{}", reason: "after top-level value"},
		{name: "too large", record: withValue("load", "0"+strings.Repeat(" ", MaxRecord)), reason: "want at most 65536"},
		{name: "too deep", record: withValue("lastSeen", deep), reason: "exceeded max depth"},
		{name: "not UTF-8", record: withValue("nodeId", "\"a\xff\""), reason: "not UTF-8"},
		{name: "no id", record: `{"endpoint":"h:1"}`, reason: "node id: it is empty"},
		{name: "an id too long", record: withValue("nodeId", `"`+strings.Repeat("x", MaxID+1)+`"`), reason: "want at most 256"},
		{name: "an id with a line feed", record: withValue("nodeId", `"a\nb"`), reason: "control characters"},
		{name: "an id with an escape sequence", record: withValue("nodeId", `"\u001b[2J"`), reason: "control characters"},
		{name: "an id with a C1 control", record: withValue("nodeId", `"\u009b2J"`), reason: "control characters"},
		{name: "no endpoint", record: `{"nodeId":"a"}`, reason: "endpoint"},
		{name: "load beyond a float", record: withValue("load", "1e999"), reason: "number"},
		{name: "negative load", record: withValue("load", "-0.1"), reason: "want a finite number ≥ 0"},
		{name: "load that is no number", record: withValue("load", `"high"`), reason: `load "high": want a finite number`},
		{name: "load in quotes that is none", record: withValue("load", `"NaN"`), reason: "want a finite number"},
		{name: "load as an object", record: withValue("load", `{"cpu":1}`), reason: "load: have an object, want a finite number"},
		{name: "load as a boolean", record: withValue("load", `true`), reason: "load: have true or false, want a finite number"},
		{name: "an id that is an array", record: withValue("nodeId", `["a"]`), reason: "node id: have an array, want a string"},
		{name: "an id that is null", record: withValue("nodeId", `null`), reason: "node id: it is empty"},
		{name: "an endpoint that is an object", record: withValue("endpoint", `{"host":"h"}`), reason: "endpoint: have an object, want a string"},
		{name: "an endpoint that is a number", record: withValue("endpoint", `8080`), reason: "want http://host:port"},
		{name: "metadata as an array", record: withValue("metadata", `[]`), reason: "metadata: have array, want an object"},
		{name: "metadata as a string", record: withValue("metadata", `"service=orders"`), reason: "metadata: have string, want an object"},
		{name: "too many pairs", record: withValue("metadata", pairs(MaxMetadata+1)), reason: "65 pairs"},
		{name: "an empty metadata key", record: withValue("metadata", `{"":"x"}`), reason: "keys must not be empty"},
		{name: "a control character in a key", record: withValue("metadata", `{"a\u0000":"x"}`), reason: "control characters"},
		{name: "a control character in a value", record: withValue("metadata", `{"a":"x\u007f"}`), reason: "control characters"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			n, err := ParseNode([]byte(test.record))
			if test.reason != "" {
				if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), test.reason) {
					t.Fatalf("got %v, want ErrInvalid and %q", err, test.reason)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if test.check != nil && !test.check(n) {
				t.Errorf("got %+v", n)
			}
			again, err := ParseNode([]byte(test.record))
			if err != nil || !reflect.DeepEqual(n, again) {
				t.Errorf("a second look sees %+v, %v; the first %+v", again, err, n)
			}
		})
	}
}

// A rejected record is shown to people: the message must not be a way to fill
// logs, and it names the node where it can.
func TestParseNodeErrorIsShort(t *testing.T) {
	long := strings.Repeat("9", 60000)
	for _, record := range []string{
		withValue("load", long),
		withValue("load", `"`+long+`"`),
		withValue("nodeId", long),
		withValue("endpoint", long),
		withValue("metadata", long),
		withValue("nodeId", `"`+long+`"`),
		withValue("endpoint", `"http://`+long+`"`),
		withValue("endpoint", `"http://h:1/`+long+`"`),
		withValue("metadata", `{"`+long+`":"\u0001"}`),
		"{" + long,
	} {
		_, err := ParseNode([]byte(record))
		if err == nil {
			t.Errorf("accepted %.80s…", record)
		} else if len(err.Error()) > 400 {
			t.Errorf("%.80s… is rejected in %d bytes: %.200s…", record, len(err.Error()), err)
		}
	}
	n, err := ParseNode([]byte(withValue("endpoint", `"nonsense"`)))
	if err == nil || n.ID != "a" {
		t.Errorf("the rejected record of a is known as %q, %v", n.ID, err)
	}
}

func FuzzParseNode(f *testing.F) {
	files, err := filepath.Glob("testdata/wire/*.json")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"nodeId":"a","endpoint":"[::ffff:1.2.3.4]:080","metadata":{"weight":"1e308","lease":"1ns","state":"DRAINING"}}`))
	f.Add([]byte(`{"nodeId":7,"endpoint":"h:1","load":"1e3","metadata":{"Service":1,"x":[],"y":{"z":1}}}`))
	f.Add([]byte(`{"NODEID":"\u2028<&>","endpoint":"HTTPS://A.B.","load":1e-320,"load":-0}`))
	at := time.Date(2025, 10, 10, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, data []byte) {
		n, err := ParseNode(data)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("%v does not wrap ErrInvalid", err)
			}
			if len(err.Error()) > 400 {
				t.Fatalf("the error has %d bytes: %.500s", len(err.Error()), err)
			}
			return
		}
		if err := n.Validate(); err != nil {
			t.Fatalf("accepted, yet %v", err)
		}
		if strings.ContainsAny(n.Endpoint.Address(), "{}") {
			t.Fatalf("a placeholder in %q", n.Endpoint.Address())
		}
		if e, err := ParseEndpoint(n.Endpoint.String()); err != nil || e != n.Endpoint {
			t.Fatalf("endpoint %q parses to %q, %v", n.Endpoint, e, err)
		}
		if w := n.Weight(); !(w >= 0 && w <= MaxWeight) {
			t.Fatalf("weight %v", w)
		}
		if l := n.Lease(); l != 0 && (l < MinLease || l > MaxLease) {
			t.Fatalf("lease %v", l)
		}
		encoded, err := AppendRecord(nil, n, at)
		if err != nil {
			// Escapes may take a record past the limit, nothing else may fail.
			if len(data) < MaxRecord/6 {
				t.Fatalf("accepted and not encoded: %v", err)
			}
			return
		}
		again, err := ParseNode(encoded)
		if err != nil {
			t.Fatalf("%s: %v", encoded, err)
		}
		n.LastSeen, n.LeftOut = at, nil // which no record of ours has
		if !reflect.DeepEqual(n, again) {
			t.Fatalf("%+v became %+v", n, again)
		}
	})
}
