package discovery_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestJoinUpdateLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		conn := m.Open()
		write(m, newNode("a"))
		d := follow(t, conn, discovery.Options{})
		expect(t, d, "a", "listed")
		write(m, newNode("b"))
		expect(t, d, "a b", "joined")
		before := d.Snapshot()
		write(m, newNode("a", discovery.KeyService, "pay", discovery.KeyState, "draining"))
		expect(t, d, "a b", "updated")
		if e := d.Snapshot().Node("a"); e.Node.Service() != "pay" || e.State() != discovery.StateDraining {
			t.Errorf("a is %+v", e.Node)
		}
		if len(d.Snapshot().Service("pay")) != 1 || len(d.Snapshot().Service("orders")) != 1 || len(before.Service("orders")) != 2 {
			t.Error("the services do not agree")
		}
		if err := conn.Withdraw(context.Background(), newNode("a")); err != nil {
			t.Fatal(err)
		}
		expect(t, d, "b", "left")
	})
}

func TestRemovalOfAnotherKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("a", 1, newNode("a"))
		s.sync(discovery.Listing{})
		s.put("node.a", 2, newNode("a")) // the same node, of a newer writer
		for _, marker := range []discovery.EventType{discovery.Left, discovery.Expired} {
			s.emit(discovery.Event{Type: marker, ID: "a", Key: "a", Revision: 3})
			s.emit(discovery.Event{Type: marker, ID: "a", Revision: 3})
			expect(t, d, "a", fmt.Sprint(marker, " of another key"))
		}
		s.emit(discovery.Event{Type: discovery.Rejected, ID: "a", Key: "a", Err: discovery.ErrInvalid})
		expect(t, d, "a", "rejected under another key")
		s.emit(discovery.Event{Type: discovery.Left, ID: "a", Key: "node.a", Revision: 4})
		expect(t, d, "", "left")
	})
}

// A goodbye of one instance does not concern the record of another, though a watch
// that has begun anew does not know it yet.
func TestLeftOfAnotherInstance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 0, newNode("a", discovery.KeyInstance, "2"))
		s.sync(discovery.Listing{})
		for _, test := range []struct {
			instance string
			stays    bool
		}{{"1", true}, {"2", false}, {"", false}} {
			s.put("", 0, newNode("a", discovery.KeyInstance, "2"))
			s.emit(discovery.Event{Type: discovery.Left, ID: "a", Instance: test.instance})
			time.Sleep(coalesced)
			synctest.Wait()
			if stays := d.Snapshot().Node("a") != nil; stays != test.stays {
				t.Errorf("after the goodbye of %q instance 2 stays: %v", test.instance, stays)
			}
		}
	})
}
