package picker

import (
	"cmp"
	"iter"
	"math"
	"math/bits"
	"slices"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A ring is a consistent hash over the nodes of a tier. Each node has points on
// it, as many as its weight demands; a key belongs to the node of the next point,
// and in the second place to the node that comes next. A node that joins takes
// over only what it owns from then on, and one that leaves gives away only what
// it owned.
//
// Nodes with the weights {a:3, b:3, c:4} have 48, 48 and 64 points: 16 for each 1 of
// weight, since the mean of about 4 has 64. Of 160 arcs 30, 30 and 40 percent belong
// to a, b and c, give or take what chance does. Without c its 64 arcs go to whoever
// has the next point, and no other key moves.
type ring struct {
	nodes  []*discovery.Entry // sorted by id
	counts []uint32           // of the points that each has
	step   int                // 4^step is about the weight that has pointsPerWeight points
	points []uint64           // sorted: position on the ring, and index of the node in the low half
	starts []uint32           // by the leading bits of a position, where its points begin
	shift  int
}

const (
	// pointsPerWeight is how many points a node of about the average weight has:
	// enough for the shares of equal nodes to differ by about an eighth.
	pointsPerWeight = 64
	// maxPoints bounds those of a single node.
	maxPoints = 100 * pointsPerWeight
	// maxRing bounds those of all nodes, each of which has one at least. The largest
	// fleet of equal nodes stays below it.
	maxRing = 8 << 20
	// maxWalk is how many points a lookup passes before it looks at all nodes.
	maxWalk = 1000
)

func (t *tier) hashRing() *ring {
	t.ringOnce.Do(func() { t.ring.Store(newRing(t.nodes, t.ring.Load())) })
	return t.ring.Load()
}

// newRing returns the ring of nodes that are sorted by id. It is derived from an
// earlier one, if there is any that differs little, which takes a fraction of the
// time.
func newRing(nodes []*discovery.Entry, earlier *ring) *ring {
	r := emptyRing(nodes)
	if earlier == nil || !r.derive(earlier) {
		r.build()
	}
	return r
}

// ringStep returns the step of the ring of these nodes, and how many points it has.
//
// A fleet whose weights are all large, or all small, needs another scale. It has wide
// steps, because many keys move when it changes. Whatever the weights are, the points
// of a ring are about 130 for each node at most.
func ringStep(nodes []*discovery.Entry) (step, total int) {
	sum := 0.0
	for _, e := range nodes {
		sum += e.Weight()
	}
	if mean := sum / float64(len(nodes)); mean > 0 {
		step = int(math.Round(math.Log2(mean) / 2))
	}
	for ; ; step++ {
		total = 0
		for _, e := range nodes {
			total += int(pointsOf(e.Weight(), step))
		}
		if total <= max(maxRing, len(nodes)) {
			return step, total
		}
	}
}

// pointsOf returns how many points a node of the weight has. A factor for the step
// would overflow where weights are the least that there are.
func pointsOf(weight float64, step int) uint32 {
	return uint32(max(1, min(maxPoints, math.Round(math.Ldexp(weight, -2*step)*pointsPerWeight))))
}

// ringBytes returns how much memory a ring of so many nodes and points takes.
func ringBytes(nodes, total int) int { return 4*nodes + 8*total + 4*(1<<bits.Len(uint(total))+1) }

// emptyRing returns a ring that lacks its points.
func emptyRing(nodes []*discovery.Entry) *ring {
	step, total := ringStep(nodes)
	r := &ring{nodes: nodes, counts: make([]uint32, len(nodes)), step: step}
	for i, e := range nodes {
		r.counts[i] = pointsOf(e.Weight(), step)
	}
	r.points = make([]uint64, 0, total)
	width := bits.Len(uint(total))
	r.shift = 32 - width
	r.starts = make([]uint32, 1<<width+1)
	return r
}

// positions yields where a node's points are, which depends on nothing but its id.
func positions(e *discovery.Entry, count uint32) iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		seed := Hash(e.Node.ID)
		for i := range uint64(count) {
			if !yield(mix(seed+i*odd) >> 32) {
				return
			}
		}
	}
}

