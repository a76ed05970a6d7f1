package natskv

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// The removal of a key that names another node than it would, if it were ours, means
// the node that was put there last.
func TestForeignKeysResolve(t *testing.T) {
	t.Parallel()
	f := newForeignKeys()
	for _, step := range []struct {
		kind     discovery.EventType
		id, want string // id is that of the record, or of the key
	}{
		{discovery.Left, "ours", "ours"},
		{discovery.Put, "theirs", "theirs"},
		{discovery.Left, "ours", "theirs"},
		{discovery.Left, "ours", "ours"},
		{discovery.Put, "theirs", "theirs"},
		{discovery.Put, "other", "other"},
		{discovery.Rejected, "ours", "other"},
		{discovery.Put, "theirs", "theirs"},
		{discovery.Put, "ours", "ours"},
		{discovery.Expired, "ours", "ours"},
	} {
		e := discovery.Event{Type: step.kind, Key: "k", ID: step.id}
		f.resolve(&e, "ours")
		if e.ID != step.want {
			t.Fatalf("%s of %q means %q, want %q", step.kind, step.id, e.ID, step.want)
		}
	}
}

// Whoever may write may write as many keys as the bucket takes, and as long ones as the
// server does. What is kept of them is bounded.
func TestForeignKeysAreBounded(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ length, flood int }{
		"many keys": {10, 2*maxForeign + 2},
		"long keys": {4 << 10, 2*maxForeignBytes/(4<<10) + 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newForeignKeys()
			put := func(key string) {
				f.resolve(&discovery.Event{Type: discovery.Put, Key: key, ID: "theirs"}, "ours")
			}
			known := func(key string) bool {
				_, known := f.nodes.Get(key)
				return known
			}
			put("first")
			padding := strings.Repeat("k", test.length)
			last := ""
			for i := range test.flood {
				last = fmt.Sprint(padding, i)
				put(last)
			}
			if known("first") || !known(last) {
				t.Errorf("the first key is known: %t, the last: %t", known("first"), known(last))
			}
		})
	}
}
