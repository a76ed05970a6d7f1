package discovery

import (
	"fmt"
	"net"
	"net/netip"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// PrivateRanges is the word for all private and loopback ranges in [Access], as
// Caddy knows it.
const PrivateRanges = "private_ranges"

// Access says where endpoints may point. The zero value lets everything pass but
// what is never wanted: see [NewRules].
type Access struct {
	// Allow, where anything is given, lets nothing else pass, and Deny wins over
	// it. Each entry is an IP address, a CIDR range, [PrivateRanges], or a glob of
	// host names in which * stands for any characters, dots among them, and ? for
	// one. A glob never speaks of endpoints that are written as an address.
	Allow, Deny []string
	// Loopback lets loopback addresses pass.
	Loopback bool
	// LocalPorts do not pass on any address of this machine.
	LocalPorts []uint16
}

// Rules decide whether a node's endpoint may be used. They never change.
type Rules struct {
	allow, deny patterns
	loopback    bool
	localPorts  []uint16
}

// patterns are what allow or deny names.
type patterns struct {
	explicit []netip.Prefix // written as a CIDR range or an address
	private  bool
	globs    []string
}

func (p *patterns) empty() bool { return len(p.explicit) == 0 && !p.private && len(p.globs) == 0 }

// never are the ranges that no fleet serves from and that a hostile record would
// name. Only an allow range inside of one of them lifts it: 0.0.0.0/0 asks for
// everybody's nodes, not for the cloud's keys.
var never = []struct {
	prefix netip.Prefix
	reason string
}{
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("::1/128"), "loopback"},
	{netip.MustParsePrefix("0.0.0.0/8"), "unspecified"},
	{netip.MustParsePrefix("::/128"), "unspecified"},
	{netip.MustParsePrefix("255.255.255.255/32"), "broadcast"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
	// What else hands out a cloud's credentials, beside 169.254.169.254.
	{netip.MustParsePrefix("100.100.100.200/32"), "cloud metadata"},     // Alibaba
	{netip.MustParsePrefix("168.63.129.16/32"), "cloud metadata"},       // Azure
	{netip.MustParsePrefix("fd00:ec2::254/128"), "cloud metadata"},      // AWS
	{netip.MustParsePrefix("fd20:ce::254/128"), "cloud metadata"},       // Google
	{netip.MustParsePrefix("fd00:c1::a9fe:a9fe/128"), "cloud metadata"}, // Oracle
}

// translated are the IPv6 ranges behind which an IPv4 address may stand: what a
// translator on the way makes of them is what counts.
var translated = []struct {
	prefix netip.Prefix
	at     int // the bit at which the IPv4 address begins
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 96},   // NAT64, RFC 6052
	{netip.MustParsePrefix("64:ff9b:1::/48"), 96}, // NAT64 of one site, RFC 8215
	{netip.MustParsePrefix("2002::/16"), 16},      // 6to4
	{netip.MustParsePrefix("::/96"), 96},          // IPv4-compatible
}

var privateRanges = []netip.Prefix{
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("fd00::/8"),
	netip.MustParsePrefix("::1/128"),
}

// NewRules returns the rules that the access asks for. Beyond those, these never
// pass unless a range of Allow that lies inside of them names them: loopback
// (where Loopback is not set), link-local, unspecified, broadcast and multicast
// addresses and those at which clouds hand out credentials, also where they are
// written as IPv6 (mapped, compatible, NAT64, 6to4); and, unless Allow names the
// single address, LocalPorts on this machine and the registry itself. The error
// wraps [ErrInvalid].
func NewRules(a Access) (*Rules, error) {
	r := &Rules{loopback: a.Loopback, localPorts: a.LocalPorts}
	var err error
	if r.allow, err = parsePatterns(a.Allow); err != nil {
		return nil, fmt.Errorf("allow: %w", err)
	}
	if r.deny, err = parsePatterns(a.Deny); err != nil {
		return nil, fmt.Errorf("deny: %w", err)
	}
	return r, nil
}

