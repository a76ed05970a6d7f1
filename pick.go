package caddydiscovery

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Pick says how many nodes a request may go to. Caddy takes a global lock for
// each upstream that a source returns, so that the cost of a request grows with
// their number; a few candidates cost the same in a fleet of any size, and the
// selection policy decides among them. Two of them under the policy least_conn
// are the "power of two choices".
type Pick struct {
	// How many nodes are drawn for each request, each with a probability in
	// proportion to its weight. Required.
	Count int `json:"count,omitempty"`

	// A value of the request, such as {http.request.header.X-Tenant}. Requests
	// with the same value get the same nodes, in the same order, by consistent
	// hashing: when one of N nodes joins or leaves, about 1/N of the values move.
	// With the selection policy first a request goes to the first of them that is
	// available. A request for which this is empty gets nodes that are drawn.
	// Default: none, the nodes are drawn
	Hash string `json:"hash,omitempty"`
}

// maxPick bounds pick and, with it, what a single request may cost.
const maxPick = 1000

// check refuses what cannot work with the handler's selection policy.
func (p *Pick) check(policy reverseproxy.Selector) error {
	if p.Count < 1 || p.Count > maxPick {
		return fmt.Errorf("pick: invalid count %d, want 1 to %d", p.Count, maxPick)
	}
	if p.Hash != "" {
		if !strings.Contains(p.Hash, "{") {
			return fmt.Errorf("pick: hash %q is no placeholder, and all requests would go to the same nodes; want one such as {http.request.header.X-Tenant}", p.Hash)
		}
		return nil
	}
	switch policy.(type) {
	case *reverseproxy.IPHashSelection, *reverseproxy.ClientIPHashSelection, *reverseproxy.URIHashSelection,
		*reverseproxy.QueryHashSelection, *reverseproxy.HeaderHashSelection, *reverseproxy.CookieHashSelection:
		name := policy.(caddy.Module).CaddyModule().ID.Name()
		return fmt.Errorf("pick draws other nodes for each request, so that lb_policy %s could not keep a client on one of them; "+
			"want 'pick %d hash <placeholder>' with lb_policy first, or no pick", name, p.Count)
	}
	return nil
}

