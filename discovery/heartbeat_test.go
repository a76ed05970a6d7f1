package discovery_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A heartbeat that names no endpoint brings a node back that has lapsed, by the
// record that it was known by last, unless the registry said something else since.
func TestHeartbeatBringsBack(t *testing.T) {
	for _, test := range []struct {
		name string
		say  func(s *stream)
		back string
	}{
		{"nothing since", nil, "a"},
		{"a decision of the operator", func(s *stream) {
			s.emit(discovery.Event{Type: discovery.Overridden, Overrides: map[string]discovery.Override{"a": drained}})
		}, "a:draining"},
		{"it said goodbye", func(s *stream) { s.emit(discovery.Event{Type: discovery.Left, ID: "a"}) }, ""},
		{"its address is that of another service now", func(s *stream) {
			s.put("", 0, newNode("b", discovery.KeyService, "pay", discovery.KeyLease, "24h"))
		}, "b"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newScripted()
				d := follow(t, w, discovery.Options{TTL: 2 * time.Second})
				s := <-w.streams
				s.sync(discovery.Listing{Partial: true})
				s.put("", 0, newNode("a"))
				expect(t, d, "a", "it joined")
				time.Sleep(3500 * time.Millisecond)
				expect(t, d, "", "silent for longer than its lease")
				if test.say != nil {
					test.say(s)
				}
				began := time.Now()
				s.emit(discovery.Event{Type: discovery.Beat, ID: "a", Load: 0.5})
				time.Sleep(coalesced)
				expectStates(t, d, test.back, "it is heard again")
				e := d.Snapshot().Node("a")
				if e == nil {
					return
				}
				if e.Load() != 0.5 || e.LastHeard().Before(began) || e.Joined().Before(began) {
					t.Errorf("it is back with load %v, heard at %v, joined at %v", e.Load(), e.LastHeard(), e.Joined())
				}
				for range 10 {
					time.Sleep(time.Second)
					s.emit(discovery.Event{Type: discovery.Beat, ID: "a"})
				}
				expectStates(t, d, test.back, "it goes on heartbeating")
				time.Sleep(3 * time.Second)
				expect(t, d, "", "and stops again")
			})
		})
	}
}

// A registry that keeps nothing lists after a restart only who answers. Nodes that
// were listed before are used while they accept connections and until a lease has
// passed in which they were not heard; a heartbeat is enough to stay, or to come
// back.
func TestRestartOnRegistryThatKeepsNothing(t *testing.T) {
	for _, asked := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			file := warmFile(t)
			nodes := fleet(5)
			n := newNetwork(nodes[:3]...)
			o := discovery.Options{TTL: 2 * time.Second, WarmStart: file, Probe: n.probe}
			w := newScripted()
			once(t, w, o, func(d *discovery.Directory) {
				s := <-w.streams
				s.sync(discovery.Listing{Partial: true})
				for _, node := range nodes {
					s.put("", 0, node)
				}
				expect(t, d, "n0 n1 n2 n3 n4", "they joined")
			})
			w = newScripted()
			d := follow(t, w, o)
			s := <-w.streams
			if asked {
				d.Restore()
				time.Sleep(coalesced)
				expectStates(t, d, "n0:restored n1:restored n2:restored", "before the listing")
			}
			s.put("", 0, nodes[0]) // it answers
			s.sync(discovery.Listing{Partial: true})
			time.Sleep(coalesced)
			expectStates(t, d, "n0 n1:restored n2:restored", "those that accept connections")
			beat := func() {
				for _, id := range []string{"n0", "n1", "n3"} {
					s.emit(discovery.Event{Type: discovery.Beat, ID: id})
				}
			}
			beat()
			time.Sleep(coalesced)
			expectStates(t, d, "n0 n1 n2:restored n3", "heard")
			for range 5 {
				time.Sleep(time.Second)
				beat()
			}
			expectStates(t, d, "n0 n1 n3", "a lease later")
		})
	}
}
