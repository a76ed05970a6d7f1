package discovery_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// A drain outlives the restart of a proxy whose registry is away, and counts from
// the first moment on; what was decided meanwhile counts when the registry is back.
func TestOverrideOutlivesRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := warmFile(t)
		nodes := fleet(3)
		n := newNetwork(nodes...)
		m := discoverytest.NewMemory()
		write(m, nodes...)
		setOverride(t, m.Open(), drained, "n0")
		setOverride(t, m.Open(), discovery.Override{State: discovery.StateMaintenance, Until: time.Now().Add(time.Minute)}, "n1")
		setOverride(t, m.Open(), drained, "not-listed")
		options := discovery.Options{WarmStart: file, Probe: n.probe}
		once(t, m.Open(), options, func(d *discovery.Directory) {
			expectStates(t, d, "n0:draining n1:maintenance n2", "listed")
		})
		m.Break()
		restart := func(when, want string, then func(d *discovery.Directory)) {
			t.Helper()
			once(t, m.Open(), options, func(d *discovery.Directory) {
				d.Restore()
				for s := d.Snapshot(); len(s.Nodes()) < 3; s = d.Snapshot() {
					if e := s.Node("n0"); e != nil && e.Serves() {
						t.Error("a drained node serves")
					}
					<-s.Superseded()
				}
				expectStates(t, d, want, when)
				then(d)
			})
		}
		// Twice: the second one starts from what one left that never saw the registry.
		restart("restarted", "n0:draining n1:maintenance n2:restored", func(*discovery.Directory) {})
		restart("restarted again", "n0:draining n1:maintenance n2:restored", func(d *discovery.Directory) {
			time.Sleep(2 * time.Minute)
			expectStates(t, d, "n0:draining n1:restored n2:restored", "one of the decisions has ended")
			m.Restore()
			reconnect(t, d)
			write(m, nodes...)
			time.Sleep(coalesced)
			expectStates(t, d, "n0:draining n1 n2", "the registry is back")
			if err := m.Open().(discovery.Overrider).ClearOverride(context.Background(), "n0"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(coalesced)
			expectStates(t, d, "n0 n1 n2", "undrained")
		})
		// What was taken back while nobody ran is not remembered.
		setOverride(t, m.Open(), drained, "n0")
		once(t, m.Open(), options, func(*discovery.Directory) { time.Sleep(coalesced) })
		if err := m.Open().(discovery.Overrider).ClearOverride(context.Background(), "n0"); err != nil {
			t.Fatal(err)
		}
		d := follow(t, m.Open(), options)
		time.Sleep(coalesced)
		expectStates(t, d, "n0 n1 n2", "undrained before the start")
	})
}

// Overrides count as known for as long as a watch goes on that would have told of others.
func TestOverridesStayKnownWhileWatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(1)
		options := discovery.Options{WarmStart: warmFile(t), Probe: newNetwork(nodes...).probe}
		m := discoverytest.NewMemory()
		write(m, nodes...)
		setOverride(t, m.Open(), drained, "n0")
		once(t, m.Open(), options, func(*discovery.Directory) {
			for range 30 * 60 * 3 {
				write(m, nodes...)
				time.Sleep(20 * time.Second)
			}
		})
		m.Break()
		d := follow(t, m.Open(), options)
		d.Restore()
		time.Sleep(time.Second)
		expectStates(t, d, "n0:draining", "restarted after thirty hours")
	})
}

// Who may not read the overrides any more goes by those that it knew, for a day
// over restarts.
func TestOverridesThatCannotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := warmFile(t)
		listed := func(overridden bool, do func(d *discovery.Directory)) {
			w := newScripted()
			once(t, w, discovery.Options{WarmStart: file}, func(d *discovery.Directory) {
				s := <-w.streams
				if overridden {
					s.emit(discovery.Event{Type: discovery.Overridden, Overrides: map[string]discovery.Override{"a": drained}})
				}
				s.put("", 1, newNode("a"))
				s.sync(discovery.Listing{})
				synctest.Wait()
				do(d)
			})
		}
		listed(true, func(d *discovery.Directory) { expectStates(t, d, "a:draining", "decided") })
		for hour := range 23 {
			time.Sleep(time.Hour)
			listed(false, func(d *discovery.Directory) { expectStates(t, d, "a:draining", fmt.Sprint(hour+1, " hours later")) })
		}
		time.Sleep(2 * time.Hour)
		listed(false, func(d *discovery.Directory) { expectStates(t, d, "a", "more than a day later") })
	})
}

// The file holds the overrides beside the nodes, also of nodes that are not listed.
func TestOverridesAreInTheSavedList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := warmFile(t)
		m := discoverytest.NewMemory()
		nodes := fleet(1)
		write(m, nodes...)
		once(t, m.Open(), discovery.Options{WarmStart: file}, func(*discovery.Directory) {})
		data, err := os.ReadFile(file.Path)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.SplitAfter(string(data), "\n")
		if len(lines) != 4 { // a header, a node, the checksum, and what follows its end
			t.Fatalf("%d lines: %s", len(lines), data)
		}
		setOverride(t, m.Open(), drained, "n0", "n1")
		once(t, m.Open(), discovery.Options{WarmStart: file}, func(*discovery.Directory) {})
		if data, err = os.ReadFile(file.Path); err != nil || strings.Count(string(data), "draining") != 2 {
			t.Errorf("the overrides are not kept: %s, %v", data, err)
		}
	})
}
