package benchmarks

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// BenchmarkThroughput compares, in one process and in turns, the requests a
// second through static upstreams and through the same upstreams as discovered
// nodes, under the same policy. It reports the median of the ratios of each pair
// of turns.
func BenchmarkThroughput(b *testing.B) {
	const (
		nodes   = 10
		turns   = 7
		turn    = time.Second
		clients = 16
	)
	for _, policy := range []string{"random", "round_robin", "least_conn"} {
		b.Run(policy, func(b *testing.B) {
			server := natstest.Start(b)
			bucket := server.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 1, Storage: jetstream.FileStorage})
			var static []string
			for i := range nodes {
				backend := newBackend(b)
				static = append(static, backend)
				record := fmt.Sprintf(`{"nodeId":"n%d","endpoint":"http://%s","load":0,"metadata":{"lease":"1h"}}`, i, backend)
				if _, err := bucket.PutString(context.Background(), fmt.Sprintf("node.n%d", i), record); err != nil {
					b.Fatal(err)
				}
			}
			ports := []string{freeport.String(b), freeport.String(b)}
			runCaddy(b, "http://127.0.0.1:"+ports[0]+" {\nreverse_proxy "+strings.Join(static, " ")+" {\nlb_policy "+policy+"\n}\n}\n"+
				"http://127.0.0.1:"+ports[1]+" {\nreverse_proxy {\ndynamic discovery "+server.URL()+"\nlb_policy "+policy+"\n}\n}\n")

			measure := func(port string) float64 {
				var group sync.WaitGroup
				counts := make([]int, clients)
				end := time.Now().Add(turn)
				began := time.Now()
				for i := range clients {
					group.Go(func() {
						conn := dial(b, "127.0.0.1:"+port)
						for time.Now().Before(end) {
							if status := conn.get(b, ""); status != 200 {
								b.Errorf("status %d", status)
								return
							}
							counts[i]++
						}
					})
				}
				group.Wait()
				total := 0
				for _, n := range counts {
					total += n
				}
				return float64(total) / time.Since(began).Seconds()
			}
			var rates [2][]float64
			var ratios []float64
			for b.Loop() {
				measure(ports[0])
				measure(ports[1]) // both are warm now
				for range turns {
					a, d := measure(ports[0]), measure(ports[1])
					rates[0], rates[1] = append(rates[0], a), append(rates[1], d)
					ratios = append(ratios, d/a)
				}
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(rates[0]), "static-req/s")
			b.ReportMetric(median(rates[1]), "discovery-req/s")
			b.ReportMetric(median(ratios), "ratio")
		})
	}
}

// BenchmarkHeartbeats counts the heartbeats that 10,000 nodes send through a
// real bucket and a directory absorbs, and the snapshots that it publishes for
// them, which should be none.
func BenchmarkHeartbeats(b *testing.B) {
	const nodes = 10_000
	server := natstest.Start(b)
	server.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 1, Storage: jetstream.FileStorage})
	js := server.JetStream()
	put := func(i int, load float64) {
		record := fmt.Sprintf(`{"nodeId":"orders-%d","endpoint":"http://10.0.%d.%d:5001","load":%g,"metadata":{"service":"orders","zone":"eu-1","lease":"1h"}}`, i, i/250, i%250, load)
		if _, err := js.PublishAsync(fmt.Sprintf("$KV.catga_nodes.node.orders-%d", i), []byte(record), jetstream.WithStallWait(time.Minute)); err != nil {
			b.Fatal(err)
		}
	}
	for i := range nodes {
		put(i, 0)
	}
	<-js.PublishAsyncComplete()

	registry, err := natskv.Open(natskv.Config{URLs: []string{server.URL()}})
	if err != nil {
		b.Fatal(err)
	}
	directory := discovery.NewDirectory(registry, discovery.Options{Probe: discoverytest.RefuseConnection})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	began := time.Now()
	go func() {
		defer close(done)
		_ = directory.Run(ctx)
	}()
	defer func() {
		cancel()
		<-done
		_ = registry.Close()
	}()
	<-directory.Synced()
	synced := time.Since(began)
	first := directory.Snapshot()
	if got := len(first.Nodes()); got != nodes {
		b.Fatalf("listed %d nodes, want %d", got, nodes)
	}

	beats := 0
	began = time.Now()
	for b.Loop() {
		beats++
		put(beats%nodes, float64(beats))
	}
	<-js.PublishAsyncComplete()
	last := directory.Snapshot().Node(fmt.Sprintf("orders-%d", beats%nodes))
	for last.Load() != float64(beats) {
		time.Sleep(100 * time.Microsecond)
	}
	b.ReportMetric(float64(synced.Milliseconds()), "ms-to-synced")
	b.ReportMetric(float64(beats)/time.Since(began).Seconds(), "heartbeats/s")
	b.ReportMetric(float64(directory.Snapshot().Number-first.Number), "snapshots")
}

func median(v []float64) float64 {
	sorted := slices.Sorted(slices.Values(v))
	return sorted[len(sorted)/2]
}
