package natskv_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/backendtest"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestOverrides(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	ctx := t.Context()
	if err := r.ClearOverride(ctx, "a"); err != nil {
		t.Errorf("clearing before there is any: %v", err)
	}
	if all, err := r.Overrides(ctx); err != nil || len(all) != 0 {
		t.Errorf("before there is any: %v, %v", all, err)
	}
	announce(t, r, node(t, "a"))
	w := watch(t, r)
	if listed, _ := w.Listing(); len(listed) != 1 {
		t.Errorf("listed %v, want the node alone", listed)
	}

	want := func(w *backendtest.Watcher, overrides string) {
		t.Helper()
		for {
			e := w.Next()
			if e.Type == discovery.Overridden && fmt.Sprint(e.Overrides) == overrides {
				return
			}
		}
	}
	half := 0.5
	if err := r.SetOverride(ctx, "a", discovery.Override{State: discovery.StateDraining}); err != nil {
		t.Fatal(err)
	}
	want(w, "map[a:state draining]") // the bucket is found although it came later
	if err := r.SetOverride(ctx, "é.1", discovery.Override{Weight: &half}); err != nil {
		t.Fatal(err)
	}
	want(w, "map[a:state draining é.1:weight × 0.5]")
	if all, err := r.Overrides(ctx); err != nil || fmt.Sprint(all) != "map[a:state draining é.1:weight × 0.5]" {
		t.Errorf("read %v, %v", all, err)
	}

	// A watch that begins now has them before the listing ends.
	other := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	listed, _ := other.Listing()
	found := false
	for _, e := range listed {
		found = found || e.Type == discovery.Overridden && len(e.Overrides) == 2
	}
	if !found {
		t.Errorf("listed %v, want the overrides among it", listed)
	}

	if err := r.ClearOverride(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	want(w, "map[é.1:weight × 0.5]")

	// What stands there is hostile input like any other.
	kv := s.KeyValue("catga_nodes_overrides")
	put(t, kv, "b", "gone")
	put(t, kv, strings.Repeat("x", 257), `{"state":"draining"}`)
	put(t, kv, "c", `{"state":"maintenance"}`)
	want(w, "map[c:state maintenance é.1:weight × 0.5]")

	if status, err := kv.Status(ctx); err != nil || status.TTL() != 0 {
		t.Errorf("the bucket of overrides has a TTL of %v, %v, want none", status.TTL(), err)
	}

	// Removed, recreated.
	if err := s.JetStream().DeleteKeyValue(ctx, "catga_nodes_overrides"); err != nil {
		t.Fatal(err)
	}
	want(w, "map[]")
	recreated := s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes_overrides"})
	put(t, recreated, "d", `{"weight":2}`)
	want(w, "map[d:weight × 2]")
}

func TestOverridesAreNotLostWithTheConnection(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	announce(t, r, node(t, "a"))
	if err := r.SetOverride(t.Context(), "a", discovery.Override{State: discovery.StateDraining}); err != nil {
		t.Fatal(err)
	}
	d := discovery.NewDirectory(r, discovery.Options{Probe: discoverytest.RefuseConnection})
	done := make(chan struct{})
	ctx := t.Context()
	go func() { defer close(done); _ = d.Run(ctx) }()
	t.Cleanup(func() { <-done })
	<-d.Synced()
	if got := d.Snapshot().Node("a").State(); got != discovery.StateDraining {
		t.Fatalf("the node is %s, want it draining from the first snapshot on", got)
	}
	s.Restart()
	deadline := time.Now().Add(patience)
	for d.Status().Restarts == 0 || !d.Status().Connected {
		if time.Now().After(deadline) {
			t.Fatal("the directory has not come back")
		}
		if got := d.Snapshot().Node("a").State(); got != discovery.StateDraining {
			t.Fatalf("the node is %s while the registry is away, want it draining", got)
		}
		time.Sleep(time.Millisecond)
	}
	if got := d.Snapshot().Node("a").State(); got != discovery.StateDraining {
		t.Fatalf("the node is %s after the registry came back, want it draining", got)
	}
}

// Who may not read the overrides lists the nodes without them, and at once: the
// server says so.
func TestOverridesThatMayNotBeRead(t *testing.T) {
	t.Parallel()
	for name, denied := range map[string]string{
		"find": "$JS.API.STREAM.INFO.KV_catga_nodes_overrides",
		"read": "$JS.API.CONSUMER.MSG.NEXT.KV_catga_nodes_overrides.>",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := natstest.Start(t, natstest.Users(
				natstest.User{Name: "admin", Password: secret},
				natstest.User{Name: "u", Password: secret, Publish: natstest.Deny(denied)},
			))
			login := func(user string) natskv.Config {
				return natskv.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{User: user, Password: secret}}
			}
			operator := open(t, login("admin"))
			announce(t, operator, node(t, "a"))
			if err := operator.SetOverride(t.Context(), "a", discovery.Override{State: discovery.StateDraining}); err != nil {
				t.Fatal(err)
			}
			w := watch(t, open(t, login("u")))
			if listed, _ := w.Listing(); len(listed) != 1 || listed[0].Type != discovery.Put {
				t.Errorf("listed %v, want the node alone", listed)
			}
			_, err := open(t, login("u")).Overrides(t.Context())
			wantError(t, err, discovery.ErrPermission)
		})
	}
}
