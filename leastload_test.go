package caddydiscovery

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
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
	report(t, m, "normal", 0.5)
	u := source(t, "registry memory "+name, "load_balancing", leastLoad)
	for range 20 {
		if got := selected(t, u, request()).Dial; got != at("idle") {
			t.Fatalf("selected %s, want the idle node", got)
		}
	}
	// A heartbeat is enough to change that.
	snapshot := u.directory.Snapshot()
	report(t, m, "idle", 5)
	eventually(t, "the load is known", func() bool { return snapshot.Node("idle").Load() == 5 })
	if got := selected(t, u, request()).Dial; got != at("normal") {
		t.Errorf("selected %s, want the node that now reports the least", got)
	}
	if u.directory.Snapshot() != snapshot {
		t.Error("a heartbeat published a snapshot")
	}
}

func TestLeastLoadDrawsAmongEquals(t *testing.T) {
	name, m := newMemory(t)
	expected := make(map[string]float64)
	const draws = 8000
	for i := range 8 {
		report(t, m, fmt.Sprint("n", i), 0)
		expected[at(fmt.Sprint("n", i))] = draws / 8
	}
	u := source(t, "registry memory "+name, "load_balancing", leastLoad)
	policy := u.wrapper.Selector.(*LeastLoad)
	policy.random = rand.New(rand.NewPCG(1, 2)).Uint64
	counts := make(map[string]int)
	for range draws {
		counts[selected(t, u, request()).Dial]++
		for _, e := range u.directory.Snapshot().Nodes() {
			peerOf(e).recent.state.Store(0)
		}
	}
	chancetest.Check(t, "selected", counts, expected)
}

func TestLeastLoadUnderMulti(t *testing.T) {
	name, m := newMemory(t)
	report(t, m, "idle", 0)
	report(t, m, "busy", 9)
	u := source(t, "registry memory "+name, "load_balancing", leastLoad)
	policy, r := u.wrapper.Selector.(*LeastLoad), request()
	pool, _ := u.GetUpstreams(r)
	foreign := []*reverseproxy.Upstream{{Dial: "foreign-1:80"}, {Dial: "foreign-2:80"}}
	for _, all := range [][]*reverseproxy.Upstream{
		{foreign[0], foreign[1], pool[0], pool[1]}, {foreign[0], pool[0], pool[1], foreign[1]}, {pool[0], pool[1], foreign[0], foreign[1]},
	} {
		host(all)
		if got := policy.Select(all, r, nil).Dial; got != at("idle") {
			t.Errorf("selected %s of %v, want the idle node", got, all)
		}
	}
	if got := policy.Select(foreign, r, nil); got == nil {
		t.Error("selected none of the other source's upstreams")
	}
}

// TestLeastLoadDoesNotHerd has four proxies send to one fleet, whose nodes report
// their load every ten seconds. One of them is idle in the beginning. A node's load
// is the number of its requests in flight; a request takes 50 ms.
func TestLeastLoadDoesNotHerd(t *testing.T) {
	const (
		nodes, proxies = 12, 4
		rate           = 2400 // requests a second in all
		took           = 50 * time.Millisecond
		beat           = 10 * time.Second
		fair           = float64(rate) * float64(took) / float64(time.Second) / nodes // in flight
	)
	type end struct {
		at    time.Duration
		node  int
		proxy int
	}
	random := rand.New(rand.NewPCG(3, 4))

	// Each proxy counts for itself, so that each has hosts and windows of its own.
	type proxy struct {
		inFlight [nodes]int
		recent   [nodes]window
	}
	fleet := make([]proxy, proxies)
	var load, peak [nodes]int
	var reported [nodes]float64
	for i := range reported {
		reported[i] = fair * min(1, float64(i))
	}
	var ends []end
	interval := time.Second / rate
	for now := time.Duration(0); now < 60*time.Second; now += interval {
		for len(ends) > 0 && ends[0].at <= now {
			load[ends[0].node]--
			fleet[ends[0].proxy].inFlight[ends[0].node]--
			ends = ends[1:]
		}
		if now%beat < interval {
			for i := range reported {
				if now > 0 {
					reported[i] = float64(load[i])
				}
			}
		}
		p := random.IntN(proxies)
		mean := 0.0
		for _, l := range reported {
			mean += l / nodes
		}
		i, least, ties := 0, math.Inf(1), 0
		for n := range nodes {
			s := score(reported[n], mean, fleet[p].inFlight[n], fleet[p].recent[n].count(now))
			if s < least {
				i, least, ties = n, s, 1
			} else if s == least {
				if ties++; random.IntN(ties) == 0 {
					i = n
				}
			}
		}
		fleet[p].recent[i].add(now)
		fleet[p].inFlight[i]++
		load[i]++
		ends = append(ends, end{now + took, i, p})
		if now > time.Second {
			peak[i] = max(peak[i], load[i])
		}
	}
	for i, n := range peak {
		if float64(n) > 3*fair {
			t.Errorf("node %d had %d requests in flight at once, want no more than three times the fair %v", i, n, fair)
		}
	}
}

func TestWindow(t *testing.T) {
	var w window
	for range 100 {
		w.add(5 * time.Second)
	}
	for at, want := range map[time.Duration]float64{
		5 * time.Second: 100, 9 * time.Second: 100, 10 * time.Second: 100, 15 * time.Second: 50, 20 * time.Second: 0, time.Hour: 0,
	} {
		if got := w.count(at); got != want {
			t.Errorf("after %v the window counts %v, want %v", at, got, want)
		}
	}
	w.add(15 * time.Second)
	if got := w.count(15 * time.Second); got != 51 {
		t.Errorf("the window counts %v, want 51", got)
	}
	for range 2 * windowMost {
		w.add(25 * time.Second)
	}
	if got := w.count(25 * time.Second); math.Abs(got-windowMost) > 1 {
		t.Errorf("the window counts %v, want it to stop at %v", got, windowMost)
	}
}
