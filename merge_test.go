package caddydiscovery

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// foreign is a source of upstreams that is not ours.
type foreign struct {
	Addresses []string `json:"addresses,omitempty"`
}

func (foreign) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.reverse_proxy.upstreams.foreign", New: func() caddy.Module { return new(foreign) }}
}

func (f foreign) GetUpstreams(*http.Request) ([]*reverseproxy.Upstream, error) {
	var all []*reverseproxy.Upstream
	for _, a := range f.Addresses {
		all = append(all, &reverseproxy.Upstream{Dial: a})
	}
	return all, nil
}

func init() { caddy.RegisterModule(foreign{}) }

// A besides is a handler with sources of ours under multi, and perhaps one of another
// kind between them.
type besides struct {
	t       *testing.T
	handler *reverseproxy.Handler
}

// newBesides makes a registry of each list of weights, by the nodes' ids, and a handler
// over all of them. Foreign upstreams stand behind the first source.
func newBesides(t *testing.T, load map[string]any, registries []map[string]float64, others []string, pairs ...any) *besides {
	t.Helper()
	var sources []any
	for i, weights := range registries {
		name := fmt.Sprintf("%s %d of %p", t.Name(), i, &sources) // another one each time
		m := addMemory(t, name)
		for id, w := range weights {
			list(t, m, id, "http://"+at(id), "weight", fmt.Sprint(w))
		}
		sources = append(sources, map[string]any{"source": "discovery", "registry": map[string]any{"backend": "memory", "name": name}})
		if i == 0 && len(others) > 0 {
			sources = append(sources, map[string]any{"source": "foreign", "addresses": others})
		}
	}
	config := map[string]any{"load_balancing": load, "dynamic_upstreams": map[string]any{"source": "multi", "sources": sources}}
	for i := 0; i < len(pairs); i += 2 {
		config[pairs[i].(string)] = pairs[i+1]
	}
	return &besides{t: t, handler: provisionHandler(t, config)}
}

// pool returns what the handler gets of all sources.
func (b *besides) pool(r *http.Request) reverseproxy.UpstreamPool {
	b.t.Helper()
	pool, err := b.handler.DynamicUpstreams.GetUpstreams(r)
	if err != nil {
		b.t.Fatal(err)
	}
	host(pool)
	return pool
}

func (b *besides) choose(r *http.Request, rw http.ResponseWriter) string {
	b.t.Helper()
	up := b.handler.LoadBalancing.SelectionPolicy.Select(b.pool(r), r, rw)
	if up == nil {
		return ""
	}
	return up.Dial
}

// busy changes how many requests an address has in flight.
func busy(address string, by int64) {
	up := &reverseproxy.Upstream{Dial: address}
	host([]*reverseproxy.Upstream{up})
	field := reflect.ValueOf(up.Host).Elem().FieldByName("numRequests") // which nothing exported writes
	reflect.NewAt(field.Type(), field.Addr().UnsafePointer()).Interface().(*atomic.Int64).Add(by)
}

// numbered returns the weights of so many nodes.
func numbered(prefix string, n int, weight float64) map[string]float64 {
	all := make(map[string]float64)
	for i := range n {
		all[fmt.Sprint(prefix, i)] = weight
	}
	return all
}

// TestUnderMultiCandidatesAreFew holds that no source returns its whole list.
func TestUnderMultiCandidatesAreFew(t *testing.T) {
	registries := []map[string]float64{numbered("a", 100, 1), numbered("b", 40, 1)}
	for what, want := range map[string]int{
		"random": 2, "random_choose": 4, "round_robin": 2, "least_conn": 2, "first": 2, "ip_hash": 2, "cookie": 2,
		"least_load": 2, "least_latency": 2, "somebodys": 140,
	} {
		b := newBesides(t, policy(what), registries, nil)
		if got := b.pool(request()); len(got) != want {
			t.Errorf("%s: %d upstreams, want %d", what, len(got), want)
		}
	}
}

