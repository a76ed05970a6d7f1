package caddydiscovery

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
)

// somebodys is a policy that is neither Caddy's nor ours. It takes the last upstream.
type somebodys struct{}

func (somebodys) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.reverse_proxy.selection_policies.somebodys", New: func() caddy.Module { return new(somebodys) }}
}

func (somebodys) Select(pool reverseproxy.UpstreamPool, _ *http.Request, _ http.ResponseWriter) *reverseproxy.Upstream {
	return pool[len(pool)-1]
}

func init() { caddy.RegisterModule(somebodys{}) }

// policy is the load balancing of a handler with a policy, whose options are given as
// pairs.
func policy(name string, pairs ...any) map[string]any {
	p := map[string]any{"policy": name}
	for i := 0; i < len(pairs); i += 2 {
		p[pairs[i].(string)] = pairs[i+1]
	}
	return map[string]any{"selection_policy": p}
}

// passive are passive health checks.
var passive = map[string]any{"passive": map[string]any{"fail_duration": "1h"}}

// builtIn are policies, with how many nodes of 100 a source returns under each.
var builtIn = map[string]struct {
	load        map[string]any
	want, spare int // with passive checks
}{
	"none":            {map[string]any{}, 1, 2},
	"random":          {policy("random"), 1, 2},
	"random_choose":   {policy("random_choose"), 2, 2},
	"random_choose 3": {policy("random_choose", "choose", 3), 3, 3},
	"round_robin":     {policy("round_robin"), 1, 2},
	"first":           {policy("first"), 1, 2},
	"least_load":      {leastLoad, 1, 2},
	"least_latency":   {policy("least_latency"), 1, 2},
	"least_conn":      {policy("least_conn"), 1, 2},
	"ip_hash":         {policy("ip_hash"), 1, 2},
	"uri_hash":        {policy("uri_hash"), 1, 2},
	"cookie":          {policy("cookie"), 1, 2},
	"header":          {policy("header", "field", "X-Key"), 1, 2},
	"header in turn":  {policy("header", "field", "X-Key", "fallback", map[string]any{"policy": "round_robin"}), 1, 2},
	"query, choose 3": {policy("query", "key", "key", "fallback", map[string]any{"policy": "random_choose", "choose": 3}), 3, 3},
	"query, query":    {policy("query", "key", "key", "fallback", map[string]any{"policy": "query", "key": "other"}), 100, 100},
	"somebody's":      {policy("somebodys"), 100, 100},
}

// hundred lists 100 nodes of the service orders.
func hundred(t *testing.T) (registry string) {
	t.Helper()
	name, m := newMemory(t)
	for i := range 100 {
		list(t, m, fmt.Sprintf("n%02d", i), fmt.Sprint("http://10.0.0.1:", 1000+i), "service", "orders")
	}
	return name
}

func TestPoliciesGetTheCandidatesThatTheyNeed(t *testing.T) {
	name := hundred(t)
	for what, test := range builtIn {
		u := source(t, "registry memory "+name+"\nservice orders", "load_balancing", test.load)
		if got, err := u.GetUpstreams(request()); err != nil || len(got) != test.want {
			t.Errorf("%s: %d upstreams, %v, want %d", what, len(got), err, test.want)
		}
		u = source(t, "registry memory "+name+"\nservice orders", "load_balancing", test.load, "health_checks", passive)
		if got, err := u.GetUpstreams(request()); err != nil || len(got) != test.spare {
			t.Errorf("%s with passive checks: %d upstreams, %v, want %d", what, len(got), err, test.spare)
		}
	}
}

func TestSomebodysPolicyGetsTheWholeList(t *testing.T) {
	u := source(t, "registry memory "+hundred(t), "load_balancing", policy("somebodys"))
	if got := selected(t, u, request()).Dial; got != "10.0.0.1:1099" {
		t.Errorf("selected %s, want the last of all", got)
	}
}

func TestLookupAllocations(t *testing.T) {
	name := hundred(t)
	for what, test := range builtIn {
		u := source(t, "registry memory "+name+"\nservice orders", "load_balancing", test.load)
		r := request()
		if _, err := u.GetUpstreams(r); err != nil { // makes the picker, and what is known of the request
			t.Fatal(err)
		}
		for _, e := range u.directory.Snapshot().Nodes() {
			_ = peerOf(e) // what is known of a node
		}
		most := map[int]float64{1: 2, 2: 1, 3: 3, 100: 2}[test.want]
		if strings.HasPrefix(what, "query") {
			most += 3 // parsed queries, and room for what the key would find
		}
		if got := testing.AllocsPerRun(100, func() {
			_, _ = u.GetUpstreams(r)
			if a, _ := attemptsOf(r); a != nil {
				a.current = a.current[:0] // as the policy does
			}
		}); got > most {
			t.Errorf("%s: a lookup takes %v allocations, want at most %v", what, got, most)
		}
	}
}

