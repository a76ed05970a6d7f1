package discovery

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// table holds the nodes in use and finds them: by id, by their record, by
// their address, and in the order in which their leases run out. add, replace, setKey
// and remove are its only writers, so that none of these is forgotten.
type table struct {
	nodes     map[string]*tracked // by id
	byRecord  map[string]*tracked // see recordName
	addresses addrIndex
	leases    timeQueue[tracked]
	room      room
}

// tracked is a node and what the loop knows of it.
type tracked struct {
	entry    *Entry
	key      string // of its record, where it has one
	revision uint64
	watch    uint64 // the last one that showed it

	// The table's.
	due       time.Duration // the order of the leases; the real end may be later, never earlier
	place     int           // in that
	neighbour int           // its place among the nodes at its address
	excess    int           // what it takes of the room
	admitted  int           // what it took when there was room for that

	announced time.Duration // since when it announces its address
	conflict  idConflict

	presence  presence
	probe     *probe        // the question to it that waits for an answer, nil if none does
	forbidden int           // how often in a row this machine did not let its probe out
	counted   counted       // as what it is counted
	alone     time.Duration // since when it is suspect though most others are heard, 0 if it is not
	expired   bool          // its record ran out in the batch of events under way
}

func (t *tracked) id() string { return t.entry.Node.ID }

// record names the node's record, by its id only where it has no key.
func (t *tracked) record() string { return recordName(t.key, t.id()) }

func newTable() table {
	return table{
		nodes:     make(map[string]*tracked),
		byRecord:  make(map[string]*tracked),
		addresses: make(addrIndex),
		leases: timeQueue[tracked]{
			time:  func(t *tracked) time.Duration { return t.due },
			place: func(t *tracked) *int { return &t.place },
		},
	}
}

// full returns why there is no room for one node more, nil if there is.
func (t *table) full(n *Node) error {
	if len(t.nodes) >= MaxNodes {
		return Invalidf(FaultFull, "record: the directory is full with %d nodes", MaxNodes)
	}
	return t.room.refuses(0, n)
}

// admits reports whether a node that was in use before may be so again: there is room,
// and no other node stands under its record.
func (t *table) admits(n *Node, key string) bool {
	return t.nodes[n.ID] == nil && t.byRecord[recordName(key, n.ID)] == nil && t.full(n) == nil
}

// add puts a node into use. None with its id is.
func (t *table) add(n *tracked) {
	t.nodes[n.id()], t.byRecord[n.record()] = n, n
	t.room.admit(n)
	t.addresses.add(n)
	t.requeue(n)
}

// replace gives a node the entry of another record.
func (t *table) replace(n *tracked, next *Entry) {
	n.excess = t.room.take(n.excess, nil)
	t.addresses.remove(n)
	n.entry = next
	t.room.admit(n)
	t.addresses.add(n)
	t.requeue(n)
}

// setKey notes under which key the node's record stands.
func (t *table) setKey(n *tracked, key string) {
	if n.key != key {
		delete(t.byRecord, n.record())
		n.key = key
		t.byRecord[n.record()] = n
	}
}

// requeue brings a node's place in the order in line with its lease.
func (t *table) requeue(n *tracked) {
	n.due = n.entry.due()
	t.leases.put(n)
}

// remove takes a node out of use.
func (t *table) remove(n *tracked) {
	delete(t.nodes, n.id())
	delete(t.byRecord, n.record())
	n.excess = t.room.take(n.excess, nil)
	t.addresses.remove(n)
	t.leases.remove(n)
}

// sorted returns the nodes in use, sorted by id.
func (t *table) sorted() []*tracked {
	return slices.SortedFunc(maps.Values(t.nodes), func(a, b *tracked) int { return strings.Compare(a.id(), b.id()) })
}

// overdue returns the node whose lease ran out first by a time, nil if none did. A
// heartbeat does not touch the order: who is at its head may have been heard since.
func (t *table) overdue(at time.Duration) *tracked {
	for {
		n := t.leases.firstBy(at)
		if n == nil || n.entry.due() <= at {
			return n
		}
		t.requeue(n)
	}
}