// TestUnderMultiWeightsCount holds the shares of the nodes of several sources, and of
// upstreams that are no nodes, against what they weigh in all.
func TestUnderMultiWeightsCount(t *testing.T) {
	one := map[string]float64{"m1": 1, "m2": 2, "m3": 0.5}
	two := map[string]float64{"m4": 1, "m5": 6}
	others := []string{"127.99.0.1:80", "127.99.0.2:80"}
	const requests = 25_000
	for what, options := range map[string]struct {
		load map[string]any
		rest []any
	}{
		"none":            {map[string]any{}, nil},
		"random":          {policy("random"), nil},
		"random, passive": {policy("random"), []any{"health_checks", passive}},
		"random_choose":   {policy("random_choose"), nil},
		"round_robin":     {policy("round_robin"), nil},
		"least_conn":      {policy("least_conn"), nil},
		"least_load":      {leastLoad, nil},
		"least_latency":   {policy("least_latency"), nil},
		"header, random":  {policy("header", "field", "X-Key", "fallback", map[string]any{"policy": "random"}), nil},
		"cookie":          {policy("cookie"), nil},
		"cookie, in turn": {policy("cookie", "fallback", map[string]any{"policy": "round_robin"}), nil},
	} {
		t.Run(what, func(t *testing.T) {
			expected := make(map[string]float64)
			sum := 12.5
			for _, weights := range []map[string]float64{one, two} {
				for id, w := range weights {
					expected[at(id)] = requests * w / sum
				}
			}
			for _, a := range others {
				expected[a] = requests / sum
			}
			b := newBesides(t, options.load, []map[string]float64{one, two}, others, options.rest...)
			counts := make(map[string]int)
			for range requests {
				counts[b.choose(request(), httptest.NewRecorder())]++
			}
			if what == "round_robin" {
				for address, want := range expected {
					if n := float64(counts[address]); n < want-4 || n > want+4 {
						t.Errorf("%s had %v turns, want %v", address, n, want)
					}
				}
				return
			}
			chancetest.Check(t, what, counts, expected)
		})
	}
}

// TestUnderMultiWhoCannotServeCostsOthersNothing has half of the nodes of one source
// fail: those that can serve get equal shares, as among all.
func TestUnderMultiWhoCannotServeCostsOthersNothing(t *testing.T) {
	for _, what := range []string{"random", "random_choose", "round_robin", "least_conn"} {
		t.Run(what, func(t *testing.T) {
			one, two := numbered(what+"-f", 8, 1), numbered(what+"-s", 4, 1)
			b := newBesides(t, policy(what), []map[string]float64{one, two}, []string{"127.99.0.3:80"},
				"health_checks", map[string]any{"passive": map[string]any{"fail_duration": "1h", "unhealthy_request_count": 2}})
			const requests = 9_000
			expected := map[string]float64{"127.99.0.3:80": requests / 9}
			for id := range two {
				expected[at(id)] = requests / 9
			}
			for i := range 8 {
				address := at(fmt.Sprint(what+"-f", i))
				if i%2 == 1 {
					expected[address] = requests / 9
					continue
				}
				busy(address, 2)
			}
			for range 2_000 { // until the source has seen the state of each
				b.choose(request(), nil)
			}
			counts := make(map[string]int)
			for range requests {
				counts[b.choose(request(), nil)]++
			}
			chancetest.Check(t, what, counts, expected)
		})
	}
}

// TestUnderMultiEachOfEqualNodesHasOneTurnInARound counts rounds over three sources and
// upstreams that are no nodes, one request after the other.
func TestUnderMultiEachOfEqualNodesHasOneTurnInARound(t *testing.T) {
	b := newBesides(t, policy("round_robin"), []map[string]float64{numbered("t", 10, 1), numbered("u", 3, 1), numbered("v", 7, 1)},
		[]string{"127.99.0.4:80", "127.99.0.5:80", "127.99.0.6:80"})
	for round := range 20 {
		counts := make(map[string]int)
		for range 23 {
			counts[b.choose(request(), nil)]++
		}
		if len(counts) != 23 {
			t.Fatalf("round %d: %d of 23 had a turn: %v", round, len(counts), counts)
		}
	}
}

