package discovery

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"
)

// A registry that takes longer than this to prove that the watch is alive is
// ill, and an ill registry is no evidence that a node is dead.
const verifyTimeout = time.Second

func (l *loop) apply(e Event) {
	if e.Revision > l.seen {
		l.seen = e.Revision
		if l.listed {
			l.revision.Store(e.Revision)
		}
	}
	switch e.Type {
	case Put:
		if e.Delay > 0 {
			l.propagation.observe(e.Delay)
		}
		l.put(e)
	case Beat:
		t := l.table.nodes[e.ID]
		if t == nil && l.everyNode {
			t = l.revive(e.ID)
		}
		if t != nil {
			t.listing = l.listing
			l.trust(t)
			load := e.Load
			if math.IsNaN(load) || math.IsInf(load, 0) || load < 0 {
				load = t.entry.Load() // the node lives, whatever it says of its load
			}
			l.renew(t, load, now())
		}
	case Left:
		t := l.table.of(&e)
		if t != nil && e.Instance != "" && e.Instance != t.entry.Node.Instance() {
			return // another process has taken the id, and is there
		}
		l.accept(e)
		l.forget(e)
		l.recant(e)
		if t != nil {
			l.remove(t, ChangeLeft, "its record was removed")
		}
	case Expired:
		l.accept(e)
		// In a listing the record may have run out because the registry was
		// away and nobody could renew it: the end of the listing decides.
		if t := l.table.of(&e); t != nil && l.listed {
			t.expired = true
			l.expired = append(l.expired, t)
		}
	case Rejected:
		l.reject(e)
	case Synced:
		l.askLocation() // before the nodes are shown
		l.sync(e.Listing)
	case Overridden:
		l.setOverrides(e.Overrides)
	}
}

// put takes in a record that can be read.
func (l *loop) put(e Event) {
	l.forget(e)
	t := l.table.nodes[e.Node.ID]
	if other := l.table.of(&e); other != nil && other != t {
		l.remove(other, ChangeLeft, "its record was replaced by that of another node")
	}
	// A writer's clock that runs ahead must not lengthen its lease.
	heard := now() - max(e.Age, 0)
	lease := e.Node.Lease()
	if lease == 0 {
		lease = l.ttl
	}
	address := "" // that it is known to have
	switch {
	case t == nil:
		if t = l.putNew(&e, lease, heard); t == nil {
			return
		}
	case t.listing == l.listing && !l.listed && e.Revision < t.revision:
		// The node stands under two keys and the newer one was listed first.
		l.accept(e)
		return
	case e.Age >= lease && heard < time.Duration(t.entry.liveness.heard.Load()) && !sameRecord(&t.entry.Node, &e.Node):
		// The registry went back to an older state, in which the node was
		// something else, or somewhere. It was heard since, so what it said then
		// stands for as long as it has to be heard again; see sync.
		l.accept(e)
		address = t.entry.Node.Endpoint.Address()
	default:
		address = t.entry.Node.Endpoint.Address()
		if !l.putAgain(t, &e, lease, heard) {
			return
		}
	}
	l.table.setKey(t, e.Key)
	t.revision, t.listing = e.Revision, l.listing
	if t.entry.Node.Endpoint.Address() != address {
		l.claimAddress(t)
	}
	l.armExpiry()
}

// putNew puts a node into use that is not. It returns nil if its record ran out
// before, or if there is no room for it.
func (l *loop) putNew(e *Event, lease, heard time.Duration) *tracked {
	if e.Age >= lease {
		// Overdue by the registry's own clock. It comes back the moment it
		// is heard. Of a first listing all such records are looked at together.
		l.accept(*e)
		if !l.everyNode && e.Age <= MaxLease {
			l.keepOverdue(l.track(e, lease, heard))
		}
		return nil
	}
	if err := l.table.full(&e.Node); err != nil {
		l.turnDown(*e, err)
		return nil
	}
	l.accept(*e)
	if g := l.graves.byID[e.Node.ID]; g != nil {
		l.graves.drop(g)
	}
	t := l.track(e, lease, heard)
	l.join(t.entry)
	l.insert(t)
	reason := ""
	if keys := leftOut(&e.Node); keys != "" {
		reason = "metadata left out, no texts: " + keys
	}
	l.note(ChangeSeen, t.entry, reason)
	return t
}

// putAgain renews a node, and gives it what its record says if that is something
// else. It reports false if there is no room for that.
func (l *loop) putAgain(t *tracked, e *Event, lease, heard time.Duration) bool {
	changed := !sameRecord(&t.entry.Node, &e.Node) || t.entry.refused != nil
	if changed {
		if err := l.table.room.refusesGrowth(t, &e.Node); err != nil {
			l.turnDown(*e, err)
			return false
		}
	}
	l.accept(*e)
	l.renew(t, e.Node.Load, heard)
	if now()-heard < lease {
		l.trust(t) // not so if a listing repeats what had run out
	}
	if changed {
		l.update(t, newEntry(e.Node, lease, t.entry.liveness))
	}
	return true
}

