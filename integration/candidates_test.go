package integration

import (
	"fmt"
	"net"
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
