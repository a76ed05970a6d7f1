package discovery

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// apply takes in what the registry reported.
func (l *loop) apply(e *Event) {
	l.watch.observe(e.Revision)
	switch e.Type {
	case Put:
		if e.Delay > 0 {
			l.dir.propagation.observe(e.Delay)
		}
		e.ID = e.Node.ID
		record := e.record()
		if err := l.put(e, record); err != nil {
			l.reject(e, err)
		} else {
			l.accept(record)
		}
	case Beat:
		l.beat(e)
	case Left:
		record := e.record()
		t := l.table.byRecord[record]
		if t != nil && e.Instance != "" && e.Instance != t.entry.Node.Instance() {
			return // another process has taken the id, and is there
		}
		l.accept(record)
		l.dropRecord(record)
		if t != nil {
			l.remove(t, ChangeLeft, "its record was removed")
		}
	case Expired:
		record := e.record()
		l.accept(record)
		// In a listing the record may have run out because the registry was
		// away and nobody could renew it: the end of the listing decides.
		if t := l.table.byRecord[record]; t != nil && l.watch.listed {
			t.expired = true
			l.expired = append(l.expired, t)
		}
	case Rejected:
		l.reject(e, e.Err)
	case Synced:
		l.askLocation() // before the nodes are shown
		l.sync(e.Listing)
	case Overridden:
		l.setOverrides(e.Overrides)
	}
}

// beat renews a node whose record is unchanged but for its load.
func (l *loop) beat(e *Event) {
	t := l.table.nodes[e.ID]
	if t == nil && l.watch.listedOnce() {
		t = l.revive(e.ID)
	}
	if t == nil {
		return
	}
	t.watch = l.watch.number
	l.endSuspicion(t)
	t.entry.liveness.renew(e.Load, now())
}

// put takes in a record that can be read. The error is why there is no room for it.
func (l *loop) put(e *Event, record string) error {
	l.suspicion.lapsed.dropRecord(record)
	t := l.table.nodes[e.ID]
	if other := l.table.byRecord[record]; other != nil && other != t {
		l.remove(other, ChangeLeft, "its record was replaced by that of another node")
	}
	// A writer's clock that runs ahead must not lengthen its lease.
	heard := now() - max(e.Age, 0)
	lease := e.Node.LeaseOr(l.dir.options.TTL)
	address, same := "", false // of what is known
	if t != nil {
		address, same = t.entry.Node.Endpoint.Address(), sameRecord(&t.entry.Node, &e.Node)
	}
	switch {
	case t == nil && e.Age >= lease:
		// Overdue by the registry's own clock. It comes back the moment it
		// is heard. Of a first listing all such records are looked at together.
		if !l.watch.listedOnce() && e.Age <= MaxLease {
			l.suspicion.addOverdue(l.newNode(e, lease, heard).lapsed())
		}
		return nil
	case t == nil:
		if err := l.table.full(&e.Node); err != nil {
			return err
		}
		reason := leftOut(&e.Node)
		if reason != "" {
			reason = "metadata left out, no texts: " + reason
		}
		t = l.newNode(e, lease, heard)
		l.enter(t, reason)
	case t.watch == l.watch.number && !l.watch.listed && e.Revision < t.revision:
		return nil // the node stands under two keys and the newer one was listed first
	case same && t.entry.refused == nil:
		l.renew(t, e, lease, heard)
	case !same && e.Age >= lease && heard < time.Duration(t.entry.liveness.heard.Load()):
		// The registry went back to an older state, in which the node was
		// something else, or somewhere. It was heard since, so what it said then
		// stands for as long as it has to be heard again; see compare.
	default:
		if err := l.table.room.refusesGrowth(t, &e.Node); err != nil {
			return err
		}
		l.renew(t, e, lease, heard)
		l.update(t, newEntry(e.Node, lease, t.entry.liveness))
	}
	l.table.setKey(t, e.Key)
	t.revision, t.watch = e.Revision, l.watch.number
	if t.entry.Node.Endpoint.Address() != address {
		l.claimAddress(t)
	}
	return nil
}

