package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestOutageSuspendsLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b", discovery.KeyLease, "1s"))
		d := follow(t, m.Open(), discovery.Options{})
		heard := d.Snapshot().Node("a").LastHeard()
		time.Sleep(500 * time.Millisecond)
		snapshot := d.Snapshot()
		m.Break()
		for range 10 {
			time.Sleep(time.Hour)
			synctest.Wait()
			if d.Snapshot() != snapshot {
				t.Fatal("the view changed while the registry was away")
			}
		}
		m.Restore()
		reconnect(t, d)
		back := d.Status().Since
		expect(t, d, "a b", "back")
		if got := d.Snapshot().Node("a").LastHeard(); !got.Before(back.Add(-time.Hour)) {
			t.Errorf("that an old record is listed counts as hearing the node: %v after the first time", got.Sub(heard))
		}
		lapsesAt(t, d, "b", back.Add(time.Second))
		lapsesAt(t, d, "a", back.Add(discovery.DefaultTTL))
	})
}

func TestAbsentAfterOutage(t *testing.T) {
	for _, test := range []struct {
		name   string
		away   time.Duration
		change func(m *discoverytest.Memory)
		stays  bool
	}{
		// Before the outage, the nodes have not been heard for 8 seconds.
		{"long enough for the lease to run out", 23 * time.Second, func(*discoverytest.Memory) {}, true},
		{"long enough for the record to run out", 3 * time.Second, func(m *discoverytest.Memory) { m.Expiry = 10 * time.Second }, true},
		{"short", time.Second, func(*discoverytest.Memory) {}, false},
		{"longer than the lease", 40 * time.Second, func(*discoverytest.Memory) {}, true},
		{"longer than the registry keeps records", 12 * time.Second, func(m *discoverytest.Memory) { m.Expiry = 10 * time.Second }, true},
		{"shorter than the registry keeps records", 5 * time.Second, func(m *discoverytest.Memory) { m.Expiry = 20 * time.Second }, false},
		{"partial listing", time.Second, func(m *discoverytest.Memory) { m.Partial = true }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := discoverytest.NewMemory()
				test.change(m)
				write(m, newNode("gone"), newNode("returns"), newNode("stays"))
				d := follow(t, m.Open(), discovery.Options{})
				expect(t, d, "gone returns stays", "listed")
				time.Sleep(8 * time.Second)
				m.Break()
				m.Drop("gone")
				m.Drop("returns")
				time.Sleep(test.away)
				m.Restore()
				reconnect(t, d)
				if !test.stays {
					expect(t, d, "stays", "back")
					return
				}
				expect(t, d, "gone returns stays", "back")
				back := d.Status().Since
				time.Sleep(20 * time.Second)
				write(m, newNode("returns"), newNode("stays"))
				lapsesAt(t, d, "gone", back.Add(discovery.DefaultTTL))
				expect(t, d, "returns stays", "a lease later")
			})
		})
	}
}

// A registry that says nothing is not one whose nodes are dead.
func TestSilentRegistryLosesNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"), newNode("dropped"))
		d := follow(t, m.Open(), discovery.Options{})
		m.Silence(true)
		m.Drop("dropped")
		time.Sleep(time.Hour)
		expect(t, d, "a b dropped", "silent for an hour")
		if status := d.Status(); status.Connected || status.Restarts != 1 || !errors.Is(status.LastError, discovery.ErrUnreachable) {
			t.Errorf("status %+v", status)
		}
		m.Silence(false)
		reconnect(t, d)
		expect(t, d, "a b dropped", "back")
		lapsesUnlessHeard(t, d, m)
	})
}

// The silence before a dead watch is noticed counts: records may have run out in
// it that their nodes could not renew.
func TestSilenceCountsAsOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScriptedVerifier()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 1, newNode("a"))
		s.put("", 2, newNode("b", discovery.KeyLease, "40s"))
		s.sync(discovery.Listing{Expiry: 20 * time.Second, Revision: 2})
		w.answer(func(context.Context) error { return errors.New("no answer") })
		s = <-w.streams // a's lease ran out and the watch was given up
		w.answer(func(context.Context) error { return nil })
		s.sync(discovery.Listing{Expiry: 20 * time.Second, Revision: 2})
		expect(t, d, "a b", "listed after 30 seconds of silence")
		lapsesAt(t, d, "a", d.Status().Since.Add(30*time.Second))
	})
}

