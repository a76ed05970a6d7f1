package caddydiscovery

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

// TestRetriesKeepToTheirBudget has every node fail, in each way in which a request is
// tried again: 100 requests get the ten retries of a tenth, and five beyond.
func TestRetriesKeepToTheirBudget(t *testing.T) {
	const byStatus = "lb_retry_match {\nexpression {rp.status_code} == 503\n}"
	for _, test := range []struct {
		name, method  string
		status        int32
		options, rest string
		want          int // status
	}{
		{"no answer", http.MethodGet, -1, "", "lb_retries 3", 502},
		{"no answer, for a time", http.MethodGet, -1, "", "lb_try_duration 20s\nlb_try_interval 1ms", 502},
		{"no answer, picked", http.MethodGet, -1, "pick 1", "lb_retries 3\nfail_duration 1s", 502},
		{"no answer to POST", http.MethodPost, -1, "", "lb_retries 3\nlb_retry_match {\nmethod POST\n}", 502},
		{"by its status", http.MethodGet, 503, "", "lb_retries 3\n" + byStatus, 503},
		{"by its status, for a time", http.MethodGet, 503, "", "lb_try_duration 20s\nlb_try_interval 1ms\n" + byStatus, 503},
		{"by its status, sticky", http.MethodGet, 503, "sticky", "lb_retries 3\n" + byStatus, 503},
		{"under multi", http.MethodGet, -1, "multi", "lb_retries 3", 502},
	} {
		t.Run(test.name, func(t *testing.T) {
			name, m := newMemory(t)
			var nodes []*flaky
			for _, id := range []string{"a", "b", "c"} {
				s := newFlaky(t, id)
				s.status.Store(test.status)
				nodes = append(nodes, s)
				list(t, m, id, s.URL)
			}
			url := ""
			if test.options == "multi" {
				url = serveMulti(t, name, "retry_budget 10% 5", test.rest)
			} else {
				url = serveNodes(t, name, "retry_budget 10% 5\n"+test.options, test.rest)
			}
			began := time.Now()
			for i := range 100 {
				req, _ := http.NewRequest(test.method, url, nil)
				resp, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if resp.StatusCode != test.want {
					t.Fatalf("status %d of request %d, want its own, %d", resp.StatusCode, i, test.want)
				}
			}
			sent := 0
			for _, s := range nodes {
				sent += int(s.served.Load())
			}
			if sent < 105 || sent > 115 || sent != 115 && time.Since(began) < retryWindow/2 {
				t.Errorf("%d attempts of 100 requests, want 115", sent)
			}
			if n := runningSource(t).directory.stats.retriesRefused.Load(); n < 85 || n > 100 {
				t.Errorf("%d retries refused, want one of each other request", n)
			}
		})
	}
}

// serveMulti is serveNodes under multi, beside static upstreams of which there are none.
func serveMulti(t *testing.T, registry, options, rest string) string {
	t.Helper()
	url := serveNodes(t, registry, "", "") // for its port
	load(t, url+" {\nreverse_proxy {\ndynamic multi {\ndiscovery {\nregistry memory "+registry+"\n"+options+"\n}\n}\n"+rest+"\n}\n}")
	return url
}

// TestRefusedConnectionsKeepToTheBudget has nobody listen. Without a budget such a
// request, which Caddy tries again whatever its method, would look for a node for a minute.
func TestRefusedConnectionsKeepToTheBudget(t *testing.T) {
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		name, m := newMemory(t)
		list(t, m, "a", "http://"+at("a"))
		list(t, m, "b", "http://"+at("b"))
		url := serveNodes(t, name, "retry_budget 1% 1", "lb_try_duration 1m")
		began := time.Now()
		for range 3 {
			req, _ := http.NewRequest(method, url, nil)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusBadGateway {
				t.Errorf("status %d, want 502", resp.StatusCode)
			}
		}
		if took := time.Since(began); took > 30*time.Second {
			t.Errorf("three requests took %v, want them to end when their retry is refused", took)
		}
	}
}

