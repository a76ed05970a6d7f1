package natspubsub_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/backendtest"
)

// BenchmarkList is a whole Watch, from nothing to Synced and its end, of nodes
// that one Registry announces. "ms/answers" is when the last answer was emitted;
// the rest is waiting for another one.
func BenchmarkList(b *testing.B) {
	for _, n := range []int{100, 1_000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := start(b)
			announceMany(b, open(b, config(s)), n)
			r := open(b, config(s))
			var answers time.Duration
			b.ReportAllocs()
			for b.Loop() {
				ctx, cancel := context.WithCancel(b.Context())
				began, listed := time.Now(), 0
				var last time.Duration
				_ = r.Watch(ctx, func(e discovery.Event) {
					if e.Type == discovery.Synced {
						cancel()
						return
					}
					listed++
					last = time.Since(began)
				})
				cancel()
				if listed != n {
					b.Fatalf("listed %d nodes, want %d", listed, n)
				}
				answers += last
			}
			b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms/list")
			b.ReportMetric(answers.Seconds()*1000/float64(b.N), "ms/answers")
		})
	}
}

func BenchmarkPropagation(b *testing.B) {
	s := start(b)
	backendtest.BenchmarkPropagation(b, open(b, config(s)), open(b, config(s)))
}

// BenchmarkHeartbeat is what a listener spends on a heartbeat, of either kind,
// the server in the same process included.
func BenchmarkHeartbeat(b *testing.B) {
	for name, data := range map[string]string{
		"lean":   `{"nodeId":"orders-1","load":0.42,"timestamp":"2025-10-10T12:00:10.7654321Z"}`,
		"record": record("orders-1"),
	} {
		b.Run(name, func(b *testing.B) {
			s := start(b)
			nc := s.Conn()
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			var heard atomic.Int64
			synced, ended := make(chan struct{}), make(chan struct{})
			r := open(b, config(s))
			go func() {
				defer close(ended)
				_ = r.Watch(ctx, func(e discovery.Event) {
					if e.Type == discovery.Synced {
						close(synced)
						return
					}
					heard.Add(1)
				})
			}()
			<-synced
			b.ReportAllocs()
			sent := int64(0)
			for b.Loop() {
				if err := nc.Publish("catga.nodes.heartbeat", []byte(data)); err != nil {
					b.Fatal(err)
				}
				if sent++; sent%10_000 == 0 {
					if err := r.Verify(ctx); err != nil {
						b.Fatal(err)
					}
				}
			}
			if err := nc.Flush(); err != nil {
				b.Fatal(err)
			}
			if err := r.Verify(ctx); err != nil {
				b.Fatal(err)
			}
			if heard.Load() != sent {
				b.Errorf("heard %d of %d", heard.Load(), sent)
			}
			cancel()
			<-ended
		})
	}
}
