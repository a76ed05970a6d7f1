package picker

import (
	"slices"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/balance"
)

// Soonest has the node from which an answer is to be expected soonest, of some that are
// drawn by weight, or of all where they are no more: see balance.Soonest. Beside it there
// are others, to be so many in all, that are drawn.
type Soonest int

// compared is how many nodes are compared. Where two in ten are slow, all that are drawn
// are so for one request in six hundred.
const compared = 4

func (n Soonest) pick(t *tier, a attempt, into []*discovery.Entry) []*discovery.Entry {
	t.weights()
	if a.race != nil {
		a.race.Weight = t.weight
		a.race = nil // no time of arrival decides
	}
	if e := t.soonest(&a); e != nil {
		into = append(into, e)
	}
	if len(into) == int(n) {
		return into
	}
	return t.draw(int(n), &a, into) // of the reserve, where nobody else can serve
}
func (Soonest) prepare(t *tier, _ *Builder) { t.weights() }
func (Soonest) size(t *tier) int            { return len(t.nodes) * pointerBytes }

// soonest returns the best of those that are compared, nil if none of them can serve.
func (t *tier) soonest(a *attempt) *discovery.Entry {
	var room [compared]*discovery.Entry
	nodes := room[:0]
	all := len(t.nodes) <= compared
	if all {
		nodes = t.capable(a, nodes)
	} else {
		nodes = t.draw(compared, a, nodes)
	}
	if len(nodes) < 2 {
		if len(nodes) == 0 {
			return nil
		}
		return nodes[0]
	}
	now := a.builder.Clock()
	var candidates [compared]balance.Candidate
	for i, e := range nodes {
		c, share := &candidates[i], a.builder.Share(e)
		c.Cost, c.InFlight = a.builder.Cost(e, now)
		c.Weight, c.New = e.Weight()*share, share < 1
		if all {
			c.Odds = c.Weight // else it is the first that was drawn, by its weight
		}
	}
	return nodes[balance.Soonest(candidates[:len(nodes)], a.builder.Random)]
}

// capable appends the nodes that can serve, and those that stand in for the others.
func (t *tier) capable(a *attempt, into []*discovery.Entry) []*discovery.Entry {
	for i, e := range t.nodes {
		if a.selective() && !a.canServe(e) {
			if e = t.standIn(i, a, into); e == nil {
				continue
			}
		}
		if !slices.Contains(into, e) {
			into = append(into, e)
		}
	}
	return into
}
