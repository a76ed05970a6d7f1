package caddydiscovery

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// TestReloadClosesIdleConnections reloads after a request: the connection to the
// node, which the old config kept for the next one, ends with it.
func TestReloadClosesIdleConnections(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	node, open := countingNode(t)
	list(t, m, "a", node)
	site := "http://127.0.0.1:" + port + " {\nreverse_proxy {\ndynamic discovery {\nregistry memory " + name + "\n}\n}\n}"
	load(t, site)
	if status, _ := get(t, "http://127.0.0.1:"+port); status != 404 || open.Load() != 1 {
		t.Fatalf("status %d over %d connections, want 404 over 1", status, open.Load())
	}
	load(t, site)
	eventually(t, "the connection is closed", func() bool { return open.Load() == 0 })
}

// countingNode starts a node that answers 404, and counts the connections to it.
func countingNode(t *testing.T) (url string, open *atomic.Int32) {
	t.Helper()
	open = new(atomic.Int32)
	node := httptest.NewUnstartedServer(http.NotFoundHandler())
	node.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			open.Add(1)
		case http.StateClosed:
			open.Add(-1)
		}
	}
	node.Start()
	t.Cleanup(node.Close)
	return node.URL, open
}

// served returns which nodes answer a few requests.
func served(t *testing.T, url string, header ...string) map[string]int {
	t.Helper()
	answers := make(map[string]int)
	for range 6 {
		status, body := get(t, url, header...)
		if status != 200 {
			body = fmt.Sprint(status)
		}
		answers[body]++
	}
	return answers
}

func TestSourceFollowsTheFleet(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+` {
					loss_guard off
				}
				service orders
			}
			lb_policy round_robin
		}
	}`)
	url := "http://127.0.0.1:" + port
	if status, _ := get(t, url); status != 503 {
		t.Errorf("no node: status %d, want 503", status)
	}
	a, b := service(t, "a"), service(t, "b")
	steps := []struct {
		what string
		do   func()
		want string
	}{
		{"a joins", func() { list(t, m, "a", a.URL, "service", "orders") }, "map[a:6]"},
		{"another service joins", func() { list(t, m, "c", b.URL, "service", "pay") }, "map[a:6]"},
		{"b joins", func() { list(t, m, "b", b.URL, "service", "orders") }, "map[a:3 b:3]"},
		{"a drains", func() { list(t, m, "a", a.URL, "service", "orders", "state", "draining") }, "map[b:6]"},
		{"a is up again", func() { list(t, m, "a", a.URL, "service", "orders") }, "map[a:3 b:3]"},
		{"b is in maintenance", func() { list(t, m, "b", b.URL, "service", "orders", "state", "maintenance") }, "map[a:6]"},
		{"b has weight 0", func() { list(t, m, "b", b.URL, "service", "orders", "weight", "0") }, "map[a:6]"},
		{"b speaks https", func() {
			list(t, m, "b", strings.Replace(b.URL, "http", "https", 1), "service", "orders")
		}, "map[a:6]"},
		{"b names no scheme", func() { list(t, m, "b", b.Listener.Addr().String(), "service", "orders") }, "map[a:3 b:3]"},
		{"a moves to another address", func() { list(t, m, "a", b.URL, "service", "orders") }, "map[b:6]"},
		{"all lapse", func() { m.Expire("a"); m.Expire("b") }, "map[503:6]"},
	}
	for _, s := range steps {
		s.do()
		eventually(t, s.what, func() bool { return fmt.Sprint(served(t, url)) == s.want })
	}
}

