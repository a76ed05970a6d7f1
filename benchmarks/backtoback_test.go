package benchmarks

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

const (
	// stormLength is for how long changes come at a steady rate.
	stormLength = 4 * time.Second

	beginBackToBack = "<!-- make bench-changes: begin -->"
	endBackToBack   = "<!-- make bench-changes: end -->"
)

// A backToBack is how long changes take that follow each other without a pause, and
// what they cost.
type backToBack struct {
	nodes                int
	join, leave, bare    []time.Duration
	request              []time.Duration
	quiet, storm, served stretch
}

// BenchmarkBackToBack times, on the real binary and a real registry, changes of fleets
// of several sizes that follow each other without a pause: half of them a node that
// joins, until it serves its first request, each followed by the same node's leaving,
// until it serves none. Whoever waits for a change asks without a pause, as well. Then
// it measures the processor time of 1,000 changes a second, without and with requests,
// for which what is chosen from is made anew. With -report it writes the table.
func BenchmarkBackToBack(b *testing.B) {
	server, port := natstest.StartProcess(b), startNodes(b)
	for b.Loop() {
		var results []*backToBack
		for _, nodes := range []int{10, 100, 1_000, 10_000} {
			f := newFleet(b, server, fmt.Sprintf("fleet-%d-%d", b.N, nodes), port)
			r := measureBackToBack(b, f, nodes)
			results = append(results, r)
			for name, d := range map[string][]time.Duration{"join": r.join, "leave": r.leave, "bare-watcher": r.bare, "request": r.request} {
				for _, p := range []int{50, 99} {
					b.ReportMetric(float64(percentile(d, p).Microseconds()), fmt.Sprintf("µs-%s-p%d-of-%d", name, p, nodes))
				}
			}
			b.ReportMetric(100*r.storm.over(r.quiet), fmt.Sprintf("%%-core-of-%d", nodes))
			b.ReportMetric(100*r.served.over(r.quiet), fmt.Sprintf("%%-core-served-of-%d", nodes))
			b.ReportMetric(r.storm.snapshots, fmt.Sprintf("snapshots/s-of-%d", nodes))
			b.ReportMetric(r.served.snapshots, fmt.Sprintf("snapshots/s-served-of-%d", nodes))
		}
		if *report != "" {
			if err := writeSection(*report, backToBackSection(b, results), beginBackToBack, endBackToBack); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}

// measureBackToBack has Caddy follow a fleet, and a node that comes and goes. Whether that
// serves shows in a source that looks through the fleet for it.
func measureBackToBack(b *testing.B, f *fleet, nodes int) *backToBack {
	b.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	bucket, err := f.js.KeyValue(ctx, f.bucket)
	if err != nil {
		b.Fatal(err)
	}
	f.renew(nodes, 0)
	admin, port, whole, address := "127.0.0.1:"+freeport.String(b), freeport.String(b), freeport.String(b), newBackend(b)
	site := func(port, options string) string {
		return "http://127.0.0.1:" + port + " {\nreverse_proxy {\ndynamic discovery " + f.url + " {\nservice orders\n" + options + "\n}\n}\n}\n"
	}
	p := startCaddy(b, admin, site(port, "where mark {header.X-Service}")+site(whole, "pick 2"))
	awaitNodes(b, admin, nodes)
	watcher, err := bucket.WatchAll(ctx, jetstream.UpdatesOnly())
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
	put := func(i int) {
		record := fmt.Sprintf(`{"nodeId":"m%d","endpoint":"http://%s","load":0,"metadata":{"service":"orders","mark":"m%d","lease":"2h"}}`, i, address, i)
		if _, err := bucket.PutString(ctx, fmt.Sprintf("node.m%d", i), record); err != nil {
			b.Fatal(err)
		}
	}
	remove := func(i int) {
		if err := bucket.Delete(ctx, fmt.Sprintf("node.m%d", i)); err != nil {
			b.Fatal(err)
		}
	}

	r := &backToBack{nodes: nodes}
	c := dial(b, "127.0.0.1:"+port)
	for i := range changes / 2 {
		mark := fmt.Sprintf("m%d", i)
		timed := func(change func(int), served bool) time.Duration {
			began := time.Now()
			change(i)
			for !b.Failed() && (c.get(b, mark) == 200) != served {
			}
			took := time.Since(began)
			r.bare = append(r.bare, (<-seen).Sub(began))
			return took
		}
		r.join = append(r.join, timed(put, true))
		if i%10 == 0 {
			began := time.Now()
			c.get(b, mark)
			r.request = append(r.request, time.Since(began))
		}
		r.leave = append(r.leave, timed(remove, false))
		if b.Failed() {
			b.FailNow()
		}
	}
	if err := watcher.Stop(); err != nil {
		b.Fatal(err)
	}
	w := startWatcher(b, f)

	// Every second record is a node that joins, the others are the same ones, which leave.
	i := 0
	change := func(int) {
		if i++; i%2 == 1 {
			f.announce(nodes+i, 0)
		} else {
			f.withdraw(nodes + i - 1)
		}
	}
	r.quiet = pace(b, admin, p, w, stormLength, 0, 0, nil)
	r.storm = pace(b, admin, p, w, stormLength, 1_000, time.Millisecond, change)
	c = dial(b, "127.0.0.1:"+whole)
	stop := make(chan struct{})
	var asking sync.WaitGroup
	asking.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Second / trickle):
				if status := c.get(b, ""); status != 200 {
					b.Errorf("status %d while nodes come and go", status)
					return
				}
			}
		}
	})
	r.served = pace(b, admin, p, w, stormLength, 1_000, time.Millisecond, change)
	close(stop)
	asking.Wait()
	f.settle()
	return r
}

