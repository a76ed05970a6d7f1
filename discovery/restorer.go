package discovery

import "time"

// leastRestoreInterval is how often a node of the saved list is dialled, at most.
const leastRestoreInterval = 5 * time.Second

// A restorer uses the list that was saved before the start, until the registry has been
// listed (warm start, guarantee 4 of the design). It does not before somebody asks for
// it, because a registry that answers within a moment knows better; and then each node
// only once it accepts a connection, which it is asked for again and again. All its
// methods are for one goroutine, which also receives from the channel of timer.
type restorer struct {
	prober   *prober
	ttl      time.Duration             // the lease of nodes that name none
	override func(id string) Override  // what operators have decided about a node
	show     func(id string, e *Entry) // how a node is in use from now on, nil: not at all
	journal  *Journal

	list   *savedList // nil: there is none, or not any more
	wanted bool       // somebody asked for it
	// Its nodes, once it is used.
	byID     map[string]*restorable
	byRecord map[string]*restorable
	due      timeQueue[restorable] // those that are dialled again
	timer    *time.Timer           // for probeDue
}

// restorable is a node of the saved list.
type restorable struct {
	entry *Entry
	key   string
	inUse bool
	// Why the registry rejected its record, and to which watch it said so.
	rejected error
	watch    uint64

	probe     *probe
	forbidden int           // how often in a row this machine did not let its probe out
	next      time.Duration // when it is dialled again
	place     int           // in due
}

func newRestorer(p *prober, ttl time.Duration, override func(id string) Override, show func(id string, e *Entry), journal *Journal) *restorer {
	return &restorer{
		prober: p, ttl: ttl, override: override, show: show, journal: journal,
		byRecord: make(map[string]*restorable),
		due: timeQueue[restorable]{
			time:  func(r *restorable) time.Duration { return r.next },
			place: func(r *restorable) *int { return &r.place },
		},
		timer: stoppedTimer(),
	}
}

// entry returns the node as it was when the list was saved, with a lease from now.
func (n *savedNode) entry(ttl time.Duration) *Entry {
	return newEntry(n.node, n.node.LeaseOr(ttl), newLiveness(n.node.Load, n.heard.Sub(processStart), now()))
}

// begin begins to use the list if there is one and somebody asked for it, and reports
// whether it did.
func (r *restorer) begin() bool {
	if !r.wanted || r.list == nil || r.byID != nil {
		return false
	}
	r.byID = make(map[string]*restorable, len(r.list.nodes))
	for i := range r.list.nodes {
		saved := &r.list.nodes[i]
		n := &restorable{entry: saved.entry(r.ttl), key: saved.key}
		r.drop(r.byID[n.entry.Node.ID])
		r.drop(r.byRecord[n.record()])
		r.byID[n.entry.Node.ID], r.byRecord[n.record()] = n, n
		r.ask(n)
	}
	return true
}

// record names the node's record, by its id only where it has no key.
func (n *restorable) record() string { return recordName(n.key, n.entry.Node.ID) }

func (r *restorer) ask(n *restorable) {
	n.probe = r.prober.ask(func() *Entry { return n.entry }, func(a answer) { r.answered(n, a) })
}

// probeDue dials the nodes whose turn it is.
func (r *restorer) probeDue() {
	at := now()
	for n := r.due.firstBy(at); n != nil; n = r.due.firstBy(at) {
		r.due.remove(n)
		r.ask(n)
	}
	r.arm()
}

func (r *restorer) arm() {
	if n := r.due.first(); n != nil {
		r.timer.Reset(n.next - now())
	}
}

// answered takes in how the probe of a node went: it is used or not until it is dialled
// again.
func (r *restorer) answered(n *restorable, a answer) {
	if len(a.addresses) > 0 {
		n.entry = n.entry.at(a.addresses)
	}
	id, unclear := n.entry.Node.ID, inconclusive(a.err, &n.forbidden)
	switch {
	case a.err == nil && !n.inUse:
		n.inUse = true
		n.entry = n.entry.under(r.override(id)).in(restored)
		r.show(id, n.entry)
		r.journal.Add(Change{
			Type: ChangeRestored, ID: id, Entry: n.entry,
			Reason: "it was listed before, the registry cannot be listed yet, and it accepts connections",
		})
	case a.err != nil && n.inUse && !unclear:
		n.inUse = false
		r.show(id, nil)
	}
	n.entry.liveness.renewed.Store(int64(now()))
	n.next = now() + max(n.entry.lease, leastRestoreInterval)
	r.due.put(n)
	r.arm()
}

// dropRecord takes the node of a record out that the registry said left, or is bad.
func (r *restorer) dropRecord(name string) { r.drop(r.byRecord[name]) }

func (r *restorer) drop(n *restorable) {
	if n == nil {
		return
	}
	delete(r.byID, n.entry.Node.ID)
	delete(r.byRecord, n.record())
	r.due.remove(n)
	n.probe.withdraw()
	if n.inUse {
		r.show(n.entry.Node.ID, nil)
	}
}

// reject notes that a watch rejected a record, or that it did not: the error is nil.
func (r *restorer) reject(name string, err error, watch uint64) {
	if n := r.byRecord[name]; n != nil {
		n.rejected, n.watch = err, watch
	}
}

// overridden has a node be as operators have decided now.
func (r *restorer) overridden(id string) {
	if n := r.byID[id]; n != nil && n.inUse {
		if next := n.entry.under(r.override(id)); next != n.entry {
			n.entry = next.in(restored)
			r.show(id, n.entry)
		}
	}
}

// end ends the use of the list, and returns what was used of it.
func (r *restorer) end() (list *savedList, nodes map[string]*restorable) {
	list, nodes = r.list, r.byID
	r.timer.Stop()
	r.list, r.byID, r.due.items = nil, nil, nil
	clear(r.byRecord)
	for _, n := range nodes {
		n.probe.withdraw()
	}
	return list, nodes
}
