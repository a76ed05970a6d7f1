package discovery

import (
	"cmp"
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
	// Listeners are the sockets on which this process serves requests: a node there
	// would have each of them go round. One at an unspecified address listens on all
	// addresses of this machine.
	Listeners []netip.AddrPort
}

// Rules decide whether a node's endpoint may be used. They never change.
type Rules struct {
	allow, deny patterns
	loopback    bool
	localPorts  []uint16
	listeners   map[uint16][]netip.Addr
}

// patterns are what allow or deny names.
type patterns struct {
	explicit []netip.Prefix // written as a CIDR range or an address
	private  bool
	globs    []string
}

func (p *patterns) empty() bool { return len(p.explicit) == 0 && !p.private && len(p.globs) == 0 }

// reserved are the ranges that no fleet serves from and that a hostile record would
// name. Only an allow range inside of one of them lifts it: 0.0.0.0/0 asks for
// everybody's nodes, not for the cloud's keys.
var reserved = []struct {
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
	{netip.MustParsePrefix("192.0.0.192/32"), "cloud metadata"},         // Oracle, the elder
	{netip.MustParsePrefix("fd00:ec2::254/128"), "cloud metadata"},      // AWS
	{netip.MustParsePrefix("fd00:ec2::23/128"), "cloud metadata"},       // AWS, identities of pods
	{netip.MustParsePrefix("fd20:ce::254/128"), "cloud metadata"},       // Google
	{netip.MustParsePrefix("fd00:c1::a9fe:a9fe/128"), "cloud metadata"}, // Oracle
	{netip.MustParsePrefix("fd00:42::42/128"), "cloud metadata"},        // Scaleway
	{netip.MustParsePrefix("fd00:a9fe:a9fe::1/128"), "cloud metadata"},  // Linode
}

// embedded4 is a place of IPv6 addresses at which an IPv4 address may stand: what a
// translator or a tunnel on the way makes of it is what counts.
type embedded4 struct {
	prefix netip.Prefix
	at     int  // the bit at which the IPv4 address begins
	split  bool // it skips the bits 64 to 71 (RFC 6052, section 2.2)
	not    bool // all its bits are inverted
	// guess says that the place is one of several, of which only the site knows the
	// right one. What reads as 0.0.0.0/8 there is the padding of another.
	guess bool
}

var embeddings = []embedded4{
	{prefix: netip.MustParsePrefix("64:ff9b::/96"), at: 96}, // NAT64, RFC 6052
	// NAT64 of one site, RFC 8215, at each length of RFC 6052 that fits.
	{prefix: netip.MustParsePrefix("64:ff9b:1::/48"), at: 96, guess: true},
	{prefix: netip.MustParsePrefix("64:ff9b:1::/48"), at: 64, split: true, guess: true},
	{prefix: netip.MustParsePrefix("64:ff9b:1::/48"), at: 56, split: true, guess: true},
	{prefix: netip.MustParsePrefix("64:ff9b:1::/48"), at: 48, split: true, guess: true},
	{prefix: netip.MustParsePrefix("2002::/16"), at: 16},            // 6to4, RFC 3056
	{prefix: netip.MustParsePrefix("2001::/32"), at: 32},            // Teredo, RFC 4380: its server
	{prefix: netip.MustParsePrefix("2001::/32"), at: 96, not: true}, // and its client
	{prefix: netip.MustParsePrefix("::ffff:0:0:0/96"), at: 96},      // IPv4-translated, SIIT, RFC 2765
	{prefix: netip.MustParsePrefix("::/96"), at: 96},                // IPv4-compatible, RFC 4291
}

// isatap is the place in addresses of any prefix whose interface identifier is one
// of ISATAP (RFC 5214, section 6.1).
var isatap = embedded4{at: 96}

// in returns the IPv4 address that stands at the place.
func (p *embedded4) in(addr netip.Addr) netip.Addr {
	bytes := addr.As16()
	var v4 [4]byte
	at := p.at / 8
	for i := range v4 {
		if p.split && at == 8 {
			at++
		}
		v4[i] = bytes[at]
		if p.not {
			v4[i] = ^v4[i]
		}
		at++
	}
	return netip.AddrFrom4(v4)
}

// reach returns how many bits of the IPv6 address determine the first ones of the
// IPv4 address.
func (p *embedded4) reach(bits int) int {
	if p.split && p.at+bits > 64 {
		bits += 8
	}
	return p.at + bits
}

