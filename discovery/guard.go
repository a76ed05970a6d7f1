package discovery

import (
	"cmp"
	"log/slog"
	"maps"
	"slices"
	"time"
)

// DefaultLossGuard is the share of a directory's nodes, in percent, beyond which
// their lapse is doubted.
const DefaultLossGuard = 50

const (
	// Fewer nodes than this may lapse together in any small fleet.
	guardFloor = 3

	// Who may use which node is looked at again so often, while nodes lapse.
	recountEvery = 10 * time.Second
)

// The loss guard (guarantee 3 of the design) stands between a lease that ran out
// and the end of its node. When one node lapses, it is dead. When most of a fleet
// lapses within one lease, it is more likely that something is wrong with what
// carries the heartbeats, and the nodes themselves are asked: each is dialled, and
// stays for as long as it accepts connections. So it is when most nodes of a service
// lapse, or the last that it has, however large the rest of the fleet is. It ends
// when a node is heard, or does not accept, or has been the exception for a lease:
// most others are heard, and it is not.

// doubt is what the guard thinks of a node in use.
type doubt uint8

const (
	trusted  doubt = iota
	doubted        // its lease ran out, and it has not been dialled yet
	held           // its lease ran out, and it accepts connections
	restored       // it was remembered, and it accepts connections
)

// state is what a node in doubt is shown as, "" for what its record says.
func (d doubt) state() State {
	switch d {
	case held:
		return StateHeld
	case restored:
		return StateRestored
	default:
		return ""
	}
}

// guard is the part of a loop that doubts.
type guard struct {
	// What ran out in the registry, in this batch of events.
	expired []*tracked
	// The nodes that lapsed and are gone. Those of the last lease are part of the
	// same event as what lapses then, and are dialled with it.
	graves graveyard
	// What a first listing showed that had run out before.
	overdue     map[string]*tracked
	overdueRoom room
	// How many nodes there are, and how many of them are doubted or held.
	census    census
	recountAt time.Duration // when all are counted anew, if anything lapses
}

func newGuard() guard {
	return guard{
		census: newCensus(), recountAt: now(),
		graves:  newGraveyard(maxGraves, maxGraveBytes),
		overdue: make(map[string]*tracked),
	}
}

// massive reports whether so many of all nodes are too many to lapse at once.
func (l *loop) massive(lost, all int) bool {
	return lost >= guardFloor && l.most(lost, all)
}

// most reports whether so many of all nodes are more than the loss guard believes.
func (l *loop) most(lost, all int) bool {
	return *l.options.LossGuard > 0 && lost*100 > *l.options.LossGuard*all
}

// outage reports whether so many of a service's nodes are too many to lapse at once:
// too many as of a directory, or all that there are.
func (l *loop) outage(lost, all int) bool {
	return l.massive(lost, all) || *l.options.LossGuard > 0 && lost > 0 && lost == all
}

// losses are the nodes that lapsed lately or are about to, of a directory or of one
// of its services.
type losses struct {
	lost, all int
	gone      int // of both, those that lapsed lately and are not in use
	fresh     int // those about to lapse that were not in doubt before
}

// lossesOf returns the losses of a service, beside those that lapse now.
func (l *loop) lossesOf(service string) losses {
	t, gone := l.census.of(service), l.graves.lapsedOf(service)
	return losses{lost: t.doubted + gone, all: t.nodes + gone, gone: gone}
}

// lossesOfAll is lossesOf for the whole directory.
func (l *loop) lossesOfAll() losses {
	gone := l.graves.lapsed()
	return losses{lost: l.census.all.doubted + gone, all: l.census.all.nodes + gone, gone: gone}
}

// usable reports whether some request may reach the node. Without the loss guard
// nobody asks.
func (l *loop) usable(e *Entry) bool {
	return *l.options.LossGuard <= 0 || l.dialer.recordsOnly || e.Address() != "" && l.dialer.permit(e)
}

// perhapsUsable is usable for a node that is not in use: its host name has not been
// looked up.
func (l *loop) perhapsUsable(e *Entry) bool { return e.Address() == "" || l.usable(e) }