func (r *ring) build() {
	// Positions are as good as random: sorting them by their leading bits leaves
	// next to nothing to do.
	for i, e := range r.nodes {
		for position := range positions(e, r.counts[i]) {
			r.starts[position>>r.shift+1]++
		}
	}
	for i := 1; i < len(r.starts); i++ {
		r.starts[i] += r.starts[i-1]
	}
	r.points = r.points[:cap(r.points)]
	next := slices.Clone(r.starts)
	for i, e := range r.nodes {
		for position := range positions(e, r.counts[i]) {
			b := position >> r.shift
			r.points[next[b]] = position<<32 | uint64(i)
			next[b]++
		}
	}
	for i := range len(r.starts) - 1 {
		if bucket := r.points[r.starts[i]:r.starts[i+1]]; len(bucket) > 1 {
			slices.Sort(bucket)
		}
	}
}

// derive takes over what the rings have in common. It reports false, and has done
// nothing, where that is too little.
func (r *ring) derive(earlier *ring) bool {
	if earlier.step != r.step {
		return false
	}
	const gone = math.MaxUint32
	moved := slices.Repeat([]uint32{gone}, len(earlier.nodes)) // from the earlier index to ours
	var joined []int                                           // or with another weight
	i := 0
	for j, e := range r.nodes {
		for i < len(moved) && earlier.nodes[i].Node.ID < e.Node.ID {
			i++
		}
		if i < len(moved) && earlier.nodes[i].Node.ID == e.Node.ID && earlier.counts[i] == r.counts[j] {
			moved[i] = uint32(j)
		} else if joined = append(joined, j); len(joined) > len(r.nodes)/8 {
			return false
		}
	}
	if len(joined) == 0 && len(moved) == len(r.nodes) {
		r.points, r.starts = earlier.points, earlier.starts
		return true
	}
	var fresh []uint64
	for _, j := range joined {
		for position := range positions(r.nodes[j], r.counts[j]) {
			fresh = append(fresh, position<<32|uint64(j))
		}
	}
	slices.Sort(fresh)
	for _, p := range earlier.points {
		j := moved[uint32(p)]
		if j == gone {
			continue
		}
		// The order of two nodes is the same in both.
		p = p&^math.MaxUint32 | uint64(j)
		for len(fresh) > 0 && fresh[0] < p {
			r.points, fresh = append(r.points, fresh[0]), fresh[1:]
		}
		r.points = append(r.points, p)
	}
	r.points = append(r.points, fresh...)
	for i, p := range r.points {
		r.starts[p>>32>>r.shift+1] = uint32(i) + 1
	}
	for i := 1; i < len(r.starts); i++ {
		r.starts[i] = max(r.starts[i], r.starts[i-1]) // nothing begins with these bits
	}
	return true
}

// find returns the index of the first point at or after the key's position.
func (r *ring) find(key uint64) int {
	position := key >> 32
	i := int(r.starts[position>>r.shift])
	for i < len(r.points) && r.points[i]>>32 < position {
		i++
	}
	return i
}

// owners appends the first n owners of the key that can serve, in the order of
// the ring; fewer if there are not so many.
func (t *tier) owners(key uint64, n int, a *attempt, into []*discovery.Entry) []*discovery.Entry {
	r := t.hashRing()
	n = min(n, len(t.nodes))
	fits := func(e *discovery.Entry) bool {
		if slices.Contains(into, e) || !a.canServe(e) {
			return false
		}
		// A new node takes over its keys one by one, and keeps those it has.
		share := a.builder.Share(e)
		return share >= 1 || unit(mix(key^Hash(e.Node.ID))) < share
	}
	i := r.find(key)
	for left := min(len(r.points), maxWalk); left > 0 && len(into) < n; left-- {
		if i == len(r.points) {
			i = 0
		}
		if e := t.nodes[uint32(r.points[i])]; fits(e) {
			into = append(into, e)
		}
		i++
	}
	if len(into) == n {
		return into
	}
	// Hardly any node can serve. Which of them owns the key then is another
	// question, with an answer that is as stable.
	rest := slices.DeleteFunc(slices.Concat(t.nodes, t.reserve), func(e *discovery.Entry) bool {
		return !a.canServe(e) || slices.Contains(into, e)
	})
	slices.SortFunc(rest, func(x, y *discovery.Entry) int {
		return cmp.Compare(mix(key^Hash(y.Node.ID)), mix(key^Hash(x.Node.ID)))
	})
	return append(into, rest[:min(len(rest), n-len(into))]...)
}