// backToBackSection is what benchmarks.md says.
func backToBackSection(b *testing.B, results []*backToBack) string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s\n## Changes without a pause\n\n`make bench-changes`, one run on %s (load average %s after).\n\n", beginBackToBack, machine(), loadAverage(b))
	fmt.Fprintf(&s, "A node that joins a fleet, until the first request that it serves, and leaves again, until the first that it does not; %d of each, one after the other, on NATS JetStream KV. "+
		"Whoever waits asks without a pause, and the registry, the load and Caddy share the cores. Part of each figure is what nobody can do without: a bare watcher of the client library, and a request. "+
		"Snapshots take at most 5 %% of one core, with what sources make of them, so that a change waits for 20 times what a snapshot of that fleet costs.\n\n", changes/2)
	s.WriteString("| nodes | joined → served, p50 | p99 | left → not served, p50 | p99 | a bare watcher, p50 | p99 | a request, p50 |\n|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, r := range results {
		fmt.Fprintf(&s, "| %s |", humanize.Comma(int64(r.nodes)))
		for _, d := range [][]time.Duration{r.join, r.leave, r.bare} {
			fmt.Fprintf(&s, " %s | %s |", micros(percentile(d, 50)), micros(percentile(d, 99)))
		}
		fmt.Fprintf(&s, " %s |\n", micros(percentile(r.request, 50)))
	}
	fmt.Fprintf(&s, "\n1,000 records a second, nodes that join and leave, for %v: the processor time of Caddy beyond rest, of one core. With %d requests a second what they choose from is made anew for each snapshot that they see.\n\n", stormLength, trickle)
	s.WriteString("| nodes | of one core | snapshots a second | with requests | snapshots a second | a bare watcher |\n|--:|--:|--:|--:|--:|--:|\n")
	for _, r := range results {
		fmt.Fprintf(&s, "| %s | %.1f %% | %.0f | %.1f %% | %.0f | %.1f %% |\n", humanize.Comma(int64(r.nodes)),
			100*r.storm.over(r.quiet), r.storm.snapshots, 100*r.served.over(r.quiet), r.served.snapshots, 100*slices.Max([]float64{r.storm.bare, r.served.bare}))
	}
	return s.String() + endBackToBack + "\n"
}
