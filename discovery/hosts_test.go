package discovery_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func hostRules(t *testing.T, o discovery.HostOptions) *discovery.HostRules {
	t.Helper()
	r, err := discovery.NewHostRules(o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// site is a node of a service with hosts and paths.
func site(id, service, hosts string, paths ...string) discovery.Node {
	n := newNode(id, discovery.KeyService, service, discovery.KeyHosts, hosts)
	if len(paths) > 0 {
		n.Metadata[discovery.KeyPaths] = strings.Join(paths, " ")
	}
	return n
}

// sites are a directory with hosts, and the registry that it follows.
func sites(t *testing.T, o discovery.HostOptions, nodes ...discovery.Node) (*discovery.Directory, *discoverytest.Memory) {
	t.Helper()
	m := discoverytest.NewMemory()
	write(m, nodes...)
	d := discovery.NewDirectory(m.Open(), isolate(discovery.Options{TTL: discovery.MaxLease}))
	d.SetHostRules(hostRules(t, o))
	run(t, d)
	return d, m
}

// run runs a directory until the test ends.
func run(t *testing.T, d *discovery.Directory) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	synctest.Wait()
}

// leave has a node withdraw its record.
func leave(t *testing.T, m *discoverytest.Memory, id string) {
	t.Helper()
	if err := m.Open().Withdraw(t.Context(), newNode(id)); err != nil {
		t.Fatal(err)
	}
}

// routed returns which nodes a request reaches, "" for none.
func routed(d *discovery.Directory, host, path string) string {
	h := d.Snapshot().Hosts().Find(discovery.RequestHost(host))
	if h == nil {
		return ""
	}
	r := h.Route(path)
	if r == nil {
		return ""
	}
	var ids []string
	for _, e := range r.Nodes {
		ids = append(ids, e.Node.ID)
	}
	return strings.Join(ids, " ")
}

func expectRouted(t *testing.T, d *discovery.Directory, host, path, want, when string) {
	t.Helper()
	synctest.Wait()
	if got := routed(d, host, path); got != want {
		t.Errorf("%s: %s%s reaches [%s], want [%s]", when, host, path, got, want)
	}
}

// refusals returns what a node does not get.
func refusals(d *discovery.Directory, id string) string {
	var all []string
	s := d.Snapshot()
	for _, r := range s.HostsOf(s.Node(id)).Refused {
		all = append(all, r.Text+": "+r.Reason)
	}
	return strings.Join(all, "\n")
}

func TestHostsAreRouted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := sites(t, discovery.HostOptions{Names: []string{"*.example.com", "shop.example.org"}},
			site("a1", "shop", "shop.example.org, Shop.example.com."),
			site("a2", "shop", "shop.example.org", "/api/*", "/api/v2"),
			site("b1", "any", "*.example.com"),
			newNode("c1"))
		for _, c := range []struct{ host, path, want string }{
			{"shop.example.org", "/", "a1"},
			{"SHOP.example.org:8443", "/apiary", "a1"},
			{"shop.example.org", "/api", "a2"},
			{"shop.example.org", "/API/x", "a2"},
			{"shop.example.org", "//api/x", "a2"},
			{"shop.example.org", "/x/../api/x", "a2"},
			{"shop.example.org", "/api/../x", "a1"},
			{"shop.example.org", "/api/v2/" + strings.Repeat("x/", 5000), "a2"},
			{"shop.example.org", "", "a1"},
			{"shop.example.com", "/x", "a1"}, // exact before wildcard
			{"cart.example.com", "/x", "b1"},
			{"a.cart.example.com", "/x", ""}, // one label
			{"example.com", "/x", ""},
			{"*.example.com", "/x", ""},
			{".example.com", "/x", ""},
			{"example.org", "/x", ""},
			{"10.0.0.7", "/", ""},
			{"", "/", ""},
		} {
			expectRouted(t, d, c.host, c.path, c.want, "listed")
		}
		h := d.Snapshot().Hosts()
		if h.Len() != 3 || h.Conflicts() != 0 {
			t.Errorf("%d hosts, %d conflicts, want 3 and none", h.Len(), h.Conflicts())
		}
		var names []string
		for host := range h.All() {
			names = append(names, fmt.Sprintf("%s%v%d", host.Name, host.Services, len(host.Nodes())))
		}
		if got, want := strings.Join(names, " "), "*.example.com[any]1 shop.example.com[shop]1 shop.example.org[shop]2"; got != want {
			t.Errorf("hosts %s, want %s", got, want)
		}
		var paths []string
		for _, r := range h.Find("shop.example.org").Routes() {
			paths = append(paths, r.Path)
		}
		if got, want := strings.Join(paths, " "), "/api/v2/* /api/* /*"; got != want {
			t.Errorf("paths %s, want %s", got, want)
		}
	})
}

