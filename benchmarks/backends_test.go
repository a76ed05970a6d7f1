package benchmarks

import (
	"context"
	"flag"
	"fmt"
	"math"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
	"github.com/caddy-discovery/caddy-discovery/discovery/redis"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

var report = flag.String("report", "", "folder into which BenchmarkBackends and BenchmarkProxy write benchmarks.md and their charts")

func TestMain(m *testing.M) {
	if natstest.Child() || nodesChild() || watcherChild() {
		return
	}
	os.Exit(m.Run())
}

// A contender is one kind of registry on a server of its own.
type contender struct {
	name, server string
	pid          int
	// open returns a connection, through the address if it is not "".
	open func(address string) discovery.Registry
	// address is where the server listens.
	address string
}

func contenders(b *testing.B) []contender {
	open := func(r discovery.Registry, err error) discovery.Registry {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = r.Close() })
		return r
	}
	or := func(address, server string) string {
		if address == "" {
			return server
		}
		return address
	}
	kv := natstest.StartProcess(b)
	kvAddress := strings.TrimPrefix(kv.URL(), "nats://")
	core := natstest.StartProcess(b)
	coreAddress := strings.TrimPrefix(core.URL(), "nats://")
	set := redistest.Start(b)
	keys := redistest.Start(b, redistest.Notify("K$gx"))
	redisAt := func(server *redistest.Server, layout string) func(string) discovery.Registry {
		return func(address string) discovery.Registry {
			return open(redis.Open(redis.Config{URLs: []string{"redis://" + or(address, server.Addr())}, Layout: layout}))
		}
	}
	return []contender{
		{"nats_kv", "NATS JetStream, file storage", kv.PID(), func(address string) discovery.Registry {
			return open(natskv.Open(natskv.Config{
				URLs:     []string{"nats://" + or(address, kvAddress)},
				MaxBytes: 256 << 20,
			}))
		}, kvAddress},
		{"nats", "NATS, core pub/sub", core.PID(), func(address string) discovery.Registry {
			return open(natspubsub.Open(natspubsub.Config{URLs: []string{"nats://" + or(address, coreAddress)}}))
		}, coreAddress},
		{"redis sorted_set", "Redis, changes by stream", set.PID(), redisAt(set, redis.LayoutSortedSet), set.Addr()},
		{"redis keys", "Redis, keyspace notifications", keys.PID(), redisAt(keys, redis.LayoutKeys), keys.Addr()},
	}
}

// result is what was measured of one contender.
type result struct {
	contender
	seen50, seen99 time.Duration
	heartbeats     float64               // a second
	sync           map[int]time.Duration // by number of nodes
	memory         int64                 // of the server, with the most nodes, in bytes
	wire           float64               // bytes a heartbeat, both ways
}

// fleetSizes are the fleets whose first sync is timed.
var fleetSizes = []int{100, 1_000, 10_000}

// BenchmarkBackends compares the kinds of registry, each on a real server in a
// process of its own, in one run and in turns. With -report it writes the table
// and the charts.
func BenchmarkBackends(b *testing.B) {
	for b.Loop() {
		var results []*result
		for _, c := range contenders(b) {
			results = append(results, &result{contender: c, sync: make(map[int]time.Duration)})
		}
		timeChanges(b, results)
		for _, r := range results {
			r.heartbeats = countHeartbeats(b, r.contender)
			r.wire = countBytes(b, r.contender)
		}
		for _, n := range fleetSizes {
			timeSync(b, results, n)
		}
		for _, r := range results {
			r.memory = residentMemory(b, r.pid)
			name := strings.ReplaceAll(r.name, " ", "-")
			b.ReportMetric(float64(r.seen50.Microseconds()), "µs-p50-"+name)
			b.ReportMetric(float64(r.seen99.Microseconds()), "µs-p99-"+name)
			b.ReportMetric(r.heartbeats, "heartbeats/s-"+name)
		}
		if *report != "" {
			if err := writeReport(*report, results); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}

// follow runs a directory on a connection of its own, until the function that it
// returns is called.
func follow(b *testing.B, c contender) (*discovery.Directory, func()) {
	b.Helper()
	registry := c.open("")
	d := discovery.NewDirectory(registry, discovery.Options{Probe: discoverytest.RefuseConnection})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = d.Run(ctx)
	}()
	select {
	case <-d.Synced():
	case <-time.After(time.Minute):
		b.Fatalf("%s: not synced: %+v", c.name, d.Status())
	}
	return d, func() {
		cancel()
		<-done
		_ = registry.Close()
	}
}

func node(b *testing.B, i int, load float64) discovery.Node {
	b.Helper()
	endpoint, err := discovery.ParseEndpoint(fmt.Sprintf("http://10.0.%d.%d:5001", i/250, i%250))
	if err != nil {
		b.Fatal(err)
	}
	return discovery.Node{ID: fmt.Sprintf("orders-%d", i), Endpoint: endpoint, Load: load, Metadata: map[string]string{
		discovery.KeyService: "orders", discovery.KeyZone: "eu-1", discovery.KeyLease: "1h", discovery.KeyInstance: "benchmark",
	}}
}

func announce(b *testing.B, r discovery.Announcer, n discovery.Node) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.Announce(ctx, n); err != nil {
		b.Errorf("announcing: %v", err)
	}
}