// value returns the value of the request that decides about its nodes, "" if there
// is none.
func (p *Pick) value(r *http.Request) string {
	if p.Hash == "" {
		return ""
	}
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return ""
	}
	if key := strings.Trim(p.Hash, "{}"); len(key) == len(p.Hash)-2 && p.Hash[0] == '{' && !strings.ContainsAny(key, `{}\`) {
		value, _ := repl.GetString(key) // the usual case, a single placeholder
		return value
	}
	return repl.ReplaceAll(p.Hash, "")
}

// A screen decides for one attempt of one request which nodes can serve it.
type screen struct {
	tried   *addressSet // where this request has failed; nil: nowhere
	limits  limits
	ramp    time.Duration // how long a new node takes to get its full share; 0: no time
	lenient bool          // nodes at which other requests have failed will do, since there are no others
	blind   bool          // everybody will do, since nobody can serve
}

// sees reports whether the screen looks at anything.
func (s *screen) sees() bool { return !s.blind && (!s.tried.empty() || s.limits.checks != nil) }

// failed reports whether this request has failed at the node.
func (s *screen) failed(e *discovery.Entry) bool {
	return !s.blind && !s.tried.empty() && dialledAtAny(e, s.tried)
}

// able reports whether the node can serve. That it is up and healthy goes without
// saying: else it would not be in the pool.
func (s *screen) able(e *discovery.Entry) bool {
	if s.blind {
		return true
	}
	return !s.failed(e) && (s.limits.checks == nil || !s.limits.exceeds(e, s.lenient))
}

// tier are nodes that a source prefers equally. It never changes, but for what is
// derived from it when it is first needed.
type tier struct {
	rank    string             // which of the preferences the nodes fail
	nodes   []*discovery.Entry // sorted by id
	reserve []*discovery.Entry // those that stand in for them; see subset

	tableOnce sync.Once
	table     aliasTable
	ringOnce  sync.Once
	ring      atomic.Pointer[ring] // before it is needed, that of an earlier tier
}

// choose returns the nodes of a pool for one attempt. It may return a slice of
// the pool, and else appends to into.
func (u *Upstreams) choose(p *pool, s *screen, r *http.Request, into []*discovery.Entry) []*discovery.Entry {
	for _, t := range p.tiers {
		if nodes := u.chooseFrom(t, s, r, into); len(nodes) > 0 {
			return nodes
		}
	}
	if len(p.tiers) == 0 || !s.sees() {
		return nil
	}
	if s.limits.checks != nil {
		// The observer sends the request to one of those that have failed lately: one
		// that has room, and at which this request has not failed itself.
		lenient := &screen{tried: s.tried, limits: s.limits, ramp: s.ramp, lenient: true}
		for _, t := range p.tiers {
			if nodes := u.chooseFrom(t, lenient, r, into); len(nodes) > 0 {
				return nodes
			}
		}
	}
	// Nobody can serve. Caddy may know better, or wait and try again.
	return u.chooseFrom(p.tiers[0], &screen{ramp: s.ramp, blind: true}, r, into)
}

func (u *Upstreams) chooseFrom(t *tier, s *screen, r *http.Request, into []*discovery.Entry) []*discovery.Entry {
	if u.Pick == nil {
		return t.all(s)
	}
	if value := u.Pick.value(r); value != "" {
		return t.owners(hash(value), u.Pick.Count, s, into)
	}
	return t.draw(u.Pick.Count, s, u.random, into)
}

// prepare derives what a source with this pick will ask the tier for.
func (t *tier) prepare(p *Pick) {
	switch {
	case p == nil:
	case p.Hash != "":
		t.hashRing()
	default:
		t.weights()
	}
}

func (t *tier) weights() aliasTable {
	t.tableOnce.Do(func() { t.table = newAliasTable(t.nodes) })
	return t.table
}

// all returns all nodes, without those that failed this request; nil if none of
// them can serve. A node that Caddy knows to be failing or full stays among them:
// its policies pass it over, and those that hash keep their order.
func (t *tier) all(s *screen) []*discovery.Entry {
	if !s.sees() {
		return t.nodes
	}
	if !slices.ContainsFunc(t.nodes, s.able) && !slices.ContainsFunc(t.reserve, s.able) {
		return nil
	}
	if s.tried.empty() && len(t.reserve) == 0 {
		return t.nodes
	}
	left := make([]*discovery.Entry, 0, len(t.nodes))
	for i, e := range t.nodes {
		if len(t.reserve) > 0 && !s.able(e) {
			if e = t.standIn(i, s, left); e == nil {
				e = t.nodes[i]
			}
		}
		if !s.failed(e) {
			left = append(left, e)
		}
	}
	return left
}

// draw appends n nodes that can serve, fewer if there are not so many. They are
// drawn by weight, one after the other and without replacement. The time it takes
// does not depend on the size of the tier, unless hardly any node can serve.
func (t *tier) draw(n int, s *screen, random func() uint64, into []*discovery.Entry) []*discovery.Entry {
	table, size := t.weights(), uint64(len(t.nodes))
	n = min(n, len(t.nodes))
	// Nodes that were drawn already, that cannot serve, or that are to get less
	// than their share for some time, are drawn and put back: the odds among the
	// others remain what they are.
	for tries := 16 + 8*n; len(into) < n && tries > 0; tries-- {
		x := random()
		i := (x >> 32) * size >> 32
		if table != nil {
			if slot := table[i]; uint32(x) > slot.keep {
				i = uint64(slot.other)
			}
		}
		e := t.nodes[i]
		if slices.Contains(into, e) {
			continue
		}
		if s.ramp > 0 {
			if share := s.share(e); share < 1 && unit(random()) >= share {
				continue
			}
		}
		if s.sees() && !s.able(e) {
			if e = t.standIn(int(i), s, nil); e == nil || slices.Contains(into, e) {
				continue
			}
		}
		into = append(into, e)
	}
	if len(into) < n {
		into = t.drawRest(n, s, random, into)
	}
	return into
}

// drawRest completes a draw by a look at every node, when most draws are in vain:
// because few nodes can serve, or one outweighs all others.
func (t *tier) drawRest(n int, s *screen, random func() uint64, into []*discovery.Entry) []*discovery.Entry {
	// The order of exponential times whose rates are the weights is that of a
	// weighted draw without replacement.
	type arrival struct {
		time float64 // its logarithm
		node *discovery.Entry
	}
	var first []arrival // sorted
	want := n - len(into)
	for _, e := range t.nodes {
		if slices.Contains(into, e) || !s.able(e) {
			continue
		}
		// Its logarithm, because a weight may be so small that the time is infinite.
		a := arrival{math.Log(-math.Log(1-unit(random()))) - math.Log(e.Weight()) - math.Log(s.share(e)), e}
		if len(first) == want {
			if first[want-1].time <= a.time {
				continue
			}
			first = first[:want-1]
		}
		i, _ := slices.BinarySearchFunc(first, a, func(x, y arrival) int { return cmp.Compare(x.time, y.time) })
		first = slices.Insert(first, i, a)
	}
	for _, a := range first {
		into = append(into, a.node)
	}
	for _, e := range t.reserve {
		if len(into) < n && s.able(e) && !slices.Contains(into, e) {
			into = append(into, e)
		}
	}
	return into
}

// rampStart is the part of its share that a node gets at first.
const rampStart = 0.1

// share returns which part of its share a node gets: less than 1 while it is new.
func (s *screen) share(e *discovery.Entry) float64 {
	if s.ramp <= 0 {
		return 1
	}
	since := e.Joined()
	if since.IsZero() {
		return 1
	}
	return min(1, rampStart+(1-rampStart)*max(0, float64(time.Since(since))/float64(s.ramp)))
}

// An aliasTable draws an index in proportion to the weights, by one look at it:
// A. J. Walker, "An efficient method for generating discrete random variables with
// general distributions", 1977. Nil draws all alike.
type aliasTable []aliasSlot

type aliasSlot struct {
	keep  uint32 // up to here the slot's own index, beyond it the other
	other uint32
}

func newAliasTable(nodes []*discovery.Entry) aliasTable {
	if len(nodes) == 0 {
		return nil
	}
	sum, same := 0.0, true
	for _, e := range nodes {
		sum += e.Weight()
		same = same && e.Weight() == nodes[0].Weight()
	}
	if same {
		return nil
	}
	// What each index has and how much one slot holds, in units of the mean.
	table := make(aliasTable, len(nodes))
	share := make([]float64, len(nodes))
	var poor, rich []uint32
	for i, e := range nodes {
		share[i] = e.Weight() / sum * float64(len(nodes))
		if share[i] < 1 {
			poor = append(poor, uint32(i))
		} else {
			rich = append(rich, uint32(i))
		}
	}
	for len(poor) > 0 && len(rich) > 0 {
		p, r := poor[len(poor)-1], rich[len(rich)-1]
		poor = poor[:len(poor)-1]
		table[p] = aliasSlot{keep: uint32(share[p] * math.MaxUint32), other: r}
		if share[r] -= 1 - share[p]; share[r] < 1 {
			rich = rich[:len(rich)-1]
			poor = append(poor, r)
		}
	}
	for _, i := range append(poor, rich...) { // what rounding has left
		table[i] = aliasSlot{keep: math.MaxUint32, other: i}
	}
	return table
}

// unit makes a number in [0, 1) of a random one.
func unit(x uint64) float64 { return float64(x>>11) / (1 << 53) }

// randomly is the source of random numbers outside of tests.
func randomly() uint64 { return rand.Uint64() }
