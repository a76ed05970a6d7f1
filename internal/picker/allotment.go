package picker

import (
	"math"
	"slices"
)

// An allotment shares out the nodes of a fleet among the proxies of a group. Each proxy
// gets as many nodes as its size says, and each node as many proxies as any other, or
// one more.
//
// Of all that is even in this way it is the one in which the ranks of the pairs of proxy
// and node have the least sum. A rank is random but fixed, as in rendezvous hashing, and
// so the allotment depends on who is there and on nothing else: all proxies that see the
// same find the same, in whatever order the others came. And it is stable: what changes
// when a node joins is a single chain, in which a proxy takes the node and gives another
// one to the next proxy. A chain that came to a proxy twice would have, between the two
// times, a circle that lowers the sum or raises it, whether or not the node is there;
// so it comes once, and costs each proxy one node. Arcs of one ring with equal
// lengths, the deterministic aperture of Finagle, are as even and as stable for nodes.
// But they all move when a proxy comes: its neighbours' by half.
//
// It is a transportation problem. Its dual prices say how much worse the ranks of a
// proxy count, for each node to choose the best by itself: proxies that too many nodes
// would choose are dear. Prices are first guessed, which comes to within some nodes of
// the sizes; then shortest paths (M. Klein, 1967) move single nodes until the sizes are
// exact.
type allotment struct {
	proxies []uint64 // their hashes
	sizes   []int    // how many nodes each of them gets; their sum is at least that of the nodes
	nodes   []uint64 // their hashes
	least   int      // how many proxies a node has, or one more
	more    int      // how many nodes have one more

	prices []int64 // by proxy
	last   []int64 // by node: the rank of the worst of the least proxies
	next   []int64 // and that of the best one beyond them
	limit  int64   // nodes have the latter, too, up to this
	ranks  []int64 // scratch, by proxy
	got    []int   // by proxy: how many nodes have chosen it
}

// ranks are numbers of so many bits.
const rankBits = 40

// newAllotment returns the allotment for these sizes, which are at most the number of
// nodes, with prices to begin with.
func newAllotment(proxies []uint64, sizes []int, nodes []uint64, prices []int64) *allotment {
	sum := 0
	for _, n := range sizes {
		sum += n
	}
	return &allotment{
		proxies: proxies, sizes: sizes, nodes: nodes,
		least: sum / len(nodes), more: sum % len(nodes),
		prices: prices,
		last:   make([]int64, len(nodes)), next: make([]int64, len(nodes)),
		ranks: make([]int64, len(proxies)), got: make([]int, len(proxies)),
	}
}

// rank fills in the ranks of all proxies for a node, with their prices.
func (t *allotment) rank(v int) []int64 {
	node := t.nodes[v]
	for p, h := range t.proxies {
		t.ranks[p] = int64(mix(h^node)>>(64-rankBits)) + t.prices[p]
	}
	return t.ranks
}

// choose has the nodes choose at the prices that there are, and returns by how much the
// proxies miss their sizes, all together.
func (t *allotment) choose() (missed int) {
	clear(t.got)
	scratch := make([]int64, len(t.proxies))
	for v := range t.nodes {
		ranks := t.rank(v)
		if t.least == 1 {
			t.last[v], t.next[v] = lowestTwo(ranks)
		} else {
			copy(scratch, ranks)
			t.last[v], t.next[v] = selectTwo(scratch, t.least)
		}
		for p, r := range ranks {
			if r <= t.last[v] {
				t.got[p]++
			}
		}
	}
	t.limit = math.MinInt64
	if t.more > 0 {
		t.limit, _ = selectTwo(slices.Clone(t.next), t.more)
		for v, next := range t.next {
			if next <= t.limit {
				t.got[slices.Index(t.rank(v), next)]++
			}
		}
	}
	for p, n := range t.got {
		missed += max(n-t.sizes[p], t.sizes[p]-n)
	}
	return missed
}

// approach looks for prices at which the nodes choose about what the sizes say.
func (t *allotment) approach() {
	const tries = 12
	last := math.MaxInt
	for range tries {
		missed := t.choose()
		// Nodes come and go with a price one by one, so that it gets no better than this.
		if missed <= 2*len(t.proxies) || missed > last/4*3 {
			return
		}
		last = missed
		// The ranks are spread evenly, so that a price that rises by a part of their
		// range costs its proxy that part of all nodes.
		for p, n := range t.got {
			t.prices[p] += int64(float64(n-t.sizes[p]) / float64(len(t.nodes)) * (1 << rankBits))
		}
	}
	_ = t.choose()
}

