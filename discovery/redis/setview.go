package redis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// A record must be absent from two looks at least this far apart before its
	// node counts as gone: the fleets in the wild replace a member of the set by
	// removing it and then adding a new one, in two steps, a round trip apart.
	absence = 40 * time.Millisecond
	// Where a node that counted as gone was back within this time, its writer is far
	// away, or pauses. From then on the records of this set must be absent for as long.
	longAbsence = 500 * time.Millisecond
	// Sets up to this size are always looked at whole: it takes the server a
	// tenth of a millisecond.
	smallSet = 256
	// A partial look reads what has a score from this long before the last
	// look; writers' clocks differ. Whole looks find those that differ by more,
	// and widen it.
	minMargin = 2 * time.Second
	maxMargin = 10 * time.Minute
	// How long partial looks are enough.
	wholeInterval = 5 * time.Second
	// How long the stream may lag behind what looks have found in it.
	streamLag = 2 * time.Second
)

// A setView is what a watch knows of a sorted set.
type setView struct {
	*sortedSet
	feed     *feed
	blocking *goredis.Client // for what blocks

	records discovery.Parser
	members map[string]*member
	nodes   map[string]*node
	gone    map[string]uint64 // left by this entry of the stream, which a late look may not know

	absence  time.Duration        // how long records must be absent
	vanished map[string]time.Time // when nodes counted as gone because theirs was; of the last while

	listed      bool // the listing is complete
	narrow      bool // only the set may be read
	subscribed  bool // to notifications
	epoch       epoch
	streams     bool      // the stream is being read
	streamed    uint64    // the newest entry that was read
	lagging     time.Time // since when looks are ahead of the stream
	seq         uint64    // of the newest look
	looks       uint64
	clock       float64 // the server's, at the newest look; clockBefore: at the one before
	clockBefore float64
	margin      time.Duration
	wholeAt     time.Time
	long        longMembers
	longAt      time.Time // when they were looked at last
}

func newSetView(l *sortedSet, f *feed) *setView {
	return &setView{
		sortedSet: l, feed: f,
		members: make(map[string]*member), nodes: make(map[string]*node), gone: make(map[string]uint64),
		long: make(longMembers), margin: minMargin,
		absence: l.absence(), vanished: make(map[string]time.Time),
	}
}

func (l *sortedSet) watch(ctx context.Context, f *feed) (view, error) {
	v := newSetView(l, f)
	var err error
	if v.blocking, err = l.client.owner(ctx, l.keys.set); err != nil {
		return nil, err
	}
	f.closeWith(ctx, v.blocking)
	f.closers = append(f.closers, v.remember)
	return v, nil
}