// A route is the same one while nothing of it changes: that is what an index is built on.
func TestRoutesAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, m := sites(t, discovery.HostOptions{},
			site("a1", "shop", "shop.example.com"), site("a2", "shop", "shop.example.com", "/api"), site("b1", "cart", "cart.example.com"))
		route := func(host, path string) *discovery.Route { return d.Snapshot().Hosts().Find(host).Route(path) }
		shop, api, cart := route("shop.example.com", "/"), route("shop.example.com", "/api"), route("cart.example.com", "/")
		write(m, site("a2", "shop", "shop.example.com", "/api", "/v2"))
		time.Sleep(coalesced)
		synctest.Wait()
		if route("shop.example.com", "/") != shop || route("cart.example.com", "/") != cart {
			t.Error("routes are new in which nothing changed")
		}
		if now := route("shop.example.com", "/api"); now == api || now.Nodes[0] != d.Snapshot().Node("a2") {
			t.Error("the route of a node that changed is not of its new entry")
		}
	})
}

func TestHostIsTheFirstServices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, m := sites(t, discovery.HostOptions{},
			// Seen at once: the smaller name has it.
			site("z1", "basket", "shop.example.com"), site("a1", "shop", "shop.example.com pay.example.com"))
		expectRouted(t, d, "shop.example.com", "/", "z1", "seen at once")
		expectRouted(t, d, "pay.example.com", "/", "a1", "seen at once")
		if got, want := refusals(d, "a1"), `shop.example.com: it is that of service "basket", which announced it first; a claim would say whose it is`; got != want {
			t.Errorf("a1 does not get\n%s\nwant\n%s", got, want)
		}
		c := d.Snapshot().Hosts().Find("shop.example.com").Conflicts
		if len(c) != 1 || c[0].Service != "shop" || c[0].Nodes != 1 || !c[0].Until.IsZero() || d.Snapshot().Hosts().Conflicts() != 1 {
			t.Errorf("conflicts %+v, want one node of shop", c)
		}

		// Further nodes of the service share, whoever else comes, and by whichever path.
		write(m, site("z2", "basket", "shop.example.com"), site("a2", "", "shop.example.com"), site("a3", "a", "shop.example.com", "/api"))
		time.Sleep(coalesced)
		expectRouted(t, d, "shop.example.com", "/api", "z1 z2", "others came")
		if got := d.Snapshot().Hosts().Conflicts(); got != 3 {
			t.Errorf("%d conflicts, want 3", got)
		}

		// It says something else, and its host is not free at once.
		leave(t, m, "z2")
		write(m, site("z1", "basket", "basket.example.com"))
		time.Sleep(9 * time.Minute)
		expectRouted(t, d, "shop.example.com", "/", "", "just left")
		left := d.Snapshot().Hosts().Known("shop.example.com")
		if left == nil || left.Left.IsZero() || fmt.Sprint(left.Services) != "[basket]" || left.Conflicts[0].Until.Sub(left.Left) != 10*time.Minute {
			t.Errorf("the host that left is shown as %+v", left)
		}
		time.Sleep(2 * time.Minute)
		expectRouted(t, d, "shop.example.com", "/", "a2", "left for long")
		write(m, site("z1", "basket", "shop.example.com"))
		time.Sleep(coalesced)
		expectRouted(t, d, "shop.example.com", "/", "a2", "the first one came back too late")
	})
}

func TestHostSurvivesAGap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, m := sites(t, discovery.HostOptions{}, site("a1", "shop", "shop.example.com"))
		write(m, site("b1", "cart", "shop.example.com"))
		for range 3 {
			leave(t, m, "a1")
			time.Sleep(9 * time.Minute)
			write(m, site("a2", "shop", "shop.example.com"))
			time.Sleep(coalesced)
			expectRouted(t, d, "shop.example.com", "/", "a2", "back in time")
			leave(t, m, "a2")
			time.Sleep(5 * time.Minute)
			write(m, site("a1", "shop", "shop.example.com"))
			time.Sleep(coalesced)
		}
		since := d.Snapshot().Hosts().Find("shop.example.com").Since
		if time.Since(since) < 30*time.Minute {
			t.Errorf("it is shown to be the service's for %v only", time.Since(since))
		}
	})
}