func parsePatterns(words []string) (p patterns, err error) {
	for _, word := range words {
		if word == PrivateRanges {
			p.private = true
			continue
		}
		if prefix, ok := parsePrefix(word); ok {
			p.explicit = append(p.explicit, prefix)
			continue
		}
		glob := strings.ToLower(strings.TrimSuffix(word, "."))
		if !isGlob(glob) {
			return p, fmt.Errorf("%w pattern %q: want a range such as 10.0.0.0/8, an IP address, %s, or host names such as *.example.com",
				ErrInvalid, clip(word), PrivateRanges)
		}
		p.globs = append(p.globs, glob)
	}
	return p, nil
}

// parsePrefix reads a range or an address in the one form in which addresses are
// compared.
func parsePrefix(word string) (netip.Prefix, bool) {
	prefix, err := netip.ParsePrefix(word)
	if err != nil {
		addr, err := netip.ParseAddr(word)
		if err != nil || addr.Zone() != "" {
			return netip.Prefix{}, false
		}
		prefix = netip.PrefixFrom(addr, addr.BitLen())
	}
	if addr := prefix.Addr(); addr.Is4In6() {
		if prefix.Bits() < 96 {
			return netip.Prefix{}, false
		}
		prefix = netip.PrefixFrom(addr.Unmap(), prefix.Bits()-96)
	}
	return prefix.Masked(), true
}

// isGlob reports whether the pattern could match a host name. One of digits and
// dots would be meant for addresses, and never match.
func isGlob(glob string) bool {
	if glob == "" || len(glob) > 253 {
		return false
	}
	for _, c := range []byte(glob) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && !strings.ContainsRune("-_.*?", rune(c)) {
			return false
		}
	}
	return glob == "*" || strings.ContainsFunc(glob, func(r rune) bool { return r >= 'a' && r <= 'z' })
}

// names reports whether one of the globs names the host.
func (p *patterns) names(host string) bool {
	for _, glob := range p.globs {
		if ok, err := path.Match(glob, host); ok && err == nil {
			return true
		}
	}
	return false
}

// contains returns the range that holds the address, as it was written.
func (p *patterns) contains(addr netip.Addr) (string, bool) {
	for _, prefix := range p.explicit {
		if prefix.Contains(addr) {
			return prefix.String(), true
		}
	}
	if p.private {
		for _, prefix := range privateRanges {
			if prefix.Contains(addr) {
				return PrivateRanges, true
			}
		}
	}
	return "", false
}

// lifts reports whether an explicit range holds the address and is at least so
// narrow.
func (p *patterns) lifts(addr netip.Addr, bits int) bool {
	for _, prefix := range p.explicit {
		if prefix.Bits() >= bits && prefix.Contains(addr) {
			return true
		}
	}
	return false
}

// AllowsName reports whether Allow names the host itself, by a glob.
func (r *Rules) AllowsName(host string) bool { return r.allow.names(host) }

// Obstacle returns in a few words why the node's endpoint may not be used, "" if
// it may. The registry is where the registry itself is. Where the endpoint has a
// host name, every address behind it must pass.
func (r *Rules) Obstacle(e *Entry, registry []netip.AddrPort) string {
	addresses := e.Addresses()
	if len(addresses) == 0 {
		return "name not resolved"
	}
	name := ""
	if e.named {
		name = e.Node.Endpoint.Host()
	}
	if name != "" && r.deny.names(name) {
		return "denied: by deny " + name
	}
	allowed := r.allow.empty() || (name != "" && r.allow.names(name))
	for _, addr := range addresses {
		if reason := r.checkAddress(addr, e.port, e.usual, registry); reason != "" {
			return "denied: " + reason
		}
		if allowed {
			continue
		}
		if _, ok := r.allow.contains(addr); !ok {
			return "denied: not in allow"
		}
	}
	return ""
}

