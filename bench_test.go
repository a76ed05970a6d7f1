package caddydiscovery

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

// BenchmarkRoute is what a request costs that goes by its host, in fleets of one node for
// each of so many hosts, all of which are asked for in turn: hold it against
// BenchmarkLookup/random/nodes=1. Matcher is what `discovered` adds.
func BenchmarkRoute(b *testing.B) {
	for _, hosts := range []int{1, 1_000, 10_000} {
		m := discoverytest.NewMemory()
		name := fmt.Sprint(b.Name(), "/", hosts)
		memories.Store(name, m)
		defer memories.Delete(name)
		requests := make([]*http.Request, hosts)
		for i := range hosts {
			host := fmt.Sprintf("service-%d.apps.example.com", i)
			list(b, m, fmt.Sprint("n", i), "http://"+at(host), "hosts", host)
			requests[i] = request()
			requests[i].Host = host
		}
		u := source(b, "registry memory "+name+"\nroute", "load_balancing", policy("random"))
		u.start()
		for u.directory.Snapshot().Hosts().Len() < hosts {
			<-u.directory.Snapshot().Superseded()
		}
		lookup := func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				upstreams, err := u.GetUpstreams(requests[i%hosts])
				if err != nil || len(upstreams) != 1 {
					b.Fatalf("looked up %d upstreams: %v", len(upstreams), err)
				}
			}
		}
		b.Run(fmt.Sprintf("lookup/hosts=%d", hosts), func(b *testing.B) {
			for _, r := range requests {
				if _, err := u.GetUpstreams(r); err != nil {
					b.Fatal(err)
				}
			}
			lookup(b)
		})
		b.Run(fmt.Sprintf("matcher/hosts=%d", hosts), func(b *testing.B) {
			d := &Discovered{directory: u.directory}
			d.starting.Do(func() {})
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if match, err := d.MatchWithError(requests[i%hosts]); !match || err != nil {
					b.Fatal(match, err)
				}
			}
		})
	}
}

// BenchmarkLookup is what a request costs here, before Caddy does its part with
// what is returned.
func BenchmarkLookup(b *testing.B) {
	for _, kind := range []struct {
		name, options string
		policy        string
		weight        func(i int) string // "" for none
		want          int                // how many upstreams; 0 for all
	}{
		{"random", "", "random", nil, 1},
		{"random-weighted", "", "random", weighted, 1},
		{"random-slow_start", "slow_start 30s", "random", nil, 1},
		{"random_choose", "", "random_choose", nil, 2},
		{"round_robin", "", "round_robin", nil, 1},
		{"round_robin-weighted", "", "round_robin", weighted, 1},
		{"first", "", "first", nil, 1},
		{"least_conn", "", "least_conn", nil, 1},
		{"ip_hash", "", "ip_hash", nil, 1},
		{"cookie", "", "cookie", nil, 1},
		{"least_load", "", "least_load", nil, 1},
		{"least_latency", "", "least_latency", nil, 1},
		{"all", "", "somebodys", nil, 0},
		{"pick", "pick 2", "random", nil, 2},
		{"pick-weighted", "pick 2", "random", weighted, 2},
		{"pick-slow_start", "pick 2\nslow_start 30s", "random", nil, 2},
		{"pick-hash", "pick 2 hash {http.request.method}", "random", nil, 2},
		{"subset-pick", "subset 100\npick 2", "random", nil, 2},
	} {
		for _, nodes := range []int{1, 10, 100, 1_000, 10_000} {
			b.Run(fmt.Sprintf("%s/nodes=%d", kind.name, nodes), func(b *testing.B) {
				m := discoverytest.NewMemory()
				memories.Store(b.Name(), m)
				defer memories.Delete(b.Name())
				fill(b, m, nodes, kind.weight)
				u := source(b, "registry memory "+b.Name()+"\nservice orders\n"+kind.options, "load_balancing", policy(kind.policy))
				r := request()
				want := min(cmp.Or(kind.want, nodes), nodes)
				if _, err := u.GetUpstreams(r); err != nil {
					b.Fatal(err)
				}
				attempts, _ := attemptsOf(r)
				b.ReportAllocs()
				for b.Loop() {
					upstreams, err := u.GetUpstreams(r)
					if err != nil || len(upstreams) != want {
						b.Fatalf("looked up %d upstreams: %v", len(upstreams), err)
					}
					if attempts != nil {
						attempts.current = attempts.current[:0] // as the policy does
					}
				}
			})
		}
	}
}

