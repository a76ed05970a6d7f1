package picker

import (
	"cmp"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A Sharing is how a tier was shared out.
type Sharing struct {
	Proxies int // of the group; 1: this one draws its nodes by chance
	Nodes   int // of the tier
	Wanted  int // the subset as it is configured
	Subset  int // and as it is: no smaller than it takes to use every node
}

// Idle returns which part of a fleet is left idle by chance, where proxies draw so many
// of its nodes each, and are just so many that they could use all.
func Idle(nodes, subset int) float64 {
	if subset >= nodes {
		return 0
	}
	share := float64(subset) / float64(nodes)
	return math.Pow(1-share, math.Ceil(1/share))
}

// subset makes a tier of the nodes that belong to this proxy, with others that stand in
// for them. Alone it draws them by chance; with a group they are its share. Earlier is
// the tier that it succeeds, nil if there is none.
func (b *Builder) subset(rank string, nodes []*discovery.Entry, proxies []Proxy, earlier *tier) (*tier, Sharing) {
	self := Hash(b.ProxyID)
	if len(proxies) < 2 {
		chosen := nearest(nodes, self, 2*b.Subset)
		return newSubset(rank, chosen[:b.Subset:b.Subset], chosen[b.Subset:]), Sharing{1, len(nodes), b.Subset, b.Subset}
	}
	var last *shared
	if earlier != nil {
		last = earlier.shared
	}
	s := share(nodes, proxies, self, last)
	chosen, others := s.split()
	t := newSubset(rank, chosen, nearest(others, self, s.size))
	t.shared = s
	return t, Sharing{len(proxies), len(nodes), b.Subset, s.size}
}

// newSubset makes a tier of nodes and of those that stand in for them.
func newSubset(rank string, nodes, reserve []*discovery.Entry) *tier {
	slices.SortFunc(nodes, func(x, y *discovery.Entry) int { return strings.Compare(x.Node.ID, y.Node.ID) })
	return &tier{rank: rank, nodes: nodes, reserve: reserve}
}

// shared is how nodes were shared out among proxies, to be kept for the next time.
type shared struct {
	nodes   []*discovery.Entry // sorted by id
	proxies []Proxy
	size    int // of the subset
	prices  []int64
	mine    []bool // by node

	until time.Time // when it has to be done anew; zero: it is exact
	made  time.Time
	took  time.Duration
}

const (
	// Of the time of one core at most a twentieth goes into sharing out, as into
	// snapshots: until then nodes that come are left to the others of the group.
	shareFactor = 20
	maxShareGap = time.Second
)

// share shares out nodes that are sorted by id. What it takes is in proportion to nodes
// times proxies; nothing, if they are those of the last time.
func share(nodes []*discovery.Entry, proxies []Proxy, self uint64, last *shared) *shared {
	s := &shared{nodes: nodes, proxies: proxies, made: time.Now()}
	sizes := subsets(proxies, len(nodes))
	me := slices.IndexFunc(proxies, func(p Proxy) bool { return p.Hash == self })
	s.size = sizes[me]
	if last != nil && s.repeats(last) {
		return s
	}
	hashes := make([]uint64, len(nodes))
	for i, e := range nodes {
		hashes[i] = Hash(e.Node.ID)
	}
	ids := make([]uint64, len(proxies))
	s.prices = make([]int64, len(proxies))
	for i, p := range proxies {
		ids[i] = p.Hash
		if last != nil {
			if j, found := slices.BinarySearchFunc(last.proxies, p.Hash, func(p Proxy, hash uint64) int { return cmp.Compare(p.Hash, hash) }); found {
				s.prices[i] = last.prices[j]
			}
		}
	}
	s.mine = make([]bool, len(nodes))
	for _, v := range newAllotment(ids, sizes, hashes, s.prices).of(me) {
		s.mine[v] = true
	}
	s.took = time.Since(s.made)
	return s
}

// subsets returns how many of n nodes each proxy gets: what it wants, all there are, and
// at least an even share. What the others want never makes that smaller, because they may
// not serve at all.
func subsets(proxies []Proxy, n int) []int {
	sizes := make([]int, len(proxies))
	for i, p := range proxies {
		even := n / len(proxies)
		if i < n%len(proxies) {
			even++
		}
		sizes[i] = min(max(p.Subset, even), n)
	}
	return sizes
}

// repeats takes over what was shared out last if the nodes and the proxies are the same,
// or for a while if that was too dear to be done again already. It reports whether it did.
func (s *shared) repeats(last *shared) bool {
	again := slices.Equal(s.proxies, last.proxies)
	same := again && last.until.IsZero() && slices.EqualFunc(s.nodes, last.nodes, func(a, b *discovery.Entry) bool { return a.Node.ID == b.Node.ID })
	until := last.made.Add(min(shareFactor*last.took, maxShareGap))
	if !same && (!again || !s.made.Before(until)) {
		return false
	}
	s.prices, s.made, s.took = last.prices, last.made, last.took
	if same {
		s.mine = last.mine
		return true
	}
	s.until, s.mine = until, make([]bool, len(s.nodes))
	kept, i := 0, 0
	for v, e := range s.nodes {
		for i < len(last.nodes) && last.nodes[i].Node.ID < e.Node.ID {
			i++
		}
		if i < len(last.nodes) && last.nodes[i].Node.ID == e.Node.ID && last.mine[i] {
			s.mine[v] = true
			kept++
		}
	}
	return kept > s.size/2
}

// split returns the nodes of this proxy and the others.
func (s *shared) split() (mine, others []*discovery.Entry) {
	for v, e := range s.nodes {
		if s.mine[v] {
			mine = append(mine, e)
		} else {
			others = append(others, e)
		}
	}
	return mine, others
}

// nearest returns the n nodes that come first for a proxy, in this order, by
// rendezvous hashing: each pair of proxy and node has a random but fixed rank. So
// a node that joins or leaves changes at most one of a proxy's first n, and each
// node is as likely among them as any other.
func nearest(nodes []*discovery.Entry, proxy uint64, n int) []*discovery.Entry {
	type ranked struct {
		rank uint64
		node *discovery.Entry
	}
	all := make([]ranked, len(nodes))
	for i, e := range nodes {
		all[i] = ranked{mix(proxy ^ Hash(e.Node.ID)), e}
	}
	if below := 2*n + 64; below < len(all) {
		// Ranks are as good as random, so that twice as many as are wanted lie
		// below this, give or take a few: only those need sorting.
		bound := math.MaxUint64 / uint64(len(all)) * uint64(below)
		low := make([]ranked, 0, below+below/2)
		for _, r := range all {
			if r.rank < bound {
				low = append(low, r)
			}
		}
		if len(low) >= n {
			all = low
		}
	}
	slices.SortFunc(all, func(a, b ranked) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), strings.Compare(a.node.Node.ID, b.node.Node.ID))
	})
	first := make([]*discovery.Entry, min(n, len(all)))
	for i := range first {
		first[i] = all[i].node
	}
	return first
}