// The watch may end by itself while it is being given up.
func TestWatchEndsWhileGivenUp(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			w := newScriptedVerifier()
			var s *stream
			w.answer(func(context.Context) error {
				s.end <- errors.New("ended by itself")
				return errors.New("no answer")
			})
			d := follow(t, w, discovery.Options{})
			s = <-w.streams
			s.put("", 1, newNode("a"))
			s.sync(discovery.Listing{})
			time.Sleep(discovery.DefaultTTL)
			synctest.Wait()
			s = <-w.streams
			s.put("", 1, newNode("a"))
			s.sync(discovery.Listing{})
			expect(t, d, "a", "back")
			if status := d.Status(); status.Restarts != 1 || !status.Connected {
				t.Errorf("status %+v", status)
			}
			w.answer(func(context.Context) error { return nil })
			lapsesAt(t, d, "a", d.Status().Since.Add(discovery.DefaultTTL))
		})
	}
}

// What a watch still says after it was given up is not heard.
func TestWatchGivenUpIsNotHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stop := make(chan struct{})
		calls := 0
		w := newScriptedVerifier()
		w.answer(func(context.Context) error { return errors.New("no answer") })
		watcher := struct {
			watchFunc
			discovery.Verifier
		}{func(ctx context.Context, emit func(discovery.Event)) error {
			calls++
			emit(discovery.Event{Type: discovery.Put, ID: "a", Node: newNode("a")})
			emit(discovery.Event{Type: discovery.Synced})
			<-ctx.Done()
			emit(discovery.Event{Type: discovery.Left, ID: "a"})
			<-stop // a watch that is slow to end
			return ctx.Err()
		}, w}
		d := follow(t, watcher, discovery.Options{})
		time.Sleep(2 * discovery.DefaultTTL)
		expect(t, d, "a", "given up")
		if calls != 1 {
			t.Errorf("%d watches at once", calls)
		}
		close(stop)
		reconnect(t, d)
	})
}

func TestWatchIsRetriedWithinBounds(t *testing.T) {
	synced := discovery.Event{Type: discovery.Synced}
	unreachable := fmt.Errorf("%w: nobody there", discovery.ErrUnreachable)
	for _, test := range []struct {
		name  string
		watch func(n int64, ctx context.Context, emit func(discovery.Event)) error
	}{
		{"never there", func(int64, context.Context, func(discovery.Event)) error { return unreachable }},
		{"broken right after every listing", func(_ int64, _ context.Context, emit func(discovery.Event)) error {
			emit(synced)
			return discovery.ErrBroken
		}},
		{"away after it worked for a day", func(n int64, _ context.Context, emit func(discovery.Event)) error {
			if n == 1 {
				emit(synced)
				time.Sleep(24 * time.Hour)
			}
			return unreachable
		}},
		{"no reason given", func(int64, context.Context, func(discovery.Event)) error { return nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var n, last atomic.Int64
				d := follow(t, watchFunc(func(ctx context.Context, emit func(discovery.Event)) error {
					last.Store(time.Now().UnixNano())
					return test.watch(n.Add(1), ctx, emit)
				}), discovery.Options{})
				if n.Load() == 1 && d.Snapshot().Synced {
					time.Sleep(24 * time.Hour) // the watch that worked
				}
				before := n.Load()
				time.Sleep(time.Hour)
				synctest.Wait()
				if calls := n.Load() - before; calls < 600 || calls > 2500 {
					t.Errorf("%d calls of Watch in an hour", calls)
				}
				if ago := time.Since(time.Unix(0, last.Load())); ago > 5*time.Second {
					t.Errorf("the last try was %v ago", ago)
				}
				if d.Status().LastError == nil {
					t.Error("no error in the status")
				}
			})
		})
	}
}

// A watch that broke after it worked is started again soon, every time.
func TestWatchIsRetriedSoonAfterSuccess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{})
		for range 20 {
			time.Sleep(time.Minute)
			m.Break()
			m.Restore()
			synctest.Wait()
			broke := time.Now()
			reconnect(t, d)
			if took := d.Status().Since.Sub(broke); took > 100*time.Millisecond {
				t.Errorf("watched again after %v", took)
			}
		}
	})
}

func TestWatchReturnsNil(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := follow(t, watchFunc(func(_ context.Context, emit func(discovery.Event)) error {
			emit(discovery.Event{Type: discovery.Put, ID: "a", Node: newNode("a")})
			emit(discovery.Event{Type: discovery.Synced})
			return nil
		}), discovery.Options{})
		expect(t, d, "a", "listed")
		if err := d.Status().LastError; !errors.Is(err, discovery.ErrBroken) {
			t.Errorf("status has %v, want ErrBroken", err)
		}
	})
}