// enter puts a node into use that came just now.
func (l *loop) enter(t *tracked, reason string) {
	l.suspicion.lapsed.drop(l.suspicion.lapsed.byID[t.id()])
	l.join(nil, t.entry)
	l.insert(t)
	l.reporter.node(ChangeSeen, t.entry, reason)
}

// renew notes that a node was heard by its record.
func (l *loop) renew(t *tracked, e *Event, lease, heard time.Duration) {
	t.entry.liveness.renew(e.Node.Load, heard)
	if now()-heard < lease {
		l.endSuspicion(t) // not so if a listing repeats what had run out
	}
}

// update gives a node in use the entry of another record.
func (l *loop) update(t *tracked, next *Entry) {
	was := t.entry
	if t.conflict.observe(&was.Node, &next.Node, was.lease, now()) {
		l.log.Warn("two processes announce the same node and overwrite each other's record; give each an id of its own",
			"node", next.Node.ID,
			"endpoints", []string{was.Node.Endpoint.String(), next.Node.Endpoint.String()},
			"writers", []string{writer(&was.Node), writer(&next.Node)})
	}
	l.detach(t)
	l.table.replace(t, next.under(l.overrides.of(next.Node.ID)).in(t.presence))
	l.join(was, t.entry)
	l.attach(t)
	l.reporter.node(ChangeUpdated, t.entry, cmp.Or(difference(&was.Node, &t.entry.Node), "its record is accepted again"))
}

// insert puts a node into use, and is the only one who does: a node in use
//
//   - is as the operators say that are in force at that moment, whatever was known
//     when its entry was made;
//   - is found by its id, by the key of its record where it has one, by its address,
//     and by its host name, whose addresses complete its entry;
//   - has a lease that runs;
//   - is in the next snapshot.
func (l *loop) insert(t *tracked) {
	t.entry = t.entry.under(l.overrides.of(t.id())).in(t.presence)
	l.table.add(t)
	l.attach(t)
}

// attach has a node's host name resolved, counts the node, and has it shown in the next
// snapshot.
func (l *loop) attach(t *tracked) {
	if t.entry.named {
		t.entry = t.entry.at(l.resolver.use(t.id(), t.entry.Node.Endpoint.Host()))
		// A node that is new or says something new may be at another address than the
		// one before it, which may be another service's by now.
		l.resolver.ask(t.id())
		l.reacher.want(t.entry)
	}
	l.suspicion.count(t)
	l.publisher.change(t.id(), t.entry)
}

// detach is the end of attach.
func (l *loop) detach(t *tracked) {
	l.suspicion.uncount(t)
	l.resolver.leave(t.id())
	l.reacher.drop(t.id())
}

// dropRecord makes sure that the node of a record that is gone, or is bad, does not come
// back from where it is known from before.
func (l *loop) dropRecord(record string) {
	l.suspicion.lapsed.dropRecord(record)
	l.restorer.dropRecord(record)
}

// newNode returns the node of a record, not in use.
func (l *loop) newNode(e *Event, lease, heard time.Duration) *tracked {
	return &tracked{entry: newEntry(e.Node, lease, newLiveness(e.Node.Load, heard, heard)), key: e.Key, revision: e.Revision, watch: l.watch.number}
}

// sameRecord reports whether two records say the same of the node, but for its load.
func sameRecord(a, b *Node) bool {
	return a.Endpoint == b.Endpoint && maps.Equal(a.Metadata, b.Metadata) && slices.Equal(a.LeftOut, b.LeftOut)
}

// remove takes a node out of use, and tells why.
func (l *loop) remove(t *tracked, why ChangeType, reason string) {
	l.takeOut(t)
	l.reporter.node(why, t.entry, reason)
}

