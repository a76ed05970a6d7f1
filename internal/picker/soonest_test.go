package picker

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
)

// costly returns a builder by costs, which the test sets; what has none costs 10 ms.
func costly() (*Builder, map[string]float64) {
	b, costs := newBuilder(), make(map[string]float64)
	b.Strategy = Soonest(1)
	b.Cost = func(e *discovery.Entry, _ time.Duration) (float64, int) {
		if cost, ok := costs[e.Node.ID]; ok {
			return cost, 0
		}
		return 0.010, 0
	}
	return b, costs
}

// TestSlowNodesGetNothing has one of few nodes be slow, and two in ten of many.
func TestSlowNodesGetNothing(t *testing.T) {
	for n, slow := range map[int]int{2: 1, 4: 3, 5: 3, 100: 20} {
		b, costs := costly()
		nodes := plain(n)
		for _, slow := range nodes[:slow] {
			costs[slow.ID] = 0.2
		}
		p := b.Build(snapshotOf(t, nodes...), &Query{})
		const picks = 2000
		got := 0
		for range picks {
			if costs[pick(p, nil, "")[0]] > 0 {
				got++
			}
		}
		// All four that are drawn are slow for one in 809.
		if most := map[int]int{100: 12}[n]; got > most {
			t.Errorf("%d of %d nodes are slow: they got %d of %d requests, want at most %d", slow, n, got, picks, most)
		}
	}
}

// TestEquallyQuickNodesGetSharesByWeight has few nodes and many.
func TestEquallyQuickNodesGetSharesByWeight(t *testing.T) {
	for _, n := range []int{2, 5, 12} {
		b, _ := costly()
		var nodes []discovery.Node
		expected := make(map[string]float64)
		const picks = 9000
		for i := range n {
			weight := 1 + i%2*2
			nodes = append(nodes, node(fmt.Sprintf("n%05d", i), "weight", fmt.Sprint(weight)))
			expected[nodes[i].ID] = picks * float64(weight) / float64(n+2*(n/2))
		}
		p := b.Build(snapshotOf(t, nodes...), &Query{})
		counts, _ := runs(p, picks)
		chancetest.Check(t, fmt.Sprint(n, " nodes"), counts, expected)
	}
}

// TestSoonestPassesOverWhoCannotServe has nodes that failed a request, and a reserve.
func TestSoonestPassesOverWhoCannotServe(t *testing.T) {
	b, costs := costly()
	nodes := plain(4)
	costs[nodes[0].ID] = 0.001
	p := b.Build(snapshotOf(t, nodes...), &Query{})
	var tried AddressSet
	for i := range nodes {
		got := pick(p, &tried, "")[0]
		if i == 0 && got != nodes[0].ID {
			t.Errorf("picked %s, want the quickest first", got)
		}
		at := slices.IndexFunc(nodes, func(n discovery.Node) bool { return n.ID == got })
		if tried.hasNode(p.tiers[0].nodes[at]) {
			t.Errorf("attempt %d: picked %s, where the request has failed", i, got)
		}
		tried.Add(nodes[at].Endpoint.Address())
	}

	b.Subset, b.ProxyID = 2, "proxy"
	p = b.Build(snapshotOf(t, nodes...), &Query{})
	tried = AddressSet{}
	for _, e := range p.tiers[0].nodes {
		tried.Add(e.Node.Endpoint.Address())
	}
	if got := p.Pick(&tried, Choice{Strategy: b.Strategy}, nil); len(got) != 1 || !slices.Contains(p.tiers[0].reserve, got[0]) {
		t.Errorf("picked %v, want one of the reserve", ids(got))
	}
}