// update gives a node in use the entry of another record.
func (l *loop) update(t *tracked, next *Entry) {
	was := t.entry
	reason := difference(&was.Node, &next.Node)
	if reason == "" {
		reason = "its record is accepted again"
	}
	if t.conflict.observe(&was.Node, &next.Node, was.lease, now()) {
		l.log.Warn("two processes announce the same node and overwrite each other's record; give each an id of its own",
			"node", next.Node.ID,
			"endpoints", []string{was.Node.Endpoint.String(), next.Node.Endpoint.String()},
			"writers", []string{writer(&was.Node), writer(&next.Node)})
	}
	l.detach(t)
	l.table.replace(t, next.under(l.decisions.of(next.Node.ID)).in(t.doubt))
	l.joinAnew(was, t.entry)
	l.attach(t)
	l.note(ChangeUpdated, t.entry, reason)
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
	t.entry = t.entry.under(l.decisions.of(t.id())).in(t.doubt)
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
	l.count(t)
	l.change(t.id(), t.entry)
}

// detach is the end of attach.
func (l *loop) detach(t *tracked) {
	l.census.count(&t.counted, counted{})
	l.resolver.leave(t.id())
	l.reacher.drop(t.id())
}

// turnDown rejects a record that can be read.
func (l *loop) turnDown(e Event, err error) {
	e.ID, e.Err = e.Node.ID, err
	l.reject(e)
}

// track returns the node of a record, not in use.
func (l *loop) track(e *Event, lease, heard time.Duration) *tracked {
	v := new(liveness)
	v.load.Store(math.Float64bits(e.Node.Load))
	v.heard.Store(int64(heard))
	v.renewed.Store(int64(heard))
	return &tracked{entry: newEntry(e.Node, lease, v), key: e.Key, revision: e.Revision, listing: l.listing}
}

// sameRecord reports whether two records say the same of the node, but for its load.
func sameRecord(a, b *Node) bool {
	return a.Endpoint == b.Endpoint && maps.Equal(a.Metadata, b.Metadata) && slices.Equal(a.LeftOut, b.LeftOut)
}

// renew notes that the node was heard, maybe some time ago: a listing repeats
// old records. The queue is not touched: a lease only ever moves later here, and
// checkLeases finds out.
func (l *loop) renew(t *tracked, load float64, heard time.Duration) {
	v := t.entry.liveness
	v.heard.Store(max(v.heard.Load(), int64(heard)))
	v.renewed.Store(max(v.renewed.Load(), int64(heard)))
	v.load.Store(math.Float64bits(load))
}

func (l *loop) remove(t *tracked, why ChangeType, reason string) {
	l.table.remove(t)
	l.detach(t)
	l.calm(t)
	l.change(t.entry.Node.ID, nil)
	l.note(why, t.entry, reason)
}

// refuse notes that the newest record of a node in use could not be read. It is
// listed, so it is not gone; but it was not understood either, and renews no lease.
func (l *loop) refuse(t *tracked, err error) {
	t.listing = l.listing
	if was := t.entry.refused; was != nil && was.Error() == err.Error() {
		return
	}
	next := *t.entry
	next.refused = err
	t.entry = &next
	l.change(next.Node.ID, t.entry)
}

