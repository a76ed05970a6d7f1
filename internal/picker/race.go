package picker

import (
	"math"
	"slices"
	"sync"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A Race tells of the nodes of one pick what it takes to choose among them and those of
// other picks as one strategy would among all nodes of all of them.
//
// What is drawn arrives at a time. A draw from nodes that weigh w together is an event of
// a Poisson process of the rate w, also where it is in vain; so a node arrives after a
// time that is exponentially distributed, with its weight as the rate, whichever others
// cannot serve. Of several such processes the earliest arrivals are a weighted draw
// without replacement from all (P. S. Efraimidis and P. G. Spirakis, "Weighted random
// sampling with a reservoir", 2006).
type Race struct {
	// Resort says that none of the nodes can serve this request, as far as is known.
	Resort bool
	// Kept says that the first node is the one of the request's session.
	Kept bool
	// Times are when the nodes arrive, in their order. Nodes beyond them stand in.
	Times []float64
	// Counts says that the fewest requests in flight over the weight decide, and times
	// among equals only. Busyness is that of the first node.
	Counts   bool
	Busyness float64
	// Turn is the turn that the first node has.
	Turn Turn
	// Weight is what all nodes weigh together for which the first one stands, where the
	// policy itself decides between it and those of other picks.
	Weight float64

	time float64 // of the last draw
	room [2]float64
}

// Decides reports whether there is something to go by.
func (r *Race) Decides() bool { return r.Kept || len(r.Times) > 0 || r.Turn.Had() }

// reset forgets what a pick that came to nothing has left.
func (r *Race) reset() {
	if r != nil {
		*r = Race{}
		r.Times = r.room[:0]
	}
}

// exponential returns a time that is exponentially distributed.
func exponential(rate float64, random func() uint64) float64 {
	return -math.Log(1-unit(random())) / rate
}

// drew notes a draw from nodes that weigh so much together.
func (a *attempt) drew(weight float64) {
	if a.race != nil {
		a.race.time += exponential(weight, a.builder.Random)
	}
}

// arrived notes that the node of the last draw was appended.
func (a *attempt) arrived() {
	if a.race != nil {
		a.race.Times = append(a.race.Times, a.race.time)
	}
}

// arrivedIn notes that a node was appended that arrives so long after the last draw.
func (a *attempt) arrivedIn(time float64) {
	if a.race != nil {
		a.race.Times = append(a.race.Times, a.race.time+time)
	}
}

// firstIdle notes that the last draw has found an idle node.
func (a *attempt) firstIdle() {
	if a.race != nil {
		a.race.Counts = true
		a.arrived()
	}
}

// bestOf notes the node with the fewest requests in flight, and what those weigh
// together that have as few. Where it is idle, the draws before it were in vain.
func (a *attempt) bestOf(busyness, weight float64) {
	if a.race == nil {
		return
	}
	a.race.Counts, a.race.Busyness = true, busyness
	time := exponential(weight, a.builder.Random)
	if busyness == 0 {
		time += a.race.time
	}
	a.race.Times = append(a.race.Times[:0], time)
}

// standIns returns the attempt for nodes that take no part in the race.
func (a *attempt) standIns() *attempt {
	if a.race == nil {
		return a
	}
	others := *a
	others.race = nil
	return &others
}

// A Turn is that of one node of a rotation.
type Turn struct {
	rotation *rotation
	index    int // of the node
	missed   int // how many turns before it were in vain
}

// Had reports whether there is one.
func (t Turn) Had() bool { return t.rotation != nil }

// PutBack lets another request have the turn.
func (t Turn) PutBack() {
	if !t.Had() {
		return
	}
	t.rotation.mu.Lock()
	defer t.rotation.mu.Unlock()
	if len(t.rotation.back) < maxBack {
		t.rotation.back = append(t.rotation.back, t)
	}
}

// maxBack bounds the turns that wait to be taken again, where many requests have one and
// wait for another source.
const maxBack = 1024

// takeAgain returns the first turn that was put back.
func (r *rotation) takeAgain() (Turn, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.back) == 0 {
		return Turn{}, false
	}
	t := r.back[0]
	r.back = slices.Delete(r.back, 0, 1)
	return t, true
}

// A Share is the part of one rotation in turns that several share.
type Share struct {
	Source int   // whose it is: the same one each time, from 0
	Turn   *Turn // nil: that of upstreams which are no nodes, one turn each
	Others int   // how many those are
	Ready  bool  // whether its turn can be taken
}

func (s *Share) weight() float64 {
	if s.Turn == nil {
		return float64(s.Others)
	}
	return s.Turn.rotation.weight
}

// A merger says whose turn it is where several rotations share the turns, each in
// proportion to what its nodes weigh, and smoothly as nginx does it among servers:
// everybody is credited with its part of each turn, and who has the most credit takes it
// (https://github.com/nginx/nginx/commit/52327e0627f49dbda1e8db695e63a4b0af4448b1).
type merger struct {
	mu     sync.Mutex
	credit []float64 // in turns, by source
	others int       // turns of those that are no nodes
}

// Next returns whose turn it is, -1 if nobody is ready, and of upstreams that are no nodes
// which one's.
func Next(shares []Share) (next, other int) {
	var m *merger
	total := 0.0
	for i := range shares {
		if t := shares[i].Turn; t != nil && m == nil {
			m = t.rotation.merger
		}
		total += shares[i].weight()
	}
	if m == nil {
		return -1, 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for total > 0 {
		next = -1
		for i := range shares {
			s := &shares[i]
			if s.weight() == 0 {
				continue
			}
			for len(m.credit) <= s.Source {
				m.credit = append(m.credit, 0)
			}
			m.credit[s.Source] += s.weight() / total
			if next < 0 || m.credit[s.Source] > m.credit[shares[next].Source] {
				next = i
			}
		}
		s := &shares[next]
		m.credit[s.Source]--
		switch {
		case s.Turn != nil && s.Turn.missed > 0:
			s.Turn.missed--
		case !s.Ready: // the handler knows better, and the others share its turns
			total -= s.weight()
			*s = Share{Source: s.Source}
			if !slices.ContainsFunc(shares, func(s Share) bool { return s.Ready }) {
				return -1, 0
			}
		case s.Turn == nil:
			m.others++
			return next, m.others % s.Others
		default:
			return next, 0
		}
	}
	return -1, 0
}

// weigh returns what nodes weigh together.
func weigh(nodes []*discovery.Entry) (sum float64) {
	for _, e := range nodes {
		sum += e.Weight()
	}
	return sum
}