// TestWeightsCountWithoutAnOption holds the shares of nodes under plain policies against
// their weights.
func TestWeightsCountWithoutAnOption(t *testing.T) {
	name, m := newMemory(t)
	weights := map[string]float64{"a": 1, "b": 2, "c": 0.5, "d": 4.5}
	const requests = 16_000
	expected := make(map[string]float64)
	for id, w := range weights {
		list(t, m, id, "http://"+at(id), "weight", fmt.Sprint(w))
		expected[at(id)] = requests * w / 8
	}
	list(t, m, "none", "http://"+at("none"), "weight", "0")
	for what, options := range map[string][]any{
		"none":                   {},
		"random":                 {"load_balancing", policy("random")},
		"random, passive checks": {"load_balancing", policy("random"), "health_checks", passive},
		"random_choose":          {"load_balancing", policy("random_choose")},
		"round_robin":            {"load_balancing", policy("round_robin")},
		"least_conn":             {"load_balancing", policy("least_conn")},
		"least_load":             {"load_balancing", leastLoad},
		"least_latency":          {"load_balancing", policy("least_latency")},
		"round_robin, passive":   {"load_balancing", policy("round_robin"), "health_checks", passive},
	} {
		u := source(t, "registry memory "+name, options...)
		u.builder.Random = rand.New(rand.NewPCG(1, 2)).Uint64
		counts := make(map[string]int)
		for range requests {
			counts[selected(t, u, request()).Dial]++
		}
		chancetest.Check(t, what, counts, expected)
	}
}

// TestSlowStartNeedsNoOption has a new node get less at first, under plain policies.
func TestSlowStartNeedsNoOption(t *testing.T) {
	for _, name := range []string{"random", "random_choose", "round_robin", "least_conn", "least_load", "least_latency"} {
		t.Run(name, func(t *testing.T) {
			registry, m := newMemory(t)
			list(t, m, "a", "http://"+at("a"))
			u := source(t, "registry memory "+registry+"\nslow_start 1h", "load_balancing", policy(name))
			list(t, m, "new", "http://"+at("new"))
			eventually(t, "the new node is known", func() bool { return u.directory.Snapshot().Node("new") != nil })
			const requests = 2200
			n := 0
			for range requests {
				if selected(t, u, request()).Dial == at("new") {
					n++
				}
			}
			if n < 100 || n > 300 {
				t.Errorf("the new node got %d of %d requests, want about 200", n, requests)
			}
		})
	}
}

func TestEachOfEqualNodesHasOneTurnInARound(t *testing.T) {
	u := source(t, "registry memory "+hundred(t), "load_balancing", policy("round_robin"))
	for round := range 3 {
		counts := make(map[string]int)
		for range 100 {
			counts[selected(t, u, request()).Dial]++
		}
		if len(counts) != 100 {
			t.Errorf("round %d: %d of 100 nodes had a turn", round, len(counts))
		}
	}
}

// reluctant is a policy that takes no pool with the first upstream in it.
type reluctant struct{ seen [][]string }

func (s *reluctant) Select(pool reverseproxy.UpstreamPool, _ *http.Request, _ http.ResponseWriter) *reverseproxy.Upstream {
	var dials []string
	for _, up := range pool {
		dials = append(dials, up.Dial)
	}
	s.seen = append(s.seen, dials)
	if slices.Contains(dials, "a:80") {
		return nil
	}
	return pool[0]
}

// TestStandInsAreShownInTheSecondPlace holds that a policy that would choose among all
// it sees sees those that stand in only where it takes none of the others.
func TestStandInsAreShownInTheSecondPlace(t *testing.T) {
	p := new(reluctant)
	w := &policyWrapper{Selector: p, handler: new(reverseproxy.Handler), shown: 1}
	pool := reverseproxy.UpstreamPool{{Dial: "a:80"}, {Dial: "b:80"}}
	if got := w.Select(pool, request(), nil); got != pool[1] || fmt.Sprint(p.seen) != "[[a:80] [b:80]]" {
		t.Errorf("selected %v after it saw %v, want the second of two", got, p.seen)
	}
	w.handler.Upstreams = reverseproxy.UpstreamPool{{Dial: "c:80"}, {Dial: "d:80"}}
	p.seen = nil
	if w.Select(nil, request(), nil); fmt.Sprint(p.seen) != "[[c:80 d:80]]" {
		t.Errorf("of static upstreams the policy saw %v, want all", p.seen)
	}
}

// TestShortlistsUnderLoad has many requests choose while the fleet changes.
func TestShortlistsUnderLoad(t *testing.T) {
	for what, test := range builtIn {
		t.Run(what, func(t *testing.T) {
			name, m := newMemory(t)
			list(t, m, "stays", "http://10.0.0.1:1")
			u := source(t, "registry memory "+name, "load_balancing", test.load, "health_checks", passive)
			done, end := make(chan struct{}), time.Now().Add(100*time.Millisecond)
			for range 4 {
				go func() {
					defer func() { done <- struct{}{} }()
					for time.Now().Before(end) {
						pool, err := u.GetUpstreams(request())
						if err != nil || len(pool) == 0 {
							t.Errorf("looked up %d upstreams, %v", len(pool), err)
							return
						}
					}
				}()
			}
			for i := range 200 {
				list(t, m, fmt.Sprint("n", i%20), fmt.Sprint("http://10.0.0.2:", 1+i%20), "weight", fmt.Sprint(1+i%3))
				m.Expire(fmt.Sprint("n", (i+7)%20))
			}
			for range 4 {
				<-done
			}
		})
	}
}
