package picker

import (
	"math"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A rotation gives n nodes their turns, in rounds of n turns, by one counter.
//
// Where all weigh alike each has one turn in a round. Otherwise the nodes lie one after
// the other on a line of the length n, each with a part in proportion to its weight.
// The turns of a round are n points that lie 1 apart, so that a node has as many turns
// as its part is long, rounded down or up. They come in an order that leads far away
// with each step, for a heavy node's turns to lie apart; and each round has its points a
// little further along, so that over the rounds nothing of a part is lost.
//
// Nodes of the weights 3 and 1 lie at 0 to 1.5 and 1.5 to 2. The points of the rounds
// are 0 and 1, 0.5 and 1.5, 0.25 and 1.25, 0.75 and 1.75: a a, a b, a a, a b.
type rotation struct {
	nodes  []*discovery.Entry // sorted by id
	weight float64            // of all of them
	taken  atomic.Uint64      // turns

	ends   []float64 // where the part of each node ends; nil: all weigh alike
	begins []uint32  // by whole numbers, which node's part that is in
	step   uint64    // from one point of a round to the next, along the line

	// Where the turns are shared with those of other rotations:
	merger *merger
	mu     sync.Mutex
	back   []Turn // those that were taken, and put back
}

// rotationBytes is what a node takes in a rotation.
const rotationBytes = 8 + 4

func (t *tier) turns(b *Builder) *rotation {
	t.rotationOnce.Do(func() { t.rotation.Store(newRotation(t.nodes, t.rotation.Load(), b.Random)) })
	return t.rotation.Load()
}

// newRotation returns the rotation of nodes that are sorted by id. It goes on where an
// earlier one is; without one it begins anywhere, for many proxies that start at once
// not to begin with the same node.
func newRotation(nodes []*discovery.Entry, earlier *rotation, random func() uint64) *rotation {
	r := &rotation{nodes: nodes, weight: weigh(nodes), merger: new(merger)}
	if earlier == nil {
		r.taken.Store(random() >> 24)
	} else {
		r.merger = earlier.merger
		taken, m := earlier.goesOn(), uint64(len(earlier.nodes))
		next := earlier.nodes[taken%m].Node.ID
		i, _ := slices.BinarySearchFunc(nodes, next, func(e *discovery.Entry, id string) int { return strings.Compare(e.Node.ID, id) })
		r.taken.Store(taken/m*uint64(len(nodes)) + uint64(i))
	}
	if weight := nodes[0].Weight(); !slices.ContainsFunc(nodes, func(e *discovery.Entry) bool { return e.Weight() != weight }) {
		return r
	}
	r.lay()
	return r
}

// goesOn returns how many turns were taken and not put back.
func (r *rotation) goesOn() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.taken.Load() - min(r.taken.Load(), uint64(len(r.back)))
}

// lay lays the nodes out by their weights.
func (r *rotation) lay() {
	n, sum := len(r.nodes), r.weight
	r.ends, r.begins = make([]float64, n), make([]uint32, 1, n+1)
	end := 0.0
	for i, e := range r.nodes {
		end += e.Weight() / sum * float64(n)
		r.ends[i] = end
		for len(r.begins) < n && float64(len(r.begins)) < end {
			r.begins = append(r.begins, uint32(i))
		}
	}
	for len(r.begins) <= n { // the last, and what rounding has left
		r.begins = append(r.begins, uint32(n-1))
	}
	// Steps of the golden section lie the furthest apart. A step that shares no divisor
	// with n comes to all points.
	r.step = max(1, uint64(math.Round(float64(n)/math.Phi)))
	for gcd(r.step, uint64(n)) != 1 {
		r.step++
	}
}

func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// take returns the index of the node whose turn it is.
func (r *rotation) take() int {
	n := uint64(len(r.nodes))
	k := r.taken.Add(1) - 1
	point := k % n
	if r.ends == nil {
		return int(point)
	}
	point = point * r.step % n
	// The numbers of rounds with their bits reversed halve what is widest each time.
	at := float64(point) + unit(bits.Reverse64(k/n))
	low, high := int(r.begins[point]), int(r.begins[point+1])
	for low < high {
		if middle := (low + high) / 2; r.ends[middle] > at {
			high = middle
		} else {
			low = middle + 1
		}
	}
	return low
}
