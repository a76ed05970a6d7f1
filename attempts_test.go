package caddydiscovery

import (
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// TestRetriesMoveOn has three nodes that refuse connections and one that serves:
// three retries are enough only if none of them goes where the request has failed.
func TestRetriesMoveOn(t *testing.T) {
	for name, source := range map[string]string{
		"random":      "dynamic discovery {\nregistry memory %s\n}",
		"round robin": "dynamic discovery {\nregistry memory %s\n}\nlb_policy round_robin",
		"choose":      "dynamic discovery {\nregistry memory %s\n}\nlb_policy random_choose 2",
		"least load":  "dynamic discovery {\nregistry memory %s\n}\nlb_policy least_load",
		"least conn":  "dynamic discovery {\nregistry memory %s\n}\nlb_policy least_conn",
		"ip hash":     "dynamic discovery {\nregistry memory %s\n}\nlb_policy ip_hash",
		"query":       "dynamic discovery {\nregistry memory %s\n}\nlb_policy query key",
		"cookie":      "dynamic discovery {\nregistry memory %s\n}\nlb_policy cookie",
		"first":       "dynamic discovery {\nregistry memory %s\n}\nlb_policy first",
		"pick":        "dynamic discovery {\nregistry memory %s\npick 1\n}",
		"pick 2":      "dynamic discovery {\nregistry memory %s\npick 2\n}\nlb_policy round_robin",
		"pick hash":   "dynamic discovery {\nregistry memory %s\npick 1 hash {query.key}\n}\nlb_policy first",
		"subset":      "dynamic discovery {\nregistry memory %s\nsubset 2\nproxy_id p\n}",
		"subset pick": "dynamic discovery {\nregistry memory %s\nsubset 2\npick 1\n}",
		"prefer":      "dynamic discovery {\nregistry memory %s\nprefer zone near\npick 2\n}",
		"multi":       "dynamic multi {\ndiscovery {\nregistry memory %s\npick 1\n}\n}",
		"multi first": "dynamic multi {\ndiscovery {\nregistry memory %s\n}\n}\nlb_policy first",
		"multi all":   "dynamic multi {\ndiscovery {\nregistry memory %s\n}\n}\nlb_policy round_robin",
	} {
		t.Run(name, func(t *testing.T) {
			registry, m := newMemory(t)
			for _, id := range []string{"a", "b", "c"} {
				list(t, m, id, "http://127.0.0.1:"+freeport.String(t), "zone", "near")
			}
			list(t, m, "d", service(t, "d").URL)
			port := freeport.String(t)
			load(t, "http://127.0.0.1:"+port+" {\nreverse_proxy {\n"+fmt.Sprintf(source, registry)+"\nlb_retries 3\n}\n}")
			for i := range 100 {
				if status, body := get(t, fmt.Sprint("http://127.0.0.1:", port, "/?key=", i)); body != "d" {
					t.Fatalf("request %d: status %d, answered %q, want the node that serves", i, status, body)
				}
			}
		})
	}
}

// TestRetriesDoNotOutliveTheRequest has one node that always fails: it is tried
// again as long as there is no other, and by the next request.
func TestRetriesDoNotOutliveTheRequest(t *testing.T) {
	registry, m := newMemory(t)
	list(t, m, "a", "http://127.0.0.1:"+freeport.String(t))
	u := source(t, "registry memory "+registry+"\npick 1", "load_balancing", map[string]any{"retries": 3})
	for range 2 {
		r := request()
		for attempt := range 3 {
			pool, err := u.GetUpstreams(r)
			if err != nil || len(pool) != 1 {
				t.Fatalf("attempt %d: %d upstreams, %v, want the only node", attempt, len(pool), err)
			}
			host(pool)
			if u.wrapper.Select(pool, r, nil) == nil {
				t.Fatalf("attempt %d: nothing was selected", attempt)
			}
		}
	}

	list(t, m, "b", "http://127.0.0.1:"+freeport.String(t))
	eventually(t, "b is known", func() bool { return len(u.directory.Snapshot().Nodes()) == 2 })
	r := request()
	tried := make(map[string]bool)
	for range 2 {
		pool, _ := u.GetUpstreams(r)
		host(pool)
		tried[u.wrapper.Select(pool, r, nil).Dial] = true
	}
	if len(tried) != 2 {
		t.Errorf("two attempts of a request went to %v, want both nodes", tried)
	}
	// The same request comes to the handler once more, as a copy of its own.
	again := r.Clone(r.Context())
	for range 50 {
		pool, _ := u.GetUpstreams(again)
		tried[pool[0].Dial] = false
	}
	for node, untried := range tried {
		if untried {
			t.Errorf("%s counts as failed when the request comes to the handler again", node)
		}
	}
}

// TestEverythingAtOnce has clients with and without sessions go on while the config is
// reloaded and a node breaks, with all that has a part in the way of a request. Each request
// is served, and in the end nothing is under way.
func TestEverythingAtOnce(t *testing.T) {
	first, m := newMemory(t)
	other := addMemory(t, first+" 2")
	var broken atomic.Bool
	ill := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if broken.Load() {
			panic(http.ErrAbortHandler)
		}
		fmt.Fprint(w, "ill")
	}))
	t.Cleanup(ill.Close)
	list(t, m, "ill", ill.URL, "service", "s", "zone", "eu")
	for _, id := range []string{"a", "b", "c"} {
		list(t, m, id, service(t, id).URL, "service", "s", "zone", "eu", "capacity", "20")
		list(t, other, id+"2", service(t, id+"2").URL, "service", "s")
	}
	port := freeport.String(t)
	options := "service s\nprefer zone eu\nsubset 3\nproxy_id p\nsticky\nslow_start 1s\noutlier {\nerrors 2\neject 200ms\n}\nmetrics node\n"
	var served atomic.Int64
	var stop atomic.Bool
	var clients sync.WaitGroup
	for i, policy := range []string{"random", "round_robin", "least_conn", "least_latency", "least_load", "random_choose 2"} {
		load(t, "{\nmetrics\n}\nhttp://127.0.0.1:"+port+" {\nreverse_proxy {\ndynamic multi {\n"+
			"discovery {\nregistry memory "+first+"\n"+options+"retry_budget 100 1000\n}\n"+
			"discovery {\nregistry memory \""+first+" 2\"\n"+options+"}\n}\n"+
			"lb_policy "+policy+"\nlb_retries 5\nfail_duration 100ms\nunhealthy_request_count 100\n}\n}\n")
		broken.Store(i%2 == 1)
		for range 6 {
			if i > 0 {
				break // they go on over the reloads
			}
			clients.Go(func() {
				visitor := new(http.Client)
				for n := 0; !stop.Load(); n++ {
					if n%10 == 0 {
						visitor.Jar, _ = cookiejar.New(nil)
					}
					resp, err := visitor.Get("http://127.0.0.1:" + port)
					if err != nil {
						continue // a reload resets connections that wait to be accepted
					}
					if resp.StatusCode != http.StatusOK {
						t.Errorf("%s: status %d", policy, resp.StatusCode)
					}
					_, _ = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
					served.Add(1)
				}
			})
		}
		before := served.Load()
		eventually(t, "some requests are served", func() bool { return served.Load() > before+200 })
	}
	stop.Store(true)
	clients.Wait()
	eventually(t, "no request is under way", func() bool {
		requests, err := requestsInFlight()
		for _, n := range requests {
			if n != 0 {
				return false
			}
		}
		return err == nil
	})
	counted := 0
	for _, d := range runningDirectories() {
		for _, c := range d.stats.tally.All() {
			counted++
			if c.InFlight() != 0 {
				t.Errorf("%d requests to %s are counted as under way", c.InFlight(), c.Node)
			}
		}
	}
	if counted < 6 {
		t.Errorf("the requests to %d nodes are counted, want those to all", counted)
	}
}
