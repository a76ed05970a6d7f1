package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// An ailing service answers with its id, or as it is told to.
type ailing struct {
	*httptest.Server
	id     string
	status atomic.Int32 // 0: that of a healthy one; -1: no answer
	served atomic.Int32
	busy   atomic.Int32
	most   atomic.Int32 // requests at a time
	pause  atomic.Int64
}

func newAiling(t *testing.T, r registry, id, metadata string) *ailing {
	t.Helper()
	s := &ailing{id: id}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n := s.busy.Add(1)
		defer s.busy.Add(-1)
		for most := s.most.Load(); n > most && !s.most.CompareAndSwap(most, n); most = s.most.Load() {
		}
		s.served.Add(1)
		if pause := s.pause.Load(); pause > 0 {
			time.Sleep(time.Duration(pause)) // the work that it does
		}
		switch status := s.status.Load(); status {
		case 0:
		case -1:
			panic(http.ErrAbortHandler)
		default:
			w.WriteHeader(int(status))
		}
		_, _ = io.WriteString(w, id)
	}))
	t.Cleanup(s.Close)
	r.put(id, camel(id, s.URL, `"service":"orders"`+metadata))
	return s
}

// onKVAndRedis runs a scenario on a bucket and on a sorted set.
func onKVAndRedis(t *testing.T, scenario func(t *testing.T, r registry)) {
	for _, kind := range registries {
		if kind.name == "nats_kv" || kind.name == "redis_sorted_set" {
			t.Run(kind.name, func(t *testing.T) {
				t.Parallel()
				scenario(t, kind.start(t))
			})
		}
	}
}

// get returns what the admin endpoint says.
func (p *proxy) get(path string) (answer string) {
	p.t.Helper()
	eventually(p.t, "the admin endpoint answers "+path, func() bool {
		resp, err := admin.Get("http://" + p.admin + path)
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		answer = string(body)
		return err == nil && resp.StatusCode == http.StatusOK
	})
	return answer
}

// ailingFleet lists so many nodes.
func ailingFleet(t *testing.T, r registry, size int) (nodes []*ailing) {
	t.Helper()
	for i := range size {
		nodes = append(nodes, newAiling(t, r, fmt.Sprintf("orders-%d", i), ""))
	}
	return nodes
}

// TestOneFailingNodeOfFive has a node answer 500 at once, under load: it gets some
// requests more and then none, which everything says that an operator looks at; it stays
// out over reloads, longer each time, and is back when it serves again.
func TestOneFailingNodeOfFive(t *testing.T) {
	t.Parallel()
	onKVAndRedis(t, func(t *testing.T, r registry) {
		nodes := ailingFleet(t, r, 5)
		port := freeport.String(t)
		config := func(policy string) string {
			return site(port, r.block("ttl 1h")+"\nservice orders\noutlier {\neject 1s\n}", "lb_policy "+policy)
		}
		p := start(t, "", config("round_robin"))
		url := "http://127.0.0.1:" + port
		bad := nodes[2]
		l := traffic(t, url)
		eventually(t, "all serve", func() bool {
			return !slices.ContainsFunc(nodes, func(s *ailing) bool { return s.served.Load() < 10 })
		})
		if strings.Contains(p.get("/discovery/nodes?state=unhealthy"), `"id"`) {
			t.Error("some node counts as unhealthy before it fails")
		}

		bad.status.Store(500)
		var shown []struct {
			ID, State, Reason string
			Sources           []struct {
				Eligible bool
				Reason   string
				Until    time.Time
			}
		}
		eventually(t, "the node is shown as ejected", func() bool {
			return json.Unmarshal([]byte(p.get("/discovery/nodes?state=unhealthy")), &shown) == nil && len(shown) == 1
		})
		const because = "5 errors in a row, the last one: status 500"
		if s := shown[0]; s.ID != bad.id || !strings.Contains(s.Reason, because) || s.Sources[0].Eligible || s.Sources[0].Until.IsZero() {
			t.Errorf("shown is %+v", s)
		}
		if journal := p.get("/discovery/journal?id=" + bad.id); !strings.Contains(journal, `"ejected"`) || !strings.Contains(journal, because+"; ejected for 1s, for the first time") {
			t.Errorf("the journal says %s", journal)
		}
		metrics := p.get("/metrics")
		if !strings.Contains(metrics, "caddy_discovery_ejections_total{") || !hasMetric(metrics, "caddy_discovery_nodes_ejected", "1") {
			t.Error("the metrics know nothing of it")
		}
		eventually(t, "the log says so", func() bool {
			return strings.Contains(p.log.String(), `"node is ejected"`) && strings.Contains(p.log.String(), `"because":"`+because+`"`)
		})
		if failed := l.failed(); failed == 0 || failed > 30 { // five, those that were under way, and those of further ejections
			t.Errorf("%d requests failed, want some", failed)
		}

		// It is ejected again and again, for longer each time, and a reload changes nothing.
		eventually(t, "it is ejected for 4 s", func() bool {
			return strings.Contains(p.get("/discovery/journal?id="+bad.id), "ejected for 4s, 3 times in a row")
		})
		served := bad.served.Load()
		p.reload("", config("least_conn"))
		l.mark()
		eventually(t, "the others serve after a reload", func() bool { return len(l.sinceMark()) == 4 })
		if n := bad.served.Load(); n != served {
			t.Errorf("the node got %d requests after a reload", n-served)
		}
		bad.status.Store(0)
		eventually(t, "it is back", func() bool { return bad.served.Load() > served+20 })
		if journal := p.get("/discovery/journal?id=" + bad.id); !strings.Contains(journal, "its ejection is over, after 4") {
			t.Errorf("the journal says %s", journal)
		}
	})
}

