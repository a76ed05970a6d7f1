package discovery

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// DefaultLossGuard is the share of a directory's nodes, in percent, beyond which
// those that lapse together are suspect; see [Options].LossGuard.
const DefaultLossGuard = 50

const (
	// Fewer nodes than this may lapse together in any small fleet.
	guardFloor = 3

	// Who may use which node is looked at again so often, while nodes lapse.
	recountEvery = 10 * time.Second
)

// presence is whether a node in use counts as alive.
type presence uint8

const (
	alive    presence = iota
	suspect           // its lease ran out, and it has not been dialled yet
	held              // its lease ran out, and it accepts connections
	restored          // it comes from the saved list, and it accepts connections
)

// state is what a node of that presence is shown as, "" for what its record says.
func (p presence) state() State {
	switch p {
	case held:
		return StateHeld
	case restored:
		return StateRestored
	default:
		return ""
	}
}

// A suspicion decides what becomes of nodes whose lease ran out (the loss guard,
// guarantee 3 of the design; Eureka's self-preservation and Envoy's panic threshold are
// its like). When one node lapses, it is dead. When most of a fleet lapses within one
// lease, it is more likely that something is wrong with what carries the heartbeats.
// Those nodes are suspect: each is dialled, and held for as long as it accepts
// connections. So it is when most nodes of a service lapse, or the last that it has,
// however large the rest of the fleet is. It ends when a node is heard, or does not
// accept, or has been the exception for a lease: most others are heard, and it is not.
//
// It acts on no node: its owner tells it of them, and carries out what it decides.
type suspicion struct {
	guard  int               // in percent; 0: nobody is suspect
	usable func(*Entry) bool // whether some request may reach the node

	counts    *counts
	recountAt time.Duration // when all are counted anew, if anything lapses
	// Those that lapsed and are gone. Those of the last lease are part of the same
	// event as what lapses now, and are dialled with it.
	lapsed lapsedNodes
	// What a first listing shows that had run out before.
	overdue     map[string]*lapsedNode
	overdueRoom room
}

func newSuspicion(guard int, usable func(*Entry) bool) *suspicion {
	c := newCounts()
	return &suspicion{
		guard: max(guard, 0), usable: usable, counts: c, recountAt: now(),
		lapsed:  newLapsedNodes(maxLapsed, maxLapsedBytes, c),
		overdue: make(map[string]*lapsedNode),
	}
}

// reset forgets all nodes.
func (s *suspicion) reset() { *s = *newSuspicion(s.guard, s.usable) }

// matters reports whether a node is one that may be lost. Without a guard nobody asks
// whether it may be used.
func (s *suspicion) matters(e *Entry) bool { return s.guard == 0 || s.usable(e) }

// mattersPerhaps is matters for a node that is not in use: its host name has not been
// looked up.
func (s *suspicion) mattersPerhaps(e *Entry) bool { return e.Address() == "" || s.matters(e) }

// count counts a node in use as it is now.
func (s *suspicion) count(t *tracked) {
	is := counted{}
	if s.matters(t.entry) {
		is = counted{t.entry.Node.Service(), count{nodes: 1}}
		if t.presence == suspect || t.presence == held {
			is.suspects = 1
		}
	}
	s.counts.update(&t.counted, is)
}

// uncount ends count for a node that is not in use any more.
func (s *suspicion) uncount(t *tracked) { s.counts.update(&t.counted, counted{}) }

// recount counts all nodes anew, from time to time: who may use them can change.
func (s *suspicion) recount(nodes map[string]*tracked, at time.Duration) {
	if s.guard == 0 || at < s.recountAt {
		return
	}
	s.recountAt = at + recountEvery
	for _, t := range nodes {
		s.count(t)
	}
}

// losses are the nodes that lapsed lately or lapse now, of all or of a service.
type losses struct {
	lost, all int // so many, of so many in use or lapsed lately
	gone      int // of both, those that lapsed lately and are not in use
	fresh     int // those that lapse now and were not suspect before
}

func lossesOf(c count) *losses {
	return &losses{lost: c.suspects + c.gone, all: c.nodes + c.gone, gone: c.gone}
}

// begins reports whether nobody was suspect before.
func (l *losses) begins() bool { return l.fresh == l.lost-l.gone }

// isMost reports whether so many of all nodes are more than the guard believes.
func (s *suspicion) isMost(lost, all int) bool { return s.guard > 0 && lost*100 > s.guard*all }

// isMass reports whether too many of all nodes lapse at once.
func (s *suspicion) isMass(l *losses) bool { return l.lost >= guardFloor && s.isMost(l.lost, l.all) }

// isOutage reports whether too many nodes of a service lapse at once: too many as of
// all nodes, or the last.
func (s *suspicion) isOutage(l *losses) bool {
	return s.isMass(l) || s.guard > 0 && l.lost > 0 && l.lost == l.all
}

// isMostInUse reports whether most nodes in use are suspect or lapse now, or all are: a
// guard of 100 percent suspects nothing but that.
func (s *suspicion) isMostInUse(l *losses) bool {
	lost, all := l.lost-l.gone, l.all-l.gone
	return s.isMost(lost, all) || lost == all
}

