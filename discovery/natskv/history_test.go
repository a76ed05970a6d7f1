package natskv_test

import (
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestHistory(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	n := node(t, "a", "version", "1")
	announce(t, r, n)
	kv := s.KeyValue("catga_nodes")
	put(t, kv, "a", record("a")) // the bare form
	put(t, kv, "node.a", "{}")
	n.Metadata["version"] = "2"
	announce(t, r, n)
	announce(t, r, node(t, "other"))
	if err := r.Withdraw(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	history, err := r.History(t.Context(), "a", 0)
	if err != nil {
		t.Fatal(err)
	}
	want := []discovery.EventType{discovery.Left, discovery.Put, discovery.Rejected, discovery.Put, discovery.Put}
	if len(history) != len(want) {
		t.Fatalf("%d revisions, want %d: %v", len(history), len(want), history)
	}
	for i, revision := range history {
		if revision.Type != want[i] || revision.Time.IsZero() ||
			(revision.Type == discovery.Rejected) != (revision.Err != nil) ||
			i > 0 && revision.Number >= history[i-1].Number {
			t.Errorf("revision %d is %+v, want %s", i, revision, want[i])
		}
	}
	if got := history[1].Node.Metadata["version"]; got != "2" {
		t.Errorf("the newest record has version %q", got)
	}
	if limited, err := r.History(t.Context(), "a", 2); err != nil || len(limited) != 2 || limited[0].Number != history[0].Number {
		t.Errorf("with a limit: %v, %v", limited, err)
	}
	if none, err := r.History(t.Context(), "never", 0); err != nil || len(none) != 0 {
		t.Errorf("of a node never heard of: %v, %v", none, err)
	}
}
