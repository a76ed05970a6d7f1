package discovery

import "time"

// tracked is a node and where its lease stands in the queue.
type tracked struct {
	entry    *Entry
	key      string
	revision uint64
	listing  uint64 // the last listing or watch that put it

	due   time.Duration // the queue's order; the real end may be later, never earlier
	place int           // in the queue

	doubt    doubt
	probe    uint64        // the question that waits for an answer, 0 if none does
	from     *grave        // what it was kept in, of a node that lapsed and is being asked
	unproven int           // how often in a row its probes were no evidence
	excess   int           // what it takes of the room
	admitted int           // what it took when there was room for that
	counted  counted       // as what it is counted
	alone    time.Duration // since when it is in doubt though most others are heard, 0 if it is not
	expired  bool          // its record ran out in the batch of events under way
	// It comes from a warm-start file.
	remembered bool
	// Why the running listing rejected its record, of one that is not in use yet.
	unread error

	// Since when it has its address, and who else has it.
	placed       time.Duration
	newer, older *tracked

	// Who wrote the record before the one who did last, and when that changed.
	rival    string
	replaced time.Duration
	fought   bool
}

// record names the node's record, by its id only where it has no key.
func (t *tracked) record() string { return recordName(t.key, t.entry.Node.ID) }

// named returns the node that was last put by the record that the event speaks
// of. Where records have keys, the key decides: a record that cannot be read may
// have no id, or a wrong one.
func (l *loop) named(e Event) *tracked {
	if e.Key != "" {
		return l.keys[e.Key]
	}
	if t := l.nodes[e.ID]; t != nil && t.key == "" {
		return t
	}
	return nil
}

// name notes by which record the node was put.
func (l *loop) name(t *tracked, key string) {
	if t.key == key {
		return
	}
	delete(l.keys, t.key)
	if t.key = key; key != "" {
		l.keys[key] = t
	}
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
	id, key := t.entry.Node.ID, t.key
	t.entry = t.entry.under(l.decisions.of(id)).in(t.doubt)
	l.nodes[id] = t
	t.key = ""
	l.name(t, key)
	l.occupy(t)
	l.requeue(t)
	l.change(id, t.entry)
}

// requeue brings a node to where the end of its lease has it.
func (l *loop) requeue(t *tracked) {
	t.due = t.entry.due()
	l.leases.put(t)
}

// newLeases returns a queue of nodes in the order in which their leases run out.
func newLeases() timeQueue[tracked] {
	return timeQueue[tracked]{
		time:  func(t *tracked) time.Duration { return t.due },
		place: func(t *tracked) *int { return &t.place },
	}
}

// occupy notes that a node in use has the endpoint it has, and completes its entry
// by what is known of that.
func (l *loop) occupy(t *tracked) {
	defer l.count(t)
	l.room.admit(t)
	l.places.enter(t)
	if !t.entry.named {
		return
	}
	id, name := t.entry.Node.ID, t.entry.Node.Endpoint.Host()
	t.entry = t.entry.at(l.resolver.use(id, name))
	// A node that is new or says something new may be at another address than the one
	// before it, which may be another service's by now.
	l.resolver.ask(id)
	l.reacher.want(t.entry)
}

// vacate is the end of occupy.
func (l *loop) vacate(t *tracked) {
	l.census.count(&t.counted, counted{})
	t.excess = l.room.take(t.excess, nil)
	l.places.leave(t)
	l.resolver.leave(t.entry.Node.ID)
	l.reacher.drop(t.entry.Node.ID)
}

// vacateAll is vacate for every node.
func (l *loop) vacateAll() {
	clear(l.places)
	l.resolver.leaveAll()
	l.census = newCensus()
	l.room = room{}
}
