package natskv_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestBucketDeletedWhileWatching(t *testing.T) {
	t.Parallel()
	for name, recreate := range map[string]bool{"deleted": false, "recreated": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := natstest.Start(t)
			r := open(t, natskv.Config{URLs: []string{s.URL()}})
			w := watch(t, r)
			_, before := w.Listing()
			announce(t, r, node(t, "a"))
			w.Want(discovery.Put, "a")
			js := s.JetStream()
			if err := js.DeleteKeyValue(t.Context(), "catga_nodes"); err != nil {
				t.Fatal(err)
			}
			if recreate {
				if _, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "catga_nodes"}); err != nil {
					t.Fatal(err)
				}
			}
			wantError(t, w.Broken(), discovery.ErrBroken, "catga_nodes")

			listed, after := watch(t, r).Listing()
			if len(listed) != 0 || after.Listing.Epoch == before.Listing.Epoch {
				t.Errorf("the new bucket lists %v, %+v, after %+v", listed, after.Listing, before.Listing)
			}
			// A wiped bucket takes announcements again.
			announce(t, r, node(t, "a"))
		})
	}
}

func TestServerRestart(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, r)
	w.Listing()
	for _, id := range []string{"a", "b", "c"} {
		if err := r.Announce(t.Context(), node(t, id)); err != nil {
			t.Fatal(err)
		}
		w.Want(discovery.Put, id)
	}
	s.Stop()
	wantError(t, w.Broken(), discovery.ErrBroken)
	wantError(t, watch(t, r).Broken(), discovery.ErrUnreachable, s.Addr())
	wantError(t, r.Announce(t.Context(), node(t, "a")), discovery.ErrUnreachable)
	s.Restart()
	listed, _ := watch(t, r).Listing()
	if len(listed) != 3 {
		t.Errorf("listed %d records after the restart, want 3", len(listed))
	}
}

// The consumer is gone and the connection is not: as when the server that had
// it left the cluster.
func TestConsumerDeleted(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	w := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	w.Listing()
	stream, err := s.JetStream().Stream(t.Context(), "KV_catga_nodes")
	if err != nil {
		t.Fatal(err)
	}
	for name := range stream.ConsumerNames(t.Context()).Name() {
		if err := stream.DeleteConsumer(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	// The server says so itself, or there is nobody any more to ask for more.
	wantError(t, w.Broken(), discovery.ErrBroken, "consumer")
}

func TestCloseEndsWatch(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, r)
	w.Listing()
	r.Close()
	wantError(t, w.Broken(), discovery.ErrBroken, "closed")
	wantError(t, r.Announce(t.Context(), node(t, "a")), discovery.ErrUnreachable, "closed")
}

func TestWatchEndsWithContextBeforeItBegins(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := open(t, natskv.Config{URLs: []string{s.URL()}}).Watch(ctx, func(discovery.Event) { t.Error("an event") })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Watch returned %v", err)
	}
}

// A connection that dies without a word ends the watch, and is not waited for
// where there is another server.
func TestSilence(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	proxy := natstest.NewProxy(t, s.Addr())
	r := open(t, natskv.Config{URLs: []string{"nats://" + proxy.Addr()}})
	w := watch(t, r)
	w.Listing()
	proxy.Freeze()
	err := w.Broken()
	wantError(t, err, discovery.ErrBroken, proxy.Addr())
	wantError(t, err, discovery.ErrUnreachable)
	wantError(t, watch(t, r).Broken(), discovery.ErrUnreachable, proxy.Addr())
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken)
	proxy.Thaw()
	announce(t, r, node(t, "a"))
	watch(t, r).Want(discovery.Put, "a")
}

// Ending a watch is part of every exit of a proxy, which may take no more than a
// second beyond the drain, and most of that is the registrar's.
func TestSilenceDoesNotHoldUpTheEnd(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	proxy := natstest.NewProxy(t, s.Addr())
	w := watch(t, open(t, natskv.Config{URLs: []string{"nats://" + proxy.Addr()}}))
	w.Listing()
	proxy.Freeze()
	defer proxy.Thaw()
	began := time.Now()
	w.Stop()
	if took := time.Since(began); took > 450*time.Millisecond {
		t.Errorf("a watch of a registry that is silent took %v to end, want hardly more than 100ms", took)
	}
}

// The server that has the consumer dies, and it is not the one that we are
// connected to: nothing tells us but the missing heartbeats.
func TestServerOfConsumerDies(t *testing.T) {
	t.Parallel()
	servers := natstest.StartCluster(t, 3)
	r := open(t, natskv.Config{URLs: []string{servers[0].URL()}, Replicas: 3})
	// A cluster that has just lost or gained a member is not sure of itself.
	settled := func(id string) {
		t.Helper()
		deadline := time.Now().Add(patience)
		for {
			err := r.Announce(t.Context(), node(t, id))
			if err == nil {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
	settled("a")
	js := servers[0].JetStream()
	host := func() string {
		stream, err := js.Stream(t.Context(), "KV_catga_nodes")
		if err != nil {
			t.Fatal(err)
		}
		for info := range stream.ListConsumers(t.Context()).Info() {
			return info.Cluster.Leader
		}
		return ""
	}
	for range 100 { // where a consumer goes is drawn
		w := watch(t, r)
		w.Want(discovery.Put, "a")
		w.Want(discovery.Synced, "")
		name := host()
		if name == servers[0].Name() || name == "" {
			w.Stop()
			continue
		}
		for _, s := range servers {
			if s.Name() == name {
				s.Stop()
			}
		}
		wantError(t, w.Broken(), discovery.ErrBroken)
		settled("b")
		listed, _ := watch(t, r).Listing()
		if len(listed) != 2 {
			t.Errorf("listed %v, want a and b", listed)
		}
		return
	}
	t.Fatal("no consumer went to another server than ours")
}

// What a process leaves behind on the server when connections break, or when it
// reloads over and over, goes away.
func TestNoConsumersLeftBehind(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	admin := s.JetStream()
	r := open(t, natskv.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{Name: "ours"}})
	announce(t, r, node(t, "a"))
	if err := r.SetOverride(t.Context(), "a", discovery.Override{State: discovery.StateDraining}); err != nil {
		t.Fatal(err)
	}
	consumers := func() (n int) {
		t.Helper()
		for _, name := range []string{"KV_catga_nodes", "KV_catga_nodes_overrides"} {
			stream, err := admin.Stream(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			n += stream.CachedInfo().State.Consumers
		}
		return n
	}
	for range 10 { // a reload
		w := watch(t, r)
		for w.Next().Type != discovery.Overridden {
		}
		w.Stop()
	}
	if n := consumers(); n != 0 {
		t.Errorf("%d consumers are left of watches that were ended", n)
	}
	for range 10 { // a connection that breaks
		w := watch(t, r)
		for w.Next().Type != discovery.Overridden {
		}
		connections, err := s.Server().Connz(nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range connections.Conns {
			if c.Name == "ours" {
				_ = s.Server().DisconnectClientByID(c.Cid) // it may have gone
			}
		}
		wantError(t, w.Broken(), discovery.ErrBroken)
	}
	if n := consumers(); n == 0 || n > 20 {
		t.Errorf("%d consumers are left of watches that broke, want those that the server has not removed yet", n)
	}
	deadline := time.Now().Add(patience)
	for consumers() > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("%d consumers are left behind", consumers())
		}
		time.Sleep(10 * time.Millisecond)
	}
}