// remember keeps what the watch knew at its end for the next one's listing.
func (v *setView) remember() {
	if !v.listed {
		return
	}
	ids := make(map[string]bool, len(v.nodes))
	for id, n := range v.nodes {
		if n.current.err == nil {
			ids[id] = true
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.previous, v.slow = ids, v.absence > absence
}

func (v *setView) follow(ctx context.Context) (err error) {
	// Whether XREAD is allowed shows only in trying.
	err = v.client.do(ctx, func(ctx context.Context) error {
		return v.blocking.XRead(ctx, &goredis.XReadArgs{Streams: []string{v.keys.changes, "$"}, Count: 1, Block: -1}).Err()
	})
	if v.streams, err = offered(err); err != nil {
		return fmt.Errorf("trying to read the stream of changes: %w", err)
	}
	notified, err := v.feed.notifies(ctx, v.blocking, "z")
	if err != nil || !notified {
		return err
	}
	v.subscribed, err = v.feed.subscribe(ctx, v.blocking, false, fmt.Sprintf("__keyspace@%d__:%s", v.client.config.DB, v.keys.set))
	return err
}

func (v *setView) changes() string {
	var by []string
	if v.streams {
		by = append(by, "stream")
	}
	if v.subscribed {
		by = append(by, "notifications")
	}
	return cmp.Or(strings.Join(by, " and "), "poll")
}

func (v *setView) list(ctx context.Context) (listing discovery.Listing, took time.Duration, err error) {
	l, err := v.lookAtAll(ctx)
	if errors.Is(err, discovery.ErrPermission) {
		// A user may be restricted to the set itself.
		v.narrow = true
		if narrow, e := v.lookAtAll(ctx); e == nil {
			l, err = narrow, nil
		}
	}
	if err != nil {
		return listing, 0, err
	}
	v.streams = v.streams && l.last != ""
	if l.epoch == "" && !v.narrow {
		if l.epoch, err = v.client.mark(ctx); err != nil {
			return listing, 0, err
		}
	}
	v.streamed, took = l.seq, l.took
	if _, err := v.apply(l); err != nil {
		return listing, 0, err
	}
	if v.lacksPrevious() {
		// A record that is being replaced just now must not count as removed.
		if !pause(ctx, longAbsence) {
			return listing, 0, ctx.Err()
		}
		second, err := v.lookAtAll(ctx)
		if err == nil {
			took = second.took
			_, err = v.apply(second)
		}
		if err != nil {
			return listing, 0, err
		}
	}
	v.listed = true
	if v.streams {
		v.feed.read(ctx, v.blocking, v.keys.changes, l.last, v.applyEntries)
	}
	return v.listing(), took, nil
}

// lookAtAll looks at the whole set at once, for the listing.
func (v *setView) lookAtAll(ctx context.Context) (*setLook, error) {
	l := v.prepare(request{whole: true})
	return l, l.ask(ctx, v.client)
}

// listing returns what Synced says.
func (v *setView) listing() discovery.Listing {
	l := discovery.Listing{Epoch: string(v.epoch), Revision: v.seq}
	if v.epoch == "" {
		// We may not leave a mark, so the newest score must do: a server that
		// was emptied has none.
		for _, m := range v.members {
			l.Revision = max(l.Revision, uint64(max(m.score, 0)))
		}
	}
	return l
}

// lacksPrevious reports whether a node is missing that the last watch knew.
func (v *setView) lacksPrevious() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	for id := range v.previous {
		if v.nodes[id] == nil {
			return true
		}
	}
	return false
}

func (v *setView) notified(*goredis.Message) request { return request{some: true} }

func (v *setView) look(q request) func(context.Context) (lookResult, error) {
	l := v.prepare(q)
	return func(ctx context.Context) (lookResult, error) {
		err := l.ask(ctx, v.client)
		return lookResult{slowest: l.took, apply: func() (request, error) { return v.apply(l) }, told: v.told}, err
	}
}

// told reports whether the entries of the stream that were read reach as far as the
// newest look.
func (v *setView) told() bool { return !v.streams || v.streamed >= v.seq }

// apply emits what a look has found to be changed.
func (v *setView) apply(l *setLook) (next request, err error) {
	if err := v.advance(l); err != nil {
		return request{}, err
	}
	if v.emptied(l) {
		if v.epoch == "" {
			return request{}, fmt.Errorf("%w: the set was emptied", discovery.ErrBroken)
		}
		maps.DeleteFunc(v.nodes, func(_ string, n *node) bool { return n.seq <= l.seq })
		maps.DeleteFunc(v.members, func(_ string, m *member) bool { return m.seq <= l.seq })
		return request{}, nil
	}
	v.noteLong(l)
	for _, n := range v.assign(l, &next) {
		v.update(n, l, &next)
	}
	switch {
	case l.whole:
		v.sweep(l)
	case l.seq < v.streamed: // the stream has told newer things
	case len(v.members) == l.count:
		v.takeOut(l) // what was missing still is: the look accounts for every member
	case l.compare:
		if l.gaps {
			v.miss(l)
		}
		next.whole = next.whole || len(v.members) != l.count
	default:
		next.add(request{some: true, gaps: true, soon: true})
	}
	if next.whole || next.gaps {
		return next, nil
	}
	return v.lookAgain(), nil
}

// lookAgain returns the look that decides on the nodes whose record is missing: a partial
// one will do, unless an older record took the place of one that is missing.
func (v *setView) lookAgain() (q request) {
	for _, n := range v.nodes {
		if !n.missing.IsZero() {
			q.add(request{some: true, soon: true, whole: n.best != n.current})
			q.after = v.absence
		}
	}
	return q
}

// advance takes over which data and where in the sequence of changes the look was
// taken. It fails if data was lost since the one before.
func (v *setView) advance(l *setLook) error {
	if err := v.epoch.follow(l.epoch); err != nil {
		return err
	}
	if l.seq < l.least {
		return fmt.Errorf("%w: the registry lost changes: it was at %d and is at %d", discovery.ErrBroken, l.least, l.seq)
	}
	v.looks++
	v.seq, v.clock, v.clockBefore = l.seq, l.clock, v.clock
	if l.whole {
		v.wholeAt = l.started
	}
	switch {
	case v.told():
		v.lagging = time.Time{}
	case v.lagging.IsZero():
		v.lagging = time.Now()
	case time.Since(v.lagging) > streamLag:
		return fmt.Errorf("%w: the stream of changes is silent", discovery.ErrBroken)
	}
	return nil
}

// emptied reports whether the whole set is gone at once: somebody deleted it, or it
// ran out because nobody wrote for long. Nobody said of a node that it left, so
// the leases decide; and if the data went with it, so does the epoch.
func (v *setView) emptied(l *setLook) bool {
	present := 0 // nodes that this look should find
	for _, n := range v.nodes {
		if n.missing.IsZero() && n.seq <= l.seq {
			present++
		}
	}
	return l.count == 0 && present > 1
}

// noteLong remembers the members that are too long.
func (v *setView) noteLong(l *setLook) {
	if !l.whole {
		maps.Copy(v.long, l.long)
		return
	}
	v.long = l.long
	if l.afresh {
		v.longAt = l.started
	}
}

// assign adds the members of a look that are new to those that are known, notes which
// have another score, and returns the nodes to which they belong, each with its newest
// member.
func (v *setView) assign(l *setLook, next *request) (found []*node) {
	// In the order of scores: the last of an id is its newest.
	belongs := func(m *member, changed bool) {
		n := v.nodes[m.id]
		if n == nil {
			n = &node{id: m.id}
			v.nodes[m.id] = n
		}
		if n.look != v.looks {
			n.look = v.looks
			found = append(found, n)
		}
		n.best, n.changed = m, changed
	}
	var nameless []*member
	guesses := make(map[string]int)
	for _, s := range l.members {
		m := v.members[s.text]
		fresh := m == nil
		if fresh {
			m = &member{foundMember: s}
			m.parse(&v.records)
			if m.unnamed != nil && !l.whole {
				next.whole = true // whose it is depends on what else stands there
				continue
			}
			v.members[s.text] = m
		}
		changed := fresh || m.score != s.score
		if changed && l.whole && v.looks > 1 && s.score < l.since {
			// This writer's clock is behind by more than partial looks go back.
			v.margin = min(time.Duration(v.clockBefore-s.score)*time.Millisecond+minMargin, maxMargin)
		}
		m.score, m.look = s.score, v.looks
		if m.unnamed == nil || !l.whole {
			belongs(m, changed)
			continue
		}
		m.unnamed.changed = changed
		nameless = append(nameless, m)
		guesses[m.unnamed.guess]++
	}
	for _, m := range nameless {
		v.name(m, guesses[m.unnamed.guess] == 1)
		belongs(m, m.unnamed.changed)
	}
	return found
}

// name decides to which node a record belongs whose id cannot be read.
func (v *setView) name(m *member, only bool) {
	id := m.unnamed.made
	if v.replaces(m, only) {
		id = m.unnamed.guess
	}
	if id == m.id {
		return
	}
	if n := v.nodes[m.id]; m.id == m.unnamed.made && n != nil && n.current == m {
		delete(v.nodes, m.id)
		v.feed.emit(n.event(discovery.Left))
	}
	m.id, m.unnamed.changed = id, true
}

// replaces reports whether a record whose id cannot be read counts as that of the
// node that its beginning names. That is a guess, since the name may stand in another
// place of the record, so it only ever keeps a node in use, and gives way to every
// record of the node that can be read, but for an old one that nobody removed.
func (v *setView) replaces(m *member, only bool) bool {
	guess := m.unnamed.guess
	n := v.nodes[guess]
	switch {
	case guess == "":
		return false
	case n == nil:
		return only
	case n.look == v.looks && (n.current == nil || n.current == n.best || n.changed):
		return false
	default:
		return only || n.current == m
	}
}

// update compares what a look found of a node with what was known.
func (v *setView) update(n *node, l *setLook, next *request) {
	if n.seq > l.seq || v.gone[n.id] > l.seq {
		// The stream has told newer things.
		if n.current == nil {
			delete(v.nodes, n.id)
		}
		return
	}
	was, best := n.current, n.best
	age := time.Duration(max(l.clock-best.score, 0) * float64(time.Millisecond))
	switch {
	case was == nil:
		if at, ok := v.vanished[n.id]; ok && time.Since(at) < longAbsence {
			v.absence = longAbsence
		}
		v.put(n, best, age, 0)
	case best == was:
		n.missing, n.seen = time.Time{}, l.seq
		if n.changed {
			v.put(n, best, 0, 0)
		}
	case !l.whole && best.score < was.score:
		// An older record than the one we know, if that is still there. The
		// whole look that decides must find it as new as this one did.
		if n.changed {
			delete(v.members, best.text)
			next.whole = true
		}
	case n.changed, was.look == v.looks:
		// Written since the last look: a heartbeat, whatever its score says.
		if !l.whole {
			delete(v.members, was.text)
		}
		v.put(n, best, 0, 0)
	case l.whole && n.gone(l.started, v.absence):
		// The record is gone, and left an older one that nobody removed.
		v.left(n, 0)
		v.nodes[n.id] = n
		v.put(n, best, age, 0)
	case l.whole:
		n.miss()
	}
}

// sweep takes out the nodes whose record looks have lacked for long enough, and forgets
// the members that this one, at everything, lacks.
func (v *setView) sweep(l *setLook) {
	v.takeOut(l)
	for _, n := range v.nodes {
		if n.look != v.looks && n.seq <= l.seq {
			n.miss()
		}
	}
	maps.DeleteFunc(v.members, func(_ string, m *member) bool { return m.look != v.looks && m.seq <= l.seq })
	maps.DeleteFunc(v.gone, func(_ string, seq uint64) bool { return seq <= l.seq })
}

// miss notes which nodes' records this look lacks, and forgets those members.
func (v *setView) miss(l *setLook) {
	maps.DeleteFunc(v.members, func(_ string, m *member) bool {
		missing := m.look != v.looks && m.seq <= l.seq && l.lacks(m.score)
		if n := v.nodes[m.id]; missing && n != nil && n.current == m && n.look != v.looks && n.seq <= l.seq {
			n.miss()
		}
		return missing
	})
}

// takeOut emits Left for the nodes whose record this look still lacks, for long enough.
func (v *setView) takeOut(l *setLook) {
	var gone []*node
	for _, n := range v.nodes {
		if n.look != v.looks && n.seq <= l.seq && (l.whole || n.best == n.current) && n.gone(l.started, v.absence) {
			gone = append(gone, n)
		}
	}
	slices.SortFunc(gone, func(a, b *node) int { return cmp.Compare(a.id, b.id) })
	now := time.Now()
	maps.DeleteFunc(v.vanished, func(_ string, at time.Time) bool { return now.Sub(at) >= longAbsence })
	for _, n := range gone {
		v.left(n, 0)
		v.vanished[n.id] = now
	}
}

// put emits a node's record, which from now on is the current one.
func (v *setView) put(n *node, m *member, age time.Duration, revision uint64) {
	n.current, n.missing, n.seen = m, time.Time{}, max(v.seq, revision)
	if m.node == nil && m.err == nil {
		m.parse(&v.records)
	}
	e := n.event(discovery.Put)
	if m.err != nil {
		e.Type, e.Err = discovery.Rejected, m.err
	} else {
		e.Node = *m.node
	}
	m.node, e.Age, e.Revision = nil, age, revision
	v.feed.emit(e)
}

// left emits that a node's record was removed, and forgets it.
func (v *setView) left(n *node, revision uint64) {
	e := n.event(discovery.Left)
	e.Revision = revision
	v.forget(n)
	v.feed.emit(e)
}

// forget removes a node and its record from what is known.
func (v *setView) forget(n *node) {
	delete(v.nodes, n.id)
	delete(v.members, n.current.text)
}

// applyEntries emits what entries of the stream say.
func (v *setView) applyEntries(entries []goredis.XMessage) (q request, err error) {
	v.lagging = time.Time{}
	for _, x := range entries {
		e, err := parseEntry(x)
		if err != nil {
			// Somebody else's. If it stands for one of ours the sequence shows it.
			continue
		}
		if e.seq != v.streamed+1 {
			return q, fmt.Errorf("%w: the stream of changes goes from %d to %d", discovery.ErrBroken, v.streamed, e.seq)
		}
		v.streamed = e.seq
		switch e.kind {
		case entryPut:
			v.applyPut(e)
		case entryLeft, entryExpired:
			v.applyEnd(e)
		case entryOverride:
			q.overrides = true
		}
	}
	return q, nil
}

// applyPut emits that a record was written.
func (v *setView) applyPut(e entry) {
	if len(e.record) > discovery.MaxRecord {
		return // the next look finds what became of the node
	}
	n := v.nodes[e.id]
	if m := v.members[e.record]; m != nil {
		// A look was faster.
		m.seq = e.seq
		if n != nil && n.current == m {
			n.seq = e.seq
		}
		return
	}
	if e.seq <= v.seq {
		// A look that was taken later lacks it: something newer stands there.
		return
	}
	m := &member{foundMember: foundMember{text: e.record, score: e.score}, seq: e.seq}
	m.parse(&v.records)
	m.id, m.unnamed = e.id, nil
	if n == nil {
		n = &node{id: e.id}
		v.nodes[e.id] = n
	} else {
		delete(v.members, n.current.text)
	}
	delete(v.gone, e.id)
	v.members[m.text] = m
	n.seq = e.seq
	v.put(n, m, 0, e.seq)
}

// applyEnd emits that a record was removed, or swept up long after its lease: then
// nobody said that the node left.
func (v *setView) applyEnd(e entry) {
	n := v.nodes[e.id]
	if n != nil && e.seq <= n.seen {
		// A look that was taken later has found a record: it is back.
		return
	}
	if e.seq > v.seq {
		v.gone[e.id] = e.seq
	}
	switch {
	case e.kind == entryExpired:
		if n != nil {
			v.forget(n)
		}
	case n != nil:
		v.left(n, e.seq)
	default:
		v.feed.emit(discovery.Event{Type: discovery.Left, ID: e.id, Revision: e.seq})
	}
}
