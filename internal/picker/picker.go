// Package picker decides to which nodes a request may go. It knows nodes and what
// requests have been through, and neither requests nor handlers.
//
// A [Builder] holds what a source is configured to do. Of a snapshot of the directory
// and a [Query] it makes a [Picker], in these steps:
//
//  1. The [Filter] leaves out the nodes that the source does not use.
//  2. The others become tiers by the preferences of the query.
//  3. With a subset each tier keeps the nodes that belong to this proxy (subset.go).
//  4. What the [Strategy] asks of a tier is derived: an alias table to draw from by
//     weight (alias.go), a rotation in which nodes take turns (rotation.go), a ring
//     to find the owners of a key (ring.go), and the like.
//
// A [Cache] keeps the pickers of the newest snapshot. For each attempt a request asks
// its picker for nodes with [Picker.Pick].
package picker

import (
	"maps"
	"slices"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/balance"
)

// A Builder makes pickers. Its fields are not changed once it is in use; then it may
// be used by many goroutines.
type Builder struct {
	Filter

	// Strategy is by which most requests choose.
	Strategy Strategy
	// Random returns the random numbers of the draws.
	Random func() uint64
	// SlowStart is how long a new node takes to get its full share; 0: no time.
	SlowStart time.Duration
	// Back returns for how long a node is in use again after it was ejected; false if it
	// never was. Nil: nobody was.
	Back func(*discovery.Entry) (time.Duration, bool)
	// Subset is how many nodes of each tier are used; 0: all of them.
	Subset int
	// ProxyID decides which nodes those are, together with the other proxies of Group.
	// Nil: this one is alone.
	ProxyID string
	Group   *Group
	// Shared is told how the nodes of the first tier are shared out. Nil: nobody asks.
	Shared func(Sharing)

	// TLS says that nodes are dialled by the names of their endpoints.
	TLS bool
	// InFlight returns how many requests a node has from this process. It is for
	// LeastBusy and Shares, and for nodes that name a capacity.
	InFlight func(*discovery.Entry) int
	// Clock returns the time that the following are asked for.
	Clock func() time.Duration
	// Cost returns what balance.Latency knows of a node, and how many requests it has from
	// this process. It is for Soonest.
	Cost func(e *discovery.Entry, now time.Duration) (cost float64, inFlight int)
	// Usage returns what balance.Usage knows of a node. It is for Shares.
	Usage func(e *discovery.Entry, now time.Duration) balance.Member
	// Token returns that of the sessions of an address. It is for Session.
	Token func(address string) string
	// Unavailable reports whether Caddy would not send the node a request now: because
	// it serves as many as it may, or, unless lenient, has failed lately. Nil: it would.
	Unavailable func(e *discovery.Entry, lenient bool) bool
	// Unchecked is asked where the checks keep all eligible nodes out. It returns those
	// that serve without a check, and otherwise when the next one will; the zero time if
	// none will. Nil: without checks.
	Unchecked func(eligible []*discovery.Entry) ([]*discovery.Entry, time.Time)
}

// A Picker has the nodes of one snapshot that serve one query. It never changes, and
// may be used by many goroutines. The zero Picker has none.
type Picker struct {
	builder *Builder
	tiers   []*tier   // by preference; none is empty
	limited bool      // some node names how many requests it takes
	proxies []Proxy   // that share the nodes
	retry   time.Time // see Retry
	until   time.Time // when what is shared out for a while only is; zero: nothing is
	bytes   int       // what it takes, about; set before others see it
}

// Build makes the picker of a snapshot for a query.
func (b *Builder) Build(snapshot *discovery.Snapshot, q *Query) *Picker {
	return b.succeed(nil, snapshot, q)
}

// succeed makes a picker that is to take the place of another one, which may be nil.
func (b *Builder) succeed(last *Picker, snapshot *discovery.Snapshot, q *Query) *Picker {
	candidates := q.candidates(snapshot)
	nodes := make([]*discovery.Entry, 0, len(candidates))
	var ejected []*discovery.Entry
	for _, e := range candidates {
		switch b.reason(e, q) {
		case "":
			nodes = append(nodes, e)
		case Ejected:
			ejected = append(ejected, e)
		}
	}
	if len(nodes) == 0 {
		nodes = ejected // a request that is sent has a chance
	}
	p := &Picker{builder: b}
	if b.Subset > 0 && b.Group != nil {
		p.proxies = b.Group.Proxies(snapshot)
	}
	if len(nodes) == 0 && b.Unchecked != nil {
		for _, e := range candidates {
			if b.ineligible(e, q) == "" {
				nodes = append(nodes, e)
			}
		}
		nodes, p.retry = b.Unchecked(nodes)
	}
	p.limited = slices.ContainsFunc(nodes, func(e *discovery.Entry) bool { return e.Capacity() > 0 })
	if len(q.Prefer) == 0 && len(nodes) > 0 {
		p.add("", nodes, last)
		return p
	}

	// A node's tier is the binary number whose digits say which criteria it
	// fails, the earliest criterion first: an earlier one outweighs all later
	// ones together.
	tiers := make(map[string][]*discovery.Entry)
	for _, e := range nodes {
		fails := make([]byte, len(q.Prefer))
		for i, c := range q.Prefer {
			fails[i] = '1'
			if c.matches(e.Node.Metadata) {
				fails[i] = '0'
			}
		}
		tiers[string(fails)] = append(tiers[string(fails)], e)
	}
	for _, fails := range slices.Sorted(maps.Keys(tiers)) {
		p.add(fails, tiers[fails], last)
	}
	return p
}

