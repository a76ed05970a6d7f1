package discovery

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
)

// What host names stand for, those of nodes and those of the registry, is part of the
// snapshots: whoever checks an address and dials it later uses the same one, whatever the
// name's server says meanwhile.

// onLookup takes in what a lookup found.
func (l *loop) onLookup(ctx context.Context, answer lookup) {
	h, changed, failed := l.resolver.found(answer)
	if ctx.Err() != nil {
		return
	}
	if failed != nil {
		l.reporter.line(slog.LevelWarn, "cannot resolve the host name of an endpoint",
			"host", h.name, "nodes", len(h.users), "error", failed)
	}
	if changed {
		l.moveTo(h.name)
	}
	// Whether the address in use still answers is looked at as often as the name.
	for id := range h.users {
		if t := l.table.nodes[id]; t != nil {
			l.reacher.want(t.entry)
		}
	}
}

// setAddresses notes what a host name stands for, as somebody else found out.
func (l *loop) setAddresses(name string, addresses []netip.Addr) {
	if l.resolver.put(name, addresses) {
		l.moveTo(name)
	}
}

// moveTo gives all that have a host name the addresses for which it stands now.
func (l *loop) moveTo(name string) {
	for id := range l.resolver.usersOf(name) {
		if t := l.table.nodes[id]; t != nil {
			l.show(t, t.entry.at(l.resolver.of(name)))
			l.suspicion.count(t)
		}
	}
	if l.location.ports[name] != nil {
		l.locateRegistry()
	}
}

// onReach takes in at which address a node can be reached.
func (l *loop) onReach(ctx context.Context, f reached) {
	l.reacher.tried(f)
	t := l.table.nodes[f.entry.Node.ID]
	if ctx.Err() != nil || f.err != nil || t == nil || !slices.Equal(t.entry.addresses, f.entry.addresses) ||
		t.entry.port != f.entry.port || t.entry.socket(f.address) == t.entry.address {
		return
	}
	t.entry.liveness.answers.Store(&f.address)
	was := t.entry.address
	l.show(t, t.entry.at(t.entry.addresses))
	l.reporter.line(slog.LevelInfo, "node is reached at another address of its host name",
		"node", t.id(), "address", t.entry.address, "before", was)
}

// failure is a node that could not be reached at an address.
type failure struct{ id, address string }

// Failed tells that a node could not be reached, or did not answer, at the address at
// which it was dialled. Its host name is looked up anew then, and where it stands for
// several addresses they are tried. It may be called from any goroutine, and never
// blocks: of very many failures some are not looked at.
func (d *Directory) Failed(e *Entry, address string) {
	if !e.named {
		return
	}
	select {
	case d.failures <- failure{e.Node.ID, address}:
	default:
	}
}

// onFailure takes in that a node could not be reached.
func (l *loop) onFailure(f failure) {
	t := l.table.nodes[f.id]
	if t == nil || t.entry.address != f.address && t.entry.Node.Endpoint.Address() != f.address {
		return // it is dialled elsewhere by now
	}
	l.resolver.ask(f.id)
	l.reacher.want(t.entry)
}

// askLocation asks the registry where else it is.
func (l *loop) askLocation() {
	if l.location.ask() {
		l.resolver.pin(l.location.names())
		l.locateRegistry()
	}
}

// locateRegistry makes known where the registry itself is.
func (l *loop) locateRegistry() {
	sockets := l.location.sockets(l.resolver.of)
	if was := l.dir.registry.Swap(&sockets); !slices.Equal(*was, sockets) {
		l.publisher.other = true
	}
}
