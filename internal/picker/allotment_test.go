package picker

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// plainAllotment finds the allotment by the shortest paths through all there is, one
// node after the other, and returns for each proxy which nodes it has.
func plainAllotment(proxies []uint64, sizes []int, nodes []uint64) [][]bool {
	const none = int64(1) << 60
	P := len(proxies)
	sum := 0
	for _, s := range sizes {
		sum += s
	}
	least, more := sum/len(nodes), sum%len(nodes)
	rank := func(p, v int) int64 { return int64(mix(proxies[p]^nodes[v]) >> 24) }
	has := make([][]bool, P)
	for p := range has {
		has[p] = make([]bool, len(nodes))
	}
	got, shared := make([]int, P), make([]int, len(nodes))
	type further struct {
		rank int64
		p, v int
	}
	var furthers []further
	for v := range nodes {
		order := make([]int, P)
		for p := range order {
			order[p] = p
		}
		slices.SortFunc(order, func(a, b int) int { return cmp.Compare(rank(a, v), rank(b, v)) })
		for _, p := range order[:least] {
			has[p][v] = true
			got[p]++
			shared[v]++
		}
		if least < P {
			furthers = append(furthers, further{rank(order[least], v), order[least], v})
		}
	}
	slices.SortFunc(furthers, func(a, b further) int { return cmp.Compare(a.rank, b.rank) })
	for _, f := range furthers[:more] {
		has[f.p][f.v] = true
		got[f.p]++
		shared[f.v]++
	}
	type hop struct {
		cost int64
		v    int
	}
	for !slices.Equal(got, sizes) {
		hops := make([][]hop, P+1)
		for a := range hops {
			hops[a] = slices.Repeat([]hop{{none, 0}}, P+1)
		}
		lower := func(a, b int, cost int64, v int) {
			if cost < hops[a][b].cost {
				hops[a][b] = hop{cost, v}
			}
		}
		for v := range nodes {
			for a := range P {
				switch {
				case has[a][v]:
					for b := range P {
						if !has[b][v] {
							lower(a, b, rank(b, v)-rank(a, v), v)
						}
					}
					if more > 0 && shared[v] > least {
						lower(a, P, -rank(a, v), v)
					}
				case more > 0 && shared[v] == least:
					lower(P, a, rank(a, v), v)
				}
			}
		}
		cost, from := make([]int64, P+1), make([]int, P+1)
		for p := range cost {
			cost[p], from[p] = none, -1
			if p < P && got[p] > sizes[p] {
				cost[p] = 0
			}
		}
		for again := true; again; {
			again = false
			for a := range cost {
				for b := range cost {
					if cost[a] < none && hops[a][b].cost < none && cost[a]+hops[a][b].cost < cost[b] {
						cost[b], from[b], again = cost[a]+hops[a][b].cost, a, true
					}
				}
			}
		}
		target := -1
		for p := range P {
			if got[p] < sizes[p] && (target < 0 || cost[p] < cost[target]) {
				target = p
			}
		}
		for b := target; from[b] >= 0; b = from[b] {
			a := from[b]
			v := hops[a][b].v
			if a < P {
				has[a][v] = false
				got[a]--
				shared[v]--
			}
			if b < P {
				has[b][v] = true
				got[b]++
				shared[v]++
			}
		}
	}
	return has
}

// TestAllotmentIsExact holds the allotment against one that is found by plain shortest
// paths, for groups of one size and of mixed ones, with prices from scratch and from
// anywhere.
func TestAllotmentIsExact(t *testing.T) {
	for seed := range uint64(60) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(seed, 1))
			proxies, nodes := make([]uint64, 1+r.IntN(12)), make([]uint64, 1+r.IntN(120))
			if seed%5 == 0 {
				proxies, nodes = make([]uint64, 20+r.IntN(20)), nodes[:1+len(nodes)/10]
			}
			for i := range proxies {
				proxies[i] = r.Uint64()
			}
			for i := range nodes {
				nodes[i] = r.Uint64()
			}
			sizes := make([]int, len(proxies))
			one := 1 + r.IntN(len(nodes))
			for p := range sizes {
				sizes[p] = max(one, (len(nodes)+len(proxies)-1)/len(proxies))
				if seed%3 == 0 {
					sizes[p] = max(sizes[p], 1+r.IntN(len(nodes)))
				}
			}
			if slices.Min(sizes) == len(nodes) {
				return // everybody has everything
			}
			want := plainAllotment(proxies, sizes, nodes)
			for p := range proxies {
				prices := make([]int64, len(proxies))
				if seed%2 == 0 {
					for i := range prices {
						prices[i] = r.Int64N(1<<39) - 1<<38
					}
				}
				got := newAllotment(proxies, sizes, nodes, prices).of(p)
				if len(got) != sizes[p] {
					t.Fatalf("proxy %d has %d nodes, want %d", p, len(got), sizes[p])
				}
				for _, v := range got {
					if !want[p][v] {
						t.Fatalf("%d proxies of %v, %d nodes: proxy %d has node %d", len(proxies), sizes, len(nodes), p, v)
					}
				}
			}
		})
	}
}
