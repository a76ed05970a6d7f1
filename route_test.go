package caddydiscovery

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// serveHosts loads a site that proxies what nodes announce, with options of the source, and
// answers everything else with 404. The registry is declared with the given lines.
func serveHosts(t *testing.T, registry, lines, options string) (url string) {
	t.Helper()
	port := freeport.String(t)
	loadHosts(t, port, registry, lines, options)
	return "http://127.0.0.1:" + port
}

func loadHosts(t *testing.T, port, registry, lines, options string) {
	t.Helper()
	load(t, hostSite(port, registry, lines, options))
}

func hostSite(port, registry, lines, options string) string {
	return `{
	discovery {
		registry main memory ` + registry + ` {
			` + lines + `
		}
	}
}
http://:` + port + ` {
	@served discovered main
	handle @served {
		reverse_proxy {
			dynamic discovery main {
				route
				` + options + `
			}
		}
	}
	handle {
		respond "no such site" 404
	}
}
`
}

// askHost returns who answers a request for a host and path, or its status where that is not
// 200.
func askHost(t *testing.T, url, host, path string) string {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host, req.Close = host, true
	resp, err := http.DefaultClient.Do(req)
	for errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) { // a server that a reload replaces had accepted the connection
		resp, err = http.DefaultClient.Do(req)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return resp.Status
	}
	var b strings.Builder
	if _, err := io.Copy(&b, resp.Body); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestRoute holds which node a request gets by its host and path: the exact host before a
// wildcard, the longest path, and nobody that announces no host.
func TestRoute(t *testing.T) {
	name, m := newMemory(t)
	for id, metadata := range map[string][]string{
		"shop":     {"hosts", "shop.example.com, Shop2.Example.com."},
		"shop-api": {"hosts", "shop.example.com", "paths", "/api/* /Files"},
		"shop-v2":  {"hosts", "shop.example.com", "paths", "/api/v2/*"},
		"apps":     {"hosts", "*.apps.example.com"},
		"one":      {"hosts", "one.apps.example.com", "paths", "/only"},
		"bücher":   {"hosts", "bücher.example"},
		"nobody":   {"service", "orders"},
		"address":  {"hosts", "127.0.0.1 10.0.0.1"},
		"away":     {"hosts", "away.example.com", "state", "draining"},
		"wild":     {"hosts", "*.example.com"}, // which hosts does not name
	} {
		list(t, m, id, service(t, id).URL, metadata...)
	}
	url := serveHosts(t, name, "hosts shop.example.com shop2.example.com away.example.com *.apps.example.com bücher.example", "")
	const unknown, unable = "404 Not Found", "503 Service Unavailable"
	for _, c := range []struct{ host, path, want string }{
		{"shop.example.com", "/", "shop"},
		{"shop.example.com", "", "shop"},
		{"SHOP.example.COM.", "/", "shop"},
		{"shop.example.com:8443", "/x", "shop"},
		{"shop2.example.com", "/api/x", "shop"},
		{"shop.example.com", "/api", "shop-api"},
		{"shop.example.com", "/api/", "shop-api"},
		{"shop.example.com", "/API/x", "shop-api"},
		{"shop.example.com", "//api//x", "shop-api"},
		{"shop.example.com", "/x/../api/y", "shop-api"},
		{"shop.example.com", "/%61pi/y", "shop-api"},
		{"shop.example.com", "/files/a", "shop-api"},
		{"shop.example.com", "/apis", "shop"},
		{"shop.example.com", "/api/v2/x", "shop-v2"},
		{"shop.example.com", "/api/v22", "shop-api"},
		{"shop.example.com", "/?/api/", "shop"},
		{"a.apps.example.com", "/", "apps"},
		{"a.b.apps.example.com", "/", unknown},
		{"apps.example.com", "/", unknown},
		{"one.apps.example.com", "/only/x", "one"},
		{"one.apps.example.com", "/", unknown}, // the exact host is somebody's, and has no such path
		{"xn--bcher-kva.example", "/", "bücher"},
		{"XN--bcher-KVA.example:80", "/", "bücher"},
		{"example.com", "/", unknown},
		{"127.0.0.1", "/", unknown},
		{"10.0.0.1", "/", unknown},
		{"[::1]:80", "/", unknown},
		{"[::1]", "/", unknown},
		{"*.apps.example.com", "/", unknown},
		{"away.example.com", "/", unable},
		{"any.example.com", "/", unknown},
	} {
		if got := askHost(t, url, c.host, c.path); got != c.want {
			t.Errorf("%s%s: %s, want %s", c.host, c.path, got, c.want)
		}
	}
}

