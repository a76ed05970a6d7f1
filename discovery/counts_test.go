package discovery

import (
	"math/rand/v2"
	"testing"
)

// Whatever is counted in which order, the sums are those of what stands.
func TestCounts(t *testing.T) {
	c := newCounts()
	nodes := make([]counted, 50)
	services := []string{"", "orders", "billing"}
	random := rand.New(rand.NewPCG(1, 2))
	for range 10_000 {
		is := counted{}
		if random.IntN(3) > 0 {
			is = counted{services[random.IntN(3)], count{nodes: 1, suspects: random.IntN(2)}}
		}
		c.update(&nodes[random.IntN(len(nodes))], is)
		var all count
		by := make(map[string]count)
		for _, n := range nodes {
			all.nodes += n.nodes
			all.suspects += n.suspects
			if n.nodes > 0 {
				s := by[n.service]
				by[n.service] = count{nodes: s.nodes + 1, suspects: s.suspects + n.suspects}
			}
		}
		if c.all != all || len(c.services) != len(by) {
			t.Fatalf("%+v, want %+v of %d services", c, all, len(by))
		}
		for _, s := range services {
			if c.of(s) != by[s] {
				t.Fatalf("%q: %+v, want %+v", s, c.of(s), by[s])
			}
		}
	}
}
