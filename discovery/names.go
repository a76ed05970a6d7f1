package discovery

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

const (
	// locateEvery is how often the directory asks a registry that was listed which
	// of its servers it has been told of.
	locateEvery = 5 * time.Second

	// settleTime is for how long a first listing is kept back while its host names
	// are being resolved and its overdue nodes dialled.
	settleTime = 500 * time.Millisecond
)

// names is the part of a loop that knows what host names stand for, those of
// nodes and those of the registry. That is part of the snapshots: whoever checks an
// address and dials it later uses the same one, whatever the name's server says
// meanwhile.
type names struct {
	resolver *resolver
	reacher  *reacher
	moved    bool
	ports    map[string][]uint16 // of the registry, by its host names
	fixed    []netip.AddrPort    // of the registry, where it is written as an address
	located  []string            // what the registry's Locator said last
	locate   *time.Timer
}

func (d *Directory) newNames() names {
	n := names{
		resolver: newResolver(d.dialer.lookup),
		reacher:  newReacher(d.dialer),
		locate:   stoppedTimer(),
	}
	n.place(d.addresses)
	return n
}

// place notes where the registry is, as host:port.
func (n *names) place(addresses []string) {
	n.ports, n.fixed = make(map[string][]uint16), nil
	defer func() { n.resolver.pin(slices.Sorted(maps.Keys(n.ports))) }()
	for _, address := range addresses {
		name, port, err := net.SplitHostPort(address)
		number, err2 := strconv.ParseUint(port, 10, 16)
		if err != nil || err2 != nil {
			continue
		}
		if addr, err := netip.ParseAddr(name); err == nil {
			n.fixed = append(n.fixed, netip.AddrPortFrom(addr.Unmap().WithZone(""), uint16(number)))
		} else if name, err := canonicalHost(name); err == nil {
			n.ports[name] = append(n.ports[name], uint16(number))
		}
	}
}

// askLocation asks the registry where else it is, now and from time to time: a
// server that was not configured is no better a place for a node to point to.
func (l *loop) askLocation() {
	if l.locator == nil {
		return
	}
	l.locate.Reset(locateEvery)
	located := l.locator.Located()
	if slices.Equal(located, l.located) {
		return
	}
	l.located = located
	l.place(slices.Concat(l.addresses, located))
	l.locateRegistry()
}

// locateRegistry makes known where the registry itself is.
func (l *loop) locateRegistry() {
	sockets := slices.Clone(l.fixed)
	for name, ports := range l.ports {
		for _, addr := range l.resolver.of(name) {
			for _, port := range ports {
				sockets = append(sockets, netip.AddrPortFrom(addr, port))
			}
		}
	}
	slices.SortFunc(sockets, netip.AddrPort.Compare)
	sockets = slices.Compact(sockets)
	if was := l.registry.Swap(&sockets); was != nil && !slices.Equal(*was, sockets) {
		l.moved = true
	}
}

// learn takes in what a lookup found.
func (l *loop) learn(ctx context.Context, answer lookup) {
	found := l.resolver.found(answer)
	if ctx.Err() != nil {
		return
	}
	if found.failed != nil && l.everyNode && l.lines.Allow() {
		l.log.Warn("cannot resolve the host name of an endpoint",
			"host", found.name, "nodes", len(found.users), "error", found.failed)
	}
	if found.changed {
		l.moveTo(found.name)
	}
	// Whether the address in use still answers is looked at as often as the name.
	for id := range found.users {
		if t := l.table.nodes[id]; t != nil {
			l.reacher.want(t.entry)
		}
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
	t.entry = t.entry.at(t.entry.addresses)
	l.change(t.entry.Node.ID, t.entry)
	if l.everyNode && l.logs() {
		l.log.Info("node is reached at another address of its host name", l.leftOut([]any{
			"node", t.entry.Node.ID, "address", t.entry.address, "before", was,
		})...)
	}
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

// see notes what a host name stands for, as somebody else found out.
func (l *loop) see(name string, addresses []netip.Addr) {
	if l.resolver.put(name, addresses) {
		l.moveTo(name)
	}
}

// moveTo gives all that have a host name the addresses for which it stands now.
func (l *loop) moveTo(name string) {
	for id := range l.resolver.usersOf(name) {
		if t := l.table.nodes[id]; t != nil {
			t.entry = t.entry.at(l.resolver.of(name))
			l.count(t)
			l.change(id, t.entry)
		}
	}
	if l.ports[name] != nil {
		l.locateRegistry()
	}
}

// stopResolving waits for the lookups that are under way. Their context has ended.
func (l *loop) stopResolving() {
	l.locate.Stop()
	l.resolver.stop()
	l.reacher.wait()
}
