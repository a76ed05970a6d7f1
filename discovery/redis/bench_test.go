package redis

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

func layouts(b *testing.B, run func(b *testing.B, s *redistest.Server, c Config)) {
	for _, l := range []struct{ name, layout, notify string }{
		{"SortedSet", LayoutSortedSet, ""},
		{"KeysNotified", LayoutKeys, "K$gx"},
	} {
		b.Run(l.name, func(b *testing.B) {
			s := redistest.Start(b, redistest.Notify(`"`+l.notify+`"`))
			run(b, s, Config{URLs: []string{s.URL()}, Layout: l.layout})
		})
	}
}

// BenchmarkPropagation measures from the call of Announce to the event.
func BenchmarkPropagation(b *testing.B) {
	layouts(b, func(b *testing.B, _ *redistest.Server, c Config) {
		writer := openRegistry(b, c)
		_, events, done := watchEvents(b, openRegistry(b, c))
		n := newNode("a")
		var took []time.Duration
		for b.Loop() {
			n.Load++
			began := time.Now()
			if err := writer.Announce(context.Background(), n); err != nil {
				b.Fatal(err)
			}
			for {
				if e := nextEvent(b, events, done); e.Type == discovery.Put && e.Node.Load == n.Load {
					break
				}
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
		b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
	})
}

// BenchmarkHeartbeat measures heartbeats that change nothing, from 16 callers on
// two registries.
func BenchmarkHeartbeat(b *testing.B) {
	layouts(b, func(b *testing.B, _ *redistest.Server, c Config) {
		var registries []*Registry
		for range 2 {
			registries = append(registries, openRegistry(b, c))
		}
		var (
			mu   sync.Mutex
			next int
		)
		b.SetParallelism(8)
		b.RunParallel(func(pb *testing.PB) {
			mu.Lock()
			i := next
			next++
			mu.Unlock()
			n := newNode(fmt.Sprint("n", i))
			for pb.Next() {
				if err := registries[i%len(registries)].Announce(context.Background(), n); err != nil {
					b.Error(err)
					return
				}
			}
		})
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "beats/s")
	})
}

// BenchmarkList measures a watch from its start to Synced.
func BenchmarkList(b *testing.B) {
	layouts(b, func(b *testing.B, s *redistest.Server, c Config) {
		for _, n := range []int{100, 1000, 10_000} {
			b.Run(fmt.Sprint(n), func(b *testing.B) {
				fill(b, s, c, n)
				r := openRegistry(b, c)
				for b.Loop() {
					ctx, cancel := context.WithCancel(context.Background())
					listed := 0
					_ = r.Watch(ctx, func(e discovery.Event) {
						switch e.Type {
						case discovery.Put:
							listed++
						case discovery.Synced:
							cancel()
						}
					})
					cancel()
					if listed != n {
						b.Fatalf("listed %d nodes", listed)
					}
				}
			})
		}
	})
}

// BenchmarkVerify measures a whole look and what it costs to compare, at rest.
func BenchmarkVerify(b *testing.B) {
	layouts(b, func(b *testing.B, s *redistest.Server, c Config) {
		for _, n := range []int{100, 1000, 10_000} {
			b.Run(fmt.Sprint(n), func(b *testing.B) {
				fill(b, s, c, n)
				r := openRegistry(b, c)
				ctx, cancel := context.WithCancel(context.Background())
				done := make(chan struct{})
				synced := make(chan struct{})
				go func() {
					defer close(done)
					_ = r.Watch(ctx, func(e discovery.Event) {
						if e.Type == discovery.Synced {
							close(synced)
						}
					})
				}()
				<-synced
				for b.Loop() {
					if err := r.Verify(ctx); err != nil {
						b.Fatal(err)
					}
				}
				cancel()
				<-done
			})
		}
	})
}

// fill makes a fleet of n nodes of our own writers.
func fill(b *testing.B, s *redistest.Server, c Config, n int) {
	b.Helper()
	ctx := context.Background()
	if err := s.Client().FlushAll(ctx).Err(); err != nil {
		b.Fatal(err)
	}
	record := func(i int) []byte {
		data, err := discovery.AppendRecord(nil, newNode(fmt.Sprint("node-", i)), time.Now())
		if err != nil {
			b.Fatal(err)
		}
		return data
	}
	pipe := s.Client().Pipeline()
	for i := range n {
		if c.Layout == LayoutKeys {
			pipe.Set(ctx, fmt.Sprint(DefaultKey, ":node-", i), record(i), time.Hour)
		} else {
			pipe.ZAdd(ctx, DefaultKey, goredis.Z{Score: float64(time.Now().UnixMilli()), Member: record(i)})
		}
	}
	if _, err := pipe.Exec(ctx); err != nil {
		b.Fatal(err)
	}
}
