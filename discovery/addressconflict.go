package discovery

import "fmt"

// An address that is given to another node takes the one before it out of use,
// unless that is heard itself. A node whose lease is suspended stays because nothing
// speaks against it, and one in doubt because it accepts connections; but where
// another node has announced the same address since it was last heard, it is the
// other that answers there. That counts where the other serves something else: a
// request would reach the wrong service. Two nodes that have shared an address all
// along, as one process that lists two services does, are left alone.

// maxNeighbours bounds how many nodes at one address are compared. A flood of
// records that all name one address must not cost the square of their number.
const maxNeighbours = 16

// places are the nodes in use by their address.
type places map[string]place

// place is an address. Its nodes are linked, the newest first.
type place struct {
	newest *tracked
	nodes  int
}

// enter notes that a node is at its address.
func (p places) enter(t *tracked) {
	address := t.entry.Node.Endpoint.Address()
	at := p[address]
	if t.older = at.newest; t.older != nil {
		t.older.newer = t
	}
	p[address] = place{t, at.nodes + 1}
}

// leave is the end of enter.
func (p places) leave(t *tracked) {
	address := t.entry.Node.Endpoint.Address()
	at := p[address]
	if t.older != nil {
		t.older.newer = t.newer
	}
	if t.newer != nil {
		t.newer.older = t.older
	} else {
		at.newest = t.older
	}
	t.newer, t.older = nil, nil
	if at.nodes--; at.nodes > 0 {
		p[address] = at
	} else {
		delete(p, address)
	}
}

// at returns the nodes at t's address, none if they are too many.
func (p places) at(t *tracked) []*tracked {
	at := p[t.entry.Node.Endpoint.Address()]
	if at.nodes == 0 || at.nodes > maxNeighbours {
		return nil
	}
	if at.nodes == 1 && at.newest == t {
		return nil
	}
	nodes := make([]*tracked, 0, at.nodes)
	for o := at.newest; o != nil; o = o.older {
		nodes = append(nodes, o)
	}
	return nodes
}

// live reports whether the node is in use because it was heard.
func (l *loop) live(t *tracked) bool { return t.doubt == trusted && t.listing == l.listing }

// claimant returns the live node of another service that has announced t's address
// since t was last heard, nil if there is none.
func (l *loop) claimant(t *tracked) *tracked {
	for _, o := range l.places.at(t) {
		if o.entry.Node.ID != t.entry.Node.ID && o.entry.Node.Service() != t.entry.Node.Service() &&
			l.live(o) && int64(o.placed) > t.entry.vitals.heard.Load() {
			return o
		}
	}
	return nil
}

// yield ends a node that is not live and whose address is another's now. It
// reports whether it was one.
func (l *loop) yield(t *tracked) bool {
	if l.live(t) {
		return false
	}
	o := l.claimant(t)
	if o == nil {
		return false
	}
	l.remove(t, ChangeLapsed, fmt.Sprintf("it is not heard, and its address is that of node %q now", o.entry.Node.ID))
	return true
}

// takePlace notes that a node has announced its address just now. In a listing it is
// not known yet who else is there: its end decides.
func (l *loop) takePlace(t *tracked) {
	t.placed = now()
	if !l.listed {
		return
	}
	for _, o := range l.places.at(t) {
		l.yield(o)
	}
}
