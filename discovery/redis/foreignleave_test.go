package redis

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// BenchmarkForeignLeave measures from the ZREM of a writer that runs no script of ours to
// the event, and what of it keeps the server busy.
func BenchmarkForeignLeave(b *testing.B) {
	for _, nodes := range []int{100, 10_000} {
		b.Run(fmt.Sprintf("nodes=%d", nodes), func(b *testing.B) {
			s := redistest.Start(b, redistest.Notify("Kz"))
			for i := range nodes {
				addMember(b, s.Client(), foreignRecord(fmt.Sprint("n", i), 0), time.Minute)
			}
			_, events, done := watchEvents(b, openRegistry(b, Config{URLs: []string{s.URL()}}))
			var took []time.Duration
			looks, busy := commandCalls(b, s.Client(), "evalsha")
			for i := 0; b.Loop() && i < nodes; i++ {
				began := time.Now()
				if err := s.Client().ZRem(context.Background(), DefaultKey, foreignRecord(fmt.Sprint("n", i), 0)).Err(); err != nil {
					b.Fatal(err)
				}
				for nextEvent(b, events, done).Type != discovery.Left {
				}
				took = append(took, time.Since(began))
			}
			after, spent := commandCalls(b, s.Client(), "evalsha")
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
			b.ReportMetric(float64(after-looks)/float64(len(took)), "looks/op")
			b.ReportMetric(float64((spent-busy).Microseconds())/float64(len(took)), "server-µs/op")
		})
	}
}
