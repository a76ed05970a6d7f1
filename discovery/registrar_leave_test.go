package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestRegistrarLeaves(t *testing.T) {
	for _, drain := range []*time.Duration{nil, new(time.Duration(0)), new(100 * time.Millisecond), new(10 * time.Second)} {
		wait := discovery.DefaultDrain
		if drain != nil {
			wait = *drain
		}
		for _, test := range []struct {
			name  string
			fail  func(m *discoverytest.Memory)
			err   error
			atAll time.Duration // beyond the drain
		}{
			{"reachable", func(*discoverytest.Memory) {}, nil, 0},
			{"broken", (*discoverytest.Memory).Break, discovery.ErrUnreachable, time.Second},
			{"silent", func(m *discoverytest.Memory) { m.Silence(true) }, context.DeadlineExceeded, time.Second},
			{"silent for a while", func(m *discoverytest.Memory) {
				m.Silence(true)
				time.Sleep(time.Minute)
			}, context.DeadlineExceeded, time.Second},
		} {
			t.Run(fmt.Sprint(test.name, " drain ", wait), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := discoverytest.NewMemory()
					a := &recorder{Registry: m.Open()}
					r := register(t, a, newNode("a"), discovery.RegistrarOptions{Drain: drain})
					test.fail(m)
					synctest.Wait()
					a.taken()
					start := time.Now()
					err := r.leave()
					took := time.Since(start)
					if !errors.Is(err, test.err) {
						t.Errorf("Run returned %v, want %v", err, test.err)
					}
					if took < wait || took > wait+test.atAll {
						t.Errorf("leaving took %v, want %v and at most %v more", took, wait, test.atAll)
					}
					if test.err != nil {
						return
					}
					calls := a.taken()
					if wait > 0 {
						if len(calls) != 2 || calls[0].node.State() != discovery.StateDraining || calls[0].at != start {
							t.Fatalf("calls %+v", calls)
						}
						calls = calls[1:]
					}
					if len(calls) != 1 || !calls[0].withdraw || calls[0].at.Sub(start) != wait || m.Record("a") != nil {
						t.Errorf("calls %+v", calls)
					}
				})
			})
		}
	}
}

// The context may have ended before anything was done.
func TestRegistrarEndedBefore(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			m := discoverytest.NewMemory()
			a := &recorder{Registry: m.Open()}
			r, err := discovery.NewRegistrar(a, newNode("a"), discovery.RegistrarOptions{})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			start := time.Now()
			if err := r.Run(ctx); err != nil || time.Since(start) != 0 {
				t.Errorf("Run took %v, %v", time.Since(start), err)
			}
			for _, c := range a.taken() {
				if !c.withdraw {
					t.Errorf("announced after the end: %+v", c)
				}
			}
		})
	}
}

// Another process took the id over, as when a container is replaced. Its record
// is left alone: neither is it deleted, nor does the old process say goodbye in
// its name.
func TestRegistrarTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{})
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{})
		successor := newNode("a", discovery.KeyInstance, "successor")
		write(m, successor)
		synctest.Wait()
		snapshot := d.Snapshot()
		start := time.Now()
		if err := r.leave(); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took != discovery.DefaultDrain {
			t.Errorf("leaving took %v; requests under way have a right to the drain", took)
		}
		if n := record(t, m, "a"); n == nil || n.Instance() != "successor" {
			t.Errorf("the record is %+v", n)
		}
		if d.Snapshot() != snapshot {
			t.Errorf("the successor was disturbed: %+v", d.Snapshot().Node("a"))
		}
	})
}

// The answer to the first announcement is still on its way when the process ends:
// the record may stand, and drains like any other. Where it does not, nobody waits.
func TestRegistrarLeavesBeforeAnswer(t *testing.T) {
	for _, arrives := range []bool{true, false} {
		t.Run(fmt.Sprint("it arrived: ", arrives), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := discoverytest.NewMemory()
				a := &recorder{Registry: &unanswered{Registry: m.Open(), arrives: arrives}}
				r := register(t, a, newNode("a"), discovery.RegistrarOptions{})
				start, want := time.Now(), time.Duration(0)
				if arrives {
					want = discovery.DefaultDrain
				}
				if err := r.leave(); err != nil || time.Since(start) != want {
					t.Errorf("leaving took %v, want %v: %v", time.Since(start), want, err)
				}
				calls := a.taken()
				if len(calls) != 3 || calls[1].node.State() != discovery.StateDraining || !calls[2].withdraw {
					t.Errorf("calls %+v, want that it is announced, drains, and goes", calls)
				}
				if m.Record("a") != nil {
					t.Error("still listed")
				}
			})
		})
	}
}

