package picker

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

func BenchmarkAllotment(b *testing.B) {
	for _, c := range []struct{ proxies, nodes, n int }{{8, 200, 25}, {10, 1000, 100}, {10, 10000, 1000}, {100, 10000, 100}, {100, 10000, 120}, {100, 10000, 250}, {100, 10000, 1000}, {256, 10000, 100}, {256, 100000, 400}} {
		b.Run(fmt.Sprintf("proxies=%d/nodes=%d/subset=%d", c.proxies, c.nodes, c.n), func(b *testing.B) {
			r := rand.New(rand.NewPCG(1, 1))
			ps, vs, sizes := make([]uint64, c.proxies), make([]uint64, c.nodes), make([]int, c.proxies)
			for i := range ps {
				ps[i], sizes[i] = r.Uint64(), c.n
			}
			for i := range vs {
				vs[i] = r.Uint64()
			}
			prices := make([]int64, len(ps))
			b.Run("new", func(b *testing.B) {
				for b.Loop() {
					prices = make([]int64, len(ps))
					newAllotment(ps, sizes, vs, prices).of(0)
				}
			})
			b.Run("next", func(b *testing.B) {
				for b.Loop() {
					vs[r.IntN(len(vs))] = r.Uint64()
					newAllotment(ps, sizes, vs, prices).of(0)
				}
			})
		})
	}
}