// TestUnderMultiTurnsOfManyRequestsAreExact has requests hold their turns for a while, as
// behind a source that waits.
func TestUnderMultiTurnsOfManyRequestsAreExact(t *testing.T) {
	b := newBesides(t, policy("round_robin"), []map[string]float64{numbered("w", 10, 1), numbered("x", 5, 1)}, nil)
	counts := make(map[string]int)
	const rounds, together = 40, 15
	for range rounds {
		var pools [together]reverseproxy.UpstreamPool
		var requests [together]*http.Request
		for i := range together {
			requests[i] = request()
			pools[i] = b.pool(requests[i])
		}
		for i := range together {
			counts[b.handler.LoadBalancing.SelectionPolicy.Select(pools[i], requests[i], nil).Dial]++
		}
	}
	for id := range 15 {
		address := at(fmt.Sprint("w", id))
		if id >= 10 {
			address = at(fmt.Sprint("x", id-10))
		}
		if n := counts[address]; n < rounds-4 || n > rounds+4 {
			t.Errorf("%s had %d turns in %d rounds", address, n, rounds)
		}
	}
}

// fickle is a circuit breaker that says something else each time.
type fickle struct{ asked int }

func (f *fickle) OK() bool {
	f.asked++
	return f.asked%2 == 1
}
func (*fickle) RecordMetric(int, time.Duration) {}

// TestUnderMultiWhoseTurnItIsMayFailMeanwhile has nodes become unavailable, and available
// again, while it is decided whose turn it is.
func TestUnderMultiWhoseTurnItIsMayFailMeanwhile(t *testing.T) {
	b := newBesides(t, policy("round_robin"), []map[string]float64{numbered("fickle-a", 1, 1), numbered("fickle-b", 1, 1)}, nil)
	for range 20 {
		r := request()
		pool := b.pool(r)
		for _, up := range pool {
			field := reflect.ValueOf(up).Elem().FieldByName("cb") // which nothing exported writes
			reflect.NewAt(field.Type(), field.Addr().UnsafePointer()).Elem().Set(reflect.ValueOf(new(fickle)))
		}
		b.handler.LoadBalancing.SelectionPolicy.Select(pool, r, nil)
	}
}

// TestUnderMultiTheLeastBusyOfAllIsChosen gives every upstream but one something to do.
func TestUnderMultiTheLeastBusyOfAllIsChosen(t *testing.T) {
	registries := []map[string]float64{numbered("y", 20, 1), numbered("z", 30, 1)}
	others := []string{"127.99.0.7:80", "127.99.0.8:80"}
	b := newBesides(t, policy("least_conn"), registries, others)
	for range 2000 { // so that the states are known
		b.choose(request(), nil)
	}
	var all []string
	for _, weights := range registries {
		for id := range weights {
			all = append(all, at(id))
		}
	}
	all = append(all, others...)
	slices.Sort(all)
	for _, address := range all {
		busy(address, 2)
	}
	for i, address := range all {
		busy(address, -1)
		if got := b.choose(request(), nil); got != address {
			t.Errorf("%d: %s was chosen, want %s with one request in flight less than all others", i, got, address)
		}
		busy(address, 1)
	}
}