// unanswered is a registry whose answers to announcements never arrive.
type unanswered struct {
	discovery.Registry
	arrives bool
}

func (u *unanswered) Announce(ctx context.Context, n discovery.Node) error {
	if u.arrives {
		_ = u.Registry.Announce(ctx, n)
	}
	<-ctx.Done()
	return ctx.Err()
}

// TestRegistrarLeavesWhenIdle has nodes that are busy for some time.
func TestRegistrarLeavesWhenIdle(t *testing.T) {
	for _, test := range []struct {
		name             string
		busy, drain      time.Duration
		fail             func(m *discoverytest.Memory)
		least, atTheMost time.Duration
	}{
		{"idle", 0, time.Minute, nil, discovery.DefaultDrain, discovery.DefaultDrain},
		{"busy for a while", 10 * time.Second, time.Minute, nil, 10 * time.Second, 10*time.Second + 300*time.Millisecond},
		{"busy for ever", time.Hour, time.Minute, nil, time.Minute, time.Minute},
		{"a short drain", 0, time.Second, nil, time.Second, time.Second},
		{"idle, the registry is silent", 0, time.Minute, func(m *discoverytest.Memory) { m.Silence(true) }, discovery.DefaultDrain, discovery.DefaultDrain + time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := discoverytest.NewMemory()
				a := &recorder{Registry: m.Open()}
				start := time.Now()
				r := register(t, a, newNode("a"), discovery.RegistrarOptions{
					Drain: &test.drain, Busy: func() bool { return time.Since(start) < test.busy },
				})
				if test.fail != nil {
					test.fail(m)
				}
				synctest.Wait()
				a.taken()
				start = time.Now()
				err := r.leave()
				took := time.Since(start)
				if took < test.least || took > test.atTheMost {
					t.Errorf("leaving took %v, want %v to %v", took, test.least, test.atTheMost)
				}
				if test.fail != nil {
					if err == nil {
						t.Error("it left a registry that is silent")
					}
					return
				}
				calls := a.taken()
				if err != nil || len(calls) < 2 || !calls[len(calls)-1].withdraw || calls[0].node.State() != discovery.StateDraining || calls[0].at != start {
					t.Errorf("%v, calls %+v, want it announced as draining at once, and then withdrawn", err, calls)
				}
			})
		})
	}
}

// TestRegistrarStaysListedWhileItDrains has drains that take longer than a lease.
func TestRegistrarStaysListedWhileItDrains(t *testing.T) {
	for _, busy := range []func() bool{nil, func() bool { return true }} {
		synctest.Test(t, func(t *testing.T) {
			m := discoverytest.NewMemory()
			a := &recorder{Registry: m.Open()}
			drain := 10 * time.Minute
			r := register(t, a, newNode("a"), discovery.RegistrarOptions{Drain: &drain, Busy: busy, Heartbeat: 10 * time.Second, TTL: 30 * time.Second})
			synctest.Wait()
			a.taken()
			start := time.Now()
			if err := r.leave(); err != nil {
				t.Error(err)
			}
			if took := time.Since(start); took != drain {
				t.Errorf("leaving took %v, want %v", took, drain)
			}
			calls := a.taken()
			last := start
			for _, c := range calls[:len(calls)-1] {
				if c.node.State() != discovery.StateDraining || c.at.Sub(last) > 10*time.Second {
					t.Fatalf("the record was renewed after %v as %s, want it as draining, every 10s", c.at.Sub(last), c.node.State())
				}
				last = c.at
			}
			if left := drain - last.Sub(start); left > 10*time.Second {
				t.Errorf("the record was renewed last %v before the end", left)
			}
		})
	}
}