// lowestTwo returns the two lowest values.
func lowestTwo(values []int64) (first, second int64) {
	first, second = math.MaxInt64, math.MaxInt64
	for _, x := range values {
		if x < first {
			first, second = x, first
		} else if x < second {
			second = x
		}
	}
	return first, second
}

// selectTwo returns the k-th lowest value and the one that follows it, the largest
// number if there is none. It brings the values into another order.
func selectTwo(values []int64, k int) (kth, following int64) {
	low, high := 0, len(values)
	for high-low > 8 {
		pivot := max(min(values[low], values[high-1]), min(max(values[low], values[high-1]), values[(low+high)/2]))
		i, j := low, high-1
		for i <= j {
			for values[i] < pivot {
				i++
			}
			for values[j] > pivot {
				j--
			}
			if i <= j {
				values[i], values[j] = values[j], values[i]
				i, j = i+1, j-1
			}
		}
		switch {
		case k-1 <= j:
			high = j + 1
		case k-1 >= i:
			low = i
		default:
			low, high = k-1, k-1
		}
	}
	slices.Sort(values[low:high])
	kth, following = values[k-1], math.MaxInt64
	for _, x := range values[k:] {
		following = min(following, x)
	}
	return kth, following
}

// of returns the nodes of a proxy by their indices, in order.
func (t *allotment) of(proxy int) (nodes []int) {
	t.approach()
	for width := max(1, int64(firstWidth<<rankBits/len(t.nodes))); ; width *= 4 {
		if width > 1<<rankBits {
			width = math.MaxInt64
		}
		// With everything collected it can be done for any sizes.
		if x := t.collect(width, proxy); x.balance() || width == math.MaxInt64 {
			return x.result(proxy)
		}
	}
}

// firstWidth is how many ranks apart, on the average, what is collected at first may lie
// from what was chosen.
const firstWidth = 64

// unreached is more than any cost.
const unreached = math.MaxInt64 / 2

// A candidate is a node that may change one of its proxies at a low cost.
type candidate struct {
	node    int
	more    bool // it has one proxy more than others
	proxies []pairing
}

// A pairing is a proxy that a candidate has, or may get.
type pairing struct {
	proxy  int32
	chosen bool
	rank   int64
}

// An exchange moves candidates from proxies that have too many to those that have too
// few.
type exchange struct {
	*allotment
	got        []int // by proxy: how many nodes it has
	width      int64 // what costs more has not been collected
	candidates []candidate
	has        []bool // by node: whether the proxy that is asked for has it

	// By proxy, and for the hub.
	onwards   [][]int32 // which candidates may go on from there
	discounts []int64   // what paths so far have taken off a price, so that no step costs less than 0
	cost      []int64   // of the cheapest path there, as far as it is known
	from      []step    // the last step of that
	settled   []bool    // nothing is cheaper
}

// A step of a path takes a candidate from one of its pairings to another. Both are
// indices; -1 is the hub, where candidates drop what they have more than others for
// others to take it up.
type step struct{ candidate, out, in int32 }

// hub is where the exchange keeps what it knows of the hub.
func (x *exchange) hub() int { return len(x.proxies) }

// collect collects what costs at most width to move.
func (t *allotment) collect(width int64, proxy int) *exchange {
	x := &exchange{
		allotment: t, got: slices.Clone(t.got), width: width,
		has:     make([]bool, len(t.nodes)),
		onwards: make([][]int32, len(t.proxies)+1), discounts: make([]int64, len(t.proxies)+1),
		cost: make([]int64, len(t.proxies)+1), from: make([]step, len(t.proxies)+1), settled: make([]bool, len(t.proxies)+1),
	}
	for v := range t.nodes {
		cut, more := t.last[v], t.next[v] <= t.limit
		if more {
			cut = t.next[v]
		}
		ranks := t.rank(v)
		x.has[v] = ranks[proxy] <= cut
		// What a proxy that was chosen has to cost to be left, and another to be taken.
		leave, take := int64(unreached), cut
		for _, r := range ranks {
			if r > cut {
				leave = min(leave, r)
			}
		}
		if more {
			leave = min(leave, t.limit)
		} else {
			take = max(take, t.limit)
		}
		var near []pairing
		for p, r := range ranks {
			if chosen := r <= cut; chosen && leave-r <= width || !chosen && r-take <= width {
				near = append(near, pairing{int32(p), chosen, r})
			}
		}
		if len(near) == 0 {
			continue
		}
		i := int32(len(x.candidates))
		x.candidates = append(x.candidates, candidate{v, more, near})
		for _, p := range near {
			x.onwards[p.proxy] = append(x.onwards[p.proxy], i)
		}
		x.onwards[x.hub()] = append(x.onwards[x.hub()], i)
	}
	return x
}

