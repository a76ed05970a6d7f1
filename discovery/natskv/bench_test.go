package natskv_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/backendtest"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// fill puts n nodes into the bucket catga_nodes, which must exist.
func fill(t testing.TB, s *natstest.Server, n int) {
	t.Helper()
	js := s.JetStream()
	for i := range n {
		id := fmt.Sprintf("orders-%05d", i)
		record, err := discovery.AppendRecord(nil, node(t, id, "service", "orders", "zone", "eu-1"), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := js.PublishAsync("$KV.catga_nodes.node."+id, record); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-js.PublishAsyncComplete():
	case <-time.After(patience):
		t.Fatalf("%d records were not stored after %v", n, patience)
	}
}

// BenchmarkList is a whole Watch, from nothing to Synced and its end.
func BenchmarkList(b *testing.B) {
	for _, n := range []int{100, 1_000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := natstest.Start(b)
			r := open(b, natskv.Config{URLs: []string{s.URL()}, MaxBytes: 128 << 20})
			list := func(want int) {
				ctx, cancel := context.WithCancel(b.Context())
				defer cancel()
				listed := 0
				_ = r.Watch(ctx, func(e discovery.Event) {
					switch e.Type {
					case discovery.Put:
						listed++
					case discovery.Synced:
						cancel()
					default:
					}
				})
				if listed != want {
					b.Fatalf("listed %d nodes, want %d", listed, want)
				}
			}
			list(0) // creates the bucket
			fill(b, s, n)
			b.ReportAllocs()
			for b.Loop() {
				list(n)
			}
			b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms/list")
		})
	}
}

func BenchmarkPropagation(b *testing.B) {
	s := natstest.Start(b)
	config := natskv.Config{URLs: []string{s.URL()}}
	backendtest.BenchmarkPropagation(b, open(b, config), open(b, config))
}