// TestNobodyIsEjectedBeyondTheCap has all of four nodes fail: two stay in use, and when all
// serve again all do.
func TestNobodyIsEjectedBeyondTheCap(t *testing.T) {
	t.Parallel()
	onKVAndRedis(t, func(t *testing.T, r registry) {
		nodes := ailingFleet(t, r, 4)
		port := freeport.String(t)
		p := start(t, "", site(port, r.block("ttl 1h")+"\nservice orders\noutlier {\nerrors 3\neject 500ms\n}", ""))
		url := "http://127.0.0.1:" + port
		traffic(t, url)
		eventually(t, "all serve", func() bool {
			return !slices.ContainsFunc(nodes, func(s *ailing) bool { return s.served.Load() < 10 })
		})
		for _, s := range nodes {
			s.status.Store(-1)
		}
		ejected := func() int { return strings.Count(p.get("/discovery/nodes?state=unhealthy"), `"id"`) }
		eventually(t, "two are ejected", func() bool { return ejected() == 2 })
		eventually(t, "the log tells of the others", func() bool { return strings.Contains(p.log.String(), "more nodes fail than may be ejected") })
		for range 20 {
			if n := ejected(); n > 2 {
				t.Errorf("%d of four are ejected", n)
			}
		}
		for _, s := range nodes {
			s.status.Store(0)
			s.served.Store(0)
		}
		eventually(t, "all are back", func() bool {
			return ejected() == 0 && !slices.ContainsFunc(nodes, func(s *ailing) bool { return s.served.Load() < 10 })
		})
	})
}

// TestCapacity has a node take two requests at a time and another as many as come.
func TestCapacity(t *testing.T) {
	t.Parallel()
	onKVAndRedis(t, func(t *testing.T, r registry) {
		small := newAiling(t, r, "small", `,"capacity":2`)
		large := newAiling(t, r, "large", "")
		for _, s := range []*ailing{small, large} {
			s.pause.Store(int64(20 * time.Millisecond))
		}
		port := freeport.String(t)
		p := start(t, "", site(port, r.block("ttl 1h")+"\nservice orders", "lb_policy random"))
		url := "http://127.0.0.1:" + port
		eventually(t, "both serve", func() bool {
			_, _ = ask(url)
			return small.served.Load() > 0 && large.served.Load() > 0
		})
		var clients sync.WaitGroup
		var failed atomic.Int32
		for range 16 {
			clients.Go(func() {
				for range 20 {
					if body, err := ask(url); err != nil || body != "small" && body != "large" {
						failed.Add(1)
					}
				}
			})
		}
		full := false
		for !full && large.served.Load() < 200 {
			full = strings.Contains(p.get("/discovery/nodes"), `"full: 2 requests in flight, capacity 2"`)
		}
		clients.Wait()
		if n := failed.Load(); n > 0 {
			t.Errorf("%d requests failed, want all that are too many for one node to go to the other", n)
		}
		// As with Caddy's own limit, requests of the same instant may both find the last place.
		if n := small.most.Load(); n < 2 || n > 4 {
			t.Errorf("%d requests at a time, want 2", n)
		}
		if n := large.most.Load(); n < 8 {
			t.Errorf("%d requests at a time at the other, want most of 16", n)
		}
		if !full {
			t.Error("the admin API never said that the node is full")
		}
	})
}

// TestRetryBudget has all nodes fail: retries add a tenth to what they get, and five.
func TestRetryBudget(t *testing.T) {
	t.Parallel()
	onKVAndRedis(t, func(t *testing.T, r registry) {
		nodes := ailingFleet(t, r, 4)
		port := freeport.String(t)
		p := start(t, "", site(port, r.block("ttl 1h")+"\nservice orders\nretry_budget 10% 5", "lb_retries 3"))
		url := "http://127.0.0.1:" + port
		eventually(t, "a node serves", func() bool { body, _ := ask(url); return strings.HasPrefix(body, "orders") })
		for _, s := range nodes {
			s.status.Store(-1)
			s.served.Store(0)
		}
		const requests = 500
		began := time.Now()
		for range requests {
			if body, err := ask(url); err != nil || body != "502" {
				t.Fatalf("%q, %v, want the request's own error", body, err)
			}
		}
		sent := 0
		for _, s := range nodes {
			sent += int(s.served.Load())
		}
		// net/http asks a node once more that closes a connection which it has used before.
		if allowed := requests + requests/10 + 10 + len(nodes); sent > allowed && time.Since(began) < 9*time.Second {
			t.Errorf("%d attempts of %d requests, want at most %d", sent, requests, allowed)
		}
		if metrics := p.get("/metrics"); hasMetric(metrics, "caddy_discovery_retries_refused_total", "0") {
			t.Error("the metrics know of no refused retry")
		}
		if !strings.Contains(p.log.String(), "retry_budget is spent") {
			t.Error("the log says nothing")
		}
	})
}

// hasMetric reports whether a metric of one registry has a value.
func hasMetric(metrics, name, value string) bool {
	for line := range strings.Lines(metrics) {
		if strings.HasPrefix(line, name+"{") && strings.HasSuffix(strings.TrimSpace(line), "} "+value) {
			return true
		}
	}
	return false
}
