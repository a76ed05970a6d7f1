package caddydiscovery

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// troubledService starts a service that answers with its id, breaks the connection of a
// request for /poison, and keeps one for /slow, of which it tells, until it is released.
// It returns its URL.
func troubledService(t *testing.T, id string, entered chan<- struct{}, release <-chan struct{}) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/poison":
			panic(http.ErrAbortHandler)
		case "/slow":
			entered <- struct{}{}
			<-release
		}
		_, _ = io.WriteString(w, id)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// TestFailingNodesGiveWayToTheNextTier has a near node that refuses connections: after
// the first request Caddy's passive health checks know it, and the far node serves
// without a retry.
func TestFailingNodesGiveWayToTheNextTier(t *testing.T) {
	for _, options := range []string{"", "pick 1", "pick 2", "subset 5", "pick 2 hash {query.key}"} {
		name, _, _ := strings.Cut("all "+options, " {")
		t.Run(name, func(t *testing.T) {
			name, m := newMemory(t)
			list(t, m, "near", "http://127.0.0.1:"+freeport.String(t), "zone", "eu")
			list(t, m, "far", service(t, "far").URL, "zone", "us")
			url := serveNodes(t, name, "prefer zone eu\n"+options, "fail_duration 1m") + "/?key=1"
			if status, _ := get(t, url); status != 502 {
				t.Fatalf("status %d, want 502: the near node comes first, and there are no retries", status)
			}
			for range 20 {
				if status, body := get(t, url); body != "far" {
					t.Fatalf("status %d, answered %q, want the far node", status, body)
				}
			}
		})
	}
}

// TestFullNodesGiveWayToTheNextTier has a near node that takes one request at a time.
func TestFullNodesGiveWayToTheNextTier(t *testing.T) {
	name, m := newMemory(t)
	began, end := make(chan struct{}), make(chan struct{})
	list(t, m, "near", troubledService(t, "near", began, end), "zone", "eu")
	list(t, m, "far", service(t, "far").URL, "zone", "us")
	url := serveNodes(t, name, "prefer zone eu\npick 1", "unhealthy_request_count 1")
	if _, body := get(t, url); body != "near" {
		t.Fatalf("answered %q, want the near node", body)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		get(t, url+"/slow")
	}()
	<-began
	for range 20 {
		if status, body := get(t, url); body != "far" {
			t.Errorf("status %d, answered %q while the near node is full, want the far one", status, body)
		}
	}
	close(end)
	<-done
	eventually(t, "the near node serves again", func() bool { _, body := get(t, url); return body == "near" })
}

// TestNodesServeWhenAllHaveFailed has a request that makes every node close its connection,
// and retries: afterwards all nodes count as failing for an hour, and serve all the
// same. One that serves as many requests as it may stays out.
func TestNodesServeWhenAllHaveFailed(t *testing.T) {
	for _, test := range []struct{ options, rest string }{
		{"", ""},
		{"", "lb_policy least_load"},
		{"", "lb_policy first"},
		{"", "lb_policy client_ip_hash"},
		{"pick 2", "lb_policy least_conn"},
		{"pick 2", "lb_policy least_load"},
		{"pick 2 hash {query.key}", "lb_policy first"},
		{"prefer zone eu", ""},
		{"subset 2\npick 1", ""},
	} {
		t.Run(strings.NewReplacer("{", "", "}", "").Replace(test.options+" "+test.rest), func(t *testing.T) {
			name, m := newMemory(t)
			entered, release := make(chan struct{}), make(chan struct{})
			for _, id := range []string{"a", "b", "c"} {
				list(t, m, id, troubledService(t, id, entered, release), "zone", map[string]string{"a": "eu"}[id])
			}
			url := serveNodes(t, name, test.options, test.rest+"\nlb_retries 5\nfail_duration 1h\nunhealthy_request_count 2")
			for range 3 {
				if status, _ := get(t, url+"/poison"); status != http.StatusBadGateway {
					t.Fatalf("status %d of a request that every node refuses, want 502", status)
				}
			}
			for i := range 20 {
				if status, body := get(t, fmt.Sprint(url, "/?key=", i)); status != http.StatusOK {
					t.Fatalf("status %d, %q, want nodes that failed to serve when nobody else is there", status, body)
				}
			}
			if test.options != "" {
				close(release)
				return
			}
			var slow sync.WaitGroup
			for range 6 {
				slow.Go(func() {
					if status, _ := get(t, url+"/slow"); status != http.StatusOK {
						t.Errorf("status %d, want each node to take two requests", status)
					}
				})
				<-entered
			}
			if status, _ := get(t, url); status != http.StatusServiceUnavailable {
				t.Errorf("status %d, want 503 when all nodes are full", status)
			}
			close(release)
			slow.Wait()
		})
	}
}