// count has the census know of a node in use as it is now.
func (l *loop) count(t *tracked) {
	is := counted{}
	if l.usable(t.entry) {
		is = counted{service: t.entry.Node.Service(), nodes: 1}
		if t.doubt == doubted || t.doubt == held {
			is.doubted = 1
		}
	}
	l.census.count(&t.counted, is)
}

// recount counts all nodes anew, from time to time: who may use them can change.
func (l *loop) recount(at time.Duration) {
	if *l.options.LossGuard <= 0 || at < l.recountAt {
		return
	}
	l.recountAt = at + recountEvery
	for _, t := range l.table.nodes {
		l.count(t)
	}
}

// settle decides about the records that ran out in the registry in one batch of
// events, so that a mass lapse is seen as one.
func (l *loop) settle() {
	if len(l.expired) == 0 {
		return
	}
	var lapsing []*tracked
	for _, t := range l.expired {
		if t.expired && l.table.nodes[t.entry.Node.ID] == t {
			t.expired = false
			lapsing = append(lapsing, t)
		}
	}
	l.expired = nil
	l.lapse(lapsing, "its record ran out in the registry")
}

// lapse ends nodes whose lease ran out, or has them dialled first if there are too
// many of them: of all nodes, or of a service.
func (l *loop) lapse(lapsing []*tracked, reason string) {
	if len(lapsing) == 0 {
		return
	}
	at := now()
	l.graves.expire(at)
	l.recount(at)
	all, services := l.lossesOfAll(), make(map[string]losses)
	for _, t := range lapsing {
		l.count(t)
		service := t.entry.Node.Service()
		of, known := services[service]
		if !known {
			of = l.lossesOf(service)
		}
		if t.counted.nodes > 0 && t.counted.doubted == 0 {
			of.lost, of.fresh = of.lost+1, of.fresh+1
			all.lost, all.fresh = all.lost+1, all.fresh+1
		}
		services[service] = of
	}
	massive := l.massive(all.lost, all.all)
	if massive && all.fresh == all.lost-all.gone {
		l.log.Warn("most nodes lapsed at once; those that accept connections stay",
			"lapsed", all.lost, "nodes", all.all)
	}
	var kept []*tracked
	for _, t := range lapsing {
		of := services[t.entry.Node.Service()]
		switch {
		case t.counted.nodes == 0:
			l.depart(t, reason, false) // no request would reach it, and no probe may
		case t.doubt == doubted || t.doubt == held:
			if l.forlorn(t, all, of, at) {
				// It answered: should the others lapse after all, it is asked with them.
				l.depart(t, "its lease ran out, and the others are heard again", massive || l.outage(of.lost, of.all))
				continue
			}
			kept = append(kept, t)
		case massive || l.outage(of.lost, of.all) && t.doubt != restored:
			kept = append(kept, t)
		default:
			// One that is only remembered, and that no listing showed, is no part of
			// what its service has lost.
			l.depart(t, reason, t.doubt == restored)
		}
	}
	for _, t := range kept {
		l.doubtful(t)
	}
	for _, t := range kept {
		l.endConflict(t) // else the other would answer for it
	}
	var graves []*grave
	if massive {
		graves = l.graves.ask()
	} else {
		for _, service := range slices.Sorted(maps.Keys(services)) {
			of := services[service]
			if !l.outage(of.lost, of.all) {
				continue
			}
			graves = append(graves, l.graves.askOf(service)...)
			if of.fresh == of.lost-of.gone {
				l.reporter.line(slog.LevelWarn, "the last nodes of a service lapsed; those that accept connections stay",
					"service", service, "lapsed", of.lost, "nodes", of.all)
			}
		}
	}
	for _, g := range graves {
		if l.graves.await(g) {
			l.probeLapsed(g)
		} else {
			l.graves.askAgain(g)
		}
	}
}