func (l *loop) takeOut(t *tracked) {
	l.table.remove(t)
	l.detach(t)
	t.endSuspicion()
	l.publisher.change(t.id(), nil)
}

// reject takes in a record that cannot be accepted.
func (l *loop) reject(e *Event, err error) {
	err = cmp.Or(err, Invalidf(FaultRecord, "record: the backend gave no reason"))
	record := e.record()
	t, final := l.table.byRecord[record], errors.Is(err, ErrForbidden)
	if final {
		l.dropRecord(record)
	} else {
		l.restorer.reject(record, err, l.watch.number) // not every rejection is kept
	}
	id, gone := e.ID, t != nil && final
	switch {
	case gone:
		l.takeOut(t)
		l.reporter.nodeRejected(t.entry, err)
	case t != nil:
		l.refuse(t, err)
		id = t.id()
	}
	if rejected, news := l.rejections.add(record, Rejection{ID: id, Key: e.Key, Err: err, watch: l.watch.number}); news && !gone {
		l.reporter.recordRejected(&rejected, l.watch.listed)
	}
}

// refuse notes that the newest record of a node in use could not be read. It is
// listed, so it is not gone; but it was not understood either, and renews no lease.
func (l *loop) refuse(t *tracked, err error) {
	t.watch = l.watch.number
	if was := t.entry.refused; was != nil && was.Error() == err.Error() {
		return
	}
	next := *t.entry
	next.refused = err
	l.show(t, &next)
}

// show gives a node in use an entry that the next snapshot shows. Its record is the same.
func (l *loop) show(t *tracked, next *Entry) {
	t.entry = next
	l.publisher.change(t.id(), next)
}

// accept forgets that the record was rejected: it is good, or it is gone.
func (l *loop) accept(record string) {
	l.restorer.reject(record, nil, l.watch.number)
	l.rejections.remove(record)
}

// sync ends a listing.
func (l *loop) sync(listed Listing) {
	at := now()
	first, wiped := !l.watch.listedOnce(), l.watch.wiped(listed)
	if listed.Advice != "" && listed.Advice != l.watch.last.Advice {
		l.log.Warn("the registry should be set up otherwise", "advice", listed.Advice)
	}
	awaited, left := l.compare(listed, wiped, at)
	l.rejections.endListing(l.watch.number)
	if wiped || listed.Partial {
		l.relearn(at)
	}
	l.watch.complete(listed, at)
	l.hosts.settle()
	if first {
		l.reporter.begun = true
		awaited = l.endRestore(listed, at)
		l.lapseOverdue()
		l.publisher.startGrace()
	}
	l.dir.setCondition(func(c *condition) { c.Connected, c.Since = true, time.Now() })

	nodes, away := len(l.table.nodes), at-l.watch.lostAt
	if first {
		rejected := l.rejections.all()
		l.reporter.firstListing(rejected, l.table.sorted())
		// It comes last: of a large listing the journal keeps only the end.
		l.dir.journal.Add(Change{Type: ChangeConnected, Reason: fmt.Sprintf("listed, %d nodes", nodes)})
		log := l.log
		if p, ok := As[ChangeSource](l.dir.watcher); ok {
			log = log.With("changes_by", p.Changes())
		}
		log.Info("listed the registry", "nodes", nodes, "rejected", len(rejected), "awaited", awaited, "took", away)
		return
	}
	l.dir.journal.Add(Change{Type: ChangeConnected, Reason: fmt.Sprintf("back after %v, %d nodes, %d awaited, %d left",
		away.Round(time.Millisecond), nodes, awaited, left)})
	if wiped {
		l.log.Warn("the registry is back and has lost data; nodes that it lacks have one lease to be heard again",
			"nodes", nodes, "awaited", awaited, "away", away)
	} else {
		l.log.Info("the registry is back", "nodes", nodes, "awaited", awaited, "left", left, "away", away)
	}
}