// timeChanges times from before a join is announced until the directory shows
// it, one contender after the other in each round.
func timeChanges(b *testing.B, results []*result) {
	const rounds = 300
	type pair struct {
		directory *discovery.Directory
		writer    discovery.Registry
		times     []time.Duration
	}
	pairs := make([]*pair, len(results))
	for i, r := range results {
		d, stop := follow(b, r.contender)
		defer stop()
		pairs[i] = &pair{directory: d, writer: r.open("")}
	}
	for round := range rounds {
		for _, p := range pairs {
			n := node(b, round, 0)
			began := time.Now()
			announce(b, p.writer, n)
			for {
				snapshot := p.directory.Snapshot()
				if snapshot.Node(n.ID) != nil {
					break
				}
				<-snapshot.Superseded()
			}
			p.times = append(p.times, time.Since(began))
		}
		// A round per 100 ms is no storm, which would be coalesced.
		time.Sleep(100 * time.Millisecond)
	}
	for i, r := range results {
		r.seen50, r.seen99 = percentile(pairs[i].times, 50), percentile(pairs[i].times, 99)
	}
}

// countHeartbeats counts the acknowledged heartbeats that eight writers get
// through in two seconds.
func countHeartbeats(b *testing.B, c contender) float64 {
	const writers, length = 8, 2 * time.Second
	counts := make([]int, writers)
	registries := make([]discovery.Registry, writers)
	for i := range registries {
		registries[i] = c.open("")
		announce(b, registries[i], node(b, i, 0))
	}
	began := time.Now()
	var group sync.WaitGroup
	for i, r := range registries {
		group.Go(func() {
			for time.Since(began) < length {
				counts[i]++
				announce(b, r, node(b, i, float64(counts[i])))
			}
		})
	}
	group.Wait()
	took, total := time.Since(began), 0
	for _, n := range counts {
		total += n
	}
	for _, r := range registries {
		_ = r.Close()
	}
	return float64(total) / took.Seconds()
}

// timeSync fills the registry up to n nodes, and takes the median of five first
// syncs.
func timeSync(b *testing.B, results []*result, n int) {
	for _, r := range results {
		var group sync.WaitGroup
		for w := range 8 {
			group.Go(func() {
				// Whoever announced stays: on pub/sub the nodes answer for themselves.
				writer := r.open("")
				for i := w; i < n; i += 8 {
					announce(b, writer, node(b, i, 0))
				}
			})
		}
		group.Wait()
	}
	times := make([][]float64, len(results))
	for range 5 {
		for i, r := range results {
			began := time.Now()
			d, stop := follow(b, r.contender)
			times[i] = append(times[i], time.Since(began).Seconds())
			if got := len(d.Snapshot().Nodes()); got < n {
				b.Errorf("%s listed %d nodes, want at least %d", r.name, got, n)
			}
			stop()
		}
	}
	for i, r := range results {
		r.sync[n] = time.Duration(median(times[i]) * float64(time.Second))
	}
}

// countBytes sends heartbeats through a proxy that counts what passes.
func countBytes(b *testing.B, c contender) float64 {
	const beats = 500
	p := newCounter(b, c.address)
	writer := c.open(p.address)
	announce(b, writer, node(b, 0, 0))
	before := p.bytes.Load()
	for i := range beats {
		announce(b, writer, node(b, 0, float64(i)))
	}
	bytes := p.bytes.Load() - before
	_ = writer.Close()
	return float64(bytes) / beats
}

func micros(d time.Duration) string {
	return fmt.Sprintf("%.2f ms", math.Round(float64(d.Microseconds())/10)/100)
}