// Nodes do not leave while nobody could say so.
func TestHostIsKeptWhileTheRegistryIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, m := sites(t, discovery.HostOptions{}, site("a1", "shop", "shop.example.com"), site("b1", "z", "shop.example.com"))
		leave(t, m, "a1")
		time.Sleep(time.Minute)
		m.Break()
		time.Sleep(time.Hour)
		expectRouted(t, d, "shop.example.com", "/", "", "the registry is away")
		m.Restore()
		write(m, site("a1", "shop", "shop.example.com"))
		reconnect(t, d)
		time.Sleep(coalesced)
		expectRouted(t, d, "shop.example.com", "/", "a1", "it came back meanwhile")
		leave(t, m, "a1")
		time.Sleep(time.Minute)
		m.Break()
		time.Sleep(time.Hour)
		m.Restore()
		reconnect(t, d)
		time.Sleep(2 * time.Minute)
		expectRouted(t, d, "shop.example.com", "/", "b1", "it did not come back")
	})
}

func TestClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := discovery.HostOptions{
			Names: []string{"*.example.com", "shop.example.com"},
			Claims: []discovery.HostClaim{
				{Service: "billing*", Hosts: []string{"pay.example.org", "*.pay.example.com"}},
				{Service: "billing-b", Hosts: []string{"b.pay.example.com"}},
			},
			Sites: []string{"admin.example.com"},
		}
		nodes := []discovery.Node{
			site("n1", "billing-a", "pay.example.org *.pay.example.com b.pay.example.com x.pay.example.com admin.example.com"),
			site("n2", "billing-b", "pay.example.org b.pay.example.com *.example.com"),
			site("n3", "a-thief", "pay.example.org, *.pay.example.com, c.pay.example.com evil.org *.evil.org *.shop.example.com a.b.example.com"),
		}
		d, m := sites(t, o, nodes...)
		for _, c := range []struct{ host, want string }{
			{"pay.example.org", "n1 n2"},
			{"x.pay.example.com", "n1"},
			{"y.pay.example.com", "n1"},
			{"b.pay.example.com", "n2"},
			{"c.pay.example.com", "n1"}, // by its wildcard
			{"any.example.com", "n2"},
			{"admin.example.com", "n2"}, // a wildcard of many names is no site's: Caddy's own sites come first
			{"evil.org", ""},
			{"a.b.example.com", ""},
		} {
			expectRouted(t, d, c.host, "/", c.want, "claimed")
		}
		if got, want := refusals(d, "n3"), `pay.example.org: claim keeps it to service billing*
*.pay.example.com: claim keeps it to service billing*
c.pay.example.com: claim keeps it to service billing*
evil.org: hosts does not name it
*.evil.org: hosts does not name this wildcard
*.shop.example.com: hosts does not name this wildcard
a.b.example.com: hosts does not name it`; got != want {
			t.Errorf("n3 does not get\n%s\nwant\n%s", got, want)
		}
		if got, want := refusals(d, "n1"), `b.pay.example.com: claim keeps it to service billing-b
admin.example.com: it is a site of this proxy's own`; got != want {
			t.Errorf("n1 does not get\n%s\nwant\n%s", got, want)
		}

		// Other rules count at once, without a new listing: a host that a claim gives to
		// somebody else is not held for whose it was, and what is not shared any more is
		// the first one's.
		number := d.Status().Restarts
		o.Claims = []discovery.HostClaim{{Service: "a-thief", Hosts: []string{"b.pay.example.com", "c.pay.example.com"}}}
		o.Names = append(o.Names, "pay.example.org", "*.pay.example.com")
		d.SetHostRules(hostRules(t, o))
		time.Sleep(coalesced)
		expectRouted(t, d, "pay.example.org", "/", "n1", "claimed otherwise")
		expectRouted(t, d, "b.pay.example.com", "/", "n1", "claimed otherwise") // by the wildcard
		expectRouted(t, d, "c.pay.example.com", "/", "n3", "claimed otherwise")
		write(m, site("n3", "a-thief", "b.pay.example.com"))
		time.Sleep(coalesced)
		expectRouted(t, d, "b.pay.example.com", "/", "n3", "claimed otherwise")
		if got := d.Status().Restarts; got != number {
			t.Error("the watch was started anew")
		}

		d.SetHostRules(nil)
		time.Sleep(coalesced)
		synctest.Wait()
		if h := d.Snapshot().Hosts(); h != nil {
			t.Errorf("there are %d hosts after nobody wants to know them", h.Len())
		}
		d.SetHostRules(hostRules(t, o))
		time.Sleep(coalesced)
		expectRouted(t, d, "pay.example.org", "/", "n1", "wanted again")
	})
}

