package discovery

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"
)

// benchRecord is a record as large as those of a usual fleet.
func benchRecord(i int) []byte {
	return fmt.Appendf(nil, `{"nodeId":"orders-%05d","endpoint":"http://10.%d.%d.%d:5001","lastSeen":"2025-10-10T12:00:00.1234567Z","load":0.35,`+
		`"metadata":{"service":"service-%d","zone":"eu-%d","version":"1.2.3","weight":"2","lease":"30s","instance":"6f1c1a0e-%04d-4c8e-9d0a-0123456789ab"},"isOnline":true}`,
		i, i>>16&255, i>>8&255, i&255, i%20, i%3, i)
}

func benchNodes(b *testing.B, n int) []Node {
	b.Helper()
	nodes := make([]Node, n)
	for i := range nodes {
		var err error
		if nodes[i], err = ParseNode(benchRecord(i)); err != nil {
			b.Fatal(err)
		}
	}
	return nodes
}

// benchWatcher lists nodes and lets the benchmark emit what comes then.
type benchWatcher struct {
	nodes []Node
	emit  chan func(Event)
}

func (w *benchWatcher) Watch(ctx context.Context, emit func(Event)) error {
	for _, n := range w.nodes {
		emit(Event{Type: Put, ID: n.ID, Key: "node." + n.ID, Node: n})
	}
	emit(Event{Type: Synced})
	w.emit <- emit
	<-ctx.Done()
	return ctx.Err()
}

// benchDirectory returns a directory of nodes, which runs, and the function by
// which its watch emits.
func benchDirectory(b *testing.B, nodes []Node) (*Directory, func(Event)) {
	b.Helper()
	w := &benchWatcher{nodes, make(chan func(Event), 1)}
	d := NewDirectory(w, Options{TTL: time.Hour})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	b.Cleanup(func() {
		cancel()
		<-done
	})
	<-d.Synced()
	w.nodes = nil
	return d, <-w.emit
}

func BenchmarkParseNode(b *testing.B) {
	record := benchRecord(7)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseNode(record); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkParser reads heartbeats, which repeat a record in all but the time and
// the load.
func BenchmarkParser(b *testing.B) {
	record := benchRecord(7)
	v := findVariables(record)
	if v.load.to == 0 || v.lastSeen.to == 0 {
		b.Fatalf("no usual record: %s", record)
	}
	var p Parser
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		record[v.lastSeen.to-2] = '0' + byte(i%10) // before the Z
		if _, err := p.Parse(record); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppendRecord(b *testing.B) {
	n, at, buffer := benchNodes(b, 1)[0], time.Now(), make([]byte, 0, 1024)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := AppendRecord(buffer, n, at); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkHeartbeat measures what a heartbeat of a directory of 10,000 nodes
// costs, from emit to the lease, without reading the record.
func BenchmarkHeartbeat(b *testing.B) {
	nodes := benchNodes(b, 10_000)
	// As after reading the record anew: equal, but not the same map.
	again := benchNodes(b, 10_000)
	keys := make([]string, len(again))
	for i, n := range again {
		keys[i] = "node." + n.ID
	}
	d, emit := benchDirectory(b, nodes)
	before := d.Snapshot()
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		n := &again[i%len(again)]
		emit(Event{Type: Put, ID: n.ID, Key: keys[i%len(keys)], Node: *n})
	}
	b.StopTimer()
	if d.Snapshot() != before {
		b.Error("a heartbeat published a snapshot")
	}
	emit(Event{Type: Left, ID: nodes[0].ID, Key: keys[0]})
	<-before.Superseded() // all before it has been absorbed
}

// BenchmarkSnapshotChange measures the snapshot that follows one change.
func BenchmarkSnapshotChange(b *testing.B) {
	for _, size := range []int{10, 100, 1_000, 10_000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			nodes := benchNodes(b, size)
			all := make(map[string]*Entry, size)
			for _, n := range nodes {
				all[n.ID] = newEntry(n, DefaultTTL, new(liveness))
			}
			s := (&Snapshot{}).succeed(all, true)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				id := nodes[i%size].ID
				i++
				s = s.succeed(map[string]*Entry{id: all[id]}, true)
			}
			if len(s.Nodes()) != size {
				b.Errorf("%d nodes, want %d", len(s.Nodes()), size)
			}
		})
	}
}

// BenchmarkMemory measures what a node of a directory of 10,000 costs in memory,
// records and one snapshot included.
func BenchmarkMemory(b *testing.B) {
	const size = 10_000
	heap := func() float64 {
		// Twice, because interned strings go one cycle later.
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	for b.Loop() {
		before := heap()
		nodes := benchNodes(b, size)
		d, _ := benchDirectory(b, nodes)
		nodes = nil
		b.ReportMetric((heap()-before)/size, "bytes/node")
		runtime.KeepAlive(nodes)
		runtime.KeepAlive(d)
	}
}
