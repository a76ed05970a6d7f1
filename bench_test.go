package caddydiscovery

import (
	"fmt"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// BenchmarkLookup is what a request costs here, before Caddy does its part with
// what is returned.
func BenchmarkLookup(b *testing.B) {
	for _, nodes := range []int{1, 10, 100, 1_000, 10_000} {
		b.Run(fmt.Sprintf("nodes=%d", nodes), func(b *testing.B) {
			m := discoverytest.NewMemory()
			memories.Store(b.Name(), m)
			defer memories.Delete(b.Name())
			for i := range nodes {
				e, err := discovery.ParseEndpoint(fmt.Sprintf("http://10.0.%d.%d:5001", i/250, i%250))
				if err != nil {
					b.Fatal(err)
				}
				id := fmt.Sprintf("orders-%d", i)
				record, err := discovery.AppendRecord(nil, discovery.Node{
					ID: id, Endpoint: e, Metadata: map[string]string{discovery.KeyService: "orders"},
				}, time.Now())
				if err != nil {
					b.Fatal(err)
				}
				m.Put(id, record)
			}
			u := source(b, "registry memory "+b.Name()+"\nservice orders")
			r := httptest.NewRequest("GET", "/", nil)
			b.ReportAllocs()
			for b.Loop() {
				upstreams, err := u.GetUpstreams(r)
				if err != nil || len(upstreams) != nodes {
					b.Fatalf("looked up %d upstreams: %v", len(upstreams), err)
				}
			}
		})
	}
}