// placesOf returns the places of the address at which an IPv4 address may stand.
func placesOf(addr netip.Addr) (places []*embedded4) {
	if !addr.Is6() || addr == netip.IPv6Unspecified() || addr == netip.IPv6Loopback() {
		return nil
	}
	for i := range embeddings {
		if embeddings[i].prefix.Contains(addr) {
			places = append(places, &embeddings[i])
		}
	}
	bytes := addr.As16()
	// The first byte has the bits that say whether it is unique and whether a group.
	if bytes[8]&^0x03 == 0 && bytes[9] == 0 && bytes[10] == 0x5e && bytes[11] == 0xfe {
		places = append(places, &isatap)
	}
	return places
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
// written as IPv6 (mapped, compatible, translated, NAT64, 6to4, Teredo, ISATAP); and, unless Allow names the
// single address, LocalPorts on this machine, Listeners and the registry itself. The
// error wraps [ErrInvalid].
func NewRules(a Access) (*Rules, error) {
	r := &Rules{loopback: a.Loopback, localPorts: a.LocalPorts, listeners: make(map[uint16][]netip.Addr)}
	for _, l := range a.Listeners {
		r.listeners[l.Port()] = append(r.listeners[l.Port()], l.Addr().Unmap().WithZone(""))
	}
	var err error
	if r.allow, err = parsePatterns(a.Allow); err != nil {
		return nil, fmt.Errorf("allow: %w", err)
	}
	if r.deny, err = parsePatterns(a.Deny); err != nil {
		return nil, fmt.Errorf("deny: %w", err)
	}
	return r, nil
}

// ValidatePatterns reports, as an error that wraps [ErrInvalid], which of the words may
// not stand in [Access].Allow and Deny.
func ValidatePatterns(words []string) error {
	_, err := parsePatterns(words)
	return err
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
				ErrInvalid, Clip(word), PrivateRanges)
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
	if p.private && slices.ContainsFunc(privateRanges, func(prefix netip.Prefix) bool { return prefix.Contains(addr) }) {
		return PrivateRanges, true
	}
	return "", false
}

// lifts reports whether an explicit range holds the address and is at least so
// narrow.
func (p *patterns) lifts(addr netip.Addr, bits int) bool {
	return slices.ContainsFunc(p.explicit, func(prefix netip.Prefix) bool { return prefix.Bits() >= bits && prefix.Contains(addr) })
}

// AllowsName reports whether Allow names the host itself, by a glob.
func (r *Rules) AllowsName(host string) bool { return r.allow.names(host) }

// Check returns in a few words why the node's endpoint may not be used, "" if
// it may. The registry is where the registry itself is. Where the endpoint has a
// host name, every address behind it must pass.
func (r *Rules) Check(e *Entry, registry []netip.AddrPort) string {
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
		if reason := r.checkAddress(addr, e.port, e.ordinary, registry); reason != "" {
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

// ordinary reports whether none of the addresses is in a range that never passes, or
// in one that hides another. Entries remember it, because rules are asked about
// each node of a fleet whenever one of them changes.
func ordinary(addresses []netip.Addr) bool {
	for _, addr := range addresses {
		if !addr.IsValid() || addr.Is4In6() || addr.Zone() != "" {
			return false
		}
		for _, n := range reserved {
			if n.prefix.Contains(addr) {
				return false
			}
		}
		if len(placesOf(addr)) > 0 {
			return false
		}
	}
	return true
}

func (r *Rules) checkAddress(addr netip.Addr, port uint16, ordinary bool, registry []netip.AddrPort) string {
	addr = addr.Unmap().WithZone("")
	if !addr.IsValid() {
		return "no address"
	}
	reason := ""
	if !ordinary {
		reason = r.checkReserved(addr, addr, nil)
	}
	if reason = cmp.Or(reason, r.checkMeaning(addr, addr, port, registry)); ordinary || reason != "" {
		return reason
	}
	guesses, padding := 0, 0
	for _, p := range placesOf(addr) {
		meaning := p.in(addr)
		if p.guess {
			if guesses++; meaning.As4()[0] == 0 {
				padding++
				continue
			}
		}
		if reason := cmp.Or(r.checkReserved(addr, meaning, p), r.checkMeaning(addr, meaning, port, registry)); reason != "" {
			return reason
		}
	}
	if guesses > 0 && guesses == padding && !r.allow.lifts(addr, addr.BitLen()) {
		return "unspecified"
	}
	return ""
}

// checkReserved checks one meaning of an address, which stands at a place of it,
// against the ranges that never pass. Only the address as it stands can lift them.
func (r *Rules) checkReserved(addr, meaning netip.Addr, p *embedded4) string {
	for _, n := range reserved {
		if !n.prefix.Contains(meaning) {
			continue
		}
		bits := n.prefix.Bits()
		if p != nil {
			bits = p.reach(bits)
		} else if meaning.IsLoopback() && r.loopback {
			break
		}
		if _, denied := r.deny.contains(meaning); !denied && !r.allow.lifts(addr, bits) {
			return n.reason
		}
		break
	}
	return ""
}

// checkMeaning checks one meaning of an address against what was configured.
func (r *Rules) checkMeaning(addr, meaning netip.Addr, port uint16, registry []netip.AddrPort) string {
	if pattern, ok := r.deny.contains(meaning); ok {
		return "by deny " + pattern
	}
	taken := ""
	switch {
	case slices.Contains(r.localPorts, port) && isLocal(meaning):
		taken = "Caddy's admin port"
	case r.listens(meaning, port):
		taken = "this proxy itself"
	case isRegistry(meaning, port, registry):
		taken = "the registry itself"
	}
	if taken != "" && !r.allow.lifts(addr, addr.BitLen()) {
		return taken
	}
	return ""
}

// listens reports whether this process serves requests at a socket.
func (r *Rules) listens(addr netip.Addr, port uint16) bool {
	return slices.ContainsFunc(r.listeners[port], func(l netip.Addr) bool {
		return l == addr || l.IsUnspecified() && isLocal(addr)
	})
}

// isRegistry reports whether a socket is one of the registry. One on this machine
// may listen on each of its addresses.
func isRegistry(addr netip.Addr, port uint16, registry []netip.AddrPort) bool {
	return slices.ContainsFunc(registry, func(s netip.AddrPort) bool {
		return s.Port() == port && (s.Addr() == addr || (isLocal(s.Addr()) && isLocal(addr)))
	})
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