// forlorn reports whether a node is in doubt alone: most others, of all and of its
// service, have been heard for a lease, and do not lapse with it. It is one dead node
// then, whatever accepts its connections.
func (l *loop) forlorn(t *tracked, all, service losses, at time.Duration) bool {
	switch {
	case l.mostInUse(all) || l.mostInUse(service):
		t.alone = 0
	case t.alone == 0:
		t.alone = at
	default:
		return at-t.alone >= t.entry.lease
	}
	return false
}

// mostInUse reports whether most nodes in use are in doubt or lapse now, or all are: a
// loss guard of 100 percent doubts only that.
func (l *loop) mostInUse(c losses) bool {
	lost, all := c.lost-c.gone, c.all-c.gone
	return l.most(lost, all) || lost == all
}

// doubtful has a node dialled before its fate is decided. It stays meanwhile.
func (l *loop) doubtful(t *tracked) {
	if t.doubt == trusted || t.doubt == restored {
		t.doubt, t.alone = doubted, 0
		l.count(t)
	}
	l.extend(t)
	if t.probe == nil {
		l.probeSuspect(t)
	}
}

// extend gives a node one lease more.
func (l *loop) extend(t *tracked) {
	t.entry.liveness.renewed.Store(int64(now()))
	l.table.requeue(t)
}

// depart removes a node that lapsed, and keeps its record for a while. If it was
// asked itself, and did not answer, it need not be asked again.
func (l *loop) depart(t *tracked, reason string, asked bool) {
	at := now()
	until := at // no request reached it: it is no loss
	if t.counted.nodes > 0 {
		until += t.entry.lease
	}
	g := t.grave(until)
	l.remove(t, ChangeLapsed, reason)
	l.graves.bury(g, at, asked)
}

// grave returns what is kept of a node that lapsed.
func (t *tracked) grave(until time.Duration) *grave {
	return &grave{entry: t.entry.in(trusted), key: t.key, revision: t.revision, watch: t.watch, until: until}
}

// node returns the node of a grave, not in use.
func (g *grave) node() *tracked {
	return &tracked{entry: g.entry, key: g.key, revision: g.revision, watch: g.watch}
}

// hold keeps a node in use that accepts connections.
func (l *loop) hold(t *tracked) {
	l.extend(t)
	if t.doubt != held {
		t.doubt = held
		l.count(t)
		l.mark(t)
		reason := "its lease ran out with those of many others or of its whole service"
		if !l.dialer.recordsOnly {
			reason += ", and it accepts connections"
		}
		l.reporter.node(ChangeHeld, t.entry, reason)
	}
}

// mark makes the doubt about a node, or its end, visible.
func (l *loop) mark(t *tracked) {
	l.show(t, t.entry.in(t.doubt))
}

// readmit brings a node back that lapsed and accepts connections after all.
func (l *loop) readmit(g *grave) {
	l.graves.drop(g)
	t := g.node()
	if !l.table.admits(&t.entry.Node, t.key) || l.addressConflict(t) != nil {
		return
	}
	t.entry.liveness.renewed.Store(int64(now()))
	if g.saved {
		t.doubt = restored
		l.insert(t)
		l.reporter.node(ChangeRestored, t.entry, "it was listed before, the registry cannot list everybody, and it accepts connections")
	} else {
		l.insert(t)
		l.hold(t)
	}
}

// revive brings a node back that lapsed and is heard again, by the record that it
// was known by last: its heartbeat names no endpoint. It returns nil where there is
// none, or where its address is another node's now.
func (l *loop) revive(id string) *tracked {
	l.graves.expire(now())
	g := l.graves.byID[id]
	if g == nil || !l.table.admits(&g.entry.Node, g.key) {
		return nil
	}
	t := g.node()
	if l.addressConflict(t) != nil {
		return nil
	}
	l.graves.drop(g)
	t.entry.liveness.renewed.Store(int64(now()))
	l.enter(t, "it is heard again")
	return t
}

// trust ends the doubt about a node in use: it was heard.
func (l *loop) trust(t *tracked) {
	t.expired = false
	if t.doubt == trusted {
		return
	}
	shown := t.doubt.state() != ""
	l.calm(t)
	l.count(t)
	if shown {
		l.mark(t)
		l.reporter.node(ChangeUpdated, t.entry, "it was heard again")
	}
}

