package discovery

import (
	"fmt"
	"slices"
)

// maxNeighbours bounds how many nodes at one address are compared. A flood of
// records that all name one address must not cost the square of their number.
const maxNeighbours = 16

// addrIndex finds the nodes in use by the address that their records name.
type addrIndex map[string][]*tracked

func (x addrIndex) add(t *tracked) {
	address := t.entry.Node.Endpoint.Address()
	t.neighbour = len(x[address])
	x[address] = append(x[address], t)
}

func (x addrIndex) remove(t *tracked) {
	address := t.entry.Node.Endpoint.Address()
	at := x[address]
	last := at[len(at)-1]
	at[t.neighbour], last.neighbour = last, t.neighbour
	at[len(at)-1] = nil
	if x[address] = at[:len(at)-1]; len(at) == 1 {
		delete(x, address)
	}
}

// at returns the nodes at t's address, none if they are too many.
func (x addrIndex) at(t *tracked) []*tracked {
	if at := x[t.entry.Node.Endpoint.Address()]; len(at) <= maxNeighbours {
		return at
	}
	return nil
}

// conflict returns the live node of another service that has announced t's address
// since t was last heard, nil if there is none.
//
// That one answers there now. A node whose lease is suspended stays because nothing
// speaks against it, and a suspect because it accepts connections; but a request would
// reach the wrong service. Two nodes that have shared an address all along, as one
// process that lists two services does, are left alone.
func (x addrIndex) conflict(t *tracked, live func(*tracked) bool) *tracked {
	for _, o := range slices.Backward(x.at(t)) { // the newest first, mostly
		if o.id() != t.id() && o.entry.Node.Service() != t.entry.Node.Service() &&
			live(o) && int64(o.announced) > t.entry.liveness.heard.Load() {
			return o
		}
	}
	return nil
}

// live reports whether the node is in use because it was heard.
func (l *loop) live(t *tracked) bool { return t.presence == alive && t.watch == l.watch.number }

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
	t.announced = now()
	if !l.watch.listed {
		return
	}
	for _, o := range slices.Clone(l.table.addresses.at(t)) {
		l.endConflict(o)
	}
}