// TestRouteFollows holds that a host is served from when a node announces it until its last
// node is gone, whatever other hosts do.
func TestRouteFollows(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL, "hosts", "a.example.com")
	b := service(t, "b").URL
	url := serveHosts(t, name, "", "")
	becomes := func(host, want string) {
		t.Helper()
		eventually(t, host+" is served by "+want, func() bool { return askHost(t, url, host, "/") == want })
	}
	becomes("a.example.com", "a")
	becomes("b.example.com", "404 Not Found")
	list(t, m, "b", b, "hosts", "b.example.com")
	becomes("b.example.com", "b")
	list(t, m, "b", b, "hosts", "b2.example.com")
	becomes("b2.example.com", "b")
	becomes("b.example.com", "404 Not Found")
	list(t, m, "b", b, "hosts", "b2.example.com", "state", "maintenance")
	becomes("b2.example.com", "503 Service Unavailable")
	list(t, m, "b", b)
	becomes("b2.example.com", "404 Not Found")
	becomes("a.example.com", "a")
}

// TestRouteWithOthers holds that the other options of a source count among the nodes of a
// route.
func TestRouteWithOthers(t *testing.T) {
	name, m := newMemory(t)
	for id, metadata := range map[string][]string{
		"a-eu": {"service", "a", "zone", "eu", "hosts", "a.example.com b.example.com"},
		"a-us": {"service", "a", "zone", "us", "hosts", "a.example.com"},
		"b-us": {"service", "b", "zone", "us", "hosts", "c.example.com"},
	} {
		list(t, m, id, service(t, id).URL, metadata...)
	}
	const unable = "503 Service Unavailable"
	for options, want := range map[string][3]string{
		"prefer zone eu":                      {"a-eu", "a-eu", "b-us"},
		"prefer zone {header.X-None} us":      {"a-us", "a-eu", "b-us"},
		"where zone us":                       {"a-us", unable, "b-us"},
		"where zone {header.X-None}":          {unable, unable, unable},
		"service b":                           {unable, unable, "b-us"},
		"service {labels.2}":                  {"a-", unable, unable},
		"where zone us\npick 2 hash {host}":   {"a-us", unable, "b-us"},
		"where zone us\nsticky":               {"a-us", unable, "b-us"},
		"where zone us\nsubset 1\nproxy_id p": {"a-us", unable, "b-us"},
	} {
		url := serveHosts(t, name, "", options)
		for i, host := range []string{"a.example.com", "b.example.com", "c.example.com"} {
			if got := askHost(t, url, host, "/"); !strings.HasPrefix(got, want[i]) && (options != "service {labels.2}" || i != 1) {
				t.Errorf("%q, %s: %s, want %s", options, host, got, want[i])
			}
		}
	}
}

// TestRouteWithSessions holds that a session at a node does not take a request to it whose
// host or path another one serves.
func TestRouteWithSessions(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL, "hosts", "a.example.com")
	list(t, m, "b", service(t, "b").URL, "hosts", "b.example.com")
	list(t, m, "b-api", service(t, "b-api").URL, "hosts", "b.example.com", "paths", "/api")
	url := serveHosts(t, name, "", "sticky")
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ host, path, want string }{
		{"a.example.com", "/", "a"}, {"a.example.com", "/", "a"}, {"b.example.com", "/", "b"},
		{"b.example.com", "/api", "b-api"}, {"a.example.com", "/", "a"},
	} {
		req.Host, req.URL.Path = c.host, c.path
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.Body.Close() != nil || string(body) != c.want {
			t.Errorf("%s%s: %s %v, want %s", c.host, c.path, body, err, c.want)
		}
		if cookies := resp.Cookies(); len(cookies) > 0 {
			req.Header.Set("Cookie", cookies[0].Name+"="+cookies[0].Value)
		}
	}
	if req.Header.Get("Cookie") == "" {
		t.Error("there was no session")
	}
}

