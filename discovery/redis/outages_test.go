package redis

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

func TestKillAndRestart(t *testing.T) {
	t.Parallel()
	eachLayout(t, func(t *testing.T, layout string) {
		s := redistest.Start(t, redistest.Notify("K$gxz"))
		c := Config{URLs: []string{s.URL()}, Layout: layout}
		writer := openRegistry(t, c)
		announce(t, writer, newNode("leaves", discovery.KeyLease, "10s"))
		a, b := newNode("a", discovery.KeyLease, "1s"), newNode("b", discovery.KeyLease, "1s")
		keepAlive(t, writer, 100*time.Millisecond, a, b)
		d := startDirectory(t, openRegistry(t, c), discovery.Options{})
		waitUntil(t, d, "all join", count(3))
		stop := neverLose(t, d, "a", "b")
		s.Kill()
		eventually(t, "the loss is noticed", func() bool { return !d.Status().Connected })
		s.Restart()
		// Before or after the directory is back: it must not matter.
		eventually(t, "the server takes writes", func() bool { return writer.Withdraw(context.Background(), newNode("leaves")) == nil })
		announce(t, writer, newNode("joins"))
		waitUntil(t, d, "the changes appear", func(s *discovery.Snapshot) bool { return lacks("leaves")(s) && has("joins")(s) })
		stop()
	})
}

// TestConnectionsKilled: nothing that is told while a connection is being
// replaced is lost.
func TestConnectionsKilled(t *testing.T) {
	t.Parallel()
	eachLayout(t, func(t *testing.T, layout string) {
		s := redistest.Start(t, redistest.Notify("K$gxz"))
		ctx := context.Background()
		c := Config{URLs: []string{s.URL()}, Layout: layout}
		writer := openRegistry(t, c)
		c.Name = "watched"
		r := openRegistry(t, c)
		d := startDirectory(t, r, discovery.Options{})
		waitSynced(t, d)
		subscriber := func(line string) bool { return strings.Contains(line, "subscribe") }
		reader := func(line string) bool { return strings.Contains(line, "cmd=xread") }
		kill := map[string]func(line string) bool{
			"subscriber": subscriber,
			"commands":   func(line string) bool { return !subscriber(line) && !reader(line) },
		}
		want := "notifications"
		if layout == LayoutSortedSet {
			kill["reader"] = reader
			want = "stream and notifications"
		}
		if got := r.Changes(); got != want {
			t.Errorf("pushed by %q, want %q", got, want)
		}
		n := 0
		for name, match := range kill {
			restarts := d.Status().Restarts
			// A connection may be between two commands, and then look like another
			// one: once more until it was the right one.
			eventually(t, "the watch is started anew after its "+name+" was killed", func() bool {
				list, err := s.Client().ClientList(ctx).Result()
				if err != nil {
					t.Fatal(err)
				}
				for line := range strings.Lines(list) {
					id, _, _ := strings.Cut(strings.TrimPrefix(line, "id="), " ")
					if strings.Contains(line, "name=watched") && match(line) {
						_ = s.Client().ClientKillByFilter(ctx, "id", id).Err()
					}
				}
				return d.Status().Restarts > restarts
			})
			id := fmt.Sprint("n", n)
			n++
			eventually(t, "the record is taken", func() bool { return writer.Announce(ctx, newNode(id)) == nil })
			waitUntil(t, d, id+" joins after the "+name+" was killed", has(id))
			if name != "commands" {
				eventually(t, "the watch is started anew", func() bool { return d.Status().Restarts > restarts && d.Status().Connected })
			}
		}
		waitUntil(t, d, "all are there", count(n))
	})
}

// TestPauseDropsNobody pauses the server for two leases.
func TestPauseDropsNobody(t *testing.T) {
	t.Parallel()
	eachLayout(t, func(t *testing.T, layout string) {
		s := redistest.Start(t)
		c := Config{URLs: []string{s.URL()}, Layout: layout, Poll: 100 * time.Millisecond}
		a, b := newNode("a", discovery.KeyLease, "1s"), newNode("b", discovery.KeyLease, "1s")
		keepAlive(t, openRegistry(t, c), 200*time.Millisecond, a, b)
		d := startDirectory(t, openRegistry(t, c), discovery.Options{})
		waitUntil(t, d, "both join", count(2))
		stop := neverLose(t, d, "a", "b")
		if err := s.Client().ClientPause(context.Background(), 2*time.Second).Err(); err != nil {
			t.Fatal(err)
		}
		// It is answered when the pause is over.
		if err := s.Client().Set(context.Background(), "x", "y", 0).Err(); err != nil {
			t.Fatal(err)
		}
		heard := d.Snapshot().Node("a").LastHeard()
		eventually(t, "a is heard again", func() bool {
			n := d.Snapshot().Node("a")
			return n == nil || n.LastHeard().After(heard)
		})
		stop()
	})
}

