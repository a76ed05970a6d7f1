package integration

import (
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// TestSharesWithoutAnOption has nodes of different weights under plain policies.
func TestSharesWithoutAnOption(t *testing.T) {
	const requests = 4000
	weights := map[string]float64{"orders-1": 1, "orders-2": 2, "orders-3": 5}
	for _, policy := range []string{"", "lb_policy random", "lb_policy round_robin", "lb_policy random_choose 2", "lb_policy least_conn", "lb_policy least_load"} {
		t.Run(policy, func(t *testing.T) {
			r := newKV(t)
			expected := make(map[string]float64)
			for id, w := range weights {
				r.put(id, camel(id, "http://"+newService(t, id).address, fmt.Sprintf(`"service":"orders","weight":"%v"`, w)))
				expected[id] = requests * w / 8
			}
			port := freeport.String(t)
			start(t, "", site(port, r.block("ttl 1h")+"\nservice orders", policy))
			counts := make(map[string]int)
			for range requests {
				id, err := ask("http://127.0.0.1:" + port)
				if err != nil {
					t.Fatal(err)
				}
				counts[id]++
			}
			for id, want := range expected {
				if n := float64(counts[id]); math.Abs(n-want) > 5*math.Sqrt(want) {
					t.Errorf("%s answered %v of %d requests, want about %v", id, n, requests, want)
				}
			}
		})
	}
}

// TestSharesOfTwoRegistries has the nodes of two registries under multi get requests by
// their weights, as if they were in one, and a node that does not serve costs no request.
func TestSharesOfTwoRegistries(t *testing.T) {
	one, two := newKV(t), newKV(t)
	weights := map[registry]map[string]int{one: {"a": 1, "b": 2, "c": 1}, two: {"d": 4}}
	for r, nodes := range weights {
		for id, w := range nodes {
			r.put(id, camel(id, "http://"+newService(t, id).address, fmt.Sprintf(`"service":"orders","weight":"%d"`, w)))
		}
	}
	sources := "dynamic multi {\ndiscovery {\n" + one.block("ttl 1h") + "\n}\ndiscovery {\n" + two.block("ttl 1h") + "\n}\n}"
	sites, ports := "", make(map[string]string)
	for _, policy := range []string{"random", "round_robin", "least_conn"} {
		ports[policy] = freeport.String(t)
		sites += "http://127.0.0.1:" + ports[policy] + " {\nreverse_proxy {\n" + sources + "\nlb_policy " + policy + "\nlb_retries 3\n}\n}\n"
	}
	start(t, "", sites)
	for policy, port := range ports {
		// A round before it counts, for both listings to be there.
		const rounds = 100
		counts := make(map[string]int)
		for i := range rounds*8 + 8 {
			id, err := ask("http://127.0.0.1:" + port)
			if err != nil {
				t.Fatal(err)
			}
			if i >= 8 {
				counts[id]++
			}
		}
		for _, nodes := range weights {
			for id, w := range nodes {
				want, off := float64(w*rounds), 2.0
				if policy != "round_robin" {
					off = 5 * math.Sqrt(want)
				}
				if n := float64(counts[id]); math.Abs(n-want) > off {
					t.Errorf("%s: %s answered %v requests, want about %v", policy, id, n, want)
				}
			}
		}
	}
	two.put("dead", camel("dead", "http://127.0.0.1:"+freeport.String(t), `"service":"orders","weight":"4"`))
	for _, port := range ports {
		for range 300 {
			if id, err := ask("http://127.0.0.1:" + port); err != nil || len(id) != 1 {
				t.Fatalf("answered %q, %v, with one node of five dead", id, err)
			}
		}
	}
}

// TestFallbackMakesNoLines has requests served by static upstreams while the registry
// lists no node.
func TestFallbackMakesNoLines(t *testing.T) {
	for _, multi := range []bool{false, true} {
		r := newKV(t)
		port, static := freeport.String(t), newService(t, "static")
		source := "dynamic discovery {\n" + r.block("ttl 1h") + "\n}"
		if multi {
			source = "dynamic multi {\ndiscovery {\n" + r.block("ttl 1h") + "\n}\n}"
		}
		p := start(t, "", "http://127.0.0.1:"+port+" {\nreverse_proxy "+static.address+" {\n"+source+"\n}\n}")
		ask500 := func(what string) {
			t.Helper()
			for range 500 {
				if id, err := ask("http://127.0.0.1:" + port); err != nil || id != "static" {
					t.Fatalf("%s: answered %q, %v, want the static upstream", what, id, err)
				}
			}
		}
		ask500("first")
		before := strings.Count(p.log.String(), "\n")
		ask500("then")
		if n := strings.Count(p.log.String(), "\n") - before; n > 5 {
			t.Errorf("500 requests made %d lines in the log", n)
		}
	}
}
