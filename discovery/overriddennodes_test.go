package discovery_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// setOverride sets the overrides of nodes.
func setOverride(t *testing.T, r discovery.Registry, o discovery.Override, ids ...string) {
	t.Helper()
	for _, id := range ids {
		if err := r.(discovery.Overrider).SetOverride(context.Background(), id, o); err != nil {
			t.Fatal(err)
		}
	}
}

var drained = discovery.Override{State: discovery.StateDraining}

// What an operator decided holds on whichever way a node comes into use.
func TestOverrideHoldsWhenNodesComeBack(t *testing.T) {
	for name, comeBack := range map[string]func(t *testing.T, m *discoverytest.Memory, nodes []discovery.Node, n *network) *discovery.Directory{
		"decided while it was lapsed, and taken back by the loss guard": func(t *testing.T, m *discoverytest.Memory, nodes []discovery.Node, n *network) *discovery.Directory {
			d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
			time.Sleep(time.Second)
			write(m, nodes[1:]...)
			time.Sleep(29*time.Second + coalesced)
			expectStates(t, d, "n1 n2 n3", "the first one has lapsed")
			setOverride(t, m.Open(), drained, "n0")
			return d
		},
		"a first listing that is mostly overdue": func(t *testing.T, m *discoverytest.Memory, _ []discovery.Node, n *network) *discovery.Directory {
			setOverride(t, m.Open(), drained, "n0")
			time.Sleep(time.Minute)
			return follow(t, m.Open(), discovery.Options{Probe: n.probe})
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := fleet(4)
				m := discoverytest.NewMemory()
				write(m, nodes...)
				d := comeBack(t, m, nodes, newNetwork(nodes...))
				time.Sleep(2 * time.Second)
				expectStates(t, d, "n0:draining n1:held n2:held n3:held", "all accept connections")
				setOverride(t, m.Open(), discovery.Override{}, "n0")
				time.Sleep(coalesced)
				expectStates(t, d, "n0:held n1:held n2:held n3:held", "undrained")
			})
		})
	}
}

// What operators say replaces what records say, for as long as it holds.
func TestOverridesChangeNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		conn := m.Open()
		set := func(id string, o discovery.Override) {
			t.Helper()
			setOverride(t, conn, o, id)
		}
		set("a", discovery.Override{State: discovery.StateDraining})
		write(m, newNode("a"), newNode("b", discovery.KeyWeight, "4"), newNode("c", discovery.KeyState, "maintenance"))
		d := follow(t, conn, discovery.Options{TTL: time.Hour})
		want := func(when, id string, state discovery.State, weight float64) {
			t.Helper()
			time.Sleep(time.Second) // what the rate of snapshots allows
			synctest.Wait()
			e := d.Snapshot().Node(id)
			if e == nil || e.State() != state || e.Weight() != weight {
				t.Fatalf("%s: %s is %+v, want it %s with weight %v", when, id, e, state, weight)
			}
		}
		want("an override from before", "a", discovery.StateDraining, 1)
		set("b", discovery.Override{Weight: new(0.25)})
		want("a weight", "b", discovery.StateUp, 1)
		write(m, newNode("b", discovery.KeyWeight, "8"))
		want("another record", "b", discovery.StateUp, 2)
		set("c", discovery.Override{State: discovery.StateUp, Until: time.Now().Add(90 * time.Second)})
		want("the operator against the record", "c", discovery.StateUp, 1)
		set("late", discovery.Override{State: discovery.StateMaintenance})
		write(m, newNode("late"))
		want("an override before its node", "late", discovery.StateMaintenance, 1)
		if err := conn.(discovery.Overrider).ClearOverride(context.Background(), "a"); err != nil {
			t.Fatal(err)
		}
		want("cleared", "a", discovery.StateUp, 1)
		m.Wipe()
		write(m, newNode("b", discovery.KeyWeight, "8"))
		want("the registry was wiped", "b", discovery.StateUp, 2)
		time.Sleep(100 * time.Second)
		want("its time is over", "c", discovery.StateMaintenance, 1)
		if got := d.Snapshot().Node("c").Override(); !got.IsZero() {
			t.Errorf("the override that has ended is still there: %v", got)
		}
	})
}