// add adds a tier of nodes that are sorted by id. With Subset it keeps those that belong
// to this proxy.
func (p *Picker) add(rank string, nodes []*discovery.Entry, last *Picker) {
	b := p.builder
	if b.Subset == 0 || len(nodes) <= b.Subset {
		p.tiers = append(p.tiers, &tier{rank: rank, nodes: nodes})
		return
	}
	t, sharing := b.subset(rank, nodes, p.proxies, last.tier(rank))
	if b.Shared != nil && len(p.tiers) == 0 {
		b.Shared(sharing)
	}
	if t.shared != nil && !t.shared.until.IsZero() && (p.until.IsZero() || t.shared.until.Before(p.until)) {
		p.until = t.shared.until
	}
	p.tiers = append(p.tiers, t)
}

// tier returns the tier of a rank, nil if there is none.
func (p *Picker) tier(rank string) *tier {
	if p != nil {
		for _, t := range p.tiers {
			if t.rank == rank {
				return t
			}
		}
	}
	return nil
}

// Empty reports whether there is no node.
func (p *Picker) Empty() bool { return len(p.tiers) == 0 }

// Limited reports whether some of the nodes name how many requests they take at a time.
func (p *Picker) Limited() bool { return p.limited }

// Retry returns when nodes that lack their first check serve all the same, so that an
// empty picker is worth making anew; the zero time if none will.
func (p *Picker) Retry() time.Time { return p.retry }

// expired reports whether the picker is to be made anew although nothing has changed.
func (p *Picker) expired() bool {
	if p.retry.IsZero() && p.until.IsZero() {
		return false
	}
	at := time.Now()
	return !p.retry.IsZero() && !at.Before(p.retry) || !p.until.IsZero() && !at.Before(p.until)
}

// First returns the nodes that the preferences put first. Read it only.
func (p *Picker) First() []*discovery.Entry {
	if p.Empty() {
		return nil
	}
	return p.tiers[0].nodes
}

// At returns the nodes that are dialled at one of the addresses.
func (p *Picker) At(addresses *AddressSet) []*discovery.Entry {
	var at []*discovery.Entry
	for _, t := range p.tiers {
		for _, nodes := range [][]*discovery.Entry{t.nodes, t.reserve} {
			for _, e := range nodes {
				if addresses.hasNode(e) {
					at = append(at, e)
				}
			}
		}
	}
	return at
}

// CanServe reports whether a node can take a request that has failed where tried says.
// That it is up and healthy goes without saying.
func (b *Builder) CanServe(e *discovery.Entry, tried *AddressSet) bool {
	a := attempt{builder: b, tried: tried, limited: true, unavailable: b.Unavailable}
	return a.canServe(e)
}

// Pick returns the nodes for one attempt of a request that has failed where tried
// says; nil if nowhere. It may return a slice of the picker, to be read only, and else appends to
// into.
//
// The tiers are asked in turn: the first one in which a node can serve gives all of
// the nodes. One that has as many requests as it takes cannot. Where none can, those will do that have failed for other requests but
// have room, then any of the first tier: Caddy may know better, or wait and try again.
func (p *Picker) Pick(tried *AddressSet, c Choice, into []*discovery.Entry) []*discovery.Entry {
	if p.Empty() {
		return nil
	}
	a := attempt{Choice: c, builder: p.builder, tried: tried, limited: p.limited, unavailable: p.builder.Unavailable, race: c.Race}
	for _, a.lenient = range [...]bool{false, true} {
		for _, t := range p.tiers {
			a.race.reset()
			if nodes := c.Strategy.pick(t, a, into); len(nodes) > 0 {
				return nodes
			}
		}
	}
	if a.race.reset(); c.Race != nil {
		c.Race.Resort = true
	}
	return c.Strategy.pick(p.tiers[0], attempt{Choice: c, builder: p.builder, race: c.Race}, into)
}

// inherit gives the tiers the rings and the like of those that they replace, to derive
// theirs from.
func (p *Picker) inherit(last *Picker) {
	for _, t := range p.tiers {
		if old := last.tier(t.rank); old != nil {
			t.ring.Store(old.ring.Load())
			t.rotation.Store(old.rotation.Load())
			t.session.Store(old.session.Load())
		}
	}
}

// prepare derives what the first request will need; the other tiers follow when they
// are needed.
func (p *Picker) prepare() {
	if !p.Empty() {
		p.builder.Strategy.prepare(p.tiers[0], p.builder)
	}
}

// pointerBytes is what one takes.
const pointerBytes = 8

// size returns about how many bytes the picker takes once all of it is in use.
func (p *Picker) size() int {
	size := 0
	for _, t := range p.tiers {
		size += (len(t.nodes)+len(t.reserve))*pointerBytes + p.builder.Strategy.size(t)
	}
	return size
}
