package discovery

import (
	"errors"
	"math"
	"time"

	"go.uber.org/zap"
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

// warm is the part of a keeper that remembers.
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
	// What the next snapshot before the first listing changes.
	recalled map[string]*Entry

	dirty   bool // there is something to save
	saving  bool
	saved   chan saving
	rested  time.Duration // when the next save may come at the earliest
	failing bool          // the last save failed, and that was told
	save    *time.Timer
}

func (d *Directory) newWarm() warm {
	w := warm{
		memory:   newShelf(),
		recalled: make(map[string]*Entry),
		loaded:   make(chan *memento, 1),
		saved:    make(chan saving, 1),
		rested:   now(),
		redial:   stoppedTimer(),
		save:     stoppedTimer(),
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
func (k *keeper) load() {
	if k.store == nil {
		return
	}
	k.loading = true
	store := k.store
	go func() {
		if err := store.open(); err != nil {
			store.log.Warn("the list of nodes is not kept for a start without the registry", zap.Error(err))
		}
		k.loaded <- store.load()
	}()
}

// remember takes in what was loaded.
func (k *keeper) remember(m *memento) {
	k.loading = false
	if m != nil && k.decisions.known.IsZero() {
		k.decisions.all, k.decisions.known = m.overrides, m.Overrides
		k.applyOverrides()
	}
	switch {
	case !k.everyNode:
		k.memento = m
		k.recall()
	case m != nil && k.last.Partial:
		k.awaitRemembered(m)
	}
	if k.dirty {
		k.saveSoon()
	}
}

// recall begins to use the remembered list, if there is one and somebody asked.
func (k *keeper) recall() {
	if !k.wanted || k.begun || k.everyNode || k.memento == nil {
		return
	}
	k.begun = true
	m := k.memento
	k.log.Warn("the registry cannot be listed yet; nodes that were listed before are used as soon as they accept connections",
		zap.Int("nodes", len(m.nodes)), zap.Duration("known", time.Since(m.Written).Round(time.Second)))
	next := *k.condition.Load()
	next.known = m.Written
	k.condition.Store(&next)
	for _, r := range m.nodes {
		t := k.remembered(r)
		k.memory.add(t, math.MaxInt64)
		k.ask(t)
	}
}

// remembered returns a node of the remembered list, not in use.
func (k *keeper) remembered(r remembered) *tracked {
	lease := r.node.Lease()
	if lease == 0 {
		lease = k.ttl
	}
	v := new(vitals)
	v.load.Store(math.Float64bits(r.node.Load))
	v.heard.Store(int64(r.heard.Sub(processStart)))
	v.renewed.Store(int64(now()))
	return &tracked{entry: newEntry(r.node, lease, v), key: r.key, remembered: true}
}

// awaitRemembered is for a first listing that shows by silence nothing about anybody:
// remembered nodes that it lacks come into use when they accept a connection, and
// then have one lease to be heard, or when they are heard.
func (k *keeper) awaitRemembered(m *memento) {
	for _, r := range m.nodes {
		if k.nodes[r.node.ID] == nil && k.graves.byID[r.node.ID] == nil {
			if g := k.remembered(r).grave(0); k.graves.buryAsked(g, now()) {
				t := k.exhume(g)
				t.remembered = true
				k.ask(t)
			}
		}
	}
}

// recallAgain dials the remembered nodes whose turn it is.
func (k *keeper) recallAgain() {
	at := now()
	for len(k.memory.queue) > 0 && k.memory.queue[0].due <= at {
		t := k.memory.queue[0]
		k.memory.postpone(t, math.MaxInt64)
		k.ask(t)
	}
}

// restoreOr takes in how the probe of a remembered node went: it is used, or not,
// until it is dialled again.
func (k *keeper) restoreOr(a answer) {
	t := a.t
	if k.memory.byID[t.entry.Node.ID] != t {
		return
	}
	if len(a.addresses) > 0 {
		t.entry = t.entry.at(a.addresses)
	}
	switch {
	case a.err == nil && t.doubt != restored:
		t.doubt = restored
		t.entry = t.entry.under(k.decisions.of(t.entry.Node.ID)).in(restored)
		k.recalled[t.entry.Node.ID] = t.entry
		k.journal.Add(Change{
			Type: ChangeRestored, ID: t.entry.Node.ID, Entry: t.entry,
			Reason: "it was listed before, the registry cannot be listed yet, and it accepts connections",
		})
	case a.err != nil && t.doubt == restored && !k.inconclusive(t, a.err):
		t.doubt = trusted
		k.recalled[t.entry.Node.ID] = nil
	}
	t.entry.vitals.renewed.Store(int64(now()))
	k.memory.postpone(t, now()+max(t.entry.lease, leastRestoreInterval))
	k.redial.Reset(k.memory.queue[0].due - now())
}

// recant takes a remembered node out that the registry said left, or is bad.
func (k *keeper) recant(e Event) {
	if t := k.memory.byRecord[rejectionKey(e)]; t != nil {
		k.memory.drop(t)
		if t.doubt == restored {
			k.recalled[t.entry.Node.ID] = nil
		}
	}
}

// endRestore is part of the end of the first listing: it decides about the
// remembered nodes in use that the listing lacks, by the same rules as after an
// outage, and returns how many of them have a lease left to be heard.
func (k *keeper) endRestore(l Listing, at time.Duration) (awaited int) {
	m := k.memento
	k.redial.Stop()
	k.memento = nil
	memory := k.memory
	k.memory = newShelf()
	for id := range k.recalled {
		if k.nodes[id] == nil {
			k.change(id, nil) // unless it is kept below
		}
	}
	clear(k.recalled)
	if !k.begun {
		if m != nil && l.Partial {
			k.awaitRemembered(m)
		}
		return 0
	}
	wiped := l.Epoch != m.Epoch || l.Revision < m.Revision
	for id, t := range memory.byID {
		t.probe = 0
		if k.nodes[id] != nil || t.doubt != restored {
			if k.nodes[id] == nil {
				k.change(id, nil)
				if l.Partial && k.graves.byID[id] == nil {
					k.graves.bury(t.grave(0), at, true) // it may be heard
				}
			}
			continue
		}
		unheard := at - time.Duration(t.entry.vitals.heard.Load())
		// What was rejected before the list was in use is kept only there.
		if r := k.rejected[t.record()]; r.Err != nil && r.listing == k.listing && !errors.Is(r.Err, ErrForbidden) {
			t.unread, t.listing = r.Err, k.listing
		}
		unread := t.unread != nil && t.listing == k.listing
		proven := !unread && !wiped && !l.Partial && unheard < t.entry.lease && (l.Expiry == 0 || unheard < l.Expiry)
		// A node that was remembered at the same address has shared it before.
		o := k.claimant(t)
		if o != nil && memory.byID[o.entry.Node.ID] != nil &&
			memory.byID[o.entry.Node.ID].entry.Node.Endpoint.Address() == t.entry.Node.Endpoint.Address() {
			o = nil
		}
		if proven || o != nil || k.full(&t.entry.Node) != nil || (t.key != "" && k.keys[t.key] != nil) {
			k.change(id, nil)
			continue
		}
		if t.entry.named {
			name := t.entry.Node.Endpoint.Host()
			k.see(name, t.entry.addresses)
		}
		t.entry.vitals.renewed.Store(int64(at))
		k.insert(t)
		if unread {
			k.refuse(t, t.unread)
			t.unread = nil
		}
		awaited++
	}
	return awaited
}

// keep has the list saved soon: there is a newer one.
func (k *keeper) keep() {
	if k.store == nil || k.dirty {
		return
	}
	k.dirty = true
	if !k.loading {
		k.saveSoon()
	}
}

func (k *keeper) saveSoon() { k.save.Reset(max(saveDelay, k.rested-now())) }

// write saves the list in the background, if it has changed or the registry
// confirms it.
func (k *keeper) write() {
	if k.store == nil || k.store.own == "" || k.saving || k.loading || !k.everyNode {
		return
	}
	if !k.dirty && !k.listed {
		k.save.Reset(saveEvery)
		return
	}
	k.dirty, k.saving = false, true
	m, store := k.reminisce(), k.store
	go func() {
		began := now()
		err := store.save(m)
		k.saved <- saving{took: now() - began, err: err}
	}()
}

// reminisce returns what is to be remembered.
func (k *keeper) reminisce() *memento {
	m := &memento{Written: time.Now(), Epoch: k.last.Epoch, Revision: k.revision.Load(), nodes: make([]remembered, 0, len(k.nodes))}
	if !k.listed {
		m.Written = processStart.Add(k.lostAt)
	}
	m.overrides, m.Overrides = k.decisions.all, k.decisions.known
	if k.decisions.listing == k.complete {
		m.Overrides = m.Written // the watch would have told of a change
	}
	for _, t := range k.nodes {
		n := t.entry.Node
		n.Load = t.entry.Load()
		m.nodes = append(m.nodes, remembered{key: t.key, heard: t.entry.LastHeard(), node: n})
	}
	return m
}

// written takes in how saving went.
func (k *keeper) written(s saving) {
	k.saving = false
	k.rested = now() + rest(s.took)
	switch {
	case s.err != nil:
		if !k.failing {
			k.log.Warn("cannot keep the list of nodes for a start without the registry", zap.Error(s.err))
		}
		k.failing, k.dirty = true, true
		k.save.Reset(saveRetry)
	default:
		k.failing = false
		if k.dirty {
			k.saveSoon()
		} else {
			k.save.Reset(saveEvery)
		}
	}
}

// stopRemembering saves what is to be saved, and lets go of the file.
func (k *keeper) stopRemembering() {
	k.redial.Stop()
	k.save.Stop()
	if k.store == nil {
		return
	}
	if k.loading {
		<-k.loaded
	}
	if k.saving {
		if s := <-k.saved; s.err != nil {
			k.dirty = true
		}
	}
	if k.store.own != "" && k.everyNode && (k.dirty || k.listed) {
		if err := k.store.save(k.reminisce()); err != nil && !k.failing {
			k.log.Warn("cannot keep the list of nodes for a start without the registry", zap.Error(err))
		}
	}
	k.store.close()
}
