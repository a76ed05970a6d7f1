package caddydiscovery

import (
	"math/rand/v2"
	"net/http"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// report lists a node with a load.
func report(t *testing.T, m *discoverytest.Memory, id string, load float64) {
	t.Helper()
	e, err := discovery.ParseEndpoint("http://" + at(id))
	if err != nil {
		t.Fatal(err)
	}
	record, err := discovery.AppendRecord(nil, discovery.Node{ID: id, Endpoint: e, Load: load}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	m.Put(id, record)
}

var leastLoad = map[string]any{"selection_policy": map[string]any{"policy": "least_load"}}

// selected lets a source and its handler's policy choose for one request.
func selected(t *testing.T, u *Upstreams, r *http.Request) *reverseproxy.Upstream {
	t.Helper()
	pool, err := u.GetUpstreams(r)
	if err != nil {
		t.Fatal(err)
	}
	host(pool)
	return u.handler.LoadBalancing.SelectionPolicy.Select(pool, r, nil)
}

func TestLeastLoad(t *testing.T) {
	name, m := newMemory(t)
	report(t, m, "busy", 0.9)
	report(t, m, "idle", 0.1)
	report(t, m, "normal", 0.3)
	u := source(t, "registry memory "+name, "load_balancing", leastLoad)
	u.builder.Random = rand.New(rand.NewPCG(1, 2)).Uint64
	const requests = 13_000
	counts := make(map[string]int)
	for range requests {
		counts[selected(t, u, request()).Dial]++
	}
	chancetest.Check(t, "selected", counts, map[string]float64{at("idle"): 9_000, at("normal"): 3_000, at("busy"): 1_000})

	// A heartbeat is enough to change that, and needs no snapshot.
	snapshot := u.directory.Snapshot()
	report(t, m, "idle", 900)
	eventually(t, "the load is known", func() bool { return snapshot.Node("idle").Load() == 900 })
	eventually(t, "the node gets hardly any request", func() bool {
		n := 0
		for range 100 {
			if selected(t, u, request()).Dial == at("idle") {
				n++
			}
		}
		return n <= 2
	})
	if u.directory.Snapshot() != snapshot {
		t.Error("a heartbeat published a snapshot")
	}
}

// TestLeastLoadUnderMulti has upstreams of another source before, between and behind the
// nodes: they get the share of an average node.
func TestLeastLoadUnderMulti(t *testing.T) {
	name, m := newMemory(t)
	report(t, m, "idle", 1)
	report(t, m, "busy", 9)
	u := source(t, "registry memory "+name, "load_balancing", leastLoad)
	u.shortlist = shortlist{strategy: picker.All{}}
	policy, r := u.wrapper.Selector.(*LeastLoad), request()
	policy.random = rand.New(rand.NewPCG(1, 2)).Uint64
	pool, _ := u.GetUpstreams(r)
	foreign := []*reverseproxy.Upstream{{Dial: "foreign-1:80"}, {Dial: "foreign-2:80"}}
	for _, all := range [][]*reverseproxy.Upstream{
		{foreign[0], foreign[1], pool[0], pool[1]}, {foreign[0], pool[0], pool[1], foreign[1]}, {pool[0], pool[1], foreign[0], foreign[1]},
	} {
		host(all)
		counts := make(map[string]int)
		for range 10_000 {
			counts[policy.Select(all, r, nil).Dial]++
		}
		chancetest.Check(t, "selected", counts, map[string]float64{
			at("idle"): 4_500, at("busy"): 500, "foreign-1:80": 2_500, "foreign-2:80": 2_500,
		})
	}
	if got := policy.Select(foreign, r, nil); got == nil {
		t.Error("selected none of the other source's upstreams")
	}
}