// TestUserRevoked: a login that is refused says nothing about the fleet, and ends
// when the server lets us in again.
func TestUserRevoked(t *testing.T) {
	t.Parallel()
	eachLayout(t, func(t *testing.T, layout string) {
		s := redistest.Start(t, redistest.User("edge", "on >pw ~* &* +@all"))
		ctx := context.Background()
		c := Config{URLs: []string{s.URL()}, Layout: layout, Poll: 50 * time.Millisecond}
		a, b := newNode("a", discovery.KeyLease, "1s"), newNode("b", discovery.KeyLease, "1s")
		keepAlive(t, openRegistry(t, c), 100*time.Millisecond, a, b)
		c.Username, c.Password = "edge", "pw"
		r := openRegistry(t, c)
		d := startDirectory(t, r, discovery.Options{})
		waitUntil(t, d, "both join", count(2))
		stop := neverLose(t, d, "a", "b")
		for _, args := range [][]any{{"ACL", "SETUSER", "edge", "off"}, {"CLIENT", "KILL", "USER", "edge"}} {
			if err := s.Client().Do(ctx, args...).Err(); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "the loss is noticed", func() bool { return !d.Status().Connected })
		eventually(t, "an announcement is refused, and says why", func() bool {
			err := r.Announce(ctx, newNode("c"))
			if err == nil {
				t.Fatal("an announcement is taken from a user that is off")
			}
			return errors.Is(err, discovery.ErrCredentials)
		})
		// Whatever a look begins with: no answer is no empty record.
		if l, ok := r.layout.(*keysLayout); ok {
			look := &keysLook{layout: l}
			if err := look.read(ctx, []string{l.prefix + "a"}); err == nil {
				t.Error("keys were read by a user that is off")
			}
		}
		if err := s.Client().Do(ctx, "ACL", "SETUSER", "edge", "on").Err(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "an announcement is taken", func() bool { return r.Announce(ctx, newNode("c")) == nil })
		waitUntil(t, d, "c joins", has("c"))
		stop()
	})
}

// TestLoading: a server that still reads its data is away, not empty.
func TestLoading(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t, redistest.Config("key-load-delay", "150"))
	ctx := context.Background()
	pipe := s.Client().Pipeline()
	// While it loads it answers after each 1024 commands.
	for range 20_000 {
		pipe.Incr(ctx, "some-other-key")
	}
	if _, err := pipe.Exec(ctx); err != nil {
		t.Fatal(err)
	}
	r := openRegistry(t, Config{URLs: []string{s.URL()}})
	s.Stop()
	s.Launch()
	var err error
	eventually(t, "the server listens", func() bool {
		err = r.Announce(ctx, newNode("a"))
		return err == nil || !strings.Contains(err.Error(), "refused")
	})
	wantError(t, err, discovery.ErrUnreachable)
	if err != nil && !strings.Contains(err.Error(), "loading") {
		t.Errorf("error %q, want it to say that the server is loading", err)
	}
	eventually(t, "the server has loaded", func() bool { return r.Announce(ctx, newNode("a")) == nil })
}

// TestFullServerRenews: no room for another record is no reason to let those
// lapse that are there.
func TestFullServerRenews(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx := context.Background()
	r := openRegistry(t, Config{URLs: []string{s.URL()}})
	announce(t, r, newNode("a"))
	if err := s.Client().ConfigSet(ctx, "maxmemory", "1").Err(); err != nil {
		t.Fatal(err)
	}
	announce(t, r, newNode("a"), newNode("a", discovery.KeyState, "draining"))
	wantError(t, r.Announce(ctx, newNode("b")), discovery.ErrFull)
	if err := r.Withdraw(ctx, newNode("a")); err != nil {
		t.Error(err)
	}
}

// TestCallsEndWithTheirContext: the server hangs, and nobody waits for it.
func TestCallsEndWithTheirContext(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := openRegistry(t, Config{URLs: []string{s.URL()}})
	announce(t, r, newNode("a"))
	_, _, done := watchEvents(t, r)
	s.Pause()
	defer s.Resume()

	ctx, cancel := context.WithCancel(context.Background())
	called := make(chan error, 1)
	go func() { called <- r.Announce(ctx, newNode("a")) }()
	cancel()
	if err := <-called; !errors.Is(err, context.Canceled) {
		t.Errorf("Announce returned %v", err)
	}
	deadline, stop := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer stop()
	wantError(t, r.Announce(deadline, newNode("a")), context.DeadlineExceeded)
	wantError(t, r.Verify(deadline), context.DeadlineExceeded)
	// And the watch ends by itself.
	wantBroken(t, done)
	wantError(t, r.Verify(context.Background()), discovery.ErrBroken)
}

// TestClose ends what is under way.
func TestClose(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := openRegistry(t, Config{URLs: []string{s.URL()}})
	_, _, done := watchEvents(t, r)
	s.Pause()
	defer s.Resume()
	called := make(chan error, 1)
	go func() { called <- r.Announce(context.Background(), newNode("a")) }()
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if err := r.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
	wantError(t, <-called, discovery.ErrUnreachable)
	if err := <-done; err == nil {
		t.Error("the watch ended without an error")
	}
	wantError(t, r.Announce(context.Background(), newNode("a")), discovery.ErrUnreachable)
	wantError(t, r.Watch(context.Background(), func(discovery.Event) {}), discovery.ErrUnreachable)
}
