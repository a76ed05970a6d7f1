package discovery

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

const (
	// What is kept of nodes that lapsed: so many, of so many bytes, and for so long.
	// The first two are more than the half of the largest fleet, which is how many
	// may lapse one by one before the loss guard asks them all.
	maxLapsed      = 1 << 16
	maxLapsedBytes = 96 << 20
	keepLapsed     = MaxLease

	// So often a node is asked again of which a probe could tell nothing.
	maxAgain = 3
)

// lapsedNodes keeps the records of nodes that lapsed, so that they can be brought
// back: by the loss guard, when so many lapsed that they are asked themselves, or by
// a heartbeat that names no endpoint. Those that lapsed within one lease are counted.
// It is bounded in number, bytes and time, the oldest go first, and each step costs the
// logarithm of their number. Those that are being asked are beside that: they have the
// bounds of the nodes in use, so that as many can be brought back, and none goes before
// its answer.
type lapsedNodes struct {
	most, mostBytes int
	counts          *counts

	byID     map[string]*lapsedNode
	byRecord map[string]*lapsedNode
	ages     timeQueue[lapsedNode] // those that are not being asked, the oldest first
	bytes    int                   // of those
	pending  int                   // how many are being asked
	room     room                  // of those
	recent   timeQueue[lapsedNode] // those that count, the one first that does so no longer
	unasked  map[string]nodeSet    // those of them that were not dialled since, by service
}

type nodeSet map[*lapsedNode]struct{}

// lapsedNode is what is kept of one node.
type lapsedNode struct {
	entry    *Entry
	key      string // of its record, where it has one
	revision uint64
	watch    uint64 // the last one that showed it
	saved    bool   // it comes from the saved list

	since  time.Duration // when it lapsed
	counts time.Duration // for how long it counts as one that lapsed lately
	until  time.Duration // up to when that is
	bytes  int
	room   int // what it takes of the room, while it is being asked
	again  int // how often it was asked in vain

	agesPlace, recentPlace int
}

func (n *lapsedNode) id() string     { return n.entry.Node.ID }
func (n *lapsedNode) record() string { return recordName(n.key, n.entry.Node.ID) }

// compare orders nodes by when they lapsed.
func (n *lapsedNode) compare(o *lapsedNode) int {
	return cmp.Or(cmp.Compare(n.since, o.since), cmp.Compare(n.id(), o.id()))
}

func newLapsedNodes(most, mostBytes int, c *counts) lapsedNodes {
	return lapsedNodes{
		most: most, mostBytes: mostBytes, counts: c,
		byID: make(map[string]*lapsedNode), byRecord: make(map[string]*lapsedNode),
		ages: timeQueue[lapsedNode]{
			time:  func(n *lapsedNode) time.Duration { return n.since },
			place: func(n *lapsedNode) *int { return &n.agesPlace },
		},
		recent: timeQueue[lapsedNode]{
			time:  func(n *lapsedNode) time.Duration { return n.until },
			place: func(n *lapsedNode) *int { return &n.recentPlace },
		},
		unasked: make(map[string]nodeSet),
	}
}

// add keeps a node that lapsed at a time, in place of what was kept of it. It counts as
// one that lapsed lately for as long as its counts says; and it need not be dialled if it
// was asked already.
func (l *lapsedNodes) add(n *lapsedNode, at time.Duration, asked bool) {
	l.insert(n, at, asked)
	l.trim()
}

// addAsked is add for a node that is to be dialled now. It reports whether there is
// room to wait for its answer.
func (l *lapsedNodes) addAsked(n *lapsedNode, at time.Duration) bool {
	l.insert(n, at, true)
	pending := l.await(n)
	l.trim()
	return pending
}

// insert is add without its bounds.
func (l *lapsedNodes) insert(n *lapsedNode, at time.Duration, asked bool) {
	l.drop(l.byID[n.id()])
	l.drop(l.byRecord[n.record()])
	l.byID[n.id()], l.byRecord[n.record()] = n, n
	n.bytes = n.entry.Node.footprint() + len(n.key)
	l.keep(n, at)
	if n.counts > 0 {
		n.until = at + n.counts
		l.recent.put(n)
		l.counts.add(n.entry.Node.Service(), count{gone: 1}, +1)
		if !asked {
			l.setUnasked(n)
		}
	}
}

