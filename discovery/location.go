package discovery

import (
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// locateEvery is how often a registry that was listed is asked which of its servers it
// has been told of.
const locateEvery = 5 * time.Second

// location knows where the registry itself is: at the addresses that are configured,
// and at those that its servers tell of.
type location struct {
	configured []string
	locator    Locator // nil if the registry is none
	reported   []string
	again      *time.Timer // when it is asked next

	ports map[string][]uint16 // by host name
	fixed []netip.AddrPort    // where it is written as an address
}

func newLocation(configured []string, locator Locator) location {
	l := location{configured: configured, locator: locator, again: stoppedTimer()}
	l.parse(configured)
	return l
}

// parse reads addresses of the form host:port.
func (l *location) parse(addresses []string) {
	l.ports, l.fixed = make(map[string][]uint16), nil
	for _, address := range addresses {
		name, port, err := net.SplitHostPort(address)
		number, err2 := strconv.ParseUint(port, 10, 16)
		if err != nil || err2 != nil {
			continue
		}
		if addr, err := netip.ParseAddr(name); err == nil {
			l.fixed = append(l.fixed, netip.AddrPortFrom(addr.Unmap().WithZone(""), uint16(number)))
		} else if name, err := canonicalHost(name); err == nil {
			l.ports[name] = append(l.ports[name], uint16(number))
		}
	}
}

// ask asks the registry where else it is, and reports whether that is news. A server
// that was not configured is no better a place for a node to point to.
func (l *location) ask() bool {
	if l.locator == nil {
		return false
	}
	l.again.Reset(locateEvery)
	reported := l.locator.Located()
	if slices.Equal(reported, l.reported) {
		return false
	}
	l.reported = reported
	l.parse(slices.Concat(l.configured, reported))
	return true
}

// names returns the host names among the addresses, sorted.
func (l *location) names() []string { return slices.Sorted(maps.Keys(l.ports)) }

// sockets returns where the registry is, sorted, given what host names stand for.
func (l *location) sockets(of func(name string) []netip.Addr) []netip.AddrPort {
	sockets := slices.Clone(l.fixed)
	for name, ports := range l.ports {
		for _, addr := range of(name) {
			for _, port := range ports {
				sockets = append(sockets, netip.AddrPortFrom(addr, port))
			}
		}
	}
	slices.SortFunc(sockets, netip.AddrPort.Compare)
	return slices.Compact(sockets)
}