func TestClaimMatchesServices(t *testing.T) {
	for _, c := range []struct {
		pattern, service string
		want             bool
	}{
		{"billing", "billing", true},
		{"billing", "billing2", false},
		{"billing", "", false},
		{"billing*", "billing", true},
		{"billing*", "billing-eu", true},
		{"billing*", "Billing", false},
		{"*", "", true},
		{"*", "x", true},
		{"*-eu", "billing-eu", true},
		{"*-eu", "eu", false},
		{"a*b*c", "abc", true},
		{"a*b*c", "axxbxxc", true},
		{"a*b*c", "acb", false},
		{"a*a", "a", false},
		{"a[b]", "ab", false},
	} {
		r := hostRules(t, discovery.HostOptions{Claims: []discovery.HostClaim{{Service: c.pattern, Hosts: []string{"a.example.com"}}}})
		synctest.Test(t, func(t *testing.T) {
			m := discoverytest.NewMemory()
			write(m, site("n", c.service, "a.example.com"))
			d := discovery.NewDirectory(m.Open(), isolate(discovery.Options{}))
			d.SetHostRules(r)
			run(t, d)
			if got := d.Snapshot().Hosts().Len() == 1; got != c.want {
				t.Errorf("claim %q lets service %q have the host: %v, want %v", c.pattern, c.service, got, c.want)
			}
		})
	}
}

func TestHostRulesSayWhatIsWrong(t *testing.T) {
	for _, o := range []discovery.HostOptions{
		{Names: []string{"*"}},
		{Names: []string{"10.0.0.1"}},
		{Names: []string{"https://a.example.com"}},
		{Claims: []discovery.HostClaim{{Service: "", Hosts: []string{"a.example.com"}}}},
		{Claims: []discovery.HostClaim{{Service: "a"}}},
		{Claims: []discovery.HostClaim{{Service: "a", Hosts: []string{"a.*.com"}}}},
	} {
		if _, err := discovery.NewHostRules(o); err == nil || !strings.Contains(err.Error(), "want") {
			t.Errorf("%+v: %v, want an error that says what would be accepted", o, err)
		}
	}
}

// A host is whose it was before this process was started, also where the registry cannot
// be listed yet, and where it was away for longer than nodes are remembered.
func TestHostsAreRemembered(t *testing.T) {
	for name, away := range map[string]time.Duration{"for a minute": time.Minute, "for a week": 7 * 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := warmFile(t)
				m := discoverytest.NewMemory()
				start := func(m *discoverytest.Memory, do func(d *discovery.Directory)) {
					t.Helper()
					r := hostRules(t, discovery.HostOptions{})
					d := discovery.NewDirectory(m.Open(), isolate(discovery.Options{WarmStart: w, TTL: discovery.MaxLease}))
					d.SetHostRules(r)
					ctx, cancel := context.WithCancel(context.Background())
					done := make(chan error, 1)
					go func() { done <- d.Run(ctx) }()
					time.Sleep(time.Second)
					synctest.Wait()
					do(d)
					// The end of a config takes its rules along, which says nothing about hosts.
					d.SetHostRules(nil)
					time.Sleep(coalesced)
					cancel()
					<-done
				}
				write(m, site("s1", "shop", "shop.example.com"), site("s2", "shop", "pay.example.com"))
				var since time.Time
				start(m, func(d *discovery.Directory) {
					since = d.Snapshot().Hosts().Find("shop.example.com").Since
				})

				time.Sleep(away)
				start(unreachable(), func(d *discovery.Directory) {
					h := d.Snapshot().Hosts().Known("shop.example.com")
					if h == nil || !h.Left.IsZero() || fmt.Sprint(h.Services) != "[shop]" {
						t.Errorf("while the registry is away the host is known as %+v, want it to be shop's", h)
					}
					if got := routed(d, "shop.example.com", "/"); got != "" {
						t.Errorf("%s gets requests before it is known to be there", got)
					}
				})

				// It comes back later than another one that is before it by its name.
				leave(t, m, "s1")
				write(m, site("a1", "a-thief", "shop.example.com pay.example.com"), site("s2", "shop", "pay.example.com"))
				start(m, func(d *discovery.Directory) {
					expectRouted(t, d, "shop.example.com", "/", "", "started anew")
					expectRouted(t, d, "pay.example.com", "/", "s2", "started anew")
					write(m, site("s1", "shop", "shop.example.com"))
					time.Sleep(coalesced)
					expectRouted(t, d, "shop.example.com", "/", "s1", "came back after the start")
					if got := d.Snapshot().Hosts().Find("shop.example.com").Since; !got.Equal(since) {
						t.Errorf("it is shown to be shop's since %v, want %v", got, since)
					}
				})

				// What had left before the end is free at the end of its time.
				leave(t, m, "s1")
				start(m, func(*discovery.Directory) {})
				time.Sleep(5 * time.Minute)
				start(m, func(d *discovery.Directory) {
					expectRouted(t, d, "shop.example.com", "/", "", "left five minutes ago")
					time.Sleep(6 * time.Minute)
					expectRouted(t, d, "shop.example.com", "/", "a1", "left eleven minutes ago")
				})
			})
		})
	}
}

