package discovery

import (
	"errors"
	"math"
	"time"
)

const (
	// A change is in the file after this time and that of writing it.
	saveDelay = 2 * time.Second
	// A list that takes long to write, because it is large or the disk is slow, is
	// written less often while it keeps changing: so many times as long lies between
	// the end of one writing and the next, but at most this.
	saveShare    = 100
	saveDelayMax = time.Minute
	// While the registry can be seen, the list is confirmed so often although
	// nothing changes: its age counts.
	saveEvery = 10 * time.Minute
	// A file that cannot be written is tried again after this time.
	saveRetry = time.Minute
	// How often a remembered node is dialled, at most.
	leastRestoreInterval = 5 * time.Second
)

// Warm start (guarantee 4 of the design): a directory that starts while its
// registry is away begins with its last known list. The list is not used before
// somebody asks, because a registry that answers within a moment knows better; and
// then each node only once it accepts a connection. The first listing ends it.

// warm is the part of a loop that remembers.
type warm struct {
	store   *warmStore // nil: nothing is kept
	loaded  chan *memento
	loading bool

	memento *memento // what was loaded, until the first listing
	wanted  bool     // somebody asked for it
	begun   bool
	// The nodes of the memento once it is in use, each due when it is dialled next.
	memory shelf
	redial *time.Timer

	dirty   bool // there is something to save
	saving  bool
	saved   chan saving
	rested  time.Duration // when the next save may come at the earliest
	failing bool          // the last save failed, and that was told
	save    *time.Timer
}

func (d *Directory) newWarm() warm {
	w := warm{
		memory: newShelf(),
		loaded: make(chan *memento, 1),
		saved:  make(chan saving, 1),
		rested: now(),
		redial: stoppedTimer(),
		save:   stoppedTimer(),
	}
	if d.warmStart.Path != "" {
		w.store = &warmStore{WarmStart: d.warmStart, log: d.log}
	}
	return w
}

// saving is how writing the file went.
type saving struct {
	took time.Duration
	err  error
}

// rest returns how long the file is left alone after a writing of it.
func rest(took time.Duration) time.Duration {
	if took > saveDelayMax/saveShare {
		return saveDelayMax
	}
	return max(saveDelay, saveShare*took)
}

// Restore asks for the last known list, if the registry has not been listed yet:
// its nodes are used from when they accept a connection to the end of the first
// listing. It returns at once, may be called from any goroutine and any number of
// times, and does nothing without [Options.WarmStart].
func (d *Directory) Restore() {
	select {
	case d.restore <- struct{}{}:
	default:
	}
}

// load reads the file, in the background.
func (l *loop) load() {
	if l.store == nil {
		return
	}
	l.loading = true
	store := l.store
	go func() {
		if err := store.open(); err != nil {
			store.log.Warn("the list of nodes is not kept for a start without the registry", "error", err)
		}
		l.loaded <- store.load()
	}()
}

// remember takes in what was loaded.
func (l *loop) remember(m *memento) {
	l.loading = false
	if m != nil && l.overrides.known.IsZero() {
		l.overrides.all, l.overrides.known = m.overrides, m.Overrides
		l.applyOverrides()
	}
	switch {
	case !l.watch.listedOnce():
		l.memento = m
		l.recall()
	case m != nil && l.watch.last.Partial:
		l.awaitRemembered(m)
	}
	if l.dirty {
		l.saveSoon()
	}
}

// recall begins to use the remembered list, if there is one and somebody asked.
func (l *loop) recall() {
	if !l.wanted || l.begun || l.watch.listedOnce() || l.memento == nil {
		return
	}
	l.begun = true
	m := l.memento
	l.log.Warn("the registry cannot be listed yet; nodes that were listed before are used as soon as they accept connections",
		"nodes", len(m.nodes), "known", time.Since(m.Written).Round(time.Second))
	l.setCondition(func(c *condition) { c.known = m.Written })
	for _, r := range m.nodes {
		t := l.remembered(r)
		l.memory.add(t, math.MaxInt64)
		l.probeRestored(t)
	}
}

