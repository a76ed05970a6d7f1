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
func (Ranked) size(t *tier) int            { return len(t.nodes) * (4 + typicalAddress) }

// typicalAddress is about how many bytes an address has.
const typicalAddress = 16

// An addressList has the addresses of nodes in one piece of memory, for a look at all of
// them to be quick.
type addressList struct {
	nodes []*discovery.Entry
	text  []byte
	ends  []uint32 // in text, of each address
	most  int      // bytes of one address
}

func (t *tier) addresses(b *Builder) *addressList {
	t.addressOnce.Do(func() { t.addressList = newAddressList(t.nodes, b.TLS) })
	return t.addressList
}

func newAddressList(nodes []*discovery.Entry, tls bool) *addressList {
	l := &addressList{nodes: nodes, text: make([]byte, 0, len(nodes)*typicalAddress), ends: make([]uint32, len(nodes))}
	for i, e := range nodes {
		address := e.DialAddress(tls)
		l.text = append(l.text, address...)
		l.ends[i] = uint32(len(l.text))
		l.most = max(l.most, len(address))
	}
	return l
}

// highest appends the n nodes that can serve and rank highest for the key.
func (l *addressList) highest(n int, a *attempt, into []*discovery.Entry) []*discovery.Entry {
	// The key stays where it is, and each address is put before it.
	var room [128]byte
	text := append(append(room[:0], make([]byte, l.most)...), a.Key...)
	var ranks [8]uint64 // of those in into, as far as there is room
	n = min(n, len(ranks))
	start := uint32(0)
	for i, end := range l.ends {
		address := l.text[start:end]
		start = end
		text := text[l.most-len(address):]
		copy(text, address)
		rank := xxhash.Sum64(text)
		if len(into) == n && rank <= ranks[n-1] || a.selective() && !a.canServe(l.nodes[i]) {
			continue
		}
		at := 0
		for at < len(into) && ranks[at] >= rank {
			at++
		}
		if len(into) == n {
			into = into[:n-1]
		}
		into = slices.Insert(into, at, l.nodes[i])
		copy(ranks[at+1:], ranks[at:])
		ranks[at] = rank
	}
	return into
}
