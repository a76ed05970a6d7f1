package caddydiscovery

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/health"
)

// A checkedService answers health checks at will, and requests with its id.
type checkedService struct {
	*httptest.Server
	status   atomic.Int32 // of /healthz; 0: it hangs
	checks   atomic.Int32
	requests atomic.Int32
	early    atomic.Int32 // requests before the first check
}

func newChecked(t *testing.T, id string, status int, secure bool) *checkedService {
	t.Helper()
	s := new(checkedService)
	s.status.Store(int32(status))
	end := make(chan struct{})
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			if s.checks.Load() == 0 {
				s.early.Add(1)
			}
			s.requests.Add(1)
			_, _ = io.WriteString(w, id)
			return
		}
		s.checks.Add(1)
		switch status := int(s.status.Load()); status {
		case 0:
			select {
			case <-r.Context().Done():
			case <-end:
			}
		default:
			w.WriteHeader(status)
		}
	})
	if secure {
		s.Server = httptest.NewTLSServer(handler)
	} else {
		s.Server = httptest.NewServer(handler)
	}
	t.Cleanup(s.Close)
	t.Cleanup(func() { close(end) })
	return s
}

// TestReloadToAFirstCheckLosesNoRequest loads the first config that has checks while requests come:
// they wait until a node has passed one, and all of them are served. A node that
// refuses is known to be unhealthy before that.
func TestReloadToAFirstCheckLosesNoRequest(t *testing.T) {
	name, m := newMemory(t)
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/healthz" {
			time.Sleep(5 * time.Millisecond)
		}
	}))
	t.Cleanup(slow.Close)
	list(t, m, "a", slow.URL)
	list(t, m, "b", "http://"+at("dead"))
	port := freeport.String(t)
	config := func(checks string) string {
		return "http://127.0.0.1:" + port + " {\nreverse_proxy {\ndynamic discovery {\nregistry memory " + name + "\n" + checks + "\n}\nlb_retries 1\n}\n}"
	}
	load(t, config(""))
	for range 10 {
		load(t, config("health {\nuri /healthz\n}"))
		var requests sync.WaitGroup
		for i := range 100 {
			requests.Go(func() {
				time.Sleep(time.Duration(i) * 200 * time.Microsecond)
				resp, err := http.Get("http://127.0.0.1:" + port)
				if err != nil {
					return // the reload has closed a connection that it had just accepted
				}
				_ = resp.Body.Close()
				if resp.StatusCode != http.StatusOK {
					t.Errorf("status %d, want a node that is healthy", resp.StatusCode)
				}
			})
		}
		requests.Wait()
		load(t, config(""))
	}
}

// The nodes that pass their checks get the requests, from the first one on, and a
// reload keeps what is known of them.
func TestHealthyNodesGetTheRequests(t *testing.T) {
	name, m := newMemory(t)
	a, b := newChecked(t, "a", 204, false), newChecked(t, "b", 500, false)
	list(t, m, "a", a.URL)
	list(t, m, "b", b.URL)
	port := freeport.String(t)
	config := `http://127.0.0.1:` + port + ` {
		reverse_proxy {
			dynamic discovery {
				registry memory ` + name + `
				health {
					uri /healthz
					interval 20ms
					timeout 5s
					fails 2
					header X-Check yes
				}
			}
			lb_policy round_robin
		}
	}`
	load(t, config)
	url := "http://127.0.0.1:" + port
	if got := fmt.Sprint(served(t, url)); got != "map[a:6]" {
		t.Fatalf("served by %s, want the healthy node, from the first request on", got)
	}
	steps := []struct {
		what string
		do   func()
		want string
	}{
		{"b becomes healthy", func() { b.status.Store(200) }, "map[a:3 b:3]"},
		{"a becomes unhealthy", func() { a.status.Store(404) }, "map[b:6]"},
		{"b hangs", func() { a.status.Store(200); b.Close() }, "map[a:6]"},
		{"c joins", func() { list(t, m, "b", newChecked(t, "c", 200, false).URL) }, "map[a:3 c:3]"},
	}
	for _, s := range steps {
		s.do()
		eventually(t, s.what, func() bool { return fmt.Sprint(served(t, url)) == s.want })
	}
	if n := a.early.Load() + b.early.Load(); n != 0 {
		t.Errorf("%d requests came before the first check", n)
	}

	// A reload keeps the results: nobody waits, and nobody is forgotten.
	a.status.Store(404)
	eventually(t, "a is unhealthy", func() bool { return fmt.Sprint(served(t, url)) == "map[c:6]" })
	load(t, config+"\n# changed")
	if got := fmt.Sprint(served(t, url)); got != "map[c:6]" {
		t.Errorf("served by %s after the reload, want what the checks had shown before", got)
	}
}