// remembered returns a node of the remembered list, not in use.
func (l *loop) remembered(r remembered) *tracked {
	v := new(liveness)
	v.load.Store(math.Float64bits(r.node.Load))
	v.heard.Store(int64(r.heard.Sub(processStart)))
	v.renewed.Store(int64(now()))
	return &tracked{entry: newEntry(r.node, r.node.LeaseOr(l.ttl), v), key: r.key}
}

// awaitRemembered is for a first listing that shows by silence nothing about anybody:
// remembered nodes that it lacks come into use when they accept a connection, and
// then have one lease to be heard, or when they are heard.
func (l *loop) awaitRemembered(m *memento) {
	for _, r := range m.nodes {
		if l.table.nodes[r.node.ID] == nil && l.graves.byID[r.node.ID] == nil {
			g := l.remembered(r).grave(0)
			g.saved = true
			if l.graves.buryAsked(g, now()) {
				l.probeLapsed(g)
			}
		}
	}
}

// recallAgain dials the remembered nodes whose turn it is.
func (l *loop) recallAgain() {
	at := now()
	for t := l.memory.queue.firstBy(at); t != nil; t = l.memory.queue.firstBy(at) {
		l.memory.postpone(t, math.MaxInt64)
		l.probeRestored(t)
	}
}

// probeRestored has a remembered node dialled.
func (l *loop) probeRestored(t *tracked) {
	t.probe = l.prober.ask(func() *Entry { return t.entry }, func(a answer) { l.restoreOr(t, a) })
}

// restoreOr takes in how the probe of a remembered node went: it is used, or not,
// until it is dialled again.
func (l *loop) restoreOr(t *tracked, a answer) {
	if len(a.addresses) > 0 {
		t.entry = t.entry.at(a.addresses)
	}
	switch {
	case a.err == nil && t.doubt != restored:
		t.doubt = restored
		t.entry = t.entry.under(l.overrides.of(t.entry.Node.ID)).in(restored)
		l.publisher.restored[t.entry.Node.ID] = t.entry
		l.journal.Add(Change{
			Type: ChangeRestored, ID: t.entry.Node.ID, Entry: t.entry,
			Reason: "it was listed before, the registry cannot be listed yet, and it accepts connections",
		})
	case a.err != nil && t.doubt == restored && !inconclusive(a.err, &t.forbidden):
		t.doubt = trusted
		l.publisher.restored[t.entry.Node.ID] = nil
	}
	t.entry.liveness.renewed.Store(int64(now()))
	l.memory.postpone(t, now()+max(t.entry.lease, leastRestoreInterval))
	l.redial.Reset(l.memory.queue.first().due - now())
}

// recant takes a remembered node out that the registry said left, or is bad.
func (l *loop) recant(e Event) {
	if t := l.memory.byRecord[rejectionKey(e)]; t != nil {
		l.memory.drop(t)
		if t.doubt == restored {
			l.publisher.restored[t.entry.Node.ID] = nil
		}
	}
}

