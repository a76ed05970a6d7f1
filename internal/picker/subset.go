package picker

import (
	"cmp"
	"math"
	"slices"
	"strings"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

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