// TestQueriesVary has requests name a service and a zone.
func TestQueriesVary(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+`
				service {header.X-Service}
				where zone {header.X-Zone} any
			}
		}
	}`)
	a, b := service(t, "a"), service(t, "b")
	list(t, m, "a", a.URL, "service", "orders", "zone", "eu")
	list(t, m, "b", b.URL, "service", "orders", "zone", "us")
	list(t, m, "c", b.URL, "service", "pay", "zone", "any")
	url := "http://127.0.0.1:" + port
	eventually(t, "the fleet is known", func() bool {
		return fmt.Sprint(served(t, url, "X-Service", "pay")) == "map[b:6]"
	})
	for _, c := range []struct {
		service, zone, want string
	}{
		{"orders", "eu", "map[a:6]"},
		{"orders", "us", "map[b:6]"},
		{"orders", "mars", "map[503:6]"},
		{"orders", "", "map[503:6]"},
		{"", "eu", "map[503:6]"},
		{"{env.HOME}", "eu", "map[503:6]"},
	} {
		if got := fmt.Sprint(served(t, url, "X-Service", c.service, "X-Zone", c.zone)); got != c.want {
			t.Errorf("service %q in zone %q is served by %s, want %s", c.service, c.zone, got, c.want)
		}
	}
}

func TestPrefer(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+` {
					loss_guard off
				}
				prefer zone eu-1 eu-2
				prefer version 2
			}
			lb_policy round_robin
		}
	}`)
	url := "http://127.0.0.1:" + port
	nodes := []struct{ id, zone, version string }{
		{"near-new", "eu-1", "2"}, {"near-old", "eu-2", "1"}, {"far-new", "us", "2"}, {"far-old", "us", "1"},
	}
	for _, n := range nodes {
		list(t, m, n.id, service(t, n.id).URL, "zone", n.zone, "version", n.version)
	}
	for _, n := range nodes {
		eventually(t, "tier of "+n.id, func() bool { return fmt.Sprint(served(t, url)) == "map["+n.id+":6]" })
		m.Expire(n.id)
	}
}

func TestNoProxyLoops(t *testing.T) {
	name, m := newMemory(t)
	port, asking := freeport.String(t), freeport.String(t)
	load(t, `{
		registrar {
			registry memory `+name+`
			node_id me
			endpoint http://127.0.0.1:`+port+`
			metadata service edge
		}
	}
	http://127.0.0.1:`+port+` {
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+`
			}
		}
	}
	http://127.0.0.1:`+asking+` {
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+`
				service edge
			}
		}
	}`)
	eventually(t, "the proxy is listed", func() bool { return m.Record("me") != nil })
	list(t, m, "other-proxy", service(t, "other").URL, "role", "proxy", "service", "edge")
	list(t, m, "node", service(t, "node").URL)
	eventually(t, "the plain source takes the node alone", func() bool {
		return fmt.Sprint(served(t, "http://127.0.0.1:"+port)) == "map[node:6]"
	})
	if got := fmt.Sprint(served(t, "http://127.0.0.1:"+asking)); got != "map[other:6]" {
		t.Errorf("the source that asks for proxies is served by %s, want the other proxy and never this one", got)
	}
}

// TestPickOptionsReachRequests has requests of many tenants use a subset of a fleet: each
// tenant gets the same two nodes of it each time, and what no tenant sends is drawn.
func TestPickOptionsReachRequests(t *testing.T) {
	name, m := newMemory(t)
	for i := range 100 {
		list(t, m, fmt.Sprint("n", i), "http://"+at(fmt.Sprint("n", i)))
	}
	u := source(t, "registry memory "+name+"\nsubset 10\nproxy_id one\npick 2 hash {test.tenant}\nslow_start 1h")
	if u.builder.SlowStart != time.Hour {
		t.Errorf("new nodes start for %v, want an hour", u.builder.SlowStart)
	}
	r, used := request(), make(map[string]bool)
	for tenant := range 200 {
		replacerOf(r).Set("test.tenant", fmt.Sprint(tenant))
		got := picked(t, u, r)
		if again := picked(t, u, r); len(got) != 2 || got[0] == got[1] || !slices.Equal(got, again) {
			t.Fatalf("tenant %d gets %v, then %v", tenant, got, again)
		}
		used[got[0]], used[got[1]] = true, true
	}
	if len(used) != 10 {
		t.Errorf("%d nodes are used, want the 10 of the subset", len(used))
	}
	replacerOf(r).Set("test.tenant", "")
	first := make(map[string]bool)
	for range 200 {
		first[picked(t, u, r)[0]] = true
	}
	if len(first) != 10 {
		t.Errorf("without a tenant %d nodes come first, want any of the 10", len(first))
	}
}