// event is what lapses at once.
type event struct {
	all      *losses
	services map[string]*losses // those that lose something
	mass     bool
	outages  []string // the services of which too many lapse at once, unless it is a mass lapse

	remove []removal
	keep   []*tracked // to be dialled, and to stay meanwhile
}

// removal is a node that is to be removed.
type removal struct {
	t     *tracked
	why   string // "" for what the caller knows
	asked bool   // it need not be dialled if others lapse with it
}

func (s *suspicion) newEvent() *event {
	return &event{all: lossesOf(s.counts.all), services: make(map[string]*losses)}
}

// of returns the losses of a node's service.
func (s *suspicion) of(v *event, e *Entry) *losses {
	service := e.Node.Service()
	if v.services[service] == nil {
		v.services[service] = lossesOf(s.counts.of(service))
	}
	return v.services[service]
}

// judge tells whether an event is a mass lapse, or else of which services it is an outage,
// once its losses are known.
func (s *suspicion) judge(v *event) {
	if v.mass = s.isMass(v.all); v.mass {
		return
	}
	for _, service := range slices.Sorted(maps.Keys(v.services)) {
		if s.isOutage(v.services[service]) {
			v.outages = append(v.outages, service)
		}
	}
}

// decide decides about nodes in use whose leases ran out together, at a time.
func (s *suspicion) decide(lapsing []*tracked, at time.Duration) *event {
	v := s.newEvent()
	for _, t := range lapsing {
		s.count(t)
		of := s.of(v, t.entry)
		if t.counted.nodes > 0 && t.counted.suspects == 0 {
			for _, l := range []*losses{v.all, of} {
				l.lost++
				l.fresh++
			}
		}
	}
	s.judge(v)
	for _, t := range lapsing {
		of := s.of(v, t.entry)
		many := v.mass || s.isOutage(of)
		switch {
		case t.counted.nodes == 0:
			v.remove = append(v.remove, removal{t: t}) // no request would reach it, and no probe may
		case t.presence == suspect || t.presence == held:
			if s.isException(t, v.all, of, at) {
				// It answered: should the others lapse after all, it is asked with them.
				v.remove = append(v.remove, removal{t, "its lease ran out, and the others are heard again", many})
			} else {
				v.keep = append(v.keep, t)
			}
		case v.mass || many && t.presence != restored:
			v.keep = append(v.keep, t)
		default:
			// One that is only restored, and that no listing showed, is no part of what
			// its service has lost.
			v.remove = append(v.remove, removal{t: t, asked: t.presence == restored})
		}
	}
	return v
}

// isException reports whether a node has been the only suspect for a lease: most others,
// of all and of its service, are heard, and do not lapse with it. It is one dead node
// then, whatever accepts its connections.
func (s *suspicion) isException(t *tracked, all, service *losses, at time.Duration) bool {
	switch {
	case s.isMostInUse(all) || s.isMostInUse(service):
		t.alone = 0
	case t.alone == 0:
		t.alone = at
	default:
		return at-t.alone >= t.entry.lease
	}
	return false
}

// askLapsed returns the nodes that lapsed shortly before an event, belong to it and were
// not asked: to be dialled, and brought back if they accept connections.
func (s *suspicion) askLapsed(v *event) (asked []*lapsedNode) {
	if v.mass {
		return s.lapsed.ask()
	}
	for _, service := range v.outages {
		asked = append(asked, s.lapsed.askOf(service)...)
	}
	return asked
}

// addOverdue keeps the node of a record that had run out when a first listing showed it
// up to the end of that.
func (s *suspicion) addOverdue(n *lapsedNode) {
	had := 0
	if was := s.overdue[n.id()]; was != nil {
		had = was.room
	} else if len(s.overdue) >= MaxNodes {
		return
	}
	if s.overdueRoom.refuses(had, &n.entry.Node) == nil {
		n.room = s.overdueRoom.take(had, &n.entry.Node)
		s.overdue[n.id()] = n
	}
}

// decideOverdue decides at the end of the first listing about what it showed as overdue
// and is not in use by then, and returns who of them is to be dialled.
func (s *suspicion) decideOverdue(inUse map[string]*tracked, at time.Duration) (v *event, asked []*lapsedNode) {
	v = s.newEvent()
	var overdue []*lapsedNode
	for id, n := range s.overdue {
		if inUse[id] != nil {
			continue
		}
		overdue = append(overdue, n)
		of := s.of(v, n.entry)
		if s.mattersPerhaps(n.entry) {
			for _, l := range []*losses{v.all, of} {
				l.lost++
				l.all++
			}
		}
	}
	s.overdue, s.overdueRoom = make(map[string]*lapsedNode), room{}
	slices.SortFunc(overdue, func(a, b *lapsedNode) int { return cmp.Compare(a.id(), b.id()) })
	s.judge(v)
	for _, n := range overdue {
		n.room = 0
		switch {
		case !s.mattersPerhaps(n.entry):
			s.lapsed.add(n, at, false)
		case v.mass || s.isOutage(s.of(v, n.entry)):
			n.counts = n.entry.lease
			if s.lapsed.addAsked(n, at) {
				asked = append(asked, n)
			}
		default:
			n.counts = n.entry.due() + n.entry.lease - at
			s.lapsed.add(n, at, false)
		}
	}
	return v, asked
}