// sync ends a listing: it decides about the nodes that the listing lacks.
func (l *loop) sync(listed Listing) {
	at := now()
	outage := at - l.lostAt
	first := !l.everyNode
	wiped := !first && (listed.Epoch != l.last.Epoch || listed.Revision < l.before)
	kept, removed := 0, 0
	for _, t := range l.table.nodes {
		if l.endConflict(t) {
			removed++
			continue
		}
		if t.listing != l.listing {
			// Guarantees 1 and 2 of the design: only a registry that lost
			// nothing, and in which the record cannot have run out for want of
			// a heartbeat, can show by silence that the node was removed.
			// Otherwise the node has one lease to be heard again. If the listing
			// before lacked it too, this one shows nothing new.
			//
			// What counts is not how long the registry was away but how long
			// the node has not been heard: its record's time began to run before.
			unheard := at - time.Duration(t.entry.liveness.heard.Load())
			if t.listing >= l.complete && !wiped && !listed.Partial &&
				unheard < t.entry.lease && (listed.Expiry == 0 || unheard < listed.Expiry) {
				l.remove(t, ChangeLeft, "it is not listed any more")
				removed++
				continue
			}
			kept++
		} else if first {
			continue
		}
		t.entry.liveness.renewed.Store(int64(at))
		l.table.requeue(t)
	}
	maps.DeleteFunc(l.rejected, func(_ string, r rejection) bool { return r.listing != l.listing })
	l.amended = true
	if wiped || listed.Partial {
		l.relearn(at)
	}
	l.last, l.everyNode, l.listed, l.complete = listed, true, true, l.listing
	l.seen = max(l.seen, listed.Revision)
	l.revision.Store(l.seen)
	l.listedAt = at
	if first {
		kept = l.endRestore(listed, at)
		l.judgeOverdue()
		l.settled.Reset(settleTime)
	}

	next := *l.condition.Load()
	next.connected, next.since = true, time.Now()
	l.condition.Store(&next)

	reason := fmt.Sprintf("listed, %d nodes", len(l.table.nodes))
	if !first {
		reason = fmt.Sprintf("back after %v, %d nodes, %d awaited, %d left",
			outage.Round(time.Millisecond), len(l.table.nodes), kept, removed)
	}
	if first {
		l.noteListing()
	}
	// It comes last: of a large listing the journal keeps only the end.
	l.journal.Add(Change{Type: ChangeConnected, Reason: reason})
	switch {
	case first:
		log := l.log
		if p, ok := l.watcher.(ChangeSource); ok {
			log = log.With("changes_by", p.Changes())
		}
		log.Info("listed the registry", "nodes", len(l.table.nodes),
			"rejected", len(l.rejected), "awaited", kept, "took", outage)
	case wiped:
		l.log.Warn("the registry is back and has lost data; nodes that it lacks have one lease to be heard again",
			"nodes", len(l.table.nodes), "awaited", kept, "away", outage)
	default:
		l.log.Info("the registry is back", "nodes", len(l.table.nodes),
			"awaited", kept, "left", removed, "away", outage)
	}
	l.armExpiry()
}

// armExpiry sets the timer to the first lease that may run out.
func (l *loop) armExpiry() {
	first := l.table.leases.first()
	if first == nil || !l.listed || l.verifies.running > 0 {
		l.expiry.Stop()
		return
	}
	l.expiry.Reset(first.due - now())
}

// checkLeases looks for leases that ran out. Before it believes that their nodes
// are gone it asks the registry to prove that it would have told.
func (l *loop) checkLeases(ctx context.Context) {
	if !l.listed || l.verifies.running > 0 {
		return
	}
	if l.table.overdue(now()) == nil {
		l.armExpiry()
		return
	}
	v := verdict{listing: l.listing, began: now()}
	if l.verifier == nil {
		l.judge(ctx, v)
		return
	}
	l.verifies.start(func() verdict {
		ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
		defer cancel()
		v.err = l.verifier.Verify(ctx)
		return v
	})
}

// judge lets the leases lapse that had run out when a successful verification
// began.
func (l *loop) judge(ctx context.Context, v verdict) {
	switch {
	case ctx.Err() != nil:
		// Everything ends, and so did the verification.
	case !l.listed || v.listing != l.listing:
		// The watch broke meanwhile; the next listing starts anew.
	case v.err != nil:
		l.giveUp(fmt.Errorf("%w: the registry did not show that the watch is alive: %w", ErrBroken, v.err))
	default:
		// What the verification proved delivered may still wait in the channel.
		for range len(l.messages) {
			l.receive(ctx, <-l.messages)
		}
		var lapsing []*tracked
		for t := l.table.overdue(v.began); t != nil && l.listed; t = l.table.overdue(v.began) {
			l.extend(t) // for as long as it takes to decide
			lapsing = append(lapsing, t)
		}
		l.lapse(lapsing, "its lease ran out")
	}
	l.armExpiry()
}

// joinAnew is join for a node that takes traffic again, or that is another process now.
func (l *loop) joinAnew(was, is *Entry) {
	if !was.Serves() && is.Serves() || was.Node.Endpoint != is.Node.Endpoint || was.Node.Instance() != is.Node.Instance() {
		l.join(is)
	}
}

// join notes that the node is new, unless it is only new to this directory: in a
// first listing, or after a registry had lost its data or cannot list, in the time
// within which all its nodes are heard again.
func (l *loop) join(e *Entry) {
	at := now()
	if !l.everyNode || l.relearns && at-l.relearned < e.lease {
		return
	}
	e.liveness.joined.Store(int64(at))
}

// relearn notes that the registry has lost what it knew, or does not keep it: what
// it lists from now on, or has just listed, may well be old.
func (l *loop) relearn(at time.Duration) {
	l.relearns, l.relearned = true, at
	for _, t := range l.table.nodes {
		if v := t.entry.liveness; time.Duration(v.joined.Load()) >= l.lostAt {
			v.joined.Store(0)
		}
	}
}