// compare decides at the end of a listing about the nodes that it lacks, and returns how
// many of them have one lease to be heard again, and how many are gone. Leases were
// suspended while the registry was away: those of all nodes begin anew.
func (l *loop) compare(listed Listing, wiped bool, at time.Duration) (awaited, left int) {
	for _, t := range l.table.nodes {
		shown := t.watch == l.watch.number
		switch {
		case l.endConflict(t):
			left++
			continue
		case shown && !l.watch.listedOnce():
			continue
		case shown:
		case t.watch >= l.watch.lastListed && !wiped && listed.provesGone(at-time.Duration(t.entry.liveness.heard.Load()), t.entry.lease):
			// If the listing before lacked it too, this one shows nothing new.
			l.remove(t, ChangeLeft, "it is not listed any more")
			left++
			continue
		default:
			awaited++
		}
		t.entry.liveness.renewed.Store(int64(at))
		l.table.requeue(t)
	}
	return awaited, left
}

// provesGone reports whether a node that the listing lacks was removed, given for how long
// it was not heard. Guarantees 1 and 2 of the design: only a registry that lost nothing,
// and in which the record cannot have run out for want of a heartbeat, can show that by
// silence. What counts is not how long the registry was away but how long the node has
// not been heard: its record's time began to run before.
func (l *Listing) provesGone(unheard, lease time.Duration) bool {
	return !l.Partial && unheard < lease && (l.Expiry == 0 || unheard < l.Expiry)
}

// checkLeases looks for a lease that ran out, or comes back when the first may have. Before
// it is believed that its node is gone the registry has to prove that it would have told.
func (l *loop) checkLeases(ctx context.Context) {
	switch first := l.table.leases.first(); {
	case first == nil || !l.watch.listed || l.watch.verifications.running > 0:
		l.expiry.Stop()
	case l.table.overdue(now()) != nil:
		l.watch.verify(ctx)
	default:
		l.expiry.Reset(l.table.leases.first().due - now())
	}
}

// onVerify lets the leases lapse that had run out when a successful verification
// began.
func (l *loop) onVerify(ctx context.Context, v verification) {
	switch {
	case ctx.Err() != nil:
		// Everything ends, and so did the verification.
	case !l.watch.listed || v.watch != l.watch.number:
		// The watch broke meanwhile; the next listing starts anew.
	case v.err != nil:
		l.giveUp(fmt.Errorf("%w: the registry did not show that the watch is alive: %w", ErrBroken, v.err))
	default:
		// What the verification proved delivered may still wait in the channel.
		l.receiveWaiting(ctx)
		var lapsing []*tracked
		for t := l.table.overdue(v.began); t != nil && l.watch.listed; t = l.table.overdue(v.began) {
			l.extend(t) // for as long as it takes to decide
			lapsing = append(lapsing, t)
		}
		l.lapse(lapsing, "its lease ran out")
	}
}

// join notes that a node is new: that it was not there, takes traffic again, or is
// another process now. It is not if it is only new to this directory: in a first listing,
// or after a registry had lost its data or cannot list, in the time within which all its
// nodes are heard again.
func (l *loop) join(was, is *Entry) {
	at := now()
	switch {
	case !l.watch.listedOnce() || l.relearns && at-l.relearned < is.lease:
	case was == nil || !was.Serves() && is.Serves() || was.Node.Endpoint != is.Node.Endpoint || was.Node.Instance() != is.Node.Instance():
		is.liveness.joined.Store(int64(at))
	}
}

// relearn notes that the registry has lost what it knew, or does not keep it: what
// it lists from now on, or has just listed, may well be old.
func (l *loop) relearn(at time.Duration) {
	l.relearns, l.relearned = true, at
	for _, t := range l.table.nodes {
		if v := t.entry.liveness; time.Duration(v.joined.Load()) >= l.watch.lostAt {
			v.joined.Store(0)
		}
	}
}