// TestRetryPassesOverADeadNodeWhenAllHaveFailed has two nodes that failed lately and live, and one
// that is dead: the retry of a request that meets the dead one goes to another.
func TestRetryPassesOverADeadNodeWhenAllHaveFailed(t *testing.T) {
	for _, test := range []struct{ options, rest string }{
		{"", ""},
		{"pick 1", ""},
		{"pick 1", "lb_policy least_load"},
		{"pick 1 hash {query.key}", "lb_policy first"},
		{"pick 2", ""},
		{"prefer zone eu us", ""},
		{"prefer zone eu", ""}, // only the dead one is there
		{"prefer zone eu\npick 1", ""},
		{"subset 2", ""},
		{"subset 2\npick 1", ""},
	} {
		t.Run(strings.NewReplacer("{", "", "}", "", "\n", " ").Replace(test.options+" "+test.rest), func(t *testing.T) {
			name, m := newMemory(t)
			var failed sync.Map
			for _, id := range []string{"a", "b"} {
				s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/poison" {
						failed.Store(id, true)
						panic(http.ErrAbortHandler)
					}
				}))
				t.Cleanup(s.Close)
				list(t, m, id, s.URL, "zone", "us")
			}
			list(t, m, "dead", "http://"+at("dead"), "zone", "eu")
			url := serveNodes(t, name, "proxy_id proxy\n"+test.options, test.rest+"\nlb_retries 1\nfail_duration 1h")
			eventually(t, "both have failed", func() bool {
				_, _ = get(t, url+"/poison")
				_, a := failed.Load("a")
				_, b := failed.Load("b")
				return a && b
			})
			for i := range 100 {
				if status, _ := get(t, fmt.Sprint(url, "/?key=", i)); status != http.StatusOK {
					t.Fatalf("status %d, want a node that lives at the second attempt", status)
				}
			}
		})
	}
}

// TestFailingNodesServeWhenOthersAreFull has a node that is full and one that failed lately: requests
// go to that one.
func TestFailingNodesServeWhenOthersAreFull(t *testing.T) {
	name, m := newMemory(t)
	entered, release := make(chan struct{}), make(chan struct{})
	list(t, m, "full", troubledService(t, "full", entered, release))
	url := serveNodes(t, name, "pick 1", "fail_duration 1h\nunhealthy_request_count 5")
	var slow sync.WaitGroup
	for range 5 {
		slow.Go(func() {
			if status, _ := get(t, url+"/slow"); status != http.StatusOK {
				t.Errorf("status %d of a slow request", status)
			}
		})
		<-entered
	}
	list(t, m, "failing", troubledService(t, "failing", entered, release))
	eventually(t, "the other serves", func() bool { _, body := get(t, url); return body == "failing" })
	if status, _ := get(t, url+"/poison"); status != http.StatusBadGateway {
		t.Errorf("status %d of a request that the node refuses, want 502", status)
	}
	for range 50 {
		if status, _ := get(t, url); status != http.StatusOK {
			t.Errorf("status %d, want the node that has room", status)
			break
		}
	}
	close(release)
	slow.Wait()
}