// TestUnderMultiAllocations bounds what two sources and the choice between them take.
func TestUnderMultiAllocations(t *testing.T) {
	var room float64
	if underRace() {
		room = 3 // what the detector keeps from being inlined escapes
	}
	for what, most := range map[string]float64{"random": 8, "random_choose": 9, "round_robin": 9, "least_conn": 10, "ip_hash": 8} {
		b := newBesides(t, policy(what), []map[string]float64{numbered("a", 100, 1), numbered("b", 40, 1)}, nil)
		r := request()
		b.choose(r, nil)
		a, _ := attemptsOf(r)
		one := new(reverseproxy.Host)
		if got := testing.AllocsPerRun(100, func() {
			pool, _ := b.handler.DynamicUpstreams.GetUpstreams(r)
			for _, up := range pool {
				up.Host = one
			}
			b.handler.LoadBalancing.SelectionPolicy.Select(pool, r, nil)
			a.tried = picker.AddressSet{} // for the next one to be a first attempt
		}); got > most+room {
			t.Errorf("%s: %v allocations, want at most %v", what, got, most+room)
		}
	}
}

// underRace reports whether the tests run with the race detector.
func underRace() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// TestUnderMultiRetriesGoElsewhere has a request fail everywhere but at one upstream.
func TestUnderMultiRetriesGoElsewhere(t *testing.T) {
	for _, what := range []string{"random", "random_choose", "round_robin", "least_conn", "least_load", "least_latency", "uri_hash", "cookie"} {
		load := policy(what)
		load["retries"] = 20
		b := newBesides(t, load, []map[string]float64{numbered("r", 5, 1), numbered("q", 4, 1)}, nil)
		r := request()
		tried := make(map[string]bool)
		for range 9 {
			tried[b.choose(r, httptest.NewRecorder())] = true
		}
		if len(tried) != 9 {
			t.Errorf("%s: nine attempts went to %d of nine nodes", what, len(tried))
		}
		if b.choose(r, httptest.NewRecorder()) == "" {
			t.Errorf("%s: when all have failed nobody is asked again", what)
		}
	}
}

// TestUnderMultiHashingIsExact holds the choice among what sources return against that
// among all of them, by Caddy's own policy.
func TestUnderMultiHashingIsExact(t *testing.T) {
	registries := []map[string]float64{numbered("h", 60, 1), numbered("i", 30, 1)}
	others := []string{"127.99.0.9:80", "127.99.0.10:80"}
	b := newBesides(t, policy("uri_hash"), registries, others)
	var all reverseproxy.UpstreamPool
	for _, weights := range registries {
		for id := range weights {
			all = append(all, &reverseproxy.Upstream{Dial: at(id)})
		}
	}
	for _, a := range others {
		all = append(all, &reverseproxy.Upstream{Dial: a})
	}
	host(all)
	own := b.handler.LoadBalancing.SelectionPolicy.(*policyWrapper).Selector
	for i := range 2000 {
		r := request()
		r.RequestURI = fmt.Sprint("/", i)
		if got, want := b.choose(r, nil), own.Select(all, r, nil).Dial; got != want {
			t.Fatalf("key %d went to %s, want %s", i, got, want)
		}
	}
}

// TestUnderMultiSessionsStay has sessions begin by turns over all sources, and come back.
func TestUnderMultiSessionsStay(t *testing.T) {
	others := []string{"127.99.0.11:80"}
	b := newBesides(t, policy("cookie", "secret", "s", "fallback", map[string]any{"policy": "round_robin"}),
		[]map[string]float64{numbered("k", 6, 1), numbered("l", 3, 1)}, others)
	at := make(map[string]string) // cookie → address
	begin := func(cookie string) (string, string) {
		r, w := request(), httptest.NewRecorder()
		if cookie != "" {
			r.AddCookie(&http.Cookie{Name: "lb", Value: cookie})
		}
		address := b.choose(r, w)
		if set := w.Result().Cookies(); len(set) > 0 {
			cookie = set[0].Value
		}
		return address, cookie
	}
	for range 10 {
		address, cookie := begin("")
		at[cookie] = address
	}
	if len(at) != 10 {
		t.Fatalf("ten sessions in turn are on %d of ten upstreams", len(at))
	}
	for cookie, want := range at {
		if strings.HasPrefix(want, "127.99.") {
			continue // the source of the others knows no sessions, and ours cannot look into it
		}
		if got, next := begin(cookie); got != want || next != cookie {
			t.Errorf("a session went to %s, want %s where it was", got, want)
		}
	}
}

