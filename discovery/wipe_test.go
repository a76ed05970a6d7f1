package discovery_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestWipedRegistryKeepsNodesForALease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"))
		d := follow(t, m.Open(), discovery.Options{})
		time.Sleep(20 * time.Second)
		m.Wipe()
		reconnect(t, d)
		expect(t, d, "a b", "wiped")
		lapsesUnlessHeard(t, d, m)
	})
}

// A registry that fails over to an empty replica tends to break more than once.
// Each further listing lacks what the first one lacked, which proves no more.
func TestWipedAndBrokenAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"))
		d := follow(t, m.Open(), discovery.Options{})
		time.Sleep(20 * time.Second)
		m.Wipe()
		reconnect(t, d)
		for range 3 {
			time.Sleep(time.Second)
			m.Break()
			m.Restore()
			synctest.Wait()
			reconnect(t, d)
			expect(t, d, "a b", "broken again")
		}
		back := d.Status().Since
		write(m, newNode("a"))
		lapsesAt(t, d, "b", back.Add(discovery.DefaultTTL))
		// A node that was heard since is known to be listed: its absence counts.
		write(m, newNode("a"))
		synctest.Wait()
		m.Break()
		m.Drop("a")
		m.Restore()
		synctest.Wait()
		reconnect(t, d)
		expect(t, d, "", "dropped")
	})
}

// A registry that was restored to an older state lists where nodes were then. A
// record that is overdue by the registry's own clock makes no node that was heard
// since move there.
func TestOlderStateMovesNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		now, then := newNode("a", "zone", "now"), newNode("a", "zone", "then")
		zone := func(want string) {
			t.Helper()
			synctest.Wait()
			n := d.Snapshot().Node("a")
			if n == nil || n.Node.Metadata["zone"] != want {
				t.Fatalf("a is %+v, want it in zone %q", n, want)
			}
		}
		s := <-w.streams
		s.put("", 8, now)
		s.sync(discovery.Listing{Epoch: "e", Revision: 8})
		zone("now")
		s.end <- discovery.ErrBroken
		s = <-w.streams
		s.emit(discovery.Event{Type: discovery.Put, ID: "a", Node: then, Revision: 3, Age: time.Hour})
		s.sync(discovery.Listing{Epoch: "e", Revision: 3})
		zone("now")
		// It has a lease to be heard, and then moves to where it says.
		back := d.Status().Since
		time.Sleep(10 * time.Second)
		s.put("", 4, then)
		zone("then")
		lapsesAt(t, d, "a", back.Add(10*time.Second+discovery.DefaultTTL))
	})
}

func TestRevisionWentBackwards(t *testing.T) {
	for _, test := range []struct {
		name  string
		then  discovery.Listing
		stays bool
	}{
		{"it went on", discovery.Listing{Epoch: "e", Revision: 12}, false},
		{"nothing happened", discovery.Listing{Epoch: "e", Revision: 11}, false},
		{"it went backwards", discovery.Listing{Epoch: "e", Revision: 10}, true},
		{"another epoch", discovery.Listing{Epoch: "f", Revision: 12}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newScripted()
				d := follow(t, w, discovery.Options{})
				s := <-w.streams
				s.put("", 3, newNode("a"))
				s.sync(discovery.Listing{Epoch: "e", Revision: 7})
				s.put("", 11, newNode("b"))
				synctest.Wait()
				if r := d.Status().Revision; r != 11 {
					t.Errorf("revision %d, want 11", r)
				}
				s.end <- discovery.ErrBroken
				s = <-w.streams
				s.put("", 11, newNode("b"))
				s.sync(test.then)
				want := "b"
				if test.stays {
					want = "a b"
				}
				expect(t, d, want, "listed again")
				if r := d.Status().Revision; r != max(test.then.Revision, 11) {
					t.Errorf("revision %d after the listing", r)
				}
			})
		})
	}
}

// A revision that a listing claims is not taken back by an older event that was
// under way.
func TestRevisionOfListingHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 90, newNode("a"))
		s.sync(discovery.Listing{Epoch: "e", Revision: 100})
		s.put("", 95, newNode("b"))
		expect(t, d, "a b", "listed")
		if r := d.Status().Revision; r != 100 {
			t.Errorf("revision %d, want 100", r)
		}
	})
}
