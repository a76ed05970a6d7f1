package picker

import (
	"cmp"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A tier has the nodes that a query prefers equally. It never changes, but for what
// is derived from it when it is first needed.
type tier struct {
	rank    string             // which of the preferences the nodes fail
	nodes   []*discovery.Entry // sorted by id
	reserve []*discovery.Entry // those that stand in for them; see standIn
	shared  *shared            // how they were shared out; nil: they were not

	tableOnce sync.Once
	table     aliasTable
	weight    float64 // of the nodes; there with the table
	// Before these are needed they are those of an earlier tier.
	ringOnce     sync.Once
	ring         atomic.Pointer[ring]
	rotationOnce sync.Once
	rotation     atomic.Pointer[rotation]
	sessionOnce  sync.Once
	session      atomic.Pointer[sessions]

	sharedTier

	addressOnce sync.Once
	addressList *addressList
}

// An attempt is one try of one request, which decides which nodes can serve it.
type attempt struct {
	Choice
	builder     *Builder
	tried       *AddressSet // where the request has failed; nil: nowhere
	limited     bool        // some nodes name how many requests they take
	unavailable func(e *discovery.Entry, lenient bool) bool
	lenient     bool
	race        *Race // nil: nobody asks
}

// selective reports whether there may be nodes that cannot serve.
func (a *attempt) selective() bool { return !a.tried.Empty() || a.limited || a.unavailable != nil }

// full reports whether the node has as many requests as it takes.
func (a *attempt) full(e *discovery.Entry) bool {
	return a.limited && e.Capacity() > 0 && a.builder.InFlight(e) >= e.Capacity()
}

// failed reports whether this request has failed at the node.
func (a *attempt) failed(e *discovery.Entry) bool { return !a.tried.Empty() && a.tried.hasNode(e) }

// canServe reports whether the node can serve. That it is up and healthy goes without
// saying: else it would not be in the picker.
func (a *attempt) canServe(e *discovery.Entry) bool {
	return !a.failed(e) && !a.full(e) && (a.unavailable == nil || !a.unavailable(e, a.lenient))
}

// rampStart is the part of its share that a node gets at first.
const rampStart = 0.1

// Share returns which part of its share a node gets: less than 1 while it is new.
func (b *Builder) Share(e *discovery.Entry) float64 {
	if b.SlowStart <= 0 {
		return 1
	}
	age := b.SlowStart
	if since := e.Joined(); !since.IsZero() {
		age = time.Since(since)
	}
	if b.Back != nil {
		if back, ok := b.Back(e); ok {
			age = min(age, back)
		}
	}
	return min(1, rampStart+(1-rampStart)*max(0, float64(age)/float64(b.SlowStart)))
}

// yields reports whether the node lets this request go to another one, as it does with
// a part of them while it is new.
func (a *attempt) yields(e *discovery.Entry) bool {
	if a.builder.SlowStart <= 0 {
		return false
	}
	share := a.builder.Share(e)
	return share < 1 && unit(a.builder.Random()) >= share
}

// all returns all nodes, without those that failed this request; nil if none of
// them can serve. A node that Caddy knows to be failing or full stays among them:
// its policies pass it over, and those that hash keep their order.
func (t *tier) all(a *attempt) []*discovery.Entry {
	if !a.selective() {
		return t.nodes
	}
	if !slices.ContainsFunc(t.nodes, a.canServe) && !slices.ContainsFunc(t.reserve, a.canServe) {
		return nil
	}
	if a.tried.Empty() && len(t.reserve) == 0 {
		return t.nodes
	}
	left := make([]*discovery.Entry, 0, len(t.nodes))
	for i, e := range t.nodes {
		if len(t.reserve) > 0 && !a.canServe(e) {
			e = cmp.Or(t.standIn(i, a, left), e)
		}
		if !a.failed(e) {
			left = append(left, e)
		}
	}
	return left
}

// draw appends n nodes that can serve, fewer if there are not so many. They are
// drawn by weight, one after the other and without replacement. The time it takes
// does not depend on the size of the tier, unless hardly any node can serve.
func (t *tier) draw(n int, a *attempt, into []*discovery.Entry) []*discovery.Entry {
	table := t.weights()
	n = min(n, len(t.nodes))
	// Nodes that were drawn already, that cannot serve, or that are to get less
	// than their share for some time, are drawn and put back: the odds among the
	// others remain what they are.
	for tries := 16 + 8*n; len(into) < n && tries > 0; tries-- {
		i := t.drawOne(table, a)
		a.drew(t.weight)
		e := t.nodes[i]
		if slices.Contains(into, e) || a.yields(e) {
			continue
		}
		if a.selective() && !a.canServe(e) {
			if e = t.standIn(i, a, nil); e == nil || slices.Contains(into, e) {
				continue
			}
		}
		into = append(into, e)
		a.arrived()
	}
	if len(into) < n {
		into = t.drawRest(n, a, into)
	}
	return into
}

// drawOne draws an index by weight.
func (t *tier) drawOne(table aliasTable, a *attempt) int {
	x := a.builder.Random()
	i := (x >> 32) * uint64(len(t.nodes)) >> 32
	if table != nil {
		if slot := table[i]; uint32(x) > slot.keep {
			i = uint64(slot.other)
		}
	}
	return int(i)
}

// drawRest completes a draw by a look at every node, when most draws are in vain:
// because few nodes can serve, or one outweighs all others.
func (t *tier) drawRest(n int, a *attempt, into []*discovery.Entry) []*discovery.Entry {
	// The order of exponential times whose rates are the weights is that of a
	// weighted draw without replacement.
	type arrival struct {
		time float64 // its logarithm, because a weight may be so small that the time is infinite
		node *discovery.Entry
	}
	var first []arrival // sorted
	want := n - len(into)
	for _, e := range t.nodes {
		if slices.Contains(into, e) || !a.canServe(e) {
			continue
		}
		next := arrival{math.Log(-math.Log(1-unit(a.builder.Random()))) - math.Log(e.Weight()) - math.Log(a.builder.Share(e)), e}
		if len(first) == want {
			if first[want-1].time <= next.time {
				continue
			}
			first = first[:want-1]
		}
		i, _ := slices.BinarySearchFunc(first, next, func(x, y arrival) int { return cmp.Compare(x.time, y.time) })
		first = slices.Insert(first, i, next)
	}
	for _, next := range first {
		into = append(into, next.node)
		a.arrivedIn(math.Exp(next.time))
	}
	for _, e := range t.reserve {
		if len(into) < n && a.canServe(e) && !slices.Contains(into, e) {
			into = append(into, e)
			a.drew(e.Weight())
			a.arrived()
		}
	}
	return into
}

// standIn returns the node of the reserve that takes the place of the i-th while
// that one cannot serve, nil if there is none: the same one each time, and
// different ones for different nodes as far as possible.
func (t *tier) standIn(i int, a *attempt, taken []*discovery.Entry) *discovery.Entry {
	for j := range t.reserve {
		e := t.reserve[(i+j)%len(t.reserve)]
		if a.canServe(e) && !slices.Contains(taken, e) {
			return e
		}
	}
	return nil
}
