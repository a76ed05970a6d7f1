package discovery

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
)

func words(s string) []string { return strings.Fields(s) }

// check is what the rules say of an endpoint; host names stand for the
// addresses behind them.
func check(t *testing.T, r *Rules, endpoint, resolved string, registry ...netip.AddrPort) string {
	t.Helper()
	parsed, err := ParseEndpoint(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	e := newEntry(Node{ID: "a", Endpoint: parsed}, DefaultTTL, new(liveness))
	if resolved != "" {
		var addresses []netip.Addr
		for _, a := range words(resolved) {
			addresses = append(addresses, netip.MustParseAddr(a))
		}
		e = e.at(addresses)
	}
	return r.Check(e, registry)
}

func TestRules(t *testing.T) {
	registry := []netip.AddrPort{
		netip.MustParseAddrPort("10.0.0.5:4222"), netip.MustParseAddrPort("127.0.0.1:6379"),
	}
	own := ""
	if interfaces, err := net.InterfaceAddrs(); err == nil {
		for _, i := range interfaces {
			if n, ok := i.(*net.IPNet); ok && n.IP.To4() != nil && !n.IP.IsLoopback() {
				own = n.IP.String()
			}
		}
	}
	tests := []struct {
		name        string
		allow, deny string
		loopback    bool
		endpoint    string
		resolved    string // the addresses of a host name
		want        string
	}{
		{name: "anything usual", endpoint: "10.0.0.7:5001"},
		{name: "a public one", endpoint: "http://93.184.216.34"},
		{name: "usual IPv6", endpoint: "[2001:db8::7]:5001"},
		{name: "unique local", endpoint: "[fd12:3456::7]:5001"},

		{name: "allowed", allow: "10.0.0.0/8", endpoint: "10.0.0.7:5001"},
		{name: "not allowed", allow: "10.0.0.0/8", endpoint: "11.0.0.7:5001", want: "denied: not in allow"},
		{name: "one of two ranges", allow: "10.0.0.0/8 11.0.0.0/8", endpoint: "11.0.0.7:5001"},
		{name: "a single address", allow: "10.0.0.7", endpoint: "10.0.0.7:5001"},
		{name: "another one", allow: "10.0.0.7", endpoint: "10.0.0.8:5001", want: "denied: not in allow"},
		{name: "a range with host bits", allow: "10.1.2.3/8", endpoint: "10.0.0.8:5001"},
		{name: "a mapped range", allow: "::ffff:10.0.0.0/104", endpoint: "10.0.0.8:5001"},
		{name: "a mapped endpoint", allow: "10.0.0.0/8", endpoint: "[::ffff:10.0.0.8]:5001"},
		{name: "private", allow: "private_ranges", endpoint: "192.168.3.4:80"},
		{name: "not private", allow: "private_ranges", endpoint: "9.9.9.9:80", want: "denied: not in allow"},
		{name: "denied", deny: "10.0.0.0/8", endpoint: "10.0.0.7:5001", want: "denied: by deny 10.0.0.0/8"},
		{name: "deny wins", allow: "10.0.0.7", deny: "10.0.0.0/8", endpoint: "10.0.0.7:5001", want: "denied: by deny 10.0.0.0/8"},
		{name: "deny private", deny: "private_ranges", endpoint: "172.16.0.1:80", want: "denied: by deny private_ranges"},
		{name: "deny through NAT64", deny: "10.0.0.0/8", endpoint: "[64:ff9b::10.0.0.7]:80", want: "denied: by deny 10.0.0.0/8"},
		{name: "deny through 6to4", deny: "10.0.0.0/8", endpoint: "[2002:a00:7::1]:80", want: "denied: by deny 10.0.0.0/8"},
		{name: "allow is no NAT64", allow: "10.0.0.0/8", endpoint: "[64:ff9b::10.0.0.7]:80", want: "denied: not in allow"},

		{name: "link-local", endpoint: "169.254.1.1:80", want: "denied: link-local"},
		{name: "metadata of most clouds", endpoint: "169.254.169.254:80", want: "denied: link-local"},
		{name: "mapped", endpoint: "[::ffff:169.254.169.254]:80", want: "denied: link-local"},
		{name: "compatible", endpoint: "[::169.254.169.254]:80", want: "denied: link-local"},
		{name: "NAT64", endpoint: "[64:ff9b::169.254.169.254]:80", want: "denied: link-local"},
		{name: "NAT64 of a site", endpoint: "[64:ff9b:1::169.254.169.254]:80", want: "denied: link-local"},
		{name: "6to4", endpoint: "[2002:a9fe:a9fe::1]:80", want: "denied: link-local"},
		{name: "NAT64 loopback", endpoint: "[64:ff9b::127.0.0.1]:80", loopback: true, want: "denied: loopback"},
		{name: "link-local IPv6", endpoint: "[fe80::1]:80", want: "denied: link-local"},
		{name: "unspecified", endpoint: "0.0.0.0:80", want: "denied: unspecified"},
		{name: "this network", endpoint: "0.1.2.3:80", want: "denied: unspecified"},
		{name: "unspecified IPv6", endpoint: "[::]:80", want: "denied: unspecified"},
		{name: "multicast", endpoint: "224.0.0.1:80", want: "denied: multicast"},
		{name: "multicast IPv6", endpoint: "[ff02::1]:80", want: "denied: multicast"},
		{name: "broadcast", endpoint: "255.255.255.255:80", want: "denied: broadcast"},
		{name: "Alibaba", endpoint: "100.100.100.200:80", want: "denied: cloud metadata"},
		{name: "Azure", endpoint: "168.63.129.16:80", want: "denied: cloud metadata"},
		{name: "AWS", endpoint: "[fd00:ec2::254]:80", want: "denied: cloud metadata"},
		{name: "Alibaba by NAT64", endpoint: "[64:ff9b::100.100.100.200]:80", want: "denied: cloud metadata"},

		{name: "Oracle, the elder", endpoint: "192.0.0.192:80", want: "denied: cloud metadata"},
		{name: "Scaleway", endpoint: "[fd00:42::42]:80", want: "denied: cloud metadata"},
		{name: "Linode", endpoint: "[fd00:a9fe:a9fe::1]:80", want: "denied: cloud metadata"},
		{name: "AWS, pods", endpoint: "[fd00:ec2::23]:80", want: "denied: cloud metadata"},
		{name: "ISATAP", endpoint: "[2001:db8::5efe:169.254.169.254]:80", want: "denied: link-local"},
		{name: "ISATAP of a unique address", endpoint: "[2001:db8::200:5efe:127.0.0.1]:80", want: "denied: loopback"},
		{name: "ISATAP of a good address", endpoint: "[2001:db8::5efe:10.0.0.7]:80"},
		{name: "no ISATAP", endpoint: "[2001:db8::400:5efe:127.0.0.1]:80"},
		{name: "ISATAP, denied inside", deny: "10.0.0.0/8", endpoint: "[2001:db8::5efe:10.0.0.7]:80", want: "denied: by deny 10.0.0.0/8"},
		{name: "ISATAP admin", allow: "2001:db8::5efe:7f00:0/104", endpoint: "[2001:db8::5efe:127.0.0.1]:2019", want: "denied: Caddy's admin port"},
		{name: "ISATAP of the registry", endpoint: "[2001:db8::5efe:10.0.0.5]:4222", want: "denied: the registry itself"},
		{name: "SIIT", endpoint: "[::ffff:0:169.254.169.254]:80", want: "denied: link-local"},
		{name: "SIIT of a good address", endpoint: "[::ffff:0:10.0.0.7]:80"},
		{name: "Teredo client", endpoint: "[2001:0:a00:1::5601:5601]:80", want: "denied: link-local"},
		{name: "Teredo server", endpoint: "[2001:0:a9fe:a9fe::f5ff:fff8]:80", want: "denied: link-local"},
		{name: "Teredo of good addresses", endpoint: "[2001:0:a00:1::f5ff:fff8]:80"},
		{name: "NAT64 of a site, /48", endpoint: "[64:ff9b:1:a9fe:a9:fe00::]:80", want: "denied: link-local"},
		{name: "NAT64 of a site, /48, with what is not looked at", endpoint: "[64:ff9b:1:a9fe:ffa9:fe12:3456:789a]:80", want: "denied: link-local"},
		{name: "NAT64 of a site, /56", endpoint: "[64:ff9b:1:a9:fe:a9fe::]:80", want: "denied: link-local"},
		{name: "NAT64 of a site, /64", endpoint: "[64:ff9b:1:7:a9:fea9:fe00::]:80", want: "denied: link-local"},
		{name: "NAT64 of a site, Alibaba in /64", endpoint: "[64:ff9b:1:7:64:6464:c800:0]:80", want: "denied: cloud metadata"},
		{name: "NAT64 of a site, a good address", endpoint: "[64:ff9b:1::10.0.0.7]:80"},
		{name: "NAT64 of a site, a good address in /48", endpoint: "[64:ff9b:1:a00:0:700::]:80"},
		{name: "NAT64 of a site, no address at all", endpoint: "[64:ff9b:1::1]:80", want: "denied: unspecified"},
		{name: "lifted in /48", allow: "64:ff9b:1:a9fe::/64", endpoint: "[64:ff9b:1:a9fe:1:100::1]:80"},
		{name: "not lifted in /48", allow: "64:ff9b:1:6464::/87", endpoint: "[64:ff9b:1:6464:64:c800::1]:80", want: "denied: cloud metadata"},
		{name: "lifted up to the split", allow: "64:ff9b:1:6464:64:c800::/88", endpoint: "[64:ff9b:1:6464:64:c800::1]:80"},

		{name: "lifted", allow: "169.254.0.0/16", endpoint: "169.254.1.1:80"},
		{name: "lifted for one", allow: "169.254.169.254/32", endpoint: "169.254.169.254:80"},
		{name: "not by everything", allow: "0.0.0.0/0 ::/0", endpoint: "169.254.169.254:80", want: "denied: link-local"},
		{name: "not by a wider range", allow: "100.64.0.0/10", endpoint: "100.100.100.200:80", want: "denied: cloud metadata"},
		{name: "not by a glob", allow: "*", endpoint: "http://metadata.internal", resolved: "169.254.169.254", want: "denied: link-local"},
		{name: "not in another form", allow: "169.254.169.254/32", endpoint: "[64:ff9b::169.254.169.254]:80", want: "denied: link-local"},
		{name: "in its own form", allow: "64:ff9b::a9fe:a9fe/128", endpoint: "[64:ff9b::169.254.169.254]:80"},
		{name: "deny wins over a lift", allow: "169.254.1.1", deny: "169.254.0.0/16", endpoint: "169.254.1.1:80", want: "denied: by deny 169.254.0.0/16"},

		{name: "loopback", endpoint: "127.0.0.1:80", want: "denied: loopback"},
		{name: "loopback elsewhere", endpoint: "127.1.2.3:80", want: "denied: loopback"},
		{name: "loopback IPv6", endpoint: "[::1]:80", want: "denied: loopback"},
		{name: "loopback mapped", endpoint: "[::ffff:127.0.0.1]:80", want: "denied: loopback"},
		{name: "loopback by name", endpoint: "http://localhost:80", resolved: "127.0.0.1 ::1", want: "denied: loopback"},
		{name: "loopback of a loopback registry", loopback: true, endpoint: "127.0.0.1:80"},
		{name: "loopback allowed", allow: "127.0.0.0/8", endpoint: "127.0.0.1:80"},
		{name: "loopback not by a word", allow: "private_ranges", endpoint: "127.0.0.1:80", want: "denied: loopback"},
		{name: "loopback by a word of a loopback registry", loopback: true, allow: "private_ranges", endpoint: "127.0.0.1:80"},
		{name: "loopback not named", loopback: true, allow: "10.0.0.0/8", endpoint: "127.0.0.1:80", want: "denied: not in allow"},

		{name: "admin", loopback: true, endpoint: "127.0.0.1:2019", want: "denied: Caddy's admin port"},
		{name: "admin IPv6", loopback: true, endpoint: "[::1]:2019", want: "denied: Caddy's admin port"},
		{name: "admin, loopback allowed", allow: "127.0.0.0/8", endpoint: "127.0.0.1:2019", want: "denied: Caddy's admin port"},
		{name: "admin allowed", allow: "127.0.0.1/32", endpoint: "127.0.0.1:2019"},
		{name: "the same port elsewhere", endpoint: "10.99.99.99:2019"},
		{name: "registry", endpoint: "10.0.0.5:4222", want: "denied: the registry itself"},
		{name: "registry in its range", allow: "10.0.0.0/8", endpoint: "10.0.0.5:4222", want: "denied: the registry itself"},
		{name: "registry by name", endpoint: "http://nats:4222", resolved: "10.0.0.5", want: "denied: the registry itself"},
		{name: "registry by NAT64", endpoint: "[64:ff9b::10.0.0.5]:4222", want: "denied: the registry itself"},
		{name: "registry allowed", allow: "10.0.0.5", endpoint: "10.0.0.5:4222"},
		{name: "beside the registry", endpoint: "10.0.0.5:4223"},
		{name: "registry on this machine", loopback: true, endpoint: "127.0.0.2:6379", want: "denied: the registry itself"},

		{name: "a name", endpoint: "http://orders.internal", resolved: "10.0.0.7 10.0.0.8"},
		{name: "a name not resolved", endpoint: "http://orders.internal", want: "name not resolved"},
		{name: "every address counts", endpoint: "http://orders.internal", resolved: "10.0.0.7 169.254.169.254", want: "denied: link-local"},
		{name: "every address must be allowed", allow: "10.0.0.0/8", endpoint: "http://orders.internal", resolved: "10.0.0.7 11.0.0.8", want: "denied: not in allow"},
		{name: "a name by its addresses", allow: "10.0.0.0/8", endpoint: "http://orders.internal", resolved: "10.0.0.7"},
		{name: "a name by a glob", allow: "*.internal", endpoint: "http://a.orders.internal", resolved: "11.0.0.7"},
		{name: "a name by another glob", allow: "orders-?.internal", endpoint: "http://orders-10.internal", resolved: "11.0.0.7", want: "denied: not in allow"},
		{name: "a name in capitals", allow: "ORDERS.Internal.", endpoint: "http://Orders.INTERNAL", resolved: "11.0.0.7"},
		{name: "a name denied", deny: "*.internal", endpoint: "http://orders.internal", resolved: "10.0.0.7", want: "denied: by deny orders.internal"},
		{name: "a name denied by an address", allow: "*.internal", deny: "10.0.0.7", endpoint: "http://orders.internal", resolved: "10.0.0.7", want: "denied: by deny 10.0.0.7/32"},
		{name: "a glob speaks of no address", deny: "*", endpoint: "10.0.0.7:80"},
		{name: "a glob allows no address", allow: "*", endpoint: "10.0.0.7:80", want: "denied: not in allow"},
	}
	if own != "" {
		tests = append(tests, tests[0])
		last := &tests[len(tests)-1]
		last.name, last.endpoint, last.want = "admin on another address", own+":2019", "denied: Caddy's admin port"
		tests = append(tests, *last)
		last = &tests[len(tests)-1]
		last.name, last.endpoint, last.want = "loopback registry on another address", own+":6379", "denied: the registry itself"
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r, err := NewRules(Access{Allow: words(test.allow), Deny: words(test.deny), Loopback: test.loopback, LocalPorts: []uint16{2019}})
			if err != nil {
				t.Fatal(err)
			}
			if got := check(t, r, test.endpoint, test.resolved, registry...); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

func TestRulesRefuse(t *testing.T) {
	for _, pattern := range []string{
		"", "10.0.0", "10.0.*", "10.0.0.0/33", "::/129", "http://a", "a/b", "a b", "[::1]", "fe80::1%eth0", "fe80::%eth0/64",
		"::ffff:0.0.0.0/95", "a[bc]", "münchen", "{env.X}", strings.Repeat("a", 254),
	} {
		if _, err := NewRules(Access{Allow: []string{pattern}}); !errors.Is(err, ErrInvalid) {
			t.Errorf("allow %q: %v, want ErrInvalid", pattern, err)
		}
		if _, err := NewRules(Access{Deny: []string{pattern}}); err == nil || !strings.HasPrefix(err.Error(), "deny: ") {
			t.Errorf("deny %q: %v", pattern, err)
		}
	}
}

// FuzzRules holds that whatever is allowed and wherever an endpoint points, what
// is never wanted passes only where a range inside of it is named, and what is
// denied never passes.
func FuzzRules(f *testing.F) {
	f.Add("10.0.0.0/8", "10.0.0.1", "http://10.0.0.7:80")
	f.Add("*.internal 0.0.0.0/0 ::/0", "private_ranges", "[::ffff:169.254.169.254]:80")
	f.Add("64:ff9b::/96 2002::/16", "*", "[64:ff9b::127.0.0.1]:2019")
	f.Add("", "", "https://[2002:a9fe:a9fe::]")
	f.Add("2001::/16", "10.0.0.0/8", "[2001:0:a00:1::5601:5601]:80")
	f.Add("64:ff9b:1::/48", "private_ranges", "[64:ff9b:1:a9fe:a9:fe00::1]:80")
	f.Add("2001:db8::/64", "", "[2001:db8::200:5efe:127.0.0.1]:80")
	f.Add("", "127.0.0.0/8", "[::ffff:0:169.254.169.254]:80")
	f.Fuzz(func(t *testing.T, allow, deny, endpoint string) {
		r, err := NewRules(Access{Allow: words(allow), Deny: words(deny), LocalPorts: []uint16{2019}})
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("error %v is not ErrInvalid", err)
			}
			return
		}
		parsed, err := ParseEndpoint(endpoint)
		if err != nil {
			return
		}
		e := newEntry(Node{ID: "a", Endpoint: parsed}, DefaultTTL, new(liveness))
		if e.Named() {
			if r.Check(e, nil) == "" {
				t.Error("a name that is not resolved passes")
			}
			return
		}
		addr := e.Addresses()[0]
		if r.Check(e, nil) != "" {
			return
		}
		narrow := false // some allowed range is narrower than a usual network
		for _, word := range words(allow) {
			if p, ok := parsePrefix(word); ok && p.Contains(addr) && p.Bits() >= 4 {
				narrow = true
			}
		}
		bad := addr.IsLoopback() || addr.IsLinkLocalUnicast() || addr.IsMulticast() || addr.IsUnspecified()
		if bad && !narrow {
			t.Errorf("%v passes with allow %q", addr, allow)
		}
		for _, inside := range insideOf(addr) {
			reserved := inside.IsLoopback() || inside.IsLinkLocalUnicast() || inside.IsMulticast() || inside == netip.MustParseAddr("192.0.0.192")
			narrow := false
			for _, word := range words(allow) {
				if p, ok := parsePrefix(word); ok && p.Contains(addr) && p.Bits() > 16 {
					narrow = true
				}
			}
			if reserved && !narrow {
				t.Errorf("%v passes with allow %q, and may stand for %v", addr, allow, inside)
			}
			for _, word := range words(deny) {
				if p, ok := parsePrefix(word); ok && p.Contains(inside) && inside.As4()[0] != 0 {
					t.Errorf("%v passes with deny %q, and may stand for %v", addr, deny, inside)
				}
			}
		}
		for _, word := range words(deny) {
			if p, ok := parsePrefix(word); ok && p.Contains(addr) {
				t.Errorf("%v passes with deny %q", addr, deny)
			}
		}
	})
}

// insideOf returns what an IPv6 address may stand for, by how it is written: an
// opinion beside that of the code.
func insideOf(addr netip.Addr) (inside []netip.Addr) {
	if !addr.Is6() {
		return nil
	}
	at := func(bytes ...int) {
		var v4 [4]byte
		for i, b := range bytes {
			v4[i] = addr.As16()[b]
		}
		inside = append(inside, netip.AddrFrom4(v4))
	}
	written := addr.StringExpanded()
	switch {
	case strings.HasPrefix(written, "0064:ff9b:0001:"):
		at(12, 13, 14, 15)
		at(6, 7, 9, 10)
		at(7, 9, 10, 11)
		at(9, 10, 11, 12)
	case strings.HasPrefix(written, "0064:ff9b:0000:0000:0000:0000:"),
		strings.HasPrefix(written, "0000:0000:0000:0000:ffff:0000:"):
		at(12, 13, 14, 15)
	case strings.HasPrefix(written, "2002:"):
		at(2, 3, 4, 5)
	case strings.HasPrefix(written, "2001:0000:"):
		at(4, 5, 6, 7)
		b := addr.As16()
		inside = append(inside, netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]}))
	}
	if id := written[20:30]; id == "0000:5efe:" || id == "0200:5efe:" {
		at(12, 13, 14, 15)
	}
	return inside
}

func BenchmarkRules(b *testing.B) {
	r, err := NewRules(Access{Allow: []string{PrivateRanges}, Deny: []string{"10.9.0.0/16"}, LocalPorts: []uint16{2019}})
	if err != nil {
		b.Fatal(err)
	}
	e := newEntry(benchNode(b), DefaultTTL, new(liveness))
	registry := []netip.AddrPort{netip.MustParseAddrPort("10.0.0.5:4222")}
	b.ReportAllocs()
	for b.Loop() {
		if reason := r.Check(e, registry); reason != "" {
			b.Fatal(reason)
		}
	}
}

func benchNode(b *testing.B) Node {
	b.Helper()
	n, err := ParseNode(benchRecord(1))
	if err != nil {
		b.Fatal(err)
	}
	return n
}