// calm forgets that a node was doubted.
func (l *loop) calm(t *tracked) {
	t.doubt = trusted
	t.probe.withdraw()
	t.probe = nil
}

// forget makes sure that a record does not come back of which the registry said
// something since it lapsed.
func (l *loop) forget(record string) {
	if g := l.graves.byRecord[record]; g != nil {
		l.graves.drop(g)
	}
}

// keepOverdue keeps a record until the end of the first listing that had run out.
func (l *loop) keepOverdue(t *tracked) {
	id, had := t.entry.Node.ID, 0
	was, known := l.overdue[id]
	if known {
		had = was.excess
	}
	if !known && len(l.overdue) >= MaxNodes || l.overdueRoom.refuses(had, &t.entry.Node) != nil {
		return
	}
	t.excess = l.overdueRoom.take(had, &t.entry.Node)
	l.overdue[id] = t
}

func (l *loop) forgetOverdue() {
	l.overdue, l.overdueRoom = make(map[string]*tracked), room{}
}

// judgeOverdue decides about what the first listing showed that had run out by the
// registry's own clock.
func (l *loop) judgeOverdue() {
	at := now()
	var candidates []*tracked
	for id, t := range l.overdue {
		if l.table.nodes[id] == nil {
			candidates = append(candidates, t)
		}
	}
	l.forgetOverdue()
	slices.SortFunc(candidates, func(a, b *tracked) int { return cmp.Compare(a.entry.Node.ID, b.entry.Node.ID) })
	all, services := l.lossesOfAll(), make(map[string]losses)
	for _, t := range candidates {
		service := t.entry.Node.Service()
		of, known := services[service]
		if !known {
			of = l.lossesOf(service)
		}
		if l.perhapsUsable(t.entry) {
			of.lost, of.all = of.lost+1, of.all+1
			all.lost, all.all = all.lost+1, all.all+1
		}
		services[service] = of
	}
	massive := l.massive(all.lost, all.all)
	if massive {
		l.log.Warn("most records of the registry are overdue; nodes that accept connections are used",
			"overdue", all.lost, "nodes", len(l.table.nodes))
	}
	for _, t := range candidates {
		of := services[t.entry.Node.Service()]
		switch {
		case !l.perhapsUsable(t.entry):
			l.graves.bury(t.grave(at), at, false)
		case massive || l.outage(of.lost, of.all):
			if g := t.grave(at + t.entry.lease); l.graves.buryAsked(g, at) {
				l.probeLapsed(g)
			}
		default:
			l.graves.bury(t.grave(t.entry.due()+t.entry.lease), at, false)
		}
	}
}

// probeSuspect has a node in use dialled whose lease ran out, and then decides about it.
func (l *loop) probeSuspect(t *tracked) {
	t.probe = l.prober.ask(func() *Entry { return t.entry }, func(a answer) {
		t.probe = nil
		switch {
		case inconclusive(a.err, &t.forbidden):
			l.hold(t)
		case a.err == nil:
			t.forbidden = 0
			l.hold(t)
		case !l.watch.listed:
			// The registry was lost meanwhile, maybe because this machine's network
			// was: leases are suspended.
		default:
			l.depart(t, "its lease ran out and it does not accept connections", true)
		}
	})
}

// probeLapsed has a node dialled that is not in use any more, and brings it back if it
// accepts connections.
func (l *loop) probeLapsed(g *grave) {
	l.prober.ask(func() *Entry { return g.entry }, func(a answer) {
		switch {
		case a.err != nil:
			l.graves.answered(g, now())
			if inconclusive(a.err, new(int)) {
				l.graves.askAgain(g)
			}
		case l.graves.byID[g.id()] == g:
			if len(a.addresses) > 0 {
				l.setAddresses(g.entry.Node.Endpoint.Host(), a.addresses)
			}
			l.readmit(g)
		}
	})
}
