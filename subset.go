package caddydiscovery

import (
	"cmp"
	"math"
	"slices"
	"strings"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// newTier makes a tier of nodes that are sorted by id. With subset it keeps those
// that belong to this proxy.
func (u *Upstreams) newTier(rank string, nodes []*discovery.Entry) *tier {
	if u.Subset == 0 || len(nodes) <= u.Subset {
		return &tier{rank: rank, nodes: nodes}
	}
	chosen := nearest(nodes, u.proxy, 2*u.Subset)
	t := &tier{rank: rank, nodes: chosen[:u.Subset:u.Subset], reserve: chosen[u.Subset:]}
	slices.SortFunc(t.nodes, func(a, b *discovery.Entry) int { return strings.Compare(a.Node.ID, b.Node.ID) })
	return t
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
		all[i] = ranked{mix(proxy ^ hash(e.Node.ID)), e}
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

// standIn returns the node of the reserve that takes the place of the i-th while
// that one cannot serve, nil if there is none: the same one each time, and
// different ones for different nodes as far as possible.
func (t *tier) standIn(i int, s *screen, taken []*discovery.Entry) *discovery.Entry {
	for j := range t.reserve {
		e := t.reserve[(i+j)%len(t.reserve)]
		if s.able(e) && !slices.Contains(taken, e) {
			return e
		}
	}
	return nil
}
