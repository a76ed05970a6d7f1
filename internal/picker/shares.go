package picker

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/balance"
)

// Shares has nodes that are drawn by what they could serve, as the loads that they report
// say: see balance.Shares. Of two that are drawn it is the one with the fewer requests in
// flight over its share, for what goes wrong between two reports. Beside it there are others,
// to be so many in all, that are drawn by weight.
type Shares int

// sharesCount is for how long shares that were computed are used, as in gRFC A58. At
// 10,000 nodes they take about a thousandth of that.
const sharesCount = time.Second

// shares are those of the nodes of a tier, as of a time.
type shares struct {
	of    []float64 // by the index of the node; together they are what the nodes weigh
	table aliasTable
	until time.Duration
}

// shareBytes is what a node takes.
const shareBytes = 8 + 8

func (n Shares) pick(t *tier, a attempt, into []*discovery.Entry) []*discovery.Entry {
	if e := t.byShare(&a); e != nil {
		into = append(into, e)
	}
	if len(into) == int(n) {
		return into
	}
	if len(into) > 0 {
		return t.draw(int(n), a.standIns(), into)
	}
	return t.draw(int(n), &a, into)
}
func (Shares) prepare(t *tier, b *Builder) { t.weights(); t.currentShares(b) }
func (Shares) size(t *tier) int            { return len(t.nodes) * (shareBytes + pointerBytes) }

// byShare returns the less busy of two nodes that are drawn, nil if few can serve.
func (t *tier) byShare(a *attempt) *discovery.Entry {
	t.weights()
	s := t.currentShares(a.builder)
	var best *discovery.Entry
	var least float64
	for range drawShares {
		i := t.drawOne(s.table, a)
		a.drew(t.weight)
		e := t.nodes[i]
		if a.yields(e) {
			continue
		}
		if a.selective() && !a.canServe(e) {
			if e = t.standIn(i, a, nil); e == nil {
				continue
			}
		}
		busyness := float64(a.builder.InFlight(e))
		if busyness == 0 {
			a.firstIdle()
			return e
		}
		if busyness /= s.of[i]; best != nil {
			if busyness < least {
				best, least = e, busyness
			}
			break
		}
		best, least = e, busyness
	}
	if best != nil {
		a.bestOf(least, t.weight)
	}
	return best
}

// scale has the shares add up to what the nodes weigh, so that they can be held against
// those of another source.
func (s *shares) scale(members []balance.Member) {
	var sum, weight float64
	for i, share := range s.of {
		sum += share
		weight += members[i].Weight
	}
	for i := range s.of {
		s.of[i] *= weight / sum
	}
}

// drawShares is how often is drawn for two nodes that can serve.
const drawShares = 16

// currentShares returns the shares of the nodes. The attempt that finds them old computes
// them, and the others use the old ones meanwhile.
func (t *tier) currentShares(b *Builder) *shares {
	now := b.Clock()
	s := t.shares.Load()
	if s != nil && now < s.until {
		return s
	}
	if s == nil {
		t.computing.Lock()
	} else if !t.computing.TryLock() {
		return s
	}
	defer t.computing.Unlock()
	if s = t.shares.Load(); s != nil && now < s.until {
		return s
	}
	members := make([]balance.Member, len(t.nodes))
	for i, e := range t.nodes {
		members[i] = b.Usage(e, now)
	}
	s = &shares{until: now + sharesCount, of: balance.Shares(members, make([]float64, 0, len(t.nodes)))}
	s.scale(members)
	s.table = newAliasTable(s.of)
	t.shares.Store(s)
	return s
}

// sharedTier is what Shares keeps with a tier.
type sharedTier struct {
	computing sync.Mutex // held while shares are computed
	shares    atomic.Pointer[shares]
}
