package integration

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// TestNodesThatDoNotServe has 40 nodes that all heartbeat, of which 12 refuse
// connections, or take them and never answer. Each request sees two candidates,
// and none fails.
func TestNodesThatDoNotServe(t *testing.T) {
	for _, test := range []struct {
		name     string
		address  func(t *testing.T) string
		rest     string
		requests int
	}{
		{"refuse", func(t *testing.T) string { return "127.0.0.1:" + freeport.String(t) }, "lb_retries 12", 20_000},
		{"refuse, passive checks", func(t *testing.T) string { return "127.0.0.1:" + freeport.String(t) },
			"lb_policy least_conn\nlb_try_duration 5s\nlb_try_interval 1ms\nfail_duration 1s", 20_000},
		{"never answer", silent, "lb_policy least_conn\nlb_retries 12\nfail_duration 30s\ntransport http {\nresponse_header_timeout 500ms\n}", 20_000},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newKV(t)
			for i := range 40 {
				id := fmt.Sprintf("orders-%d", i)
				address := ""
				if i%10 < 3 {
					address = test.address(t)
				} else {
					address = newService(t, id).address
				}
				r.put(id, camel(id, "http://"+address, `"service":"orders"`))
			}
			port := freeport.String(t)
			start(t, "", site(port, r.block("ttl 1h")+"\nservice orders\npick 2", test.rest))
			url := "http://127.0.0.1:" + port
			l := traffic(t, url)
			eventually(t, fmt.Sprint(test.requests, " requests"), func() bool {
				return l.served()+l.failed() >= test.requests
			})
			l.cancel()
			l.group.Wait()
			if n := l.failed(); n > 0 {
				t.Errorf("%d of %d requests failed, the first: %s", n, l.served()+n, l.failures[0])
			}
			if len(l.answers) != 28 {
				t.Errorf("%d nodes answered, want the 28 that serve", len(l.answers))
			}
		})
	}
}

// A checked service answers requests with its id, and health checks at will.
type checked struct {
	*httptest.Server
	healthy atomic.Bool
	hangs   atomic.Bool
	checks  atomic.Int32
	failed  atomic.Int32 // checks in a row
	worst   atomic.Int32 // the most of them that any request came after
	early   atomic.Int32 // requests that came before a check was passed
	served  atomic.Int32
	passed  atomic.Bool
}

func newChecked(t *testing.T, id string) *checked {
	t.Helper()
	s := new(checked)
	end := make(chan struct{})
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			if !s.passed.Load() {
				s.early.Add(1)
			}
			s.served.Add(1)
			s.worst.Store(max(s.worst.Load(), s.failed.Load()))
			_, _ = io.WriteString(w, id)
			return
		}
		s.checks.Add(1)
		switch {
		case s.hangs.Load():
			select {
			case <-r.Context().Done():
			case <-end:
			}
		case s.healthy.Load():
			s.failed.Store(0)
			s.passed.Store(true)
		default:
			s.failed.Add(1)
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	t.Cleanup(s.Close)
	t.Cleanup(func() { close(end) })
	return s
}

// TestHealthChecks has nodes that serve and heartbeat whatever their checks say.
func TestHealthChecks(t *testing.T) {
	r := newKV(t)
	join := func(id string, healthy bool) *checked {
		s := newChecked(t, id)
		s.healthy.Store(healthy)
		r.put(id, camel(id, s.URL, `"service":"orders"`))
		return s
	}
	a, b, sick := join("a", true), join("b", true), join("sick", false)
	port := freeport.String(t)
	sites := site(port, r.block("ttl 1h")+"\nservice orders\nhealth {\nuri /healthz\ninterval 200ms\ntimeout 1s\nfails 3\n}", "lb_policy round_robin")
	p := start(t, "", sites)
	l := traffic(t, "http://127.0.0.1:"+port)
	more := func(s *checked) func() bool {
		before := s.served.Load()
		return func() bool { return s.served.Load() > before+100 }
	}
	// rests waits until a node gets no requests while another gets many.
	rests := func(what string, s *checked) {
		t.Helper()
		eventually(t, what, func() bool {
			before := s.served.Load()
			eventually(t, "the others serve", more(a))
			return s.served.Load() == before
		})
	}
	eventually(t, "a serves", more(a))
	eventually(t, "b serves", more(b))

	// It leaves after as many failed checks as it may have.
	b.healthy.Store(false)
	rests("b fails its checks", b)
	if n := b.worst.Load(); n < 2 || n > 4 { // one may be under way, or just be noted
		t.Errorf("after %d failed checks there came requests, want 3", n)
	}
	// And comes back by itself, as does one that never was healthy.
	b.healthy.Store(true)
	sick.healthy.Store(true)
	eventually(t, "b is back", more(b))
	eventually(t, "the third serves", more(sick))

	// One that hangs keeps no other from being checked, nor from serving.
	b.hangs.Store(true)
	late := join("late", true)
	eventually(t, "one that joins serves", more(late))
	rests("b hangs", b)
	before := a.checks.Load()
	eventually(t, "the others are checked", func() bool { return a.checks.Load() > before+2 })

	// What is known outlives a reload.
	served := b.served.Load()
	p.reload("", sites+"http://127.0.0.1:"+port+"/x {\n}\n")
	eventually(t, "a serves after the reload", more(a))
	if n := b.served.Load() - served; n > 0 {
		t.Errorf("%d requests went to an unhealthy node after a reload", n)
	}
	l.stop(t)
	for _, s := range []*checked{a, b, sick, late} {
		if n := s.early.Load(); n > 0 {
			t.Errorf("%d requests came before the first check was passed", n)
		}
	}
}

