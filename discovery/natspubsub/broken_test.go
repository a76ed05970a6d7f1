package natspubsub_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestOneConnection(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	announce(t, r, node(t, "a"))
	before := s.Server().NumSubscriptions()
	w := watch(t, r)
	w.Listing()
	if err := r.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	withdraw(t, r, node(t, "a"))
	w.Want(discovery.Left, "a")
	if n := s.NumClients(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
	w.Cancel()
	if err := w.Broken(); !errors.Is(err, context.Canceled) {
		t.Errorf("the watch ended with %v", err)
	}
	announce(t, r, node(t, "b")) // and so the server has done what the watch asked last
	if n := s.Server().NumSubscriptions(); n != before {
		t.Errorf("the watch left %d subscriptions behind", n-before)
	}
}

func TestServerRestart(t *testing.T) {
	t.Parallel()
	s := start(t)
	r, other := open(t, config(s)), open(t, config(s))
	w := watch(t, r)
	w.Listing()
	announce(t, r, node(t, "ours"))
	w.Want(discovery.Put, "ours")
	announce(t, other, node(t, "theirs"))
	w.Want(discovery.Put, "theirs")
	s.Stop()
	wantError(t, w.Broken(), discovery.ErrBroken, "catga.nodes")
	wantError(t, watch(t, r).Broken(), discovery.ErrUnreachable, s.Addr())
	wantError(t, r.Announce(t.Context(), node(t, "ours")), discovery.ErrUnreachable)
	s.Restart()
	// The new connection answers for what was announced on the old one. Others
	// are back when they announce.
	w = watch(t, r)
	listed, _ := w.Listing()
	if len(listed) != 1 || listed[0].ID != "ours" {
		t.Errorf("listed %v", listed)
	}
	said := listen(t, s.Conn(), "catga.nodes.*")
	for _, r := range []*natspubsub.Registry{r, other} {
		announce(t, r, node(t, "x"))
		w.Want(discovery.Put, "x")
		if m := next(t, said); m.Subject != "catga.nodes.join" {
			t.Errorf("the first word on a new connection is %s", m.Subject)
		}
	}
	seen := puts(t, watch(t, open(t, config(s))), 4) // x twice
	for _, id := range []string{"ours", "theirs", "x"} {
		if _, found := seen[id]; !found {
			t.Errorf("listed %v, want %s too", seen, id)
		}
	}
}

// A server that takes away the right to listen ends the subscriptions, and leaves
// the connection as it is.
func TestRightToListenRevoked(t *testing.T) {
	t.Parallel()
	users := func(permissions string) string {
		return "authorization { users: [{user: u, password: " + secret + ", permissions: " + permissions + "}] }"
	}
	p := natstest.StartProcess(t, users("{}"))
	r := open(t, natspubsub.Config{
		URLs: []string{p.URL()}, Conn: natsconn.Options{User: "u", Password: secret}, Listen: 2 * patience,
	})
	w := watch(t, r)
	w.Listing()
	announce(t, r, node(t, "a"))
	w.Want(discovery.Put, "a")
	p.Reload(users(`{subscribe: {deny: "catga.nodes.>"}}`))
	err := w.Broken()
	wantError(t, err, discovery.ErrBroken)
	wantError(t, watch(t, r).Broken(), discovery.ErrPermission)
	p.Reload(users("{}"))
	deadline := time.Now().Add(patience)
	for {
		// The next watch begins on a connection that has the right again.
		if err := r.Announce(t.Context(), node(t, "a")); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	w = watch(t, r)
	w.Listing()
	announce(t, r, node(t, "b"))
	w.Want(discovery.Put, "b")
}

func TestCloseEndsWatch(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	announce(t, r, node(t, "a"))
	w := watch(t, r)
	w.Listing()
	for range 2 {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	wantError(t, w.Broken(), discovery.ErrBroken, "closed")
	wantError(t, r.Announce(t.Context(), node(t, "a")), discovery.ErrUnreachable, "closed")
}

func TestWatchEndsWithContextBeforeItBegins(t *testing.T) {
	t.Parallel()
	s := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := open(t, config(s)).Watch(ctx, func(discovery.Event) { t.Error("an event") })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Watch returned %v", err)
	}
	if n := s.NumClients(); n != 0 {
		t.Errorf("%d connections for nothing", n)
	}
}

// A connection that dies without a word ends the watch, is not verified, and is
// not waited for for ever.
func TestSilence(t *testing.T) {
	t.Parallel()
	s := start(t)
	proxy := natstest.NewProxy(t, s.Addr())
	r := open(t, natspubsub.Config{URLs: []string{"nats+pubsub://" + proxy.Addr()}})
	w := watch(t, r)
	w.Listing()
	proxy.Freeze()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	wantError(t, r.Verify(ctx), discovery.ErrUnreachable, proxy.Addr())
	// Whoever tries to announce finds out what Verify cannot.
	wantError(t, r.Announce(t.Context(), node(t, "a")), discovery.ErrUnreachable, proxy.Addr())
	wantError(t, w.Broken(), discovery.ErrBroken, proxy.Addr())
	wantError(t, watch(t, r).Broken(), discovery.ErrUnreachable, proxy.Addr())
	proxy.Thaw()
	announce(t, r, node(t, "a"))
	watch(t, r).Want(discovery.Put, "a")
}
