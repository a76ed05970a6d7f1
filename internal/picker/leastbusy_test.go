package picker

import (
	"fmt"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
)

// busyBuilder returns a builder by requests in flight, which the test sets.
func busyBuilder() (*Builder, map[string]int) {
	b, flying := newBuilder(), make(map[string]int)
	b.Strategy = LeastBusy(1)
	b.InFlight = func(e *discovery.Entry) int { return flying[e.Node.ID] }
	return b, flying
}

func TestTheLeastBusyIsFound(t *testing.T) {
	b, flying := busyBuilder()
	p := b.Build(snapshotOf(t, plain(maxLook)...), &Query{})
	for i := range maxLook {
		flying[fmt.Sprintf("n%05d", i)] = 5 + i%3
	}
	flying["n00123"] = 2
	for range 50 {
		if got := pick(p, nil, "")[0]; got != "n00123" {
			t.Fatalf("picked %s with %d requests in flight, want the one with 2", got, flying[got])
		}
	}
	var tried AddressSet
	tried.Add(node("n00123").Endpoint.Address())
	if got := pick(p, &tried, "")[0]; flying[got] != 5 {
		t.Errorf("after a failure: picked %s with %d requests in flight, want one with 5", got, flying[got])
	}
}

// TestIdleNodesComeFirst holds that a node without a request in flight is found among
// many more than are looked at.
func TestIdleNodesComeFirst(t *testing.T) {
	b, flying := busyBuilder()
	const n = 4 * maxLook
	p := b.Build(snapshotOf(t, plain(n)...), &Query{})
	for range n / 4 {
		id := pick(p, nil, "")[0]
		if flying[id] > 0 {
			t.Fatalf("%s has a request in flight while three in four nodes are idle", id)
		}
		flying[id]++
	}
}

// TestRequestsInFlightGoByWeight has requests stay: each node has as many as its weight
// demands, whether all nodes are looked at or some.
func TestRequestsInFlightGoByWeight(t *testing.T) {
	b, flying := busyBuilder()
	p := b.Build(snapshotOf(t, node("a"), node("b", "weight", "3"), node("c", "weight", "0.5"), node("d", "weight", "5.5")), &Query{})
	for range 1000 {
		flying[pick(p, nil, "")[0]]++
	}
	for id, want := range map[string]int{"a": 100, "b": 300, "c": 50, "d": 550} {
		if n := flying[id]; n < want-2 || n > want+2 {
			t.Errorf("%s has %d requests in flight, want about %d", id, n, want)
		}
	}

	var nodes []discovery.Node
	for i := range 2 * maxLook {
		nodes = append(nodes, node(fmt.Sprintf("n%05d", i), "weight", fmt.Sprint(1+i%2)))
	}
	b, flying = busyBuilder()
	p = b.Build(snapshotOf(t, nodes...), &Query{})
	for range 10 * len(nodes) * 3 / 2 {
		flying[pick(p, nil, "")[0]]++
	}
	for i, n := range nodes {
		if want := 10 * (1 + i%2); flying[n.ID] < want-3 || flying[n.ID] > want+3 {
			t.Errorf("%s has %d requests in flight, want about %d", n.ID, flying[n.ID], want)
		}
	}
}

// TestIdleNodesAreDrawnByWeight has requests that end at once.
func TestIdleNodesAreDrawnByWeight(t *testing.T) {
	b, _ := busyBuilder()
	p := b.Build(snapshotOf(t, node("a"), node("b", "weight", "3")), &Query{})
	counts, _ := runs(p, 8000)
	chancetest.Check(t, "picked", counts, map[string]float64{"a": 2000, "b": 6000})
}

// TestEqualsAreDrawnByWeight has all nodes as busy as their weights allow.
func TestEqualsAreDrawnByWeight(t *testing.T) {
	b, flying := busyBuilder()
	p := b.Build(snapshotOf(t, node("a"), node("b", "weight", "3")), &Query{})
	flying["a"], flying["b"] = 2, 6
	counts, _ := runs(p, 8000)
	chancetest.Check(t, "picked", counts, map[string]float64{"a": 2000, "b": 6000})
}