func TestChecksGoOverTheTransportOfRequests(t *testing.T) {
	name, m := newMemory(t)
	a := newChecked(t, "a", 200, true)
	list(t, m, "a", a.URL)
	port := freeport.String(t)
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+`
				health {
					uri /healthz
				}
			}
			transport http {
				tls_insecure_skip_verify
			}
		}
	}`)
	if status, body := get(t, "http://127.0.0.1:"+port); body != "a" {
		t.Errorf("status %d, answered %q, want the node, checked over TLS", status, body)
	}
	if a.checks.Load() == 0 {
		t.Error("the node was not checked")
	}
}

// TestEmptyFleetIsNotAwaited has no node of the service: there is nothing to wait for.
func TestEmptyFleetIsNotAwaited(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "other", "http://127.0.0.1:1", "service", "other")
	u := source(t, "registry memory "+name+"\nservice orders\nsync_timeout 1h\nhealth {\n}")
	if upstreams, err := u.GetUpstreams(request()); err != nil || len(upstreams) != 0 {
		t.Errorf("returned %v, %v, want nothing at once", upstreams, err)
	}
}

// TestEqualChecksAreShared holds that equal settings are one checker, and that others,
// or another transport, are not.
func TestEqualChecksAreShared(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "http://"+at("a"))
	options := "registry memory " + name + "\nhealth {\nuri /healthz\n}"
	a, b := source(t, options), source(t, options+"\nservice orders")
	c := source(t, "registry memory "+name+"\nhealth {\nuri /\n}")
	d := source(t, options, "transport", map[string]any{"protocol": "http", "tls": map[string]any{}})
	e := source(t, options, "transport", map[string]any{"protocol": "http", "tls": map[string]any{"insecure_skip_verify": true}})
	if a.health.Checker != b.health.Checker {
		t.Error("equal settings have two checkers")
	}
	for i, other := range []*Upstreams{c, d, e} {
		if other.health.Checker == a.health.Checker {
			t.Errorf("different settings, case %d, share a checker", i)
		}
	}
	if d.health.Checker == e.health.Checker {
		t.Error("different transports share a checker")
	}
}

// TestRequestsWhileHealthChanges has many requests see the health change, for the race
// detector.
func TestRequestsWhileHealthChanges(t *testing.T) {
	name, m := newMemory(t)
	for i := range 20 {
		list(t, m, fmt.Sprint("n", i), newChecked(t, "n", 200, false).URL)
	}
	u := source(t, "registry memory "+name+"\npick 2\nhealth {\nuri /healthz\ninterval 5ms\n}")
	u.start()
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for range 2000 {
				var upstreams []*reverseproxy.Upstream
				upstreams, _ = u.GetUpstreams(request())
				_ = upstreams
			}
		})
	}
	for i := range 20 {
		list(t, m, fmt.Sprint("n", i), "http://127.0.0.1:1", discovery.KeyZone, fmt.Sprint(i))
	}
	group.Wait()
}

// siteWithChecks is a site whose source checks its nodes.
func siteWithChecks(port, registry, checks, rest string) string {
	return "http://127.0.0.1:" + port + " {\nreverse_proxy {\ndynamic discovery {\nregistry memory " + registry + "\n" + rest +
		"\nhealth {\nuri /healthz\ninterval 1h\ntimeout 1h\n" + checks + "\n}\n}\nlb_policy round_robin\n}\n}"
}

// reload loads another config, and returns when a request has been answered, over a
// connection that is kept: the config before closes those that it had just accepted,
// and only what fails on a connection that was used before is tried again.
func reload(t *testing.T, site, url string) {
	t.Helper()
	load(t, site)
	http.DefaultClient.CloseIdleConnections()
	eventually(t, "a request is answered", func() bool {
		resp, err := http.Get(url)
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return err == nil
	})
}

