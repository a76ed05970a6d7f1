package caddydiscovery

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

// behaves is a service that answers with its id, after what it does first.
func behaves(t *testing.T, id string, first http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		first(w, r)
		_, _ = io.WriteString(w, id)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func fails(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }

func slow(_ http.ResponseWriter, r *http.Request) {
	select {
	case <-time.After(100 * time.Millisecond):
	case <-r.Context().Done():
	}
}

// asked sends requests, four at a time, and returns how many each node answered.
func asked(t *testing.T, url string, requests int) map[string]int {
	t.Helper()
	var mu sync.Mutex
	counts := make(map[string]int)
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for range requests / 4 {
				_, body := get(t, url)
				mu.Lock()
				counts[body]++
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	return counts
}

// TestLeastLatency has one of four nodes be slow, refuse or fail at once: it gets the few
// requests by which that is known, also where upstreams of other sources are beside, or
// nodes are drawn before.
func TestLeastLatency(t *testing.T) {
	for name, first := range map[string]http.HandlerFunc{"slow": slow, "fails": fails, "refuses": nil} {
		for _, site := range []string{
			"dynamic discovery {\nregistry memory %s\n}\nlb_policy least_latency",
			"dynamic discovery {\nregistry memory %s\npick 3\n}\nlb_policy least_latency",
			"dynamic multi {\ndiscovery {\nregistry memory %s\n}\n}\nlb_policy least_latency {\ndecay 5s\n}",
			"dynamic discovery {\nregistry memory %s\n}\nlb_policy header X-Key {\nfallback least_latency\n}",
		} {
			t.Run(name, func(t *testing.T) {
				registry, m := newMemory(t)
				for _, id := range []string{"a", "b", "c"} {
					list(t, m, id, service(t, id).URL)
				}
				bad := "http://127.0.0.1:" + freeport.String(t)
				if first != nil {
					bad = behaves(t, "bad", first)
				}
				list(t, m, "bad", bad)
				port := freeport.String(t)
				load(t, "http://127.0.0.1:"+port+" {\nreverse_proxy {\n"+fmt.Sprintf(site, registry)+"\n}\n}")
				counts := asked(t, "http://127.0.0.1:"+port, 1200)
				if n := 1200 - counts["a"] - counts["b"] - counts["c"]; n == 0 || n > 40 {
					t.Errorf("%v: the bad node got %d requests, want the few by which it is known", counts, n)
				}
				for _, id := range []string{"a", "b", "c"} {
					if counts[id] == 0 {
						t.Errorf("%v: %s got none", counts, id)
					}
				}
			})
		}
	}
}

// TestClientsThatSendSlowly has one take its time to send a body, and another one stream while
// it is answered: that is not the node's, neither meanwhile nor afterwards.
func TestClientsThatSendSlowly(t *testing.T) {
	registry, m := newMemory(t)
	began := make(chan string, 1)
	reads := behaves(t, "a", func(w http.ResponseWriter, r *http.Request) {
		began <- r.URL.Path
		if r.URL.Path == "/early" {
			_ = http.NewResponseController(w).EnableFullDuplex()
			_ = http.NewResponseController(w).Flush()
		}
		_, _ = io.Copy(io.Discard, r.Body)
	})
	list(t, m, "a", reads)
	url := "http://127.0.0.1:" + freeport.String(t)
	// Without full duplex Caddy may cut off a response over HTTP/1 that begins before its
	// request has ended.
	load(t, "{\nservers {\nenable_full_duplex\n}\n}\n"+url+
		" {\nreverse_proxy {\ndynamic discovery {\nregistry memory "+registry+"\n}\nlb_policy least_latency\nflush_interval -1\n}\n}")
	for range 20 {
		get(t, url)
		<-began
	}
	l := latencyOf(runningSource(t).directory.Snapshot().Node("a"))
	cost := func() float64 { return l.Cost(traffic.Now(), 10*time.Second) }
	for _, path := range []string{"/late", "/early"} {
		sent, send := io.Pipe()
		defer send.Close()
		answered := make(chan error, 1)
		go func() {
			resp, err := http.Post(url+path, "text/plain", sent)
			if err == nil {
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			answered <- err
		}()
		_, _ = io.WriteString(send, "begins")
		<-began
		for end := traffic.Now() + 500*time.Millisecond; traffic.Now() < end; {
			if c := cost(); c > 0.3 {
				t.Fatalf("%s: while a client sends, the node counts as one of %v s", path, c)
			}
			time.Sleep(10 * time.Millisecond) // the client's pause
		}
		_ = send.Close()
		if err := <-answered; err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if c := cost(); c > 0.3 {
			t.Errorf("%s: when a client has sent, the node counts as one of %v s", path, c)
		}
	}
}

// TestLatencyOutlivesAReload has what is known of a node be known after a reload, and by
// another handler.
func TestLatencyOutlivesAReload(t *testing.T) {
	registry, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL)
	list(t, m, "bad", behaves(t, "bad", slow))
	sites := func(ports ...string) (source string) {
		for _, port := range ports {
			source += "http://127.0.0.1:" + port + " {\nreverse_proxy {\ndynamic discovery {\nregistry memory " + registry + "\n}\nlb_policy least_latency {\ndecay 1h\n}\n}\n}\n"
		}
		return source
	}
	first, second := freeport.String(t), freeport.String(t)
	load(t, sites(first))
	asked(t, "http://127.0.0.1:"+first, 100)
	if err := tryLoad(sites(first, second)); err != nil {
		t.Fatal(err)
	}
	for _, port := range []string{first, second} {
		// A node that is not known gets five. One that is may get some where the other has
		// a hiccup.
		if counts := asked(t, "http://127.0.0.1:"+port, 100); counts["bad"] > 3 {
			t.Errorf("%v: the slow node got requests, want it to be known still", counts)
		}
	}
}

// TestLeastLatencyBesideUpstreamsThatAreUnknown has upstreams count as quick as the average
// that are no nodes.
func TestLeastLatencyBesideUpstreamsThatAreUnknown(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "slow", "http://"+at("slow"))
	list(t, m, "quick", "http://"+at("quick"))
	u := source(t, "registry memory "+name+"\npick 2", "load_balancing", policy("least_latency"))
	for id, took := range map[string]time.Duration{"slow": time.Second, "quick": time.Millisecond} {
		l := latencyOf(u.directory.Snapshot().Node(id))
		for range 10 {
			l.Sent(traffic.Now())
			l.Answered(traffic.Now(), took, time.Hour, false)
		}
	}
	policy, r := u.wrapper.Selector.(*LeastLatency), request()
	foreign := []*reverseproxy.Upstream{{Dial: "foreign-1:80"}, {Dial: "foreign-2:80"}}
	choose := func(pool []*reverseproxy.Upstream, want ...string) {
		t.Helper()
		host(pool)
		counts, expected := make(map[string]int), make(map[string]float64)
		for range 1000 {
			counts[policy.Select(pool, r, nil).Dial]++
		}
		for _, address := range want {
			expected[address] = 1000 / float64(len(want))
		}
		chancetest.Check(t, "selected", counts, expected)
	}
	pool, err := u.GetUpstreams(r)
	if err != nil || len(pool) != 2 {
		t.Fatal(len(pool), err)
	}
	choose(append(pool[:2:2], foreign...), at("quick"))
	choose(foreign, "foreign-1:80", "foreign-2:80")
}

// TestLoadInResponses has nodes report their load in responses: it counts, and no client
// sees it.
func TestLoadInResponses(t *testing.T) {
	registry, m := newMemory(t)
	loads := map[string]string{
		"busy": `JSON {"application_utilization": 0.9, "cpu_utilization": 0.1}`,
		"idle": "TEXT cpu_utilization=0.1",
	}
	for id, load := range loads {
		list(t, m, id, behaves(t, id, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("endpoint-load-metrics", load) }))
	}
	url := serveNodes(t, registry, "", "lb_policy least_load")
	eventually(t, "the idle node gets several times as many requests", func() bool {
		counts := asked(t, url, 100)
		return counts["idle"] >= 75
	})
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if v := resp.Header.Get("Endpoint-Load-Metrics"); v != "" {
		t.Errorf("the client got the header of the load, %q", v)
	}
}

// TestLoadInTrailers has a node report its load behind the body, as servers of gRPC do.
func TestLoadInTrailers(t *testing.T) {
	registry, m := newMemory(t)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "Endpoint-Load-Metrics-Bin, X-Other")
		_, _ = io.WriteString(w, "a")
		w.Header().Set("Endpoint-Load-Metrics-Bin", "CQAAAAAAAOg/") // cpu_utilization 0.75
		w.Header().Set("X-Other", "x")
	}))
	t.Cleanup(s.Close)
	list(t, m, "a", s.URL)
	url := serveNodes(t, registry, "", "lb_policy least_load")
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadAll(resp.Body); err != nil {
		t.Fatal(err)
	}
	if v := resp.Trailer.Get("X-Other"); v != "x" {
		t.Errorf("the other trailer is %q", v)
	}
	if v := resp.Trailer.Get("Endpoint-Load-Metrics-Bin"); v != "" {
		t.Errorf("the client got the trailer of the load, %q", v)
	}
	e := runningSource(t).directory.Snapshot().Node("a")
	if got := memberOf(e, traffic.Now()).Load; got != 0.75 {
		t.Errorf("the load is %v, want 0.75", got)
	}
}
