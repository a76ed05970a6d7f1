package discovery

import (
	"fmt"
	"time"
)

// maxNeighbours bounds how many nodes at one address are compared. A flood of
// records that all name one address must not cost the square of their number.
const maxNeighbours = 16

// addrIndex finds the nodes in use by the address that their records name.
type addrIndex map[string]atAddress

// atAddress are the nodes at one address, linked, the newest first.
type atAddress struct {
	newest *tracked
	nodes  int
}

// neighbour is where a node stands in the index, and since when it has its address.
type neighbour struct {
	since        time.Duration
	newer, older *tracked
}

func (x addrIndex) add(t *tracked) {
	address := t.entry.Node.Endpoint.Address()
	at := x[address]
	if t.neighbour.older = at.newest; at.newest != nil {
		at.newest.neighbour.newer = t
	}
	x[address] = atAddress{t, at.nodes + 1}
}

func (x addrIndex) remove(t *tracked) {
	address := t.entry.Node.Endpoint.Address()
	at, older, newer := x[address], t.neighbour.older, t.neighbour.newer
	if older != nil {
		older.neighbour.newer = newer
	}
	if newer != nil {
		newer.neighbour.older = older
	} else {
		at.newest = older
	}
	t.neighbour.newer, t.neighbour.older = nil, nil
	if at.nodes--; at.nodes > 0 {
		x[address] = at
	} else {
		delete(x, address)
	}
}

// at returns the nodes at t's address, none if they are too many or t alone.
func (x addrIndex) at(t *tracked) []*tracked {
	at := x[t.entry.Node.Endpoint.Address()]
	if at.nodes > maxNeighbours || at.nodes == 1 && at.newest == t {
		return nil
	}
	nodes := make([]*tracked, 0, at.nodes)
	for o := at.newest; o != nil; o = o.neighbour.older {
		nodes = append(nodes, o)
	}
	return nodes
}

// conflict returns the live node of another service that has announced t's address
// since t was last heard, nil if there is none.
//
// That one answers there now. A node whose lease is suspended stays because nothing
// speaks against it, and a suspect because it accepts connections; but a request would
// reach the wrong service. Two nodes that have shared an address all along, as one
// process that lists two services does, are left alone.
func (x addrIndex) conflict(t *tracked, live func(*tracked) bool) *tracked {
	for _, o := range x.at(t) {
		if o.id() != t.id() && o.entry.Node.Service() != t.entry.Node.Service() &&
			live(o) && int64(o.neighbour.since) > t.entry.liveness.heard.Load() {
			return o
		}
	}
	return nil
}

// live reports whether the node is in use because it was heard.
func (l *loop) live(t *tracked) bool { return t.doubt == trusted && t.watch == l.watch.number }

// addressConflict returns the live node to which t has lost its address, nil if there
// is none.
func (l *loop) addressConflict(t *tracked) *tracked { return l.table.addresses.conflict(t, l.live) }

// endConflict removes a node that is not live and has lost its address to another,
// and reports whether it was one.
func (l *loop) endConflict(t *tracked) bool {
	if l.live(t) {
		return false
	}
	o := l.addressConflict(t)
	if o == nil {
		return false
	}
	l.remove(t, ChangeLapsed, fmt.Sprintf("it is not heard, and its address is that of node %q now", o.id()))
	return true
}

// claimAddress notes that a node has announced its address just now. In a listing it is
// not known yet who else is there: its end decides.
func (l *loop) claimAddress(t *tracked) {
	t.neighbour.since = now()
	if !l.watch.listed {
		return
	}
	for _, o := range l.table.addresses.at(t) {
		l.endConflict(o)
	}
}
