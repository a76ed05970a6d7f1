package integration

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

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// A fickle service answers with its id, as the test wants it.
type fickle struct {
	*httptest.Server
	delay  atomic.Int64 // time.Duration
	status atomic.Int32
	load   atomic.Value // string: in the header of ORCA
	served atomic.Int64
	flying atomic.Int64
	most   atomic.Int64 // in flight at once
}

func newFickle(t *testing.T, id string) *fickle {
	t.Helper()
	s := new(fickle)
	s.load.Store("")
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.served.Add(1)
		n := s.flying.Add(1)
		defer s.flying.Add(-1)
		for most := s.most.Load(); n > most && !s.most.CompareAndSwap(most, n); most = s.most.Load() {
		}
		select {
		case <-time.After(time.Duration(s.delay.Load())):
		case <-r.Context().Done():
		}
		if load := s.load.Load().(string); load != "" {
			w.Header().Set("endpoint-load-metrics", load)
		}
		if status := int(s.status.Load()); status != 0 {
			w.WriteHeader(status)
		}
		_, _ = io.WriteString(w, id)
	}))
	t.Cleanup(s.Close)
	return s
}

// fickleFleet lists five of them.
func fickleFleet(t *testing.T, r registry) []*fickle {
	t.Helper()
	nodes := make([]*fickle, 5)
	for i := range nodes {
		id := fmt.Sprintf("orders-%d", i)
		nodes[i] = newFickle(t, id)
		nodes[i].delay.Store(int64(2 * time.Millisecond))
		r.put(id, camel(id, nodes[i].URL, `"service":"orders"`))
	}
	return nodes
}

// asked sends requests, eight at a time, and returns how many each node answered, and others
// by their status.
func asked(t *testing.T, url string, requests int) map[string]int {
	t.Helper()
	var mu sync.Mutex
	counts := make(map[string]int)
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			for range requests / 8 {
				id, err := ask(url)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				counts[id]++
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	return counts
}

// TestLeastLatency has one node of five answer late, then fail, then be as the others: it
// gets hardly a request for as long as that lasts, over a reload, too, and its share again
// afterwards. A new node is not sent everything at once.
func TestLeastLatency(t *testing.T) {
	onKVAndRedis(t, func(t *testing.T, r registry) {
		nodes := fickleFleet(t, r)
		port := freeport.String(t)
		url := "http://127.0.0.1:" + port
		sites := site(port, r.block("ttl 1h")+"\nservice orders", "lb_policy least_latency {\ndecay 3s\n}")
		nodes[0].delay.Store(int64(200 * time.Millisecond))
		p := start(t, "", sites)

		const requests = 4000
		counts := asked(t, url, requests)
		if n := counts["orders-0"]; n == 0 || n > requests*3/100 {
			t.Errorf("%v: the slow node got %d of %d requests, want some and no more than 3 %%", counts, n, requests)
		}
		p.reload("", sites+"http://127.0.0.1:"+port+"/x {\n}\n")
		counts = asked(t, url, 800)
		if n := counts["orders-0"]; n > 2*800/100 {
			t.Errorf("%v: after a reload the slow node got %d of 800 requests", counts, n)
		}

		nodes[0].delay.Store(0)
		nodes[0].status.Store(http.StatusInternalServerError)
		counts = asked(t, url, requests)
		if n := requests - counts["orders-1"] - counts["orders-2"] - counts["orders-3"] - counts["orders-4"]; n > requests*3/100 {
			t.Errorf("%v: the failing node got %d of %d requests, however soon it answers", counts, n, requests)
		}

		nodes[0].status.Store(0)
		nodes[0].delay.Store(int64(2 * time.Millisecond))
		eventually(t, "the node that is well again serves", func() bool { return asked(t, url, 200)["orders-0"] >= 20 })

		// A new node that hangs keeps no more than one request of those that are sent at once.
		late := newFickle(t, "late")
		late.delay.Store(int64(time.Second))
		r.put("late", camel("late", late.URL, `"service":"orders"`))
		eventually(t, "the new node is tried", func() bool {
			asked(t, url, 200)
			return late.served.Load() > 0
		})
		if n := late.most.Load(); n > 2 { // two that come at the same instant may both see it idle
			t.Errorf("a new node that nobody knows had %d requests at once, want one at a time", n)
		}
	})
}

// TestLeastLoad has nodes report their loads in heartbeats, and then in responses.
func TestLeastLoad(t *testing.T) {
	onKVAndRedis(t, func(t *testing.T, r registry) {
		idle, busy := newFickle(t, "idle"), newFickle(t, "busy")
		put := func(id string, s *fickle, load float64) {
			r.put(id, fmt.Sprintf(`{"nodeId":%q,"endpoint":%q,"load":%v,"metadata":{"service":"orders"}}`, id, s.URL, load))
		}
		put("idle", idle, 0.1)
		put("busy", busy, 0.9)
		port := freeport.String(t)
		url := "http://127.0.0.1:" + port
		start(t, "", site(port, r.block("ttl 1h")+"\nservice orders", "lb_policy least_load"))
		const requests = 800
		if counts := asked(t, url, requests); counts["idle"] < 4*counts["busy"] || counts["busy"] == 0 {
			t.Errorf("%v: want the node that reports 0.1 to get several times as many requests as the one at 0.9", counts)
		}

		// Their records go on saying so, but the nodes know better.
		idle.load.Store(`JSON {"application_utilization": 0.9, "cpu_utilization": 0.1}`)
		busy.load.Store("TEXT cpu_utilization=0.1")
		eventually(t, "the shares change", func() bool {
			counts := asked(t, url, 200)
			return counts["busy"] > 2*counts["idle"]
		})
		resp, err := client.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if v := resp.Header.Get("Endpoint-Load-Metrics"); v != "" {
			t.Errorf("the client got %q", v)
		}

		// Whatever a node says, all are served.
		for _, load := range []string{"JSON {\"cpu_utilization\": 1e999}", "TEXT cpu_utilization=NaN", "TEXT cpu_utilization=-1", "BIN " + strings.Repeat("A", 1<<20), "nonsense"} {
			busy.load.Store(load)
			if counts := asked(t, url, 80); counts["idle"]+counts["busy"] != 80 {
				t.Errorf("%.40s: %v", load, counts)
			}
		}
	})
}