// BenchmarkMulti is what a request costs here where the policy chooses among the nodes of
// two sources, both included.
func BenchmarkMulti(b *testing.B) {
	for _, kind := range []string{"random", "random_choose", "round_robin", "least_conn", "ip_hash"} {
		for _, nodes := range []int{10, 1_000, 10_000} {
			b.Run(fmt.Sprintf("%s/nodes=%d", kind, nodes), func(b *testing.B) {
				var sources []any
				for i := range 2 {
					name := fmt.Sprint(b.Name(), i)
					m := discoverytest.NewMemory()
					memories.Store(name, m)
					defer memories.Delete(name)
					fill(b, m, nodes, nil)
					sources = append(sources, map[string]any{"source": "discovery", "registry": map[string]any{"backend": "memory", "name": name}})
				}
				handler := provisionHandler(b, map[string]any{"load_balancing": policy(kind), "dynamic_upstreams": map[string]any{"source": "multi", "sources": sources}})
				r, states := request(), make(map[string]*reverseproxy.Host)
				if _, err := handler.DynamicUpstreams.GetUpstreams(r); err != nil { // which waits for the listings
					b.Fatal(err)
				}
				handler.LoadBalancing.SelectionPolicy.Select(nil, r, nil)
				b.ReportAllocs()
				for b.Loop() {
					pool, err := handler.DynamicUpstreams.GetUpstreams(r)
					if err != nil {
						b.Fatal(err)
					}
					for _, up := range pool {
						if up.Host = states[up.Dial]; up.Host == nil {
							up.Host = new(reverseproxy.Host)
							states[up.Dial] = up.Host
						}
					}
					if handler.LoadBalancing.SelectionPolicy.Select(pool, r, nil) == nil {
						b.Fatal("nothing was chosen")
					}
					a, _ := attemptsOf(r)
					a.tried = picker.AddressSet{} // for the next one to be a first attempt
				}
			})
		}
	}
}

// BenchmarkWatched is what a request costs from the choice of a node to the end of its
// response, with a transport that answers at once: without observers, the same where it is
// noted anyway what requests have been through, and with observers that do nothing.
func BenchmarkWatched(b *testing.B) {
	for _, test := range []struct{ observers, retries int }{{0, 0}, {0, 1}, {1, 1}, {3, 1}} {
		b.Run(fmt.Sprintf("observers=%d/retries=%d", test.observers, test.retries), func(b *testing.B) {
			name, m := newMemory(b)
			fill(b, m, 10, nil)
			witnesses.Store("orders", slices.Repeat(observers{idle{}}, test.observers))
			defer witnesses.Delete("orders")
			handler := provisionHandler(b, map[string]any{"load_balancing": map[string]any{"retries": test.retries}, "dynamic_upstreams": map[string]any{
				"source": "watched", "service": "orders", "registry": map[string]any{"backend": "memory", "name": name},
			}})
			u := &handler.DynamicUpstreams.(*watchedSource).Upstreams
			u.directory.start()
			<-u.directory.Synced()
			response := &http.Response{StatusCode: 200}
			transport := http.RoundTripper(instant{response})
			if t, ok := handler.Transport.(*traffic.Transport); ok {
				t.Next = transport
				transport = t
			}
			r := request()
			vars := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
			body := io.NopCloser(strings.NewReader(""))
			b.ReportAllocs()
			for b.Loop() {
				delete(vars, attemptsKey)
				pool, _ := u.GetUpstreams(r)
				host(pool)
				to := reverseproxy.DialInfo{Upstream: handler.LoadBalancing.SelectionPolicy.Select(pool, r, nil)}
				response.Body = body
				res, err := transport.RoundTrip(r.WithContext(context.WithValue(r.Context(), caddy.CtxKey("reverse_proxy.dial_info"), to)))
				if err != nil {
					b.Fatal(err)
				}
				_, _ = res.Body.Read(nil)
				res.Body.Close()
			}
		})
	}
}

