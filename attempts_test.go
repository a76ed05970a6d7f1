package caddydiscovery

import (
	"fmt"
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
