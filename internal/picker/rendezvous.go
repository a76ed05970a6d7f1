package picker

import (
	"slices"

	"github.com/cespare/xxhash/v2"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Ranked has the so many nodes that rank highest for the key, highest first. The rank is
// that of Caddy's hashing policies: xxhash64 of the address at which the node is dialled
// and the key. So they are the nodes that such a policy would choose of all, and each
// key stays where it is when others join or leave.
type Ranked int

func (n Ranked) pick(t *tier, a attempt, into []*discovery.Entry) []*discovery.Entry {
	if len(t.reserve) == 0 || !a.selective() {
		return t.addresses(a.builder).highest(int(n), &a, into)
	}
	nodes := t.all(&a) // with those that stand in
	return newAddressList(nodes, a.builder.TLS).highest(int(n), &a, into)
}
func (Ranked) prepare(t *tier, b *Builder) { t.addresses(b) }
func (Ranked) size(t *tier) int            { return len(t.nodes) * (4 + 8 + 2*typicalAddress) }

// typicalAddress is about how many bytes an address has.
const typicalAddress = 16

// An addressList has the addresses of nodes by their length, for a look at all of them
// to be quick.
type addressList struct {
	nodes  []*discovery.Entry
	groups []*addressGroup // of those that are shorter than a block, by length
	tls    bool
	long   []uint32 // the nodes whose addresses are longer
}

func (t *tier) addresses(b *Builder) *addressList {
	t.addressOnce.Do(func() { t.addressList = newAddressList(t.nodes, b.TLS) })
	return t.addressList
}

func newAddressList(nodes []*discovery.Entry, tls bool) *addressList {
	l := &addressList{nodes: nodes, tls: tls}
	var groups [blockBytes]*addressGroup
	for i, e := range nodes {
		address := e.DialAddress(tls)
		if len(address) >= blockBytes {
			l.long = append(l.long, uint32(i))
			continue
		}
		if groups[len(address)] == nil {
			groups[len(address)] = &addressGroup{length: len(address)}
		}
		groups[len(address)].add(i, address)
	}
	for _, g := range groups {
		if g != nil {
			l.groups = append(l.groups, g)
		}
	}
	return l
}

// highest appends the n nodes that can serve and rank highest for the key.
func (l *addressList) highest(n int, a *attempt, into []*discovery.Entry) []*discovery.Entry {
	best := ranking{attempt: a, n: min(n, maxRanked), nodes: into}
	var k keyHash
	var room someHashes
	for _, g := range l.groups {
		if !g.hashKey(a.Key, &k) {
			l.rankWhole(g.nodes, &best)
			continue
		}
		for from := 0; from < len(g.nodes); from += len(room) {
			for i, rank := range k.hashes(g, from, &room) {
				if rank > best.least || len(best.nodes) < best.n {
					best.add(l.nodes[g.nodes[from+i]], rank)
				}
			}
		}
	}
	l.rankWhole(l.long, &best)
	return best.nodes
}

// rankWhole hashes each address and the key as one text.
func (l *addressList) rankWhole(nodes []uint32, best *ranking) {
	var room [128]byte
	for _, i := range nodes {
		text := append(append(room[:0], l.nodes[i].DialAddress(l.tls)...), best.attempt.Key...)
		best.add(l.nodes[i], xxhash.Sum64(text))
	}
}

// maxRanked is how many nodes of the highest ranks are told apart.
const maxRanked = 8

// A ranking has the nodes that rank highest so far, highest first.
type ranking struct {
	attempt *attempt
	n       int
	nodes   []*discovery.Entry
	ranks   [maxRanked]uint64
	least   uint64 // of the ranks, when there are n
}

// add takes a node in if it ranks high enough and can serve.
func (r *ranking) add(e *discovery.Entry, rank uint64) {
	full := len(r.nodes) == r.n
	if full && rank <= r.least || r.attempt.selective() && !r.attempt.canServe(e) {
		return
	}
	at := 0
	for at < len(r.nodes) && r.ranks[at] >= rank {
		at++
	}
	if full {
		r.nodes = r.nodes[:r.n-1]
	}
	r.nodes = slices.Insert(r.nodes, at, e)
	copy(r.ranks[at+1:], r.ranks[at:])
	r.ranks[at] = rank
	if len(r.nodes) == r.n {
		r.least = r.ranks[r.n-1]
	}
}