// Restored nodes have their hosts as listed ones have.
func TestHostsOfRestoredNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warmFile(t)
		node := site("s1", "shop", "shop.example.com")
		saveList(t, w, node)
		m := unreachable()
		n := newNetwork(node)
		d := discovery.NewDirectory(m.Open(), isolate(discovery.Options{WarmStart: w, Probe: n.probe}))
		d.SetHostRules(hostRules(t, discovery.HostOptions{}))
		run(t, d)
		d.Restore()
		time.Sleep(time.Second)
		expectRouted(t, d, "shop.example.com", "/", "s1", "restored")
	})
}

func TestHostileHosts(t *testing.T) {
	const recordRejected = "the whole record" // by the rules for all metadata
	many := func(n int, format string) string {
		var names []string
		for i := range n {
			names = append(names, fmt.Sprintf(format, i))
		}
		return strings.Join(names, " ")
	}
	for _, c := range []struct {
		name, hosts, paths string
		want               int // hosts
		refused            string
	}{
		{"a thousand hosts", many(1000, "h%d.example.com"), "", 100, "h100.example.com: it and what follows is left out, hosts are at most 100 in 8 KiB"},
		{"long ones", many(600, strings.Repeat("a", 60)+"%d.example.com"), "", 100, "at most 100 in 8 KiB"},
		{"too many bytes", many(200, strings.Repeat(strings.Repeat("a", 50)+".", 4)+"x%d"), "", 39, "at most 100 in 8 KiB"},
		{"the same a thousand times", strings.Repeat("a.example.com ", 1000), "", 1, "at most 100 in 8 KiB"},
		{"a thousand paths", "a.example.com", many(1000, "/p%d/*"), 1, "/p20/*: it and what follows is left out, paths are at most 20 in 8 KiB"},
		{"no path that is one", "a.example.com", "api /x*", 0, "api: it does not begin with a slash"},
		{"separators", " , ,,  , a.example.com,b.example.com,,", "  ", 2, ""},
		{"a tab", "a.example.com\tb.example.com", "", 0, recordRejected},
		{"only separators", " ,, ", "", 0, ""},
		{"controls", "a.example.com\u0085evil", "", 0, recordRejected},
		{"one word of 60 KiB", strings.Repeat("a", 60<<10), "", 0, "at most 100 in 8 KiB"},
		{"punycode of 60 KiB", strings.Repeat("ü", 30<<10), "", 0, "at most 100 in 8 KiB"},
		{"format", "%s%n.example.com {host}.example.com ${x}", "", 0, "no host name"},
		{"markup", "<script>alert(1)</script>.example.com", "", 0, "URL"},
		{"addresses", "127.0.0.1 [::1] 169.254.169.254 0x7f000001 localhost:2019", "", 0, "IP address"},
		{"look-alikes", "shор.example.com", "", 0, "look alike"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := site("bad", "evil", c.hosts, c.paths)
				if strings.ContainsFunc(c.hosts+c.paths, func(r rune) bool { return r < ' ' || r == 0x85 }) {
					n.Metadata[discovery.KeyHosts] = "x"
				}
				d, m := sites(t, discovery.HostOptions{}, site("good", "shop", "shop.example.com"))
				data := encode(n)
				if n.Metadata[discovery.KeyHosts] == "x" {
					data = []byte(strings.Replace(string(data), `"hosts":"x"`, fmt.Sprintf(`"hosts":%q`, c.hosts), 1))
				}
				m.Put("bad", data)
				time.Sleep(coalesced)
				synctest.Wait()
				served := d.Snapshot().Hosts().Len() - 1
				if rejected := d.Snapshot().Node("bad") == nil; rejected || c.refused == recordRejected {
					if rejections := d.Status().Rejections; !rejected || c.refused != recordRejected || served != 0 || len(rejections) != 1 {
						t.Fatalf("the record is rejected: %v, with %d hosts; rejections %v", rejected, served, rejections)
					}
					return
				}
				got := d.Snapshot().HostsOf(d.Snapshot().Node("bad"))
				if served != c.want || c.want > 0 && len(got.Hosts) != c.want {
					t.Errorf("it has %d hosts, shown %d, want %d", served, len(got.Hosts), c.want)
				}
				if r := refusals(d, "bad"); c.refused == "" && r != "" || !strings.Contains(r, c.refused) {
					t.Errorf("refused is\n%s\nwant %q in it", r, c.refused)
				}
				expectRouted(t, d, "shop.example.com", "/", "good", "beside it")
			})
		})
	}
}