// TestResultsOutliveAChangeOfTheChecks reloads with other checks while all checks hang:
// what is known of the nodes goes on where the same is asked, and where it is not
// the nodes that were healthy serve until their first result.
func TestResultsOutliveAChangeOfTheChecks(t *testing.T) {
	for _, test := range []struct {
		what, checks string
	}{
		{"another fails", "fails 5"},
		{"another passes", "passes 4"},
		{"another interval", "interval 30m"},
		{"another status", "status 200"},
		{"a header", "header X-Check yes"},
	} {
		t.Run(test.what, func(t *testing.T) {
			name, m := newMemory(t)
			a, b := newChecked(t, "a", 200, false), newChecked(t, "b", 500, false)
			list(t, m, "a", a.URL)
			list(t, m, "b", b.URL)
			port := freeport.String(t)
			load(t, siteWithChecks(port, name, "", ""))
			url := "http://127.0.0.1:" + port
			eventually(t, "both are checked", func() bool { return a.checks.Load() == 1 && b.checks.Load() == 1 })
			if got := fmt.Sprint(served(t, url)); got != "map[a:6]" {
				t.Fatalf("served by %s, want the healthy node", got)
			}
			a.status.Store(0)
			b.status.Store(0)
			site := siteWithChecks(port, name, test.checks, "sync_timeout 1h")
			if test.checks == "interval 30m" {
				site = strings.Replace(site, "interval 1h\n", "", 1)
			}
			reload(t, site, url)
			if got := fmt.Sprint(served(t, url)); got != "map[a:6]" {
				t.Fatalf("served by %s after the reload, want the node that was healthy before", got)
			}
		})
	}
}

// TestUncheckedNodesServeAfterSyncTimeout has checks that hang: after sync_timeout the
// node serves without, and no longer once another one has passed.
func TestUncheckedNodesServeAfterSyncTimeout(t *testing.T) {
	for what, service := range map[string]string{"one service": "orders", "any service": "{header.X-Service}"} {
		t.Run(what, func(t *testing.T) {
			name, m := newMemory(t)
			a := newChecked(t, "a", 0, false)
			list(t, m, "a", a.URL, "service", "orders")
			port := freeport.String(t)
			load(t, siteWithChecks(port, name, "", "sync_timeout 50ms\nservice "+service))
			url := "http://127.0.0.1:" + port
			if got := fmt.Sprint(served(t, url, "X-Service", "orders")); got != "map[a:6]" {
				t.Fatalf("served by %s, want the node of which nothing is known", got)
			}
			// Another node that passes is all that is needed.
			list(t, m, "b", newChecked(t, "b", 200, false).URL, "service", "orders")
			eventually(t, "the checked node serves", func() bool {
				return fmt.Sprint(served(t, url, "X-Service", "orders")) == "map[b:6]"
			})
		})
	}
}

// TestUncheckedNodeBesideAnUnhealthyOne has a node that is known to be unhealthy when
// another one joins and hangs: requests do not wait for its check, nor are they sent
// to it.
func TestUncheckedNodeBesideAnUnhealthyOne(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "unhealthy", newChecked(t, "unhealthy", 500, false).URL)
	u := source(t, "registry memory "+name+"\nsync_timeout 50ms\nhealth {\nuri /healthz\ninterval 1h\ntimeout 1h\n}")
	u.start()
	checked := func(id string, want health.State) func() bool {
		return func() bool {
			h, since := u.health.Of(u.directory.Snapshot().Node(id))
			return h == want && !since.IsZero() && time.Since(since) > time.Duration(u.SyncTimeout)
		}
	}
	eventually(t, "it is known to be unhealthy for a while", checked("unhealthy", health.Unhealthy))
	joined := newChecked(t, "joined", 0, false)
	list(t, m, "joined", joined.URL)
	eventually(t, "the other is being checked", func() bool { return joined.checks.Load() == 1 })
	if p := u.pickers.Picker(u.directory.Snapshot(), nil); !p.Empty() || !p.Retry().IsZero() {
		t.Errorf("%d nodes, awaited until %v, want nobody", len(p.First()), p.Retry())
	}
	eventually(t, "it has waited for its check", checked("joined", health.Unchecked))
	if upstreams, err := u.GetUpstreams(request()); err != nil || len(upstreams) > 0 {
		t.Errorf("returned %v, %v, want nobody", upstreams, err)
	}
}

// TestRequestsWaitForTheSuccessorOfTheOnlyNode restarts the only node of a service, long after the
// checks began: requests wait for the first check of its successor.
func TestRequestsWaitForTheSuccessorOfTheOnlyNode(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", newChecked(t, "a", 200, false).URL, discovery.KeyInstance, "first")
	port := freeport.String(t)
	load(t, siteWithChecks(port, name, "", "sync_timeout 1h"))
	url := "http://127.0.0.1:" + port
	for i := range 20 {
		eventually(t, "it serves", func() bool { return fmt.Sprint(served(t, url)) == "map[a:6]" })
		next := newChecked(t, "a", 200, false)
		list(t, m, "a", next.URL, discovery.KeyInstance, fmt.Sprint(i))
		for next.requests.Load() == 0 {
			if status, _ := get(t, url); status != http.StatusOK {
				t.Fatalf("status %d in round %d, want requests to wait for the check", status, i)
			}
		}
	}
}
