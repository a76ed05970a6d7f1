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

func TestHeartbeatPublishesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		n := newNode("a")
		write(m, n)
		d := follow(t, m.Open(), discovery.Options{})
		snapshot := d.Snapshot()
		e := snapshot.Node("a")
		for i := range 100 {
			time.Sleep(10 * time.Second)
			n.Load = float64(i)
			write(m, n)
			synctest.Wait()
			if d.Snapshot() != snapshot {
				t.Fatal("a heartbeat published a snapshot")
			}
			if e.Load() != n.Load || time.Since(e.LastHeard()) != 0 || time.Until(e.LeaseEnd()) != discovery.DefaultTTL {
				t.Fatalf("after heartbeat %d: load %v, heard %v ago, lease ends in %v", i, e.Load(), time.Since(e.LastHeard()), time.Until(e.LeaseEnd()))
			}
		}
	})
}

func TestHeartbeatWithoutRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 0, newNode("a"))
		s.sync(discovery.Listing{Partial: true})
		synctest.Wait()
		snapshot := d.Snapshot()
		time.Sleep(20 * time.Second)
		s.emit(discovery.Event{Type: discovery.Beat, ID: "a", Load: 0.5})
		s.emit(discovery.Event{Type: discovery.Beat, ID: "stranger", Load: 0.5})
		synctest.Wait()
		e := snapshot.Node("a")
		if d.Snapshot() != snapshot || e.Load() != 0.5 || time.Since(e.LastHeard()) != 0 {
			t.Errorf("after a beat: load %v, heard %v ago", e.Load(), time.Since(e.LastHeard()))
		}
		// A load that is none would draw all traffic to its node for ever.
		s.emit(discovery.Event{Type: discovery.Beat, ID: "a", Load: -1})
		synctest.Wait()
		if e.Load() != 0.5 {
			t.Errorf("load %v was believed", e.Load())
		}
		lapsesAt(t, d, "a", time.Now().Add(discovery.DefaultTTL))
	})
}

func TestNodeLapsesWithItsLease(t *testing.T) {
	for _, test := range []struct {
		name  string
		ttl   time.Duration
		pairs []string
		lease time.Duration
	}{
		{"default", 0, nil, discovery.DefaultTTL},
		{"ttl of the directory", 7 * time.Second, nil, 7 * time.Second},
		{"lease of the record", 7 * time.Second, []string{discovery.KeyLease, "90s"}, 90 * time.Second},
		{"lease that is none", 7 * time.Second, []string{discovery.KeyLease, "soon"}, 7 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := discoverytest.NewMemory()
				d := follow(t, m.Open(), discovery.Options{TTL: test.ttl})
				write(m, newNode("a", test.pairs...))
				expect(t, d, "a", "joined")
				time.Sleep(test.lease / 2)
				write(m, newNode("a", test.pairs...))
				lapsesAt(t, d, "a", time.Now().Add(test.lease))
				write(m, newNode("a", test.pairs...))
				expect(t, d, "a", "heard again")
			})
		})
	}
}

func TestNodesLapseInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{})
		start := time.Now()
		for _, lease := range []string{"9s", "3s", "7s", "1s", "5s"} {
			write(m, newNode("n"+lease, discovery.KeyLease, lease))
		}
		for _, lease := range []int{1, 3, 5, 7, 9} {
			lapsesAt(t, d, fmt.Sprintf("n%ds", lease), start.Add(time.Duration(lease)*time.Second))
		}
	})
}

// The queue is only brought in order when its head is due; a lease that an
// update changes must count all the same.
func TestLeaseChangedByUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{})
		write(m, newNode("a", discovery.KeyLease, "1h"), newNode("b", discovery.KeyLease, "2s"))
		time.Sleep(time.Second)
		write(m, newNode("a", discovery.KeyLease, "2s"), newNode("b", discovery.KeyLease, "1h"))
		changed := time.Now()
		lapsesAt(t, d, "a", changed.Add(2*time.Second))
		lapsesAt(t, d, "b", changed.Add(time.Hour))
	})
}

func TestRecordExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"))
		d := follow(t, m.Open(), discovery.Options{})
		m.Expire("a")
		expect(t, d, "b", "expired")
	})
}

// What was emitted before a verification succeeded is heard before anybody is
// removed.
func TestVerificationIsHeardAfterEvents(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			w := newScriptedVerifier()
			var s *stream
			w.answer(func(context.Context) error {
				// The heartbeat was late, and it is what the verification finds.
				s.put("", 0, newNode("a"))
				return nil
			})
			d := follow(t, w, discovery.Options{})
			s = <-w.streams
			s.put("", 0, newNode("a"))
			s.sync(discovery.Listing{})
			synctest.Wait()
			snapshot := d.Snapshot()
			time.Sleep(10 * discovery.DefaultTTL)
			synctest.Wait()
			if d.Snapshot() != snapshot {
				t.Fatal("a node lapsed that had been heard")
			}
		})
	}
}

// A lease that ran out while the verification was under way was not what it was
// asked about.
func TestVerificationProvesWhenItBegan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScriptedVerifier()
		asked := 0
		w.answer(func(context.Context) error {
			asked++
			time.Sleep(500 * time.Millisecond)
			return nil
		})
		d := follow(t, w, discovery.Options{})
		start := time.Now()
		s := <-w.streams
		s.put("", 0, newNode("a", discovery.KeyLease, "10s"))
		s.put("", 0, newNode("b", discovery.KeyLease, "10300ms"))
		s.sync(discovery.Listing{})
		lapsesAt(t, d, "a", start.Add(10500*time.Millisecond))
		lapsesAt(t, d, "b", start.Add(11000*time.Millisecond))
		if asked != 2 {
			t.Errorf("asked %d times, want 2", asked)
		}
	})
}

// A verification may outlive the watch that it asked about.
func TestVerificationOfAnotherWatch(t *testing.T) {
	for _, answered := range []error{nil, errors.New("no answer")} {
		t.Run(fmt.Sprint(answered), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newScriptedVerifier()
				answer := make(chan error)
				w.answer(func(context.Context) error { return <-answer })
				d := follow(t, w, discovery.Options{})
				s := <-w.streams
				s.put("", 1, newNode("a"))
				s.sync(discovery.Listing{})
				time.Sleep(discovery.DefaultTTL)
				synctest.Wait()
				s.end <- discovery.ErrBroken
				s = <-w.streams
				s.put("", 1, newNode("a"))
				s.sync(discovery.Listing{})
				synctest.Wait()
				back := time.Now()
				answer <- answered
				expect(t, d, "a", "the answer came too late")
				if status := d.Status(); !status.Connected || status.Restarts != 1 {
					t.Errorf("status %+v", status)
				}
				w.answer(func(context.Context) error { return nil })
				lapsesAt(t, d, "a", back.Add(discovery.DefaultTTL))
			})
		})
	}
}