// TestHostsChangeWithAReload holds that a reload changes which hosts count, and that the
// directory and its watch stay.
func TestHostsChangeWithAReload(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL, "service", "a", "hosts", "a.example.com")
	list(t, m, "b", service(t, "b").URL, "service", "b", "hosts", "b.example.com")
	port := freeport.String(t)
	url := "http://127.0.0.1:" + port
	loadHosts(t, port, name, "", "")
	first := runningDirectories()[0]
	const unknown = "404 Not Found"
	for _, c := range []struct{ lines, a, b string }{
		{"hosts a.example.com", "a", unknown},
		{"hosts *.example.com\nclaim a b.example.com", "a", unknown},
		{"claim b* b.example.com", "a", "b"},
		{"hosts c.example.com", unknown, unknown},
		{"", "a", "b"},
	} {
		loadHosts(t, port, name, c.lines, "")
		eventually(t, c.lines, func() bool {
			return askHost(t, url, "a.example.com", "/") == c.a && askHost(t, url, "b.example.com", "/") == c.b
		})
	}
	if running := runningDirectories(); len(running) != 1 || running[0] != first || m.Watches() != 1 {
		t.Errorf("%d directories and %d watches, want the one that was there before", len(running), m.Watches())
	}

	// Without anybody who asks for hosts nobody looks at them, and one who does waits for it.
	plain := "http://:" + port + " {\nreverse_proxy {\ndynamic discovery {\nregistry memory " + name + "\nservice a\n}\n}\n}"
	load(t, plain)
	eventually(t, "nobody looks at hosts", func() bool { return first.Snapshot().Hosts() == nil })
	loadHosts(t, port, name, "", "")
	if got := askHost(t, url, "b.example.com", "/"); got != "b" {
		t.Errorf("after a config that asked for no hosts: %s, want b", got)
	}
}

// TestSitesAreNotTaken holds that no node gets the host of a site that the config has
// itself, and that a site which is for nodes is not such a one.
func TestSitesAreNotTaken(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL, "hosts", "admin.example.com shop.example.com free.example.com a.apps.example.com")
	port := freeport.String(t)
	site := hostSite(port, name, "hosts *.example.com *.apps.example.com", "")
	load(t, site+`
http://admin.example.com:`+port+` {
	respond ours
}
http://*.apps.example.com:`+port+` {
	respond ours
}
http://shop.example.com:`+port+` {
	route /x/* {
		reverse_proxy {
			dynamic multi {
				discovery {
					route
				}
			}
		}
	}
}
`)
	url := "http://127.0.0.1:" + port
	for host, want := range map[string]string{"admin.example.com": "ours", "a.apps.example.com": "ours", "free.example.com": "a"} {
		if got := askHost(t, url, host, "/x/"); got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
	}
	if got := askHost(t, url, "shop.example.com", "/x/"); got != "a" {
		t.Errorf("a site for nodes: %s, want a", got)
	}
	d := runningDirectories()[0]
	eventually(t, "the sites are known", func() bool {
		hosts := d.Snapshot().HostsOf(d.Snapshot().Node("a"))
		return strings.Join(hosts.Hosts, " ") == "shop.example.com free.example.com a.apps.example.com" &&
			len(hosts.Refused) == 1 && hosts.Refused[0].Text == "admin.example.com"
	})
}