// TestUnderMultiWhatIsGivenUpIsForgotten has the handler fall back to static upstreams
// after sources were asked, as it does when the client goes away meanwhile.
func TestUnderMultiWhatIsGivenUpIsForgotten(t *testing.T) {
	for _, what := range []string{"random", "round_robin", "least_conn", "cookie", "uri_hash"} {
		b := newBesides(t, policy(what), []map[string]float64{numbered("e", 5, 1), numbered("d", 5, 1)}, nil)
		r := request()
		b.pool(r)
		static := reverseproxy.UpstreamPool{{Dial: "127.99.0.13:80"}}
		host(static)
		if got := b.handler.LoadBalancing.SelectionPolicy.Select(static, r, httptest.NewRecorder()); got != static[0] {
			t.Errorf("%s: %v was chosen, want the static upstream", what, got)
		}
		counts := make(map[string]int)
		for range 10 {
			counts[b.choose(request(), httptest.NewRecorder())]++
		}
		if what == "round_robin" && len(counts) != 10 {
			t.Errorf("a turn was lost: %v", counts)
		}
	}
}

// TestSlowStartUnderMulti has a node join one of two sources.
func TestSlowStartUnderMulti(t *testing.T) {
	for _, name := range []string{"random", "random_choose", "round_robin", "least_conn"} {
		t.Run(name, func(t *testing.T) {
			one, m := newMemory(t)
			list(t, m, "so", "http://"+at("so"))
			two := one + " two"
			other := addMemory(t, two)
			list(t, other, "st", "http://"+at("st"))
			var sources []any
			for _, registry := range []string{one, two} {
				sources = append(sources, map[string]any{"source": "discovery", "slow_start": "1h", "registry": map[string]any{"backend": "memory", "name": registry}})
			}
			b := &besides{t: t, handler: provisionHandler(t, map[string]any{"load_balancing": policy(name),
				"dynamic_upstreams": map[string]any{"source": "multi", "sources": sources}})}
			b.choose(request(), nil)
			list(t, m, "sn", "http://"+at("sn"))
			eventually(t, "the new node serves", func() bool { return b.choose(request(), nil) == at("sn") })
			const requests = 4200
			counts := make(map[string]int)
			for range requests {
				counts[b.choose(request(), nil)]++
			}
			if n := counts[at("sn")]; n < 130 || n > 290 {
				t.Errorf("the new node got %d of %d requests, want about 200", n, requests)
			}
			if n := counts[at("st")]; n < 1850 || n > 2150 {
				t.Errorf("the node of the other source got %d of %d requests, want about 2000", n, requests)
			}
		})
	}
}

// TestUnderMultiLearnedSharesAreOfAll has policies that learn of nodes choose where nothing
// is known yet: equal nodes get equal shares, however many their source has.
func TestUnderMultiLearnedSharesAreOfAll(t *testing.T) {
	for _, what := range []string{"least_load", "least_latency"} {
		b := newBesides(t, policy(what), []map[string]float64{numbered(what+"-m", 8, 1), numbered(what+"-f", 2, 1)}, nil)
		const requests = 5000
		few := 0
		for range requests {
			if address := b.choose(request(), nil); address == at(what+"-f0") || address == at(what+"-f1") {
				few++
			}
		}
		if few < requests/5*85/100 || few > requests/5*115/100 {
			t.Errorf("%s: two of ten nodes, of another source, got %d of %d requests, want about %d", what, few, requests, requests/5)
		}
	}
}

