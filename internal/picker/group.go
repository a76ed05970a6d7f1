package picker

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A Proxy uses a share of a fleet.
type Proxy struct {
	Hash   uint64 // of its id
	Subset int    // how many nodes it wants
}

// A Group is the proxies that share a fleet among them: those whose records in its
// registry claim a share of it, and this one. It may be used by many goroutines.
//
// Whoever may write into the registry may claim what it likes. A record that lies is one
// proxy more, and the nodes that only it would use are left idle: one share of the
// fleet. Of very many that lie so many are believed that this proxy uses what its own
// subset says and no more, and the group together what it would by chance.
type Group struct {
	key    string
	self   Proxy
	joined atomic.Bool
	last   atomic.Pointer[membership]
}

type membership struct {
	records []*discovery.Entry
	proxies []Proxy
}

// Bounds of what is believed. Sharing out takes a time in proportion to the proxies.
const (
	maxProxies = 128
	// MaxClaims is how many claims one record may have.
	MaxClaims = 64
	maxClaim  = 16 + 1 + 16 + 1 + len("100000")
)

// NewGroup returns the group of a source that wants so many nodes. What names the same
// fleet is the same group.
func NewGroup(fleet, proxyID string, subset int) *Group {
	return &Group{key: fmt.Sprintf("%016x", Hash(fleet)), self: Proxy{Hash(proxyID), subset}}
}

// Join is called when the proxy's own record claims its share. Until then the group is
// this proxy alone: the others do not know of it.
func (g *Group) Join() { g.joined.Store(true) }

// Joined reports whether Join was called.
func (g *Group) Joined() bool { return g.joined.Load() }

// Claims returns what a record says of the groups of its proxy, the metadata value under
// [discovery.KeySubsets]: a word for each group, with its key, the hash of the proxy's id
// and the subset, the largest where sources differ in that. There is a limit to the groups
// of one record; those that it claims are returned.
func Claims(groups []*Group) (value string, claimed []*Group) {
	subsets := make(map[[2]string]int)
	for _, g := range groups {
		id := [2]string{g.key, fmt.Sprintf("%016x", g.self.Hash)}
		if _, known := subsets[id]; !known && len(subsets) == MaxClaims {
			continue
		}
		subsets[id] = max(subsets[id], min(g.self.Subset, discovery.MaxNodes))
		claimed = append(claimed, g)
	}
	words := make([]string, 0, len(subsets))
	for id, n := range subsets {
		words = append(words, fmt.Sprintf("%s:%s:%d", id[0], id[1], n))
	}
	slices.Sort(words)
	return strings.Join(words, " "), claimed
}

// Claims reports whether the node is a proxy of the group.
func (g *Group) Claims(e *discovery.Entry) bool {
	_, claims := g.claim(e)
	return claims
}

// claim returns the proxy that a record claims to be.
func (g *Group) claim(e *discovery.Entry) (p Proxy, claims bool) {
	value := e.Node.Metadata[discovery.KeySubsets]
	if len(value) > MaxClaims*(maxClaim+1) {
		return Proxy{}, false
	}
	for word := range strings.FieldsSeq(value) {
		rest, ours := strings.CutPrefix(word, g.key+":")
		if !ours {
			continue
		}
		id, subset, _ := strings.Cut(rest, ":")
		hash, err := strconv.ParseUint(id, 16, 64)
		n, notNumber := strconv.Atoi(subset)
		if err == nil && notNumber == nil && len(id) == 16 && n > 0 && n <= discovery.MaxNodes {
			return Proxy{hash, n}, true
		}
	}
	return Proxy{}, false
}

// Proxies returns the proxies of the group, sorted by their hashes, with this one. A
// proxy counts for as long as it is listed, in whatever state: while it drains it sends
// requests. Two records of one proxy, while a process takes over from another, count once.
func (g *Group) Proxies(s *discovery.Snapshot) []Proxy {
	if !g.Joined() {
		return nil
	}
	records := s.Sharing()
	if last := g.last.Load(); last != nil && same(last.records, records) {
		return last.proxies
	}
	proxies := []Proxy{g.self}
	for _, e := range records {
		if p, claims := g.claim(e); claims && p.Hash != g.self.Hash {
			proxies = append(proxies, p)
		}
	}
	slices.SortFunc(proxies, func(a, b Proxy) int {
		return cmp.Or(cmp.Compare(a.Hash, b.Hash), cmp.Compare(b.Subset, a.Subset))
	})
	proxies = slices.CompactFunc(proxies, func(a, b Proxy) bool { return a.Hash == b.Hash })
	if len(proxies) > maxProxies {
		// All believe the same ones, and each believes itself.
		others := slices.DeleteFunc(proxies, func(p Proxy) bool { return p == g.self })
		proxies = append(others[:maxProxies-1:maxProxies-1], g.self)
		slices.SortFunc(proxies, func(a, b Proxy) int { return cmp.Compare(a.Hash, b.Hash) })
	}
	g.last.Store(&membership{records, proxies})
	return proxies
}

// same reports whether both are one slice.
func same(a, b []*discovery.Entry) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}