// balance moves nodes until the sizes are exact. It reports false where that, or that it
// was done as cheaply as it can be, takes more than was collected.
func (x *exchange) balance() bool {
	for p := range x.proxies {
		for x.got[p] > x.sizes[p] {
			target := x.search(p)
			if target < 0 {
				return false
			}
			x.move(target)
			// What was moved so far lies within the largest discount. With four times that
			// much collected nothing that was not could have been cheaper.
			if x.width != math.MaxInt64 && slices.Max(x.discounts) > x.width/4 {
				return false
			}
		}
	}
	return true
}

// search finds the cheapest path from a proxy to one that has too few nodes, and returns
// that; -1 if there is none. It is Dijkstra's algorithm.
func (x *exchange) search(source int) (target int) {
	clear(x.settled)
	for at := range x.cost {
		x.cost[at], x.from[at] = unreached, step{candidate: -1}
	}
	x.cost[source] = 0
	for {
		at := -1
		for p, cost := range x.cost {
			if !x.settled[p] && cost != unreached && (at < 0 || cost < x.cost[at]) {
				at = p
			}
		}
		switch {
		case at < 0:
			return -1
		case at != x.hub() && x.got[at] < x.sizes[at]:
			for p, settled := range x.settled {
				if settled {
					x.discounts[p] += x.cost[at] - x.cost[p]
				}
			}
			return at
		}
		x.settled[at] = true
		for _, i := range x.onwards[at] {
			if at == x.hub() {
				x.leaveHub(i)
			} else {
				x.leave(at, i)
			}
		}
	}
}

// leave has the paths to a proxy go on by a step of the i-th candidate.
func (x *exchange) leave(at int, i int32) {
	n := &x.candidates[i]
	out := slices.IndexFunc(n.proxies, func(p pairing) bool { return int(p.proxy) == at })
	if !n.proxies[out].chosen {
		return
	}
	cost := x.cost[at] - n.proxies[out].rank - x.discounts[at]
	if x.more > 0 && n.more {
		x.reach(x.hub(), cost+x.limit+x.discounts[x.hub()], step{i, int32(out), -1})
	}
	x.take(i, int32(out), cost)
}

// leaveHub has the path to the hub go on by a step of the i-th candidate.
func (x *exchange) leaveHub(i int32) {
	if !x.candidates[i].more {
		x.take(i, -1, x.cost[x.hub()]-x.limit-x.discounts[x.hub()])
	}
}

// take has a path go on to all proxies that may take a candidate.
func (x *exchange) take(i, out int32, cost int64) {
	for in, p := range x.candidates[i].proxies {
		if !p.chosen {
			x.reach(int(p.proxy), cost+p.rank+x.discounts[p.proxy], step{i, out, int32(in)})
		}
	}
}

// reach notes a path, if it is the cheapest one so far.
func (x *exchange) reach(at int, cost int64, from step) {
	if cost < x.cost[at] {
		x.cost[at], x.from[at] = cost, from
	}
}

// move takes one step after the other back from the proxy where a path ends.
func (x *exchange) move(target int) {
	x.got[target]++
	at := target
	for s := x.from[at]; s.candidate >= 0; s = x.from[at] {
		n := &x.candidates[s.candidate]
		if s.in >= 0 {
			n.proxies[s.in].chosen = true
		} else {
			n.more = false
		}
		if s.out >= 0 {
			n.proxies[s.out].chosen = false
			at = int(n.proxies[s.out].proxy)
		} else {
			n.more = true
			at = x.hub()
		}
	}
	x.got[at]--
}

// result returns the nodes of the proxy for which it was collected.
func (x *exchange) result(proxy int) (nodes []int) {
	for _, n := range x.candidates {
		for _, p := range n.proxies {
			if int(p.proxy) == proxy {
				x.has[n.node] = p.chosen
			}
		}
	}
	for v, has := range x.has {
		if has {
			nodes = append(nodes, v)
		}
	}
	return nodes
}