// TestRetriesWithinTheBudget has some nodes fail: each request is served.
func TestRetriesWithinTheBudget(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "http://"+at("a"))
	bad := newFlaky(t, "b")
	bad.status.Store(-1)
	list(t, m, "b", bad.URL)
	list(t, m, "c", service(t, "c").URL)
	url := serveNodes(t, name, "retry_budget 100% 100", "lb_policy round_robin\nlb_retries 2")
	for range 50 {
		if status, body := get(t, url); status != http.StatusOK || body != "c" {
			t.Fatalf("status %d, %q", status, body)
		}
	}
	if n := runningSource(t).directory.stats.retriesRefused.Load(); n > 0 {
		t.Errorf("%d retries were refused", n)
	}
}

// TestRetryMatchStaysWhatItIs has conditions of the configuration hold beside a budget.
func TestRetryMatchStaysWhatItIs(t *testing.T) {
	for _, test := range []struct {
		method, rest string
		attempts     int32
	}{
		{http.MethodGet, "lb_retries 1", 2},
		{http.MethodPost, "lb_retries 1", 1},
		{http.MethodPost, "lb_retries 1\nlb_retry_match {\nmethod POST\n}\nlb_retry_match {\npath /x\n}", 2},
		{http.MethodGet, "lb_retries 1\nlb_retry_match {\nmethod POST\n}", 1},
	} {
		t.Run(test.method+strings.ReplaceAll(test.rest, "\n", " "), func(t *testing.T) {
			name, m := newMemory(t)
			bad := newFlaky(t, "a")
			bad.status.Store(-1)
			list(t, m, "a", bad.URL)
			url := serveNodes(t, name, "retry_budget 100%", test.rest)
			bad.served.Store(0)
			// A server that closes a connection without an answer is asked once more on a new
			// connection by net/http, if the connection was used before: here it was not.
			req, _ := http.NewRequest(test.method, url, nil)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if n := bad.served.Load(); n != test.attempts {
				t.Errorf("%d attempts, want %d", n, test.attempts)
			}
		})
	}
}

func TestRetryBudgetOptions(t *testing.T) {
	for _, test := range []struct{ option, rest, want string }{
		{"retry_budget 20%", "lb_retries 1", ""},
		{"retry_budget 20 0", "lb_try_duration 1s", ""},
		{"retry_budget 20%", "", "want lb_retries or lb_try_duration"},
		{"retry_budget 0%", "lb_retries 1", "invalid percentage \"0%\""},
		{"retry_budget 20% -1", "lb_retries 1", "invalid number \"-1\", want 0 to 100000"},
		{"retry_budget", "lb_retries 1", "retry_budget"},
	} {
		name, _ := newMemory(t)
		err := validate(":80 {\nreverse_proxy {\ndynamic discovery {\nregistry memory " + name + "\n" + test.option + "\n}\n" + test.rest + "\n}\n}")
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q, %q: %v, want %q", test.option, test.rest, err, test.want)
		}
	}
	name, _ := newMemory(t)
	twice := "discovery {\nregistry memory " + name + "\nretry_budget 20%\n}\n"
	if err := validate(":80 {\nreverse_proxy {\nlb_retries 1\ndynamic multi {\n" + twice + twice + "}\n}\n}"); err == nil || !strings.Contains(err.Error(), "want it once") {
		t.Errorf("two budgets of one handler: %v", err)
	}
}

// TestTheBudgetWatchesTheTransport holds where the handler's dial errors pass.
func TestTheBudgetWatchesTheTransport(t *testing.T) {
	name, _ := newMemory(t)
	handler := provisionHandler(t, map[string]any{
		"dynamic_upstreams": map[string]any{"source": "discovery", "registry": map[string]any{"backend": "memory", "name": name}, "retry_budget": map[string]any{"percent": 20}},
		"load_balancing":    map[string]any{"retries": 1},
	})
	transport, ok := handler.Transport.(*traffic.Transport)
	if !ok || transport.Failed == nil {
		t.Fatalf("the transport is %T", handler.Transport)
	}
	if n := len(handler.LoadBalancing.RetryMatch); n != 1 {
		t.Errorf("%d sets of matchers, want 1", n)
	}
	if _, ok := traffic.Real(transport).(*reverseproxy.HTTPTransport); !ok {
		t.Errorf("behind it is %T", traffic.Real(transport))
	}
}