// idle is an observer that does nothing.
type idle struct{}

func (idle) Sent(*traffic.Exchange)     {}
func (idle) Answered(*traffic.Exchange) {}
func (idle) Done(*traffic.Exchange)     {}

// instant is a transport that always has the same response.
type instant struct{ *http.Response }

func (i instant) RoundTrip(*http.Request) (*http.Response, error) { return i.Response, nil }

// BenchmarkBareDraw is the least that any source does that returns two candidates of
// many, to hold BenchmarkLookup against.
func BenchmarkBareDraw(b *testing.B) {
	addresses := make([]string, 10_000)
	for i := range addresses {
		addresses[i] = fmt.Sprintf("10.0.%d.%d:5001", i/250, i%250)
	}
	b.ReportAllocs()
	var upstreams []*reverseproxy.Upstream
	for b.Loop() {
		i, j := rand.IntN(len(addresses)), rand.IntN(len(addresses))
		block := make([]reverseproxy.Upstream, 2)
		block[0].Dial, block[1].Dial = addresses[i], addresses[j]
		upstreams = []*reverseproxy.Upstream{&block[0], &block[1]}
	}
	if len(upstreams) != 2 {
		b.Fatal("nothing was drawn")
	}
}

// BenchmarkPicker is what the first request after a change of the fleet costs. The
// directory is charged for it.
func BenchmarkPicker(b *testing.B) {
	for _, kind := range []struct{ name, options string }{
		{"random", ""}, {"pick", "pick 2"}, {"pick-hash", "pick 2 hash {client_ip}"}, {"subset", "subset 100\npick 2"},
		{"prefer", "prefer zone eu\npick 2"},
	} {
		for _, nodes := range []int{100, 10_000} {
			b.Run(fmt.Sprintf("%s/nodes=%d", kind.name, nodes), func(b *testing.B) {
				m := discoverytest.NewMemory()
				memories.Store(b.Name(), m)
				defer memories.Delete(b.Name())
				fill(b, m, nodes, weighted)
				u := source(b, "registry memory "+strconv.Quote(b.Name())+"\nservice orders\n"+kind.options)
				snapshot := u.directory.Snapshot()
				b.ReportAllocs()
				choice := u.shortlist.choice(request())
				for b.Loop() {
					if u.builder.Build(snapshot, &u.pickers.Query).Pick(nil, choice, nil) == nil {
						b.Fatal("nothing was picked")
					}
				}
			})
		}
	}
}

// weighted gives nodes different weights.
func weighted(i int) string { return fmt.Sprint(1 + i%7) }

// fill lists a service of some nodes.
func fill(tb testing.TB, m *discoverytest.Memory, nodes int, weight func(i int) string) {
	tb.Helper()
	for i := range nodes {
		e, err := discovery.ParseEndpoint(fmt.Sprintf("http://10.0.%d.%d:5001", i/250, i%250))
		if err != nil {
			tb.Fatal(err)
		}
		id := fmt.Sprintf("orders-%d", i)
		metadata := map[string]string{discovery.KeyService: "orders"}
		if weight != nil {
			metadata[discovery.KeyWeight] = weight(i)
		}
		record, err := discovery.AppendRecord(nil, discovery.Node{ID: id, Endpoint: e, Metadata: metadata}, time.Now())
		if err != nil {
			tb.Fatal(err)
		}
		m.Put(id, record)
	}
}

// request is a request as Caddy's server hands it to a handler.
func request() *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), httptest.NewRecorder(), &caddyhttp.Server{})
}

// replacerOf returns the request's replacer.
func replacerOf(r *http.Request) *caddy.Replacer {
	return r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
}