// silent takes connections and never answers.
func silent(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close() // when the listener has ended
		}
	}()
	return l.Addr().String()
}

// TestPoisonedRequest sends a request at which every node closes its connection, with
// what the manual recommends and with what takes each of them out at once: others are
// served all the while.
func TestPoisonedRequest(t *testing.T) {
	for _, rest := range []string{"lb_retries 3\nfail_duration 10s\nmax_fails 3", "lb_retries 5\nfail_duration 1m"} {
		t.Run(rest, func(t *testing.T) {
			r := newKV(t)
			for i := range 5 {
				id := fmt.Sprintf("orders-%d", i)
				s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/poison" {
						panic(http.ErrAbortHandler)
					}
					_, _ = io.WriteString(w, id)
				}))
				t.Cleanup(s.Close)
				r.put(id, camel(id, s.URL, `"service":"orders"`))
			}
			port := freeport.String(t)
			start(t, "", site(port, r.block("ttl 1h")+"\nservice orders", rest))
			url := "http://127.0.0.1:" + port
			l := traffic(t, url)
			for range 10 {
				if status, err := ask(url + "/poison"); status != "502" {
					t.Fatalf("the poisoned request was answered %s, %v, want 502", status, err)
				}
			}
			before := l.served()
			eventually(t, "requests after that", func() bool { return l.served()+l.failed() > before+1000 })
			l.stop(t)
		})
	}
}

// TestChecksOfNewConfigs starts, and reloads with changed checks, under load: checks
// that ask for several passes, and whose interval is longer than the test, cost no
// request.
func TestChecksOfNewConfigs(t *testing.T) {
	r := newKV(t)
	for i := range 5 {
		id := fmt.Sprintf("orders-%d", i)
		s := newChecked(t, id)
		s.healthy.Store(true)
		r.put(id, camel(id, s.URL, `"service":"orders"`))
	}
	port := freeport.String(t)
	sites := func(checks string) string {
		return site(port, r.block("ttl 1h")+"\nservice orders\n"+checks, "lb_policy round_robin")
	}
	p := start(t, "", sites("health {\nuri /healthz\npasses 3\ninterval 1m\n}"))
	l := traffic(t, "http://127.0.0.1:"+port)
	more := func() {
		t.Helper()
		before := l.served() + l.failed()
		eventually(t, "requests", func() bool { return l.served()+l.failed() > before+1000 })
	}
	more()
	for i, checks := range []string{
		"", // adds them with the next one
		"health {\nuri /healthz\npasses 3\ninterval 1m\n}",
		"health {\nuri /healthz\npasses 4\ninterval 1m\n}",
		"health {\nuri /healthz\npasses 4\ninterval 2m\ntimeout 3s\n}",
		"health {\nuri /healthz?deep=yes\npasses 4\ninterval 2m\n}",
		"health {\nuri /healthz?deep=yes\npasses 4\ninterval 2m\nheader X-Check yes\n}",
	} {
		p.reload("", sites(checks))
		more()
		if n := l.failed(); n > 0 {
			t.Fatalf("%d of %d requests failed by reload %d, the first: %s", n, l.served()+n, i, l.failures[0])
		}
	}
	l.stop(t)
}
