package discovery

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"go.uber.org/zap"
)

const (
	// locateEvery is how often the directory asks a registry that was listed which
	// of its servers it has been told of.
	locateEvery = 5 * time.Second

	// settleTime is for how long a first listing is kept back while its host names
	// are being resolved and its overdue nodes dialled.
	settleTime = 500 * time.Millisecond
)

// names is the part of a keeper that knows what host names stand for, those of
// nodes and those of the registry. That is part of the snapshots: whoever checks an
// address and dials it later uses the same one, whatever the name's server says
// meanwhile.
type names struct {
	resolver *resolver
	moved    bool
	ports    map[string][]uint16 // of the registry, by its host names
	fixed    []netip.AddrPort    // of the registry, where it is written as an address
	located  []string            // what the registry's Locator said last
	locate   *time.Timer
}

func (d *Directory) newNames() names {
	n := names{
		resolver: newResolver(d.lookup),
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
func (k *keeper) askLocation() {
	if k.locator == nil {
		return
	}
	k.locate.Reset(locateEvery)
	located := k.locator.Located()
	if slices.Equal(located, k.located) {
		return
	}
	k.located = located
	k.place(slices.Concat(k.addresses, located))
	k.locateRegistry()
}

// locateRegistry makes known where the registry itself is.
func (k *keeper) locateRegistry() {
	sockets := slices.Clone(k.fixed)
	for name, ports := range k.ports {
		for _, addr := range k.resolver.of(name) {
			for _, port := range ports {
				sockets = append(sockets, netip.AddrPortFrom(addr, port))
			}
		}
	}
	slices.SortFunc(sockets, netip.AddrPort.Compare)
	sockets = slices.Compact(sockets)
	if was := k.registry.Swap(&sockets); was != nil && !slices.Equal(*was, sockets) {
		k.moved = true
	}
}

// occupy notes that a node in use has the endpoint it has, and completes its entry
// by what is known of that.
func (k *keeper) occupy(t *tracked) {
	defer k.count(t)
	t.excess = k.room.take(0, &t.entry.Node)
	k.places.enter(t)
	if !t.entry.named {
		return
	}
	t.entry = t.entry.at(k.resolver.use(t.entry.Node.ID, t.entry.Node.Endpoint.Host()))
}

// vacate is the end of occupy.
func (k *keeper) vacate(t *tracked) {
	k.census.count(&t.counted, counted{})
	t.excess = k.room.take(t.excess, nil)
	k.places.leave(t)
	k.resolver.leave(t.entry.Node.ID)
}

// vacateAll is vacate for every node.
func (k *keeper) vacateAll() {
	clear(k.places)
	k.resolver.leaveAll()
	k.census = newCensus()
	k.room = room{}
}

// learn takes in what a lookup found.
func (k *keeper) learn(ctx context.Context, l lookup) {
	found := k.resolver.done(l)
	if ctx.Err() != nil {
		return
	}
	if found.failed != nil && k.everyNode && k.lines.Allow() {
		k.log.Warn("cannot resolve the host name of an endpoint",
			zap.String("host", found.name), zap.Int("nodes", len(found.users)), zap.Error(found.failed))
	}
	if found.changed {
		k.moveTo(found.name)
	}
}

// see notes what a host name stands for, as somebody else found out.
func (k *keeper) see(name string, addresses []netip.Addr) {
	if k.resolver.put(name, addresses) {
		k.moveTo(name)
	}
}

// moveTo gives all that have a host name the addresses for which it stands now.
func (k *keeper) moveTo(name string) {
	for id := range k.resolver.usersOf(name) {
		if t := k.nodes[id]; t != nil {
			t.entry = t.entry.at(k.resolver.of(name))
			k.count(t)
			k.change(id, t.entry)
		}
	}
	if k.ports[name] != nil {
		k.locateRegistry()
	}
}

// stopResolving waits for the lookups that are under way. Their context has ended.
func (k *keeper) stopResolving() {
	k.locate.Stop()
	k.resolver.stop()
}