// keep has a node be one of those that are not being asked.
func (l *lapsedNodes) keep(n *lapsedNode, since time.Duration) {
	n.since = since
	l.ages.put(n)
	l.bytes += n.bytes
}

func (l *lapsedNodes) setUnasked(n *lapsedNode) {
	service := n.entry.Node.Service()
	if l.unasked[service] == nil {
		l.unasked[service] = make(nodeSet)
	}
	l.unasked[service][n] = struct{}{}
}

// trim drops the oldest that are too many.
func (l *lapsedNodes) trim() {
	for len(l.ages.items) > l.most || l.bytes > l.mostBytes {
		l.drop(l.ages.first())
	}
}

// await keeps a node until [lapsedNodes.answered], whatever lapses meanwhile, and
// reports whether there is room for it.
func (l *lapsedNodes) await(n *lapsedNode) bool {
	if !l.ages.has(n) || l.pending >= MaxNodes || l.room.refuses(0, &n.entry.Node) != nil {
		return false
	}
	l.ages.remove(n)
	l.bytes -= n.bytes
	l.pending++
	n.room = l.room.take(0, &n.entry.Node)
	return true
}

// answered ends await at a time.
func (l *lapsedNodes) answered(n *lapsedNode, at time.Duration) {
	if l.byID[n.id()] == n && !l.ages.has(n) {
		l.leave(n)
		l.keep(n, at)
		l.trim()
	}
}

// leave takes a node out of those that are being asked.
func (l *lapsedNodes) leave(n *lapsedNode) {
	l.pending--
	n.room = l.room.take(n.room, nil)
}

// dropRecord forgets the node of a record: the registry said something of it since it
// lapsed.
func (l *lapsedNodes) dropRecord(name string) { l.drop(l.byRecord[name]) }

// drop forgets a node, if it is there.
func (l *lapsedNodes) drop(n *lapsedNode) {
	if n == nil || l.byID[n.id()] != n {
		return
	}
	delete(l.byID, n.id())
	delete(l.byRecord, n.record())
	if l.ages.has(n) {
		l.ages.remove(n)
		l.bytes -= n.bytes
	} else {
		l.leave(n)
	}
	l.uncount(n)
}

// uncount has a node count no longer.
func (l *lapsedNodes) uncount(n *lapsedNode) {
	if !l.recent.has(n) {
		return
	}
	l.recent.remove(n)
	service := n.entry.Node.Service()
	l.counts.add(service, count{gone: 1}, -1)
	if delete(l.unasked[service], n); len(l.unasked[service]) == 0 {
		delete(l.unasked, service)
	}
}

// expire drops and uncounts those whose time is over.
func (l *lapsedNodes) expire(at time.Duration) {
	for n := l.recent.firstBy(at); n != nil; n = l.recent.firstBy(at) {
		l.uncount(n)
	}
	for n := l.ages.firstBy(at - keepLapsed); n != nil; n = l.ages.firstBy(at - keepLapsed) {
		l.drop(n)
	}
}

// ask returns the nodes that lapsed lately and were not asked since, each once; they
// are kept until they are answered.
func (l *lapsedNodes) ask() (asked []*lapsedNode) {
	for _, service := range slices.Collect(maps.Keys(l.unasked)) { // askOf may change it
		asked = append(asked, l.askOf(service)...)
	}
	slices.SortFunc(asked, (*lapsedNode).compare)
	return asked
}

// askOf is ask for one service.
func (l *lapsedNodes) askOf(service string) []*lapsedNode {
	asked := slices.SortedFunc(maps.Keys(l.unasked[service]), (*lapsedNode).compare)
	delete(l.unasked, service)
	return slices.DeleteFunc(asked, func(n *lapsedNode) bool {
		if l.await(n) {
			return false
		}
		l.askAgain(n)
		return true
	})
}

// askAgain has a node asked once more, the next time that many are: it could not be
// told whether it answers. That is so a few times only.
func (l *lapsedNodes) askAgain(n *lapsedNode) {
	if l.byID[n.id()] == n && l.recent.has(n) && n.again < maxAgain {
		n.again++
		l.setUnasked(n)
	}
}
