package picker

import (
	"slices"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A Strategy says which nodes of a tier a request gets. It has no state of its own:
// what it derives is kept with the tier.
type Strategy interface {
	// pick appends the nodes for an attempt, none if none of them can serve. It may
	// return a slice of the tier instead.
	pick(t *tier, a attempt, into []*discovery.Entry) []*discovery.Entry
	// prepare derives from the tier what pick needs.
	prepare(t *tier, b *Builder)
	// size returns about how many bytes that takes.
	size(t *tier) int
}

// A Choice is how the nodes for one request are chosen.
type Choice struct {
	Strategy Strategy
	// Key is a value of the request. The strategies that know keys choose the same nodes
	// for it each time, in the same order.
	Key string
	// Else is the choice where a Session has no node.
	Else *Choice
	// Race is told what decides between the nodes and those of other picks; nil if there
	// are none.
	Race *Race
}

// All is the strategy of who chooses among all nodes, sorted by id.
type All struct{}

func (All) pick(t *tier, a attempt, _ []*discovery.Entry) []*discovery.Entry { return t.all(&a) }
func (All) prepare(*tier, *Builder)                                          {}
func (All) size(*tier) int                                                   { return 0 }

// Draw draws so many nodes by weight, one after the other.
type Draw int

func (n Draw) pick(t *tier, a attempt, into []*discovery.Entry) []*discovery.Entry {
	return t.draw(int(n), &a, into)
}
func (Draw) prepare(t *tier, _ *Builder) { t.weights() }
func (Draw) size(t *tier) int            { return len(t.nodes) * pointerBytes } // a slot is as large

// Owners finds so many owners of the key on a ring, and draws where there is no key.
type Owners int

func (n Owners) pick(t *tier, a attempt, into []*discovery.Entry) []*discovery.Entry {
	if a.Key == "" {
		return t.draw(int(n), &a, into)
	}
	return t.owners(Hash(a.Key), int(n), &a, into)
}
func (Owners) prepare(t *tier, _ *Builder) { t.hashRing() }
func (Owners) size(t *tier) int {
	_, points := ringStep(t.nodes)
	return ringBytes(len(t.nodes), points)
}

// Turns gives the nodes their turns. Beside the one whose turn it is there are others,
// to be so many in all, that are drawn: to stand in for it, since their turn is later.
type Turns int

func (n Turns) pick(t *tier, a attempt, into []*discovery.Entry) []*discovery.Entry {
	r := t.turns(a.builder)
	missed := 0
	for range t.nodes {
		turn, again := Turn{rotation: r}, false
		if a.race != nil {
			turn, again = r.takeAgain()
		}
		if !again {
			turn = Turn{rotation: r, index: r.take()}
		}
		missed += turn.missed
		e := t.nodes[turn.index]
		if !again && a.yields(e) {
			missed++
			continue
		}
		if a.selective() && !a.canServe(e) {
			if e = t.standIn(turn.index, &a, nil); e == nil {
				missed++
				continue
			}
		}
		into = append(into, e)
		if a.race != nil {
			turn.missed = missed
			a.race.Turn = turn
		}
		break
	}
	if len(into) == int(n) {
		return into
	}
	return t.draw(int(n), a.standIns(), into)
}
func (Turns) prepare(t *tier, b *Builder) { t.turns(b) }
func (Turns) size(t *tier) int            { return len(t.nodes) * rotationBytes }

// Leading has the first so many nodes by id that can serve.
type Leading int

func (n Leading) pick(t *tier, a attempt, into []*discovery.Entry) []*discovery.Entry {
	for i, e := range t.nodes {
		if len(into) == int(n) {
			break
		}
		if a.selective() && !a.canServe(e) {
			if e = t.standIn(i, &a, into); e == nil {
				continue
			}
		}
		if !slices.Contains(into, e) {
			into = append(into, e)
		}
	}
	return into
}
func (Leading) prepare(*tier, *Builder) {}
func (Leading) size(*tier) int          { return 0 }
