package discovery

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"go.uber.org/zap"
)

const (
	// A host name is looked up again so long after it was resolved, give or take
	// a fifth. A resolver of the system does not tell for how long its answer
	// holds.
	resolveEvery = 30 * time.Second
	// One that could not be resolved is tried again sooner at first.
	resolveRetry = time.Second

	lookupTimeout = 5 * time.Second
	maxLookups    = 32

	// locateEvery is how often the directory asks a registry that was listed which
	// of its servers it has been told of.
	locateEvery = 5 * time.Second

	// namesTick is how often the directory looks which names are due.
	namesTick = time.Second

	// settleTime is for how long a first listing is kept back while its host names
	// are being resolved and its overdue nodes dialled.
	settleTime = 500 * time.Millisecond
)

// names is the part of a keeper that resolves host names, in the background. What
// a name stands for is part of the snapshots: whoever checks an address and dials
// it later uses the same one, whatever the name's server says meanwhile.
type names struct {
	hosts   map[string]*host
	queue   []string // to be looked up
	lookups int      // under way
	found   chan lookup
	tick    *time.Timer
	ticking bool
	untried int // hosts that were never looked up
	moved   bool
	ports   map[string][]uint16 // of the registry, by its host names
	fixed   []netip.AddrPort    // of the registry, where it is written as an address
	located []string            // what the registry's Locator said last
	locate  *time.Timer
}

// host is a host name that endpoints have, or the registry.
type host struct {
	users     map[string]struct{} // ids of nodes
	addresses []netip.Addr        // sorted; none before the first success
	tried     bool
	failures  int
	next      time.Duration // when it is looked up again
	busy      bool          // it waits in the queue, or is being looked up
}

// lookup is what a host name stands for.
type lookup struct {
	host      string
	addresses []netip.Addr
	err       error
}

func (d *Directory) newNames() names {
	n := names{
		hosts:  make(map[string]*host),
		found:  make(chan lookup, maxLookups),
		tick:   stoppedTimer(),
		locate: stoppedTimer(),
	}
	n.place(d.addresses)
	return n
}

// place notes where the registry is, as host:port.
func (n *names) place(addresses []string) {
	n.ports, n.fixed = make(map[string][]uint16), nil
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
		h := k.host(name)
		for _, addr := range h.addresses {
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

// host returns the state of a host name; a new one is looked up soon.
func (k *keeper) host(name string) *host {
	h := k.hosts[name]
	if h == nil {
		h = &host{users: make(map[string]struct{}), busy: true}
		k.hosts[name] = h
		k.queue = append(k.queue, name)
		k.untried++
	}
	if !k.ticking {
		k.ticking = true
		k.tick.Reset(namesTick)
	}
	return h
}

// occupy notes that a node in use has the endpoint it has, and completes its entry
// by what is known of that.
func (k *keeper) occupy(t *tracked) {
	k.places.enter(t)
	if !t.entry.named {
		return
	}
	h := k.host(t.entry.Node.Endpoint.Host())
	h.users[t.entry.Node.ID] = struct{}{}
	t.entry = t.entry.at(h.addresses)
}

// vacate is the end of occupy.
func (k *keeper) vacate(t *tracked) {
	k.places.leave(t)
	if !t.entry.named {
		return
	}
	if h := k.hosts[t.entry.Node.Endpoint.Host()]; h != nil {
		delete(h.users, t.entry.Node.ID)
	}
}

// vacateAll is vacate for every node.
func (k *keeper) vacateAll() {
	clear(k.places)
	for _, h := range k.hosts {
		clear(h.users)
	}
}

// resolve looks up the names that wait for it, a bounded number at once.
func (k *keeper) resolve(ctx context.Context) {
	for len(k.queue) > 0 && k.lookups < maxLookups {
		name := k.queue[0]
		k.queue = k.queue[1:]
		if k.hosts[name] == nil {
			continue
		}
		k.lookups++
		go func() {
			l := lookup{host: name}
			l.addresses, l.err = k.lookUp(ctx, name)
			k.found <- l
		}()
	}
}

// lookUp returns the addresses behind a name, sorted.
func (d *Directory) lookUp(ctx context.Context, name string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	found, err := d.lookup(ctx, name)
	if err != nil {
		return nil, err
	}
	addresses := make([]netip.Addr, 0, len(found))
	for _, addr := range found {
		if addr = addr.Unmap().WithZone(""); addr.IsValid() {
			addresses = append(addresses, addr)
		}
	}
	if len(addresses) == 0 {
		return nil, fmt.Errorf("looking up %s: no address", name)
	}
	slices.SortFunc(addresses, netip.Addr.Compare)
	return slices.Compact(addresses), nil
}

// learn takes in what a lookup found.
func (k *keeper) learn(ctx context.Context, l lookup) {
	k.lookups--
	h := k.hosts[l.host]
	if ctx.Err() != nil || h == nil {
		return
	}
	h.busy = false
	if !h.tried {
		h.tried = true
		k.untried--
	}
	if l.err != nil {
		// Stale beats none: what the name stood for was checked, and it still is
		// when it is dialled.
		wait := resolveEvery
		if h.failures++; len(h.addresses) == 0 {
			wait = min(resolveRetry<<min(h.failures-1, 10), resolveEvery)
		}
		h.next = now() + jitter(wait)
		if h.failures == 1 && k.everyNode && k.lines.Allow() {
			k.log.Warn("cannot resolve the host name of an endpoint",
				zap.String("host", l.host), zap.Int("nodes", len(h.users)), zap.Error(l.err))
		}
		return
	}
	h.failures = 0
	h.next = now() + jitter(resolveEvery)
	k.see(l.host, h, l.addresses)
}

// see notes what a host name stands for now.
func (k *keeper) see(name string, h *host, addresses []netip.Addr) {
	if slices.Equal(h.addresses, addresses) {
		return
	}
	h.addresses = addresses
	for id := range h.users {
		if t := k.nodes[id]; t != nil {
			t.entry = t.entry.at(addresses)
			k.change(id, t.entry)
		}
	}
	if k.ports[name] != nil {
		k.locateRegistry()
	}
}

// refresh queues the names that are due, and forgets those that nobody uses.
func (k *keeper) refresh() {
	at := now()
	for name, h := range k.hosts {
		switch {
		case h.busy:
		case len(h.users) == 0 && k.ports[name] == nil:
			delete(k.hosts, name)
		case h.next <= at:
			h.busy = true
			k.queue = append(k.queue, name)
		}
	}
	if k.ticking = len(k.hosts) > 0; k.ticking {
		k.tick.Reset(namesTick)
	}
}

// stopResolving waits for the lookups that are under way. Their context has ended.
func (k *keeper) stopResolving() {
	k.tick.Stop()
	k.locate.Stop()
	for ; k.lookups > 0; k.lookups-- {
		<-k.found
	}
}

// jitter returns the duration, give or take a fifth.
func jitter(d time.Duration) time.Duration {
	return d*4/5 + time.Duration(rand.Int64N(int64(d)*2/5+1))
}

// lookupHost is the default lookup.
func lookupHost(ctx context.Context, name string) ([]netip.Addr, error) {
	return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
}
