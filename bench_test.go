package caddydiscovery

import (
	"cmp"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// BenchmarkLookup is what a request costs here, before Caddy does its part with
// what is returned.
func BenchmarkLookup(b *testing.B) {
	for _, kind := range []struct {
		name, options string
		weight        func(i int) string // "" for none
		want          int                // how many upstreams; 0 for all
	}{
		{"all", "", nil, 0},
		{"pick", "pick 2", nil, 2},
		{"pick-weighted", "pick 2", func(i int) string { return fmt.Sprint(1 + i%7) }, 2},
		{"pick-slow_start", "pick 2\nslow_start 30s", nil, 2},
		{"pick-hash", "pick 2 hash {http.request.method}", nil, 2},
		{"subset-pick", "subset 100\npick 2", nil, 2},
	} {
		for _, nodes := range []int{1, 10, 100, 1_000, 10_000} {
			b.Run(fmt.Sprintf("%s/nodes=%d", kind.name, nodes), func(b *testing.B) {
				m := discoverytest.NewMemory()
				memories.Store(b.Name(), m)
				defer memories.Delete(b.Name())
				fill(b, m, nodes, kind.weight)
				u := source(b, "registry memory "+b.Name()+"\nservice orders\n"+kind.options)
				r := request()
				want := min(cmp.Or(kind.want, nodes), nodes)
				b.ReportAllocs()
				for b.Loop() {
					upstreams, err := u.GetUpstreams(r)
					if err != nil || len(upstreams) != want {
						b.Fatalf("looked up %d upstreams: %v", len(upstreams), err)
					}
				}
			})
		}
	}
}

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
