package discovery

import (
	"cmp"
	"log/slog"
)

// lapseExpired has the nodes lapse whose records ran out in the registry in one batch
// of events, together: a mass lapse is seen as one.
func (l *loop) lapseExpired() {
	if len(l.expired) == 0 {
		return
	}
	var lapsing []*tracked
	for _, t := range l.expired {
		if t.expired && l.table.nodes[t.id()] == t {
			t.expired = false
			lapsing = append(lapsing, t)
		}
	}
	l.expired = nil
	l.lapse(lapsing, "its record ran out in the registry")
}

// lapse ends nodes whose lease ran out, or has them dialled first if the suspicion says
// so.
func (l *loop) lapse(lapsing []*tracked, reason string) {
	if len(lapsing) == 0 {
		return
	}
	at := now()
	l.suspicion.lapsed.expire(at)
	l.suspicion.recount(l.table.nodes, at)
	v := l.suspicion.decide(lapsing, at)
	if v.mass && v.all.begins() {
		l.log.Warn("most nodes lapsed at once; those that accept connections stay",
			"lapsed", v.all.lost, "nodes", v.all.all)
	}
	for _, r := range v.remove {
		l.removeLapsed(r.t, cmp.Or(r.why, reason), r.asked)
	}
	for _, t := range v.keep {
		l.suspect(t)
	}
	for _, t := range v.keep {
		l.endConflict(t) // else the other would answer for it
	}
	for _, service := range v.outages {
		if of := v.services[service]; of.begins() {
			l.reporter.line(slog.LevelWarn, "the last nodes of a service lapsed; those that accept connections stay",
				"service", service, "lapsed", of.lost, "nodes", of.all)
		}
	}
	for _, n := range l.suspicion.askLapsed(v) {
		l.probeLapsed(n)
	}
}

// lapseOverdue decides about what the first listing showed that had run out by the
// registry's own clock.
func (l *loop) lapseOverdue() {
	v, asked := l.suspicion.decideOverdue(l.table.nodes, now())
	if v.mass {
		l.log.Warn("most records of the registry are overdue; nodes that accept connections are used",
			"overdue", v.all.lost, "nodes", len(l.table.nodes))
	}
	for _, n := range asked {
		l.probeLapsed(n)
	}
}

// suspect has a node dialled before its fate is decided. It stays meanwhile.
func (l *loop) suspect(t *tracked) {
	if t.presence == alive || t.presence == restored {
		t.presence, t.alone = suspect, 0
		l.suspicion.count(t)
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

// probeSuspect has a node in use dialled, and then holds or removes it.
func (l *loop) probeSuspect(t *tracked) {
	t.probe = l.prober.ask(func() *Entry { return t.entry }, func(a answer) {
		t.probe = nil
		switch {
		case inconclusive(a.err, &t.forbidden), a.err == nil:
			l.hold(t)
		case !l.watch.listed:
			// The registry was lost meanwhile, maybe because this machine's network
			// was: leases are suspended.
		default:
			l.removeLapsed(t, "its lease ran out and it does not accept connections", true)
		}
	})
}

// hold keeps a node in use that accepts connections.
func (l *loop) hold(t *tracked) {
	l.extend(t)
	if t.presence == held {
		return
	}
	t.presence = held
	l.suspicion.count(t)
	l.showPresence(t)
	reason := "its lease ran out with those of many others or of its whole service"
	if !l.prober.recordsOnly {
		reason += ", and it accepts connections"
	}
	l.reporter.node(ChangeHeld, t.entry, reason)
}

// endSuspicion has a node in use be alive: it was heard.
func (l *loop) endSuspicion(t *tracked) {
	t.expired = false
	if t.presence == alive {
		return
	}
	shown := t.presence.state() != ""
	t.endSuspicion()
	l.suspicion.count(t)
	if shown {
		l.showPresence(t)
		l.reporter.node(ChangeUpdated, t.entry, "it was heard again")
	}
}

func (t *tracked) endSuspicion() {
	t.presence = alive
	t.probe.withdraw()
	t.probe = nil
}

// showPresence has the presence of a node shown in the next snapshot.
func (l *loop) showPresence(t *tracked) {
	l.show(t, t.entry.in(t.presence))
}

// removeLapsed removes a node that lapsed, and keeps its record for a while. If it was
// asked itself, and did not answer, it need not be asked again.
func (l *loop) removeLapsed(t *tracked, reason string, asked bool) {
	n := t.lapsed()
	if t.counted.nodes > 0 { // else no request reached it, and it is no loss
		n.counts = t.entry.lease
	}
	l.remove(t, ChangeLapsed, reason)
	l.suspicion.lapsed.add(n, now(), asked)
}

// lapsed returns what is kept of a node that lapsed.
func (t *tracked) lapsed() *lapsedNode {
	return &lapsedNode{entry: t.entry.in(alive), key: t.key, revision: t.revision, watch: t.watch}
}

// probeLapsed has a node dialled that is not in use any more, and brings it back if it
// accepts connections.
func (l *loop) probeLapsed(n *lapsedNode) {
	l.prober.ask(func() *Entry { return n.entry }, func(a answer) {
		switch {
		case a.err != nil:
			l.suspicion.lapsed.answered(n, now())
			if inconclusive(a.err, new(int)) {
				l.suspicion.lapsed.askAgain(n)
			}
		case l.suspicion.lapsed.byID[n.id()] == n:
			if len(a.addresses) > 0 {
				l.setAddresses(n.entry.Node.Endpoint.Host(), a.addresses)
			}
			l.readmit(n)
		}
	})
}

// readmit brings a node back that lapsed and accepts connections after all.
func (l *loop) readmit(n *lapsedNode) {
	l.suspicion.lapsed.drop(n)
	t := l.returning(n)
	switch {
	case t == nil:
	case n.saved:
		t.presence = restored
		l.insert(t)
		l.reporter.node(ChangeRestored, t.entry, "it was listed before, the registry cannot list everybody, and it accepts connections")
	default:
		l.insert(t)
		l.hold(t)
	}
}

// revive brings a node back that lapsed and is heard again, by the record that it
// was known by last: its heartbeat names no endpoint. It returns nil where there is
// none, or where its address is another node's now.
func (l *loop) revive(id string) *tracked {
	l.suspicion.lapsed.expire(now())
	n := l.suspicion.lapsed.byID[id]
	if n == nil {
		return nil
	}
	t := l.returning(n)
	if t == nil {
		return nil
	}
	l.enter(t, "it is heard again")
	return t
}

// returning returns the node to be put into use that lapsed, with a lease from now, nil
// if it may not be.
func (l *loop) returning(n *lapsedNode) *tracked {
	t := &tracked{entry: n.entry, key: n.key, revision: n.revision, watch: n.watch}
	if !l.table.admits(&t.entry.Node, t.key) || l.addressConflict(t) != nil {
		return nil
	}
	t.entry.liveness.renewed.Store(int64(now()))
	return t
}
