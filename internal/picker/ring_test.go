package picker

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// TestKeysKeepTheirNodes holds that when a node joins or leaves, only the keys move
// that it takes over or gives away.
func TestKeysKeepTheirNodes(t *testing.T) {
	const fleet, keys = 100, 20_000
	b := newBuilder()
	b.Strategy = Owners(3)
	owners := func(nodes []discovery.Node) [][]string {
		p := b.Build(snapshotOf(t, nodes...), &Query{})
		all := make([][]string, keys)
		for k := range all {
			all[k] = pick(p, nil, fmt.Sprint("key-", k))
		}
		return all
	}
	nodes := plain(fleet)
	before := owners(nodes)
	share := make(map[string]int)
	for _, o := range before {
		if len(o) != 3 || o[0] == o[1] || o[1] == o[2] || o[0] == o[2] {
			t.Fatalf("a key belongs to %v, want three nodes", o)
		}
		share[o[0]]++
	}
	for id, n := range share {
		if n < keys/fleet/2 || n > keys/fleet*2 {
			t.Errorf("%s owns %d of %d keys, want about %d", id, n, keys, keys/fleet)
		}
	}

	left := nodes[50].ID
	after := owners(slices.Delete(slices.Clone(nodes), 50, 51))
	moved := 0
	for k := range after {
		if before[k][0] == left {
			moved++
			if after[k][0] != before[k][1] {
				t.Fatalf("the owners of a key were %v and are %v without the first, want the second to come first", before[k], after[k])
			}
		} else if after[k][0] != before[k][0] {
			t.Fatalf("the owners of a key were %v and are %v without %s, want the same one", before[k], after[k], left)
		}
	}
	if moved > 2*keys/fleet {
		t.Errorf("%d of %d keys moved when 1 of %d nodes left, want about %d", moved, keys, fleet, keys/fleet)
	}

	nodes[50] = node(left, "weight", "2")
	again := owners(nodes)
	moved = 0
	for k := range again {
		if again[k][0] != after[k][0] {
			moved++
			if again[k][0] != left {
				t.Fatalf("the owners of a key were %v and are %v after %s joined", after[k], again[k], left)
			}
		}
	}
	if want := 2 * keys / (fleet + 1); moved < want*2/3 || moved > want*3/2 {
		t.Errorf("a node of double weight took over %d of %d keys, want about %d", moved, keys, want)
	}

	// Without a key there is nothing to stick to.
	p, seen := b.Build(snapshotOf(t, nodes...), &Query{}), make(map[string]bool)
	for range 1000 {
		seen[pick(p, nil, "")[0]] = true
	}
	if len(seen) < fleet*9/10 {
		t.Errorf("1000 requests without a key went to %d of %d nodes", len(seen), fleet)
	}
}

// TestRingExample holds what the comment of ring tells.
func TestRingExample(t *testing.T) {
	r := newRing(weighted(t, 3, 3, 4), nil)
	if got := fmt.Sprint(r.counts, len(r.points)); got != "[48 48 64] 160" {
		t.Errorf("nodes have %s points, want 48, 48 and 64 of 160", got)
	}
}

// TestRingIsExact holds the ring against the definition.
func TestRingIsExact(t *testing.T) {
	var weights []float64
	for i := range 37 {
		weights = append(weights, float64(i%5+1))
	}
	ring := newRing(weighted(t, weights...), nil)
	if !slices.IsSorted(ring.points) {
		t.Fatal("points are out of order")
	}
	for k := range 100_000 {
		key := Hash(fmt.Sprint(k))
		i := ring.find(key)
		if i < len(ring.points) && ring.points[i]>>32 < key>>32 || i > 0 && ring.points[i-1]>>32 >= key>>32 {
			t.Fatalf("key %x is found at %d", key, i)
		}
	}
}

// TestRingIsDerived holds rings that are derived from those before them against
// rings that are built.
func TestRingIsDerived(t *testing.T) {
	const fleet = 200
	weights := make([]float64, fleet) // 0: not listed
	random := rand.New(rand.NewPCG(1, 2))
	for i := range weights {
		weights[i] = float64(random.IntN(4))
	}
	derived, last := 0, (*ring)(nil)
	for round := range 30 {
		// Nothing, a little, or too much changes.
		for range []int{0, 1, 5, fleet}[round%4] {
			weights[random.IntN(fleet)] = float64(random.IntN(4))
		}
		nodes := weighted(t, weights...)
		want, got := newRing(nodes, nil), emptyRing(nodes)
		if last == nil || !got.derive(last) {
			last = want
			continue
		}
		derived++
		if !slices.Equal(got.points, want.points) || !slices.Equal(got.starts, want.starts) || got.shift != want.shift {
			t.Fatalf("round %d: the derived ring of %d nodes is another", round, len(nodes))
		}
		last = got
	}
	if derived < 15 {
		t.Errorf("%d rings were derived, want about 22", derived)
	}
}

// BenchmarkRing is the ring of 10,000 nodes, built, and derived from the one with a
// node more.
func BenchmarkRing(b *testing.B) {
	weights := make([]float64, 10_000)
	for i := range weights {
		weights[i] = float64(1 + i%7)
	}
	nodes := weighted(b, weights...)
	earlier := newRing(nodes, nil)
	nodes = slices.Delete(slices.Clone(nodes), 5000, 5001)
	b.Run("built", func(b *testing.B) {
		for b.Loop() {
			newRing(nodes, nil)
		}
	})
	b.Run("derived", func(b *testing.B) {
		for b.Loop() {
			if !emptyRing(nodes).derive(earlier) {
				b.Fatal("the ring could not be derived")
			}
		}
	})
}