// TestSitesInsideOfSites holds that the handle blocks of a site count as sites, too, that one
// made of a named route is for nodes if that is, and that hosts may come from the
// environment.
func TestSitesInsideOfSites(t *testing.T) {
	t.Setenv("DISCOVERY_TEST_SITE", "env.example.com")
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL, "hosts",
		"own.example.com env.example.com part.example.com header.example.com block.example.com invoked.example.com loop.example.com free.example.com")
	port := freeport.String(t)
	load(t, `{
	auto_https off
	discovery {
		registry main memory `+name+`
	}
}
&(nodes) {
	reverse_proxy {
		dynamic discovery {
			route
		}
	}
}
&(loop) {
	invoke loop
}
http://{env.DISCOVERY_TEST_SITE}:`+port+` {
	respond ours
}
http://:`+port+` {
	@header host header.example.com
	header @header X-Ours yes
	@block host block.example.com
	handle @block {
		invoke nodes
	}
	@part {
		host part.example.com
		path /ours/*
	}
	handle @part {
		respond ours
	}
	handle {
		invoke nodes
	}
	@own host own.example.com
	handle @own {
		respond ours
	}
}
http://invoked.example.com:`+port+` {
	invoke nodes
}
http://loop.example.com:`+port+` {
	invoke loop
}
`)
	d := runningDirectories()[0]
	eventually(t, "the node is listed", func() bool { return d.Snapshot().Node("a") != nil })
	eventually(t, "the sites are known", func() bool {
		hosts := d.Snapshot().HostsOf(d.Snapshot().Node("a"))
		return len(hosts.Refused) == 3 &&
			strings.Join(hosts.Hosts, " ") == "part.example.com header.example.com block.example.com invoked.example.com free.example.com"
	})
	url := "http://127.0.0.1:" + port
	for host, want := range map[string]string{
		"own.example.com": "ours", "env.example.com": "ours",
		"part.example.com": "a", "header.example.com": "a", "block.example.com": "a", "invoked.example.com": "a", "free.example.com": "a",
	} {
		if got := askHost(t, url, host, "/"); got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
	}
	if got := askHost(t, url, "part.example.com", "/ours/"); got != "ours" {
		t.Errorf("a part of a host: %s, want ours", got)
	}
}

// TestDiscoveredWaits holds that a request waits for the first listing, and what it gets
// where there is none.
func TestDiscoveredWaits(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL, "hosts", "a.example.com")
	m.Break()
	port := freeport.String(t)
	url := "http://127.0.0.1:" + port
	matcher := func(timeout string) string {
		return strings.Replace(hostSite(port, name, "", "sync_timeout 5s"), "discovered main", "{\ndiscovered main {\nsync_timeout "+timeout+"\n}\n}", 1)
	}
	load(t, matcher("1ms"))
	eventually(t, "the time is over", func() bool { return askHost(t, url, "a.example.com", "/") == "503 Service Unavailable" })
	load(t, matcher("30s"))
	answer := make(chan string, 1)
	go func() { answer <- askHost(t, url, "a.example.com", "/") }()
	time.AfterFunc(20*time.Millisecond, m.Restore)
	if got := <-answer; got != "a" {
		t.Errorf("a request that waited: %s, want a", got)
	}
	if got := askHost(t, url, "b.example.com", "/"); got != "404 Not Found" {
		t.Errorf("a host that nobody announces: %s, want 404", got)
	}
}

// TestDiscoveredInExpressions holds that expressions ask the matcher, and what they may
// say.
func TestDiscoveredInExpressions(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL, "hosts", "a.example.com")
	port := freeport.String(t)
	url := "http://127.0.0.1:" + port
	in := func(expression string) string {
		return strings.Replace(hostSite(port, name, "", ""), "discovered main", "`"+expression+"`", 1)
	}
	for _, expression := range []string{"discovered()", "discovered('main')", "discovered() && path('/api/*')", "path('/api/*') && !(!discovered('main'))"} {
		load(t, in(expression))
		if got := askHost(t, url, "a.example.com", "/api/x"); got != "a" {
			t.Errorf("%s: %s, want a", expression, got)
		}
		if got := askHost(t, url, "b.example.com", "/api/x"); got != "404 Not Found" {
			t.Errorf("%s: %s, want 404", expression, got)
		}
	}
	wantError(t, "a placeholder", validate(in("discovered({host})")), "as a literal, such as discovered('main')")
	wantError(t, "no such registry", validate(in("discovered('mian')")), `there is no registry "mian"`, "declared are main")
}

