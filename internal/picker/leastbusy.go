package picker

import (
	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// LeastBusy has the node with the fewest requests in flight over its weight, and among
// equals one that is drawn by weight. Beside it there are others, to be so many in all,
// that are drawn.
//
// A node without a request in flight has the fewest there can be, and is found by some
// draws while not nearly all nodes are busy. Only then all are looked at, which is
// exact, unless they are too many: then it is the best of those that were drawn.
type LeastBusy int

const (
	// idleDraws is how many nodes are drawn in the hope of an idle one.
	idleDraws = 8
	// maxLook is up to how many nodes all are looked at: that takes about 5 µs.
	maxLook = 500
)

func (n LeastBusy) pick(t *tier, a attempt, into []*discovery.Entry) []*discovery.Entry {
	e := t.leastBusyDrawn(&a)
	if e == nil || a.builder.InFlight(e) > 0 && len(t.nodes) <= maxLook {
		e = t.leastBusy(&a)
	}
	if e == nil {
		into = t.draw(int(n), &a, into) // of the reserve
		if a.race != nil && len(into) > 0 {
			a.race.Counts = true
			a.race.Busyness, _ = a.busyness(into[0])
		}
		return into
	}
	if into = append(into, e); len(into) == int(n) {
		return into
	}
	return t.draw(int(n), a.standIns(), into)
}
func (LeastBusy) prepare(t *tier, _ *Builder) { t.weights() }
func (LeastBusy) size(t *tier) int            { return len(t.nodes) * pointerBytes }

// busyness is what nodes are compared by.
func (a *attempt) busyness(e *discovery.Entry) (busyness, weight float64) {
	weight = e.Weight() * a.builder.Share(e)
	return float64(a.builder.InFlight(e)) / weight, weight
}

// leastBusyDrawn returns the best of some nodes that are drawn, the first that is idle;
// nil if none of them can serve.
func (t *tier) leastBusyDrawn(a *attempt) *discovery.Entry {
	table := t.weights()
	var best *discovery.Entry
	var least float64
	for range idleDraws {
		i := t.drawOne(table, a)
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
		busyness, _ := a.busyness(e)
		if busyness == 0 {
			a.firstIdle()
			return e
		}
		if best == nil || busyness < least {
			best, least = e, busyness
		}
	}
	if best != nil {
		a.bestOf(least, t.weight) // of which some have as few, nobody knows how many
	}
	return best
}

// leastBusy returns the best of all nodes, nil if none can serve.
func (t *tier) leastBusy(a *attempt) *discovery.Entry {
	var best *discovery.Entry
	var least, sum float64 // of the weights of those that are as good
	for i, e := range t.nodes {
		busyness, weight := a.busyness(e)
		if best != nil && busyness > least && len(t.reserve) == 0 {
			continue // whether it can serve or not
		}
		if a.selective() && !a.canServe(e) {
			if e = t.standIn(i, a, nil); e == nil {
				continue
			}
			busyness, weight = a.busyness(e)
		}
		switch {
		case best == nil || busyness < least:
			best, least, sum = e, busyness, weight
		case busyness == least:
			if sum += weight; unit(a.builder.Random())*sum < weight {
				best = e
			}
		}
	}
	if best != nil {
		a.bestOf(least, sum)
	}
	return best
}
