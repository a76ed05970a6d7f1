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
		t := l.nodes[e.ID]
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
		t := l.named(e)
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
		if t := l.named(e); t != nil && l.listed {
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

func (l *loop) put(e Event) {
	l.forget(e)
	// A writer's clock that runs ahead must not lengthen its lease.
	heard := now() - max(e.Age, 0)
	t := l.nodes[e.Node.ID]
	if other := l.named(e); other != nil && other != t {
		l.remove(other, ChangeLeft, "its record was replaced by that of another node")
	}
	lease := e.Node.Lease()
	if lease == 0 {
		lease = l.ttl
	}
	moved := false // it announces this address for the first time
	switch {
	case t == nil:
		if e.Age >= lease {
			// Overdue by the registry's own clock. It comes back the moment it
			// is heard. Of a first listing all such records are looked at together.
			l.accept(e)
			if !l.everyNode && e.Age <= MaxLease {
				l.keepOverdue(l.track(e, lease, heard))
			}
			return
		}
		if err := l.full(&e.Node); err != nil {
			l.turnDown(e, err)
			return
		}
		l.accept(e)
		if g := l.graves.byID[e.Node.ID]; g != nil {
			l.graves.drop(g)
		}
		t = l.track(e, lease, heard)
		l.join(t.entry)
		l.insert(t)
		reason := ""
		if keys := leftOut(&e.Node); keys != "" {
			reason = "metadata left out, no texts: " + keys
		}
		l.note(ChangeSeen, t.entry, reason)
		moved = true
	case t.listing == l.listing && !l.listed && e.Revision < t.revision:
		// The node stands under two keys and the newer one was listed first.
		l.accept(e)
		return
	case e.Age >= lease && heard < time.Duration(t.entry.vitals.heard.Load()) && !sameRecord(&t.entry.Node, &e.Node):
		// The registry went back to an older state, in which the node was
		// something else, or somewhere. It was heard since, so what it said then
		// stands for as long as it has to be heard again; see sync.
		l.accept(e)
	default:
		changed := !sameRecord(&t.entry.Node, &e.Node) || t.entry.refused != nil
		if changed {
			if err := l.room.refusesGrowth(t, &e.Node); err != nil {
				l.turnDown(e, err)
				return
			}
		}
		l.accept(e)
		l.renew(t, e.Node.Load, heard)
		if now()-heard < lease {
			l.trust(t) // not so if a listing repeats what had run out
		}
		if changed {
			reason := difference(&t.entry.Node, &e.Node)
			if reason == "" {
				reason = "its record is accepted again"
			}
			l.watchFight(t, &e.Node)
			moved = t.entry.Node.Endpoint.Address() != e.Node.Endpoint.Address()
			l.vacate(t)
			l.replace(t, newEntry(e.Node, lease, t.entry.vitals).under(l.decisions.of(e.Node.ID)).in(t.doubt))
			l.occupy(t)
			l.requeue(t)
			l.change(e.Node.ID, t.entry)
			l.note(ChangeUpdated, t.entry, reason)
		}
	}
	l.name(t, e.Key)
	t.revision, t.listing = e.Revision, l.listing
	if moved {
		l.takePlace(t)
	}
	l.armExpiry()
}

// turnDown rejects a record that can be read.
func (l *loop) turnDown(e Event, err error) {
	e.ID, e.Err = e.Node.ID, err
	l.reject(e)
}

// track returns the node of a record, not in use.
func (l *loop) track(e Event, lease, heard time.Duration) *tracked {
	v := new(vitals)
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
	v := t.entry.vitals
	v.heard.Store(max(v.heard.Load(), int64(heard)))
	v.renewed.Store(max(v.renewed.Load(), int64(heard)))
	v.load.Store(math.Float64bits(load))
}

func (l *loop) remove(t *tracked, why ChangeType, reason string) {
	delete(l.nodes, t.entry.Node.ID)
	l.name(t, "")
	l.vacate(t)
	l.calm(t)
	l.leases.remove(t)
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
	for _, t := range l.nodes {
		if l.yield(t) {
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
			unheard := at - time.Duration(t.entry.vitals.heard.Load())
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
		t.entry.vitals.renewed.Store(int64(at))
		l.requeue(t)
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

	reason := fmt.Sprintf("listed, %d nodes", len(l.nodes))
	if !first {
		reason = fmt.Sprintf("back after %v, %d nodes, %d awaited, %d left",
			outage.Round(time.Millisecond), len(l.nodes), kept, removed)
	}
	if first {
		l.noteListing()
	}
	// It comes last: of a large listing the journal keeps only the end.
	l.journal.Add(Change{Type: ChangeConnected, Reason: reason})
	switch {
	case first:
		log := l.log
		if p, ok := l.watcher.(Pusher); ok {
			log = log.With("changes_by", p.Push())
		}
		log.Info("listed the registry", "nodes", len(l.nodes),
			"rejected", len(l.rejected), "awaited", kept, "took", outage)
	case wiped:
		l.log.Warn("the registry is back and has lost data; nodes that it lacks have one lease to be heard again",
			"nodes", len(l.nodes), "awaited", kept, "away", outage)
	default:
		l.log.Info("the registry is back", "nodes", len(l.nodes),
			"awaited", kept, "left", removed, "away", outage)
	}
	l.armExpiry()
}

// armExpiry sets the timer to the first lease that may run out.
func (l *loop) armExpiry() {
	first := l.leases.first()
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
	if l.overdueBy(now()) == nil {
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

// overdueBy brings the queue in order up to a time, and returns its head if the lease
// of that ran out by then, else nil.
func (l *loop) overdueBy(at time.Duration) *tracked {
	for {
		t := l.leases.firstBy(at)
		if t == nil || t.entry.due() <= at {
			return t
		}
		l.requeue(t)
	}
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
		for l.listed {
			t := l.overdueBy(v.began)
			if t == nil {
				break
			}
			l.extend(t) // for as long as it takes to decide
			lapsing = append(lapsing, t)
		}
		l.lapse(lapsing, "its lease ran out")
	}
	l.armExpiry()
}

// replace gives a node another entry. A node that takes traffic again, or that is
// another process now, counts as new.
func (l *loop) replace(t *tracked, next *Entry) {
	was := t.entry
	t.entry = next
	if !was.Serves() && next.Serves() || was.Node.Endpoint != next.Node.Endpoint || was.Node.Instance() != next.Node.Instance() {
		l.join(next)
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
	e.vitals.joined.Store(int64(at))
}

// relearn notes that the registry has lost what it knew, or does not keep it: what
// it lists from now on, or has just listed, may well be old.
func (l *loop) relearn(at time.Duration) {
	l.relearns, l.relearned = true, at
	for _, t := range l.nodes {
		if v := t.entry.vitals; time.Duration(v.joined.Load()) >= l.lostAt {
			v.joined.Store(0)
		}
	}
}