// A flood of records with hosts costs those that have as many as is usual nothing.
func TestHostsHaveRoomForOrdinaryNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, m := sites(t, discovery.HostOptions{}, site("good", "shop", "shop.example.com"))
		var paths []string
		for i := range discovery.MaxPaths {
			paths = append(paths, fmt.Sprintf("/%d", i))
		}
		const flood = 120
		for i := range flood {
			var hosts []string
			for j := range discovery.MaxHosts {
				hosts = append(hosts, fmt.Sprintf("h%d-%d.example.com", i, j))
			}
			m.Put(fmt.Sprint("bad", i), encode(site(fmt.Sprint("bad", i), "evil", strings.Join(hosts, " "), paths...)))
		}
		time.Sleep(coalesced)
		write(m, site("late", "late", "late.example.com a.example.com b.example.com c.example.com"))
		time.Sleep(coalesced)
		synctest.Wait()
		expectRouted(t, d, "shop.example.com", "/", "good", "in the flood")
		expectRouted(t, d, "c.example.com", "/", "late", "in the flood")
		routes := 0
		for h := range d.Snapshot().Hosts().All() {
			routes += len(h.Routes())
		}
		if routes < 190_000 || routes > 200_000+4*flood+5 {
			t.Errorf("%d routes, want at most what there is room for", routes)
		}
		const out = "bad99" // by its id the last one
		if got := refusals(d, out); !strings.Contains(got, "full of hosts") {
			t.Errorf("the last one of the flood does not get\n%s", got)
		}
		// Where there is room again those get it that had none.
		for i := range 60 {
			leave(t, m, fmt.Sprint("bad", i))
		}
		time.Sleep(coalesced)
		synctest.Wait()
		if got := refusals(d, out) + refusals(d, "bad98"); got != "" {
			t.Errorf("there is room again, and two of the flood do not get\n%s", got)
		}
	})
}

// What becomes of hosts is told once, not with each heartbeat.
func TestHostsInTheJournal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, m := sites(t, discovery.HostOptions{Names: []string{"shop.example.com"}}, site("s1", "shop", "shop.example.com"))
		write(m, site("t1", "thief", "shop.example.com Evil.example.com. 10.0.0.1"))
		write(m, site("t2", "thief", "shop.example.com"))
		time.Sleep(coalesced)
		for range 5 {
			write(m, site("t1", "thief", "shop.example.com Evil.example.com. 10.0.0.1", ""), site("t2", "thief", "shop.example.com"))
			time.Sleep(coalesced)
		}
		leave(t, m, "s1")
		time.Sleep(11 * time.Minute)
		synctest.Wait()
		var told []string
		for _, c := range d.Journal().Newest(0, func(c *discovery.Change) bool { return c.Type == discovery.ChangeHosts }) {
			told = append(told, c.ID+" "+c.Reason)
		}
		want := `t1 host shop.example.com is this service's now; it was that of service "shop", which left 10m0s ago
t1 host shop.example.com refused: it is that of service "shop", which announced it first; a claim would say whose it is
t1 10.0.0.1 refused: it is an IP address; Evil.example.com. refused: hosts does not name it`
		if got := strings.Join(told, "\n"); !sameLines(got, want) {
			t.Errorf("the journal says\n%s\nwant\n%s", got, want)
		}
	})
}

func sameLines(a, b string) bool {
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	slices.Sort(x)
	slices.Sort(y)
	return slices.Equal(x, y)
}
