package benchmarks

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// changes is how many joins, and as many leaves, are timed.
const changes = 500

// BenchmarkPropagation times, on the real binary and a real registry, how long it
// takes from the writing of a record to the first request that the new node
// serves, and from its removal to the first request that it does not serve any
// more. In the same run it times what nobody can do without: a bare watcher of
// the bucket that sees the same change, and one request. What is left over is
// what the plugin adds.
//
// A request that comes too early is answered 503 and asked again at once, so a
// figure includes up to one request more than it must.
func BenchmarkPropagation(b *testing.B) {
	server := natstest.Start(b)
	bucket := server.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 1, Storage: jetstream.FileStorage})
	port := freeport.String(b)
	runCaddy(b, "http://127.0.0.1:"+port+` {
		reverse_proxy {
			dynamic discovery `+server.URL()+` {
				service {header.X-Service}
			}
		}
	}`)
	backend := newBackend(b)
	conn := dial(b, "127.0.0.1:"+port)

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	watcher, err := bucket.WatchAll(ctx)
	if err != nil {
		b.Fatal(err)
	}
	seen := make(chan time.Time, 16)
	go func() {
		for e := range watcher.Updates() {
			if e != nil {
				seen <- time.Now()
			}
		}
	}()

	var join, leave, joinSeen, leaveSeen, request []time.Duration
	for b.Loop() {
		for i := range changes {
			service := fmt.Sprintf("s%d", i)
			key := "node.n" + service
			record := fmt.Sprintf(`{"nodeId":"n%s","endpoint":"http://%s","load":0,"metadata":{"service":%q}}`, service, backend, service)
			// One change at a time: a storm is another thing.
			time.Sleep(100 * time.Millisecond)

			began := time.Now()
			if _, err := bucket.PutString(ctx, key, record); err != nil {
				b.Fatal(err)
			}
			for conn.get(b, service) != 200 {
			}
			join = append(join, time.Since(began))
			joinSeen = append(joinSeen, (<-seen).Sub(began))

			began = time.Now()
			if conn.get(b, service) != 200 {
				b.Fatal("a listed node did not serve")
			}
			request = append(request, time.Since(began))

			time.Sleep(100 * time.Millisecond)
			began = time.Now()
			if err := bucket.Delete(ctx, key); err != nil {
				b.Fatal(err)
			}
			for conn.get(b, service) == 200 {
			}
			leave = append(leave, time.Since(began))
			leaveSeen = append(leaveSeen, (<-seen).Sub(began))
		}
	}
	b.ReportMetric(0, "ns/op")
	report := func(name string, all, watch []time.Duration) {
		for _, p := range []int{50, 99} {
			total, bare, one := percentile(all, p), percentile(watch, p), percentile(request, p)
			b.ReportMetric(float64(total.Microseconds()), fmt.Sprintf("µs-%s-p%d", name, p))
			b.ReportMetric(float64(bare.Microseconds()), fmt.Sprintf("µs-%s-bare-watcher-p%d", name, p))
			b.ReportMetric(float64((total - bare - one).Microseconds()), fmt.Sprintf("µs-%s-beyond-p%d", name, p))
		}
	}
	report("join", join, joinSeen)
	report("leave", leave, leaveSeen)
	for _, p := range []int{50, 99} {
		b.ReportMetric(float64(percentile(request, p).Microseconds()), fmt.Sprintf("µs-request-p%d", p))
	}
}

func percentile(d []time.Duration, p int) time.Duration {
	sorted := slices.Sorted(slices.Values(d))
	return sorted[min(len(sorted)*p/100, len(sorted)-1)]
}