// TestUnderMultiUnderLoad has many requests choose at once while the fleets change, some
// of which hold what they got for a while: each gets an upstream, and where the nodes are
// equal and stay, each has as many turns as another.
func TestUnderMultiUnderLoad(t *testing.T) {
	for _, what := range []string{"random", "random_choose", "round_robin", "least_conn", "least_load", "least_latency", "cookie", "uri_hash"} {
		t.Run(what, func(t *testing.T) {
			one, m := newMemory(t)
			two := one + " two"
			other := addMemory(t, two)
			for i := range 5 {
				list(t, m, fmt.Sprint("stays", i), fmt.Sprint("http://10.1.0.1:", 1+i))
				list(t, other, fmt.Sprint("stays", i), fmt.Sprint("http://10.1.0.2:", 1+i))
			}
			var sources []any
			for _, registry := range []string{one, two} {
				sources = append(sources, map[string]any{"source": "discovery", "registry": map[string]any{"backend": "memory", "name": registry}})
			}
			load := policy(what)
			load["retries"] = 2
			b := &besides{t: t, handler: provisionHandler(t, map[string]any{"load_balancing": load,
				"health_checks":     passive,
				"dynamic_upstreams": map[string]any{"source": "multi", "sources": sources}})}
			b.choose(request(), httptest.NewRecorder())
			var group sync.WaitGroup
			var stop atomic.Bool
			var mu sync.Mutex
			counts := make(map[string]int)
			for range 4 {
				group.Go(func() {
					for !stop.Load() {
						r := request()
						r.RequestURI = fmt.Sprint("/", rand.IntN(1000))
						pool := b.pool(r)
						runtime.Gosched()
						up := b.handler.LoadBalancing.SelectionPolicy.Select(pool, r, httptest.NewRecorder())
						if up == nil {
							t.Errorf("of %d upstreams none was chosen", len(pool))
							return
						}
						mu.Lock()
						counts[up.Dial]++
						mu.Unlock()
					}
				})
			}
			for i := range 100 {
				list(t, m, fmt.Sprint("n", i%10), fmt.Sprint("http://10.1.0.3:", 1+i%10))
				m.Expire(fmt.Sprint("n", (i+3)%10))
				list(t, other, fmt.Sprint("n", i%7), fmt.Sprint("http://10.1.0.4:", 1+i%7), "weight", "2")
				other.Expire(fmt.Sprint("n", (i+2)%7))
			}
			eventually(t, "many were chosen", func() bool {
				mu.Lock()
				defer mu.Unlock()
				sum := 0
				for _, n := range counts {
					sum += n
				}
				return sum > 4000
			})
			stop.Store(true)
			group.Wait()
			if what != "round_robin" {
				return
			}
			least, most := math.MaxInt, 0
			for i := range 5 {
				for _, host := range []string{"10.1.0.1", "10.1.0.2"} {
					n := counts[fmt.Sprint(host, ":", 1+i)]
					least, most = min(least, n), max(most, n)
				}
			}
			if most > least+least/5+20 {
				t.Errorf("equal nodes had %d to %d turns", least, most)
			}
		})
	}
}

// TestUnderMultiTheChosenNodeIsKnown holds that placeholders name the node, whichever
// source it is of.
func TestUnderMultiTheChosenNodeIsKnown(t *testing.T) {
	b := newBesides(t, policy("random"), []map[string]float64{numbered("p", 5, 1), numbered("o", 5, 1)}, []string{"127.99.0.12:80"})
	w := b.handler.LoadBalancing.SelectionPolicy.(*policyWrapper)
	w.nodes = true
	for range 200 {
		r := request()
		address := b.choose(r, nil)
		vars := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
		node := chosenOf(vars, r).node
		switch {
		case strings.HasPrefix(address, "127.99."):
			if node != nil {
				t.Fatalf("%s is no node, and is said to be %s", address, node.Node.ID)
			}
		case node == nil || at(node.Node.ID) != address:
			t.Fatalf("%s is said to be %v", address, node)
		}
	}
}