// usual reports whether none of the addresses is in a range that never passes, or
// in one that hides another. Entries remember it, because rules are asked about
// each node of a fleet whenever one of them changes.
func usual(addresses []netip.Addr) bool {
	for _, addr := range addresses {
		if !addr.IsValid() || addr.Is4In6() || addr.Zone() != "" {
			return false
		}
		for _, n := range never {
			if n.prefix.Contains(addr) {
				return false
			}
		}
		for _, t := range translated {
			if t.prefix.Contains(addr) {
				return false
			}
		}
	}
	return true
}

func (r *Rules) checkAddress(addr netip.Addr, port uint16, usual bool, registry []netip.AddrPort) string {
	if usual {
		return r.checkForm(addr, addr, addr.BitLen(), port, registry)
	}
	addr = addr.Unmap().WithZone("")
	if !addr.IsValid() {
		return "no address"
	}
	if reason := r.checkForm(addr, addr, 0, port, registry); reason != "" || addr.Is4() {
		return reason
	}
	for _, t := range translated {
		if t.prefix.Contains(addr) && addr != netip.IPv6Unspecified() && addr != netip.IPv6Loopback() {
			bytes := addr.As16()
			v4 := netip.AddrFrom4([4]byte(bytes[t.at/8 : t.at/8+4]))
			if reason := r.checkForm(addr, v4, t.at, port, registry); reason != "" {
				return reason
			}
		}
	}
	return ""
}

// checkForm checks one meaning of an address, which begins at a bit of it; at its
// end there is nothing to check but what was configured. Only the address as it
// stands can lift anything.
func (r *Rules) checkForm(addr, meaning netip.Addr, at int, port uint16, registry []netip.AddrPort) string {
	if pattern, ok := r.deny.contains(meaning); ok {
		return "by deny " + pattern
	}
	for _, n := range never {
		if at == addr.BitLen() {
			break
		}
		if !n.prefix.Contains(meaning) {
			continue
		}
		if meaning.IsLoopback() && r.loopback && at == 0 {
			break
		}
		if !r.allow.lifts(addr, at+n.prefix.Bits()) {
			return n.reason
		}
		break
	}
	reserved := ""
	switch {
	case slices.Contains(r.localPorts, port) && isLocal(meaning):
		reserved = "Caddy's admin port"
	case isRegistry(meaning, port, registry):
		reserved = "the registry itself"
	}
	if reserved != "" && !r.allow.lifts(addr, addr.BitLen()) {
		return reserved
	}
	return ""
}

// isRegistry reports whether a socket is one of the registry. One on this machine
// may listen on each of its addresses.
func isRegistry(addr netip.Addr, port uint16, registry []netip.AddrPort) bool {
	for _, s := range registry {
		if s.Port() == port && (s.Addr() == addr || (isLocal(s.Addr()) && isLocal(addr))) {
			return true
		}
	}
	return false
}

// machine is what is known of this machine's addresses, for a while: a flood of
// records that name its ports must not have them looked up for each.
type machine struct {
	addresses []netip.Addr
	until     time.Time
}

var thisMachine atomic.Pointer[machine]

// isLocal reports whether the address is one of this machine.
func isLocal(addr netip.Addr) bool {
	if addr.IsLoopback() || addr.IsUnspecified() {
		return true
	}
	known := thisMachine.Load()
	if at := time.Now(); known == nil || at.After(known.until) {
		known = &machine{until: at.Add(10 * time.Second)}
		interfaces, _ := net.InterfaceAddrs() // where the system does not tell, loopback has to do
		for _, i := range interfaces {
			if n, ok := i.(*net.IPNet); ok {
				if a, ok := netip.AddrFromSlice(n.IP); ok {
					known.addresses = append(known.addresses, a.Unmap())
				}
			}
		}
		thisMachine.Store(known)
	}
	return slices.Contains(known.addresses, addr)
}
