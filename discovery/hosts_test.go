package discovery_test

import (
	"context"
	"fmt"
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