// endRestore is part of the end of the first listing: it decides about the
// remembered nodes in use that the listing lacks, by the same rules as after an
// outage, and returns how many of them have a lease left to be heard.
func (l *loop) endRestore(listed Listing, at time.Duration) (awaited int) {
	m := l.memento
	l.redial.Stop()
	l.memento = nil
	memory := l.memory
	l.memory = newShelf()
	l.publisher.endRestored() // unless they are kept below
	if !l.begun {
		if m != nil && listed.Partial {
			l.awaitRemembered(m)
		}
		return 0
	}
	wiped := listed.Epoch != m.Epoch || listed.Revision < m.Revision
	for id, t := range memory.byID {
		memory.queue.remove(t)
		t.probe.withdraw()
		t.probe = nil
		if l.table.nodes[id] != nil || t.doubt != restored {
			if l.table.nodes[id] == nil {
				l.publisher.change(id, nil)
				if listed.Partial && l.graves.byID[id] == nil {
					l.graves.bury(t.grave(0), at, true) // it may be heard
				}
			}
			continue
		}
		unheard := at - time.Duration(t.entry.liveness.heard.Load())
		// What was rejected before the list was in use is kept only there.
		if err := l.rejections.of(t.record(), l.watch.number); err != nil && !errors.Is(err, ErrForbidden) {
			t.unread, t.watch = err, l.watch.number
		}
		unread := t.unread != nil && t.watch == l.watch.number
		proven := !unread && !wiped && listed.provesGone(unheard, t.entry.lease)
		// A node that was remembered at the same address has shared it before.
		o := l.addressConflict(t)
		if o != nil && memory.byID[o.entry.Node.ID] != nil &&
			memory.byID[o.entry.Node.ID].entry.Node.Endpoint.Address() == t.entry.Node.Endpoint.Address() {
			o = nil
		}
		if proven || o != nil || !l.table.admits(&t.entry.Node, t.key) {
			l.publisher.change(id, nil)
			continue
		}
		if t.entry.named {
			name := t.entry.Node.Endpoint.Host()
			l.setAddresses(name, t.entry.addresses)
		}
		t.entry.liveness.renewed.Store(int64(at))
		l.insert(t)
		if unread {
			l.refuse(t, t.unread)
			t.unread = nil
		}
		awaited++
	}
	return awaited
}

// keep has the list saved soon: there is a newer one.
func (l *loop) keep() {
	if l.store == nil || l.dirty {
		return
	}
	l.dirty = true
	if !l.loading {
		l.saveSoon()
	}
}

func (l *loop) saveSoon() { l.save.Reset(max(saveDelay, l.rested-now())) }

// write saves the list in the background, if it has changed or the registry
// confirms it.
func (l *loop) write() {
	if l.store == nil || l.store.own == "" || l.saving || l.loading || !l.watch.listedOnce() {
		return
	}
	if !l.dirty && !l.watch.listed {
		l.save.Reset(saveEvery)
		return
	}
	l.dirty, l.saving = false, true
	m, store := l.reminisce(), l.store
	go func() {
		began := now()
		err := store.save(m)
		l.saved <- saving{took: now() - began, err: err}
	}()
}

// reminisce returns what is to be remembered.
func (l *loop) reminisce() *memento {
	m := &memento{Written: time.Now(), Epoch: l.watch.last.Epoch, Revision: l.revision.Load(), nodes: make([]remembered, 0, len(l.table.nodes))}
	if !l.watch.listed {
		m.Written = processStart.Add(l.watch.lostAt)
	}
	m.overrides, m.Overrides = l.overrides.all, l.overrides.known
	if l.overrides.watch == l.watch.lastListed {
		m.Overrides = m.Written // the watch would have told of a change
	}
	for _, t := range l.table.nodes {
		n := t.entry.Node
		n.Load = t.entry.Load()
		m.nodes = append(m.nodes, remembered{key: t.key, heard: t.entry.LastHeard(), node: n})
	}
	return m
}

// written takes in how saving went.
func (l *loop) written(s saving) {
	l.saving = false
	l.rested = now() + rest(s.took)
	switch {
	case s.err != nil:
		if !l.failing {
			l.log.Warn("cannot keep the list of nodes for a start without the registry", "error", s.err)
		}
		l.failing, l.dirty = true, true
		l.save.Reset(saveRetry)
	default:
		l.failing = false
		if l.dirty {
			l.saveSoon()
		} else {
			l.save.Reset(saveEvery)
		}
	}
}

// stopRemembering saves what is to be saved, and lets go of the file.
func (l *loop) stopRemembering() {
	l.redial.Stop()
	l.save.Stop()
	if l.store == nil {
		return
	}
	if l.loading {
		<-l.loaded
	}
	if l.saving {
		if s := <-l.saved; s.err != nil {
			l.dirty = true
		}
	}
	if l.store.own != "" && l.watch.listedOnce() && (l.dirty || l.watch.listed) {
		if err := l.store.save(l.reminisce()); err != nil && !l.failing {
			l.log.Warn("cannot keep the list of nodes for a start without the registry", "error", err)
		}
	}
	l.store.close()
}
