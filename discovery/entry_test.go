package discovery_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		conn := m.Open()
		write(m, newNode("first"))
		d := follow(t, conn, discovery.Options{TTL: time.Hour})
		joined := func(id string) time.Time {
			t.Helper()
			time.Sleep(time.Second)
			synctest.Wait()
			return d.Snapshot().Node(id).Joined()
		}
		if at := joined("first"); !at.IsZero() {
			t.Errorf("a node of the first listing counts as new since %v", at)
		}
		began := time.Now()
		write(m, newNode("second"))
		if at := joined("second"); at.Before(began) || time.Since(at) > time.Minute {
			t.Errorf("a node that joined counts as new since %v, want from %v", at, began)
		}
		before := joined("second")
		write(m, newNode("second", discovery.KeyVersion, "2"))
		if at := joined("second"); at != before {
			t.Errorf("an update made the node new again")
		}
		for what, n := range map[string]discovery.Node{
			"another process":    newNode("second", discovery.KeyInstance, "x"),
			"back from draining": newNode("second", discovery.KeyInstance, "x", discovery.KeyWeight, "2"),
		} {
			write(m, newNode("second", discovery.KeyState, "draining"))
			before = joined("second")
			write(m, n)
			if at := joined("second"); !at.After(before) {
				t.Errorf("%s: it counts as new since %v, want from later on", what, at)
			}
		}
		before = joined("second")
		m.Wipe()
		write(m, newNode("third"))
		if at := joined("second"); at != before {
			t.Errorf("a node that joined before the registry was wiped counts as new since %v, want from %v", at, before)
		}
		if at := joined("third"); !at.IsZero() {
			t.Errorf("a node that is first heard after the registry was wiped counts as new since %v", at)
		}
		time.Sleep(2 * time.Hour)
		write(m, newNode("fourth"))
		if at := joined("fourth"); at.IsZero() {
			t.Error("a node that joined long after the registry was wiped does not count as new")
		}
	})
}

// A registry that does not keep what it lists tells of nodes that were there before.
func TestJoinedOnRegistryThatKeepsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.sync(discovery.Listing{Partial: true})
		s.put("", 0, newNode("heard"))
		time.Sleep(discovery.DefaultTTL)
		s.put("", 0, newNode("joins"))
		expect(t, d, "joins", "a lease later")
		if at := d.Snapshot().Node("joins").Joined(); at.IsZero() {
			t.Error("a node that joined when all had been heard does not count as new")
		}
		s.put("", 0, newNode("heard"))
		s.end <- discovery.ErrBroken
		s = <-w.streams
		s.sync(discovery.Listing{Partial: true})
		s.put("", 0, newNode("other"))
		time.Sleep(coalesced)
		synctest.Wait()
		if at := d.Snapshot().Node("other").Joined(); !at.IsZero() {
			t.Errorf("a node that is first heard after an outage counts as new since %v", at)
		}
	})
}

func TestAttached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"))
		d := follow(t, m.Open(), discovery.Options{})
		type mine struct{ n atomic.Int64 }
		type theirs struct{ n atomic.Int64 }
		attached := func() (*mine, *theirs) {
			e := d.Snapshot().Node("a")
			return discovery.Attached[mine](e), discovery.Attached[theirs](e)
		}
		a, b := attached()
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				a, b := attached()
				a.n.Add(1)
				b.n.Add(2)
			})
		}
		group.Wait()
		if a.n.Load() != 8 || b.n.Load() != 16 {
			t.Errorf("two users meet, or lose what they attached: %d, %d", a.n.Load(), b.n.Load())
		}
		write(m, newNode("a", discovery.KeyZone, "eu"))
		expect(t, d, "a", "updated")
		if c, d := attached(); c != a || d != b {
			t.Error("an update of the record lost what was attached")
		}
	})
}
