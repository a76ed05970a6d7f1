package natslink_test

import (
	"context"
	"errors"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestNobodyThere(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	s.Stop()
	_, err := open(t, natslink.Config{URLs: []string{s.URLWith(url.UserPassword("u", secret))}}).Get(t.Context())
	wantError(t, err, discovery.ErrUnreachable, s.Addr(), "connection refused")
}

func TestFirstServerDead(t *testing.T) {
	t.Parallel()
	dead, live := natstest.Start(t), natstest.Start(t)
	dead.Stop()
	conn := open(t, natslink.Config{URLs: []string{dead.URL(), live.URL()}})
	if got := mustGet(t, conn).Address(); got != live.URL() {
		t.Errorf("connected to %s, want %s", got, live.URL())
	}
}

// A refusal says more than silence, whichever server comes last.
func TestRefusedByOneAndDeadOther(t *testing.T) {
	t.Parallel()
	dead, live := natstest.Start(t), natstest.Start(t, natstest.Token(secret))
	dead.Stop()
	for _, urls := range [][]string{{dead.URL(), live.URL()}, {live.URL(), dead.URL()}} {
		_, err := open(t, natslink.Config{URLs: urls}).Get(t.Context())
		wantError(t, err, discovery.ErrCredentials, dead.Addr(), live.Addr(), "connection refused")
	}
}

func TestOneConnectionForAll(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	conn := open(t, natslink.Config{URLs: []string{s.URL()}})
	links := make([]*natslink.Link, 20)
	var group sync.WaitGroup
	for i := range links {
		group.Go(func() { links[i], _ = conn.Get(t.Context()) })
	}
	group.Wait()
	for _, link := range links {
		if link == nil || link != links[0] {
			t.Fatal("two calls of Get returned different connections")
		}
	}
	if n := s.NumClients(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

func TestLostAndDialledAnew(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	conn := open(t, natslink.Config{URLs: []string{s.URL()}})
	link := mustGet(t, conn)
	guarded, cancel := link.Guard(t.Context(), func(natslink.Operation, string) bool { return false })
	defer cancel()
	if err := link.Err(); err != nil {
		t.Errorf("Err of a connection that stands = %v", err)
	}

	s.Stop()
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrUnreachable, s.Addr())
	await(t, "the end of the guarded context", guarded.Done())
	wantError(t, context.Cause(guarded), discovery.ErrUnreachable, s.Addr())
	late, cancel := link.Guard(t.Context(), func(natslink.Operation, string) bool { return false })
	defer cancel()
	wantError(t, context.Cause(late), discovery.ErrUnreachable)
	_, err := conn.Get(t.Context())
	wantError(t, err, discovery.ErrUnreachable)

	s.Restart()
	if next := mustGet(t, conn); next == link {
		t.Error("Get returned the connection that was lost")
	}
}

func TestDiscoveredServers(t *testing.T) {
	t.Parallel()
	one := natstest.Start(t, natstest.NoJetStream(), natstest.Cluster("one"))
	two := natstest.Start(t, natstest.NoJetStream(), natstest.Cluster("two", one))
	conn := open(t, natslink.Config{URLs: []string{one.URL()}})
	link := mustGet(t, conn)
	deadline := time.Now().Add(patience)
	for len(link.DiscoveredServers()) == 0 {
		if time.Now().After(deadline) {
			t.Fatal("the cluster has not told of its second server")
		}
		if err := link.Flush(); err != nil { // a round trip
			t.Fatal(err)
		}
	}
	one.Stop()
	await(t, "the loss of the connection", link.Lost())
	for {
		// The address is remembered by a callback, a moment after the client
		// has it.
		next, err := conn.Get(t.Context())
		if err == nil {
			if got := next.Address(); got != two.URL() {
				t.Errorf("connected to %s, want %s", got, two.URL())
			}
			if got := conn.Located(); !slices.Contains(got, two.Addr()) {
				t.Errorf("located at %q, want %s among them", got, two.Addr())
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func TestGetEndsWithContext(t *testing.T) {
	t.Parallel()
	address, accepted := silent(t)
	conn := open(t, natslink.Config{URLs: []string{"nats://" + address}})
	ctx, cancel := context.WithCancel(t.Context())
	results := make(chan error)
	for range 2 { // one dials, the other waits for its turn
		go func() {
			_, err := conn.Get(ctx)
			results <- err
		}()
	}
	await(t, "the dialling", accepted)
	cancel()
	for range 2 {
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Errorf("Get returned %v, want the context's error", err)
		}
	}
	expired, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	if _, err := conn.Get(expired); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Get returned %v, want the context's error", err)
	}
}

func TestCloseEndsGet(t *testing.T) {
	t.Parallel()
	address, accepted := silent(t)
	conn := open(t, natslink.Config{URLs: []string{"nats://" + address}})
	results := make(chan error)
	for range 2 {
		go func() {
			_, err := conn.Get(t.Context())
			results <- err
		}()
	}
	await(t, "the dialling", accepted)
	conn.Close()
	for range 2 {
		wantError(t, <-results, discovery.ErrUnreachable, "closed")
	}
	_, err := conn.Get(t.Context())
	wantError(t, err, discovery.ErrUnreachable, "closed")
	if err := conn.Close(); err != nil {
		t.Errorf("the second Close: %v", err)
	}
}
