package caddydiscovery

import (
	"net/http"
	"runtime"
	"strings"
	"testing"

	"go.uber.org/zap"
	logtest "go.uber.org/zap/zaptest/observer"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// TestRefusedLoops holds that a request which has come through too many proxies costs
// nothing that lasts, whatever the handler remembers of failures, and is not tried again.
func TestRefusedLoops(t *testing.T) {
	for name, c := range map[string]struct {
		transport string
		want      int
	}{
		"http":    {"http", http.StatusLoopDetected},
		"fastcgi": {"fastcgi", http.StatusBadGateway},
	} {
		t.Run(name, func(t *testing.T) {
			registry, m := newMemory(t)
			port := freeport.String(t)
			load(t, `http://127.0.0.1:`+port+` {
				encode gzip
				reverse_proxy {
					dynamic discovery {
						registry memory `+registry+`
					}
					transport `+c.transport+`
					fail_duration 1h
					lb_try_duration 1h
					lb_retry_match path /x
				}
			}`)
			s := service(t, "a")
			list(t, m, "a", s.URL)
			u := runningSource(t)
			eventually(t, "the node is there", func() bool { return u.directory.Snapshot().Node("a") != nil })
			core, logs := logtest.New(zap.WarnLevel)
			policy := u.handler.LoadBalancing.SelectionPolicy.(*policyWrapper)
			policy.logger = zap.New(core)
			const requests = 200
			url, via := "http://127.0.0.1:"+port+"/x", strings.Repeat("1.1 Caddy, ", maxHops)+"1.1 Caddy"
			before := runtime.NumGoroutine()
			for range requests {
				if status, body := get(t, url, "Via", via); status != c.want {
					t.Fatalf("%d %q, want %d", status, body, c.want)
				}
			}
			if grown := runtime.NumGoroutine() - before; grown > requests/4 {
				t.Errorf("%d goroutines more after %d requests", grown, requests)
			}
			if said := logs.FilterMessageSnippet("proxies that list each other as nodes").Len(); said != 1 {
				t.Errorf("said %d times: %v", said, logs.All())
			}
		})
	}
}

func TestHops(t *testing.T) {
	for _, test := range []struct {
		via  []string
		want int
	}{
		{nil, 0},
		{[]string{"1.1 Caddy"}, 1},
		{[]string{"1.1 Caddy", "2.0 Caddy", "3.0 Caddy"}, 3},
		{[]string{"1.1 Caddy, 2.0 Caddy,1.1 Caddy (edge)"}, 3},
		{[]string{"1.0 fred, 1.1 p.example.net", "HTTP/1.1 GWA", "1.1 Caddyshack", "1.1 caddy"}, 0},
		{[]string{"", ",,,", "Caddy", " Caddy"}, 0},
	} {
		if got := hops(http.Header{"Via": test.via}); got != test.want {
			t.Errorf("%q: %d hops, want %d", test.via, got, test.want)
		}
	}
}

func BenchmarkHops(b *testing.B) {
	header := http.Header{"Via": {"2.0 Caddy"}, "User-Agent": {"x"}}
	b.ReportAllocs()
	for b.Loop() {
		if hops(header) != 1 {
			b.Fatal("miscounted")
		}
	}
}