// TestHostsAreSeen holds what the admin API, the status page and the metrics show of hosts,
// and that the registry can be asked for by its name.
func TestHostsAreSeen(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "http://10.0.0.1:80", "service", "a", "hosts", "shop.example.com *.apps.example.com", "paths", "/api /")
	load(t, hostSite(freeport.String(t), name, "hosts shop.example.com *.apps.example.com", ""))
	waitSynced(t)
	d := runningDirectories()[0]
	list(t, m, "b", "http://10.0.0.2:80", "service", "b", "hosts", "shop.example.com evil.example.com")
	eventually(t, "the conflict is known", func() bool { return d.Snapshot().Hosts().Conflicts() == 1 })

	hosts := getAdmin(t, "/discovery/hosts")
	if len(hosts) != 2 || hosts[0]["host"] != "*.apps.example.com" || hosts[1]["host"] != "shop.example.com" {
		t.Fatalf("hosts: %v", hosts)
	}
	if h := hosts[1]; fmt.Sprint(h["services"], h["paths"], h["nodes"], h["left"], h["certificate"]) != "[a] [/api/* /*] [a] <nil> <nil>" || h["since"] == nil {
		t.Errorf("a host: %v", h)
	}
	if c := hosts[1]["conflicts"].([]any); len(c) != 1 || c[0].(map[string]any)["service"] != "b" || c[0].(map[string]any)["nodes"] != 1.0 {
		t.Errorf("conflicts: %v", c)
	}
	for query, want := range map[string]int{"?registry=main": 2, "?registry=memory": 2, "?registry=spare": 0, "?service=a": 2, "?service=b": 0, "?host=Shop.Example.com.": 1} {
		if got := getAdmin(t, "/discovery/hosts"+query); len(got) != want {
			t.Errorf("%s: %v, want %d", query, got, want)
		}
	}
	if status, body := askAdmin(t, http.MethodGet, "/discovery/hosts?host=10.0.0.1"); status != http.StatusBadRequest || !strings.Contains(string(body), "IP address") {
		t.Errorf("an address for a host: %d %s", status, body)
	}
	nodes := getAdmin(t, "/discovery/nodes?registry=main")
	if got := fmt.Sprint(nodes[0]["hosts"], nodes[0]["refused_hosts"]); got != "[shop.example.com *.apps.example.com] <nil>" {
		t.Errorf("the first node: %s", got)
	}
	if got := fmt.Sprint(nodes[1]["hosts"], nodes[1]["refused_hosts"]); !strings.Contains(got, "hosts does not name it") || !strings.Contains(got, `service "a"`) {
		t.Errorf("the second node: %s", got)
	}
	if r := getAdmin(t, "/discovery/registries"); r[0]["name"] != "main" {
		t.Errorf("registries: %v", r)
	}
}

// TestRouteTellsUnguarded holds that a source which goes by hosts says, too, that anybody on
// this machine may list what gets its requests.
func TestRouteTellsUnguarded(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL, "hosts", "a.example.com")
	url := serveHosts(t, name, "", "")
	if got := askHost(t, url, "a.example.com", "/"); got != "a" {
		t.Fatal(got)
	}
	if !runningDirectories()[0].told.Load() {
		t.Error("nothing was said")
	}
}

// TestRoutesAreSharedWithProxiesThatJoin holds that a proxy which joins takes its share of
// the nodes of a host, although these are the same as before.
func TestRoutesAreSharedWithProxiesThatJoin(t *testing.T) {
	registry, m := newMemory(t)
	for i := range 6 {
		id := fmt.Sprint("n", i)
		list(t, m, id, "http://"+at(id), "hosts", "a.example")
	}
	u := source(t, "registry memory "+registry+"\nroute\nsubset 1\nproxy_id p", "load_balancing", policy("random"))
	u.builder.Group.Join()
	r := request()
	r.Host = "a.example"
	share := func() int { return len(u.pickerFor(r, nil).First()) }
	eventually(t, "six nodes are known", func() bool { return u.pickerFor(r, nil) != nobody && len(u.directory.Snapshot().Nodes()) == 6 })
	if n := share(); n != 1 {
		t.Fatalf("alone, %d nodes are used, want 1", n)
	}
	claims, _ := picker.Claims([]*picker.Group{picker.NewGroup(u.fleet(), "q", 1)})
	list(t, m, "q", "http://"+at("q"), discovery.KeyRole, discovery.RoleProxy, discovery.KeySubsets, claims)
	eventually(t, "the nodes are shared by two", func() bool { return share() == 3 })
}
