package discovery

import (
	"context"
	"fmt"
	"runtime"
	"syscall"
	"testing"
)

// BenchmarkLapse measures what each record costs that comes and expires when many
// did before it and their leases would last for a day: the time of one, and the
// memory that is kept of all.
func BenchmarkLapse(b *testing.B) {
	for _, before := range []int{1_000, 300_000} {
		b.Run(fmt.Sprint(before), func(b *testing.B) {
			heap := func() float64 {
				runtime.GC()
				runtime.GC()
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				return float64(m.HeapAlloc)
			}
			empty := heap()
			w := &benchWatcher{benchNodes(b, 100), make(chan func(Event), 1)}
			d := NewDirectory(w, Options{Probe: func(context.Context, string) error { return syscall.ECONNREFUSED }})
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- d.Run(ctx) }()
			defer func() {
				cancel()
				<-done
			}()
			<-d.Synced()
			emit := <-w.emit
			lapse := func(i int) {
				n, err := ParseNode(fmt.Appendf(nil, `{"nodeId":"foreign-%07d","endpoint":"http://10.9.%d.%d:5001",`+
					`"metadata":{"service":"foreign","zone":"eu-1","version":"1.2.3","lease":"24h","instance":"6f1c1a0e-%07d-4c8e-9d0a"}}`,
					i, i>>8&255, i&255, i))
				if err != nil {
					b.Fatal(err)
				}
				emit(Event{Type: Put, ID: n.ID, Key: "node." + n.ID, Node: n})
				emit(Event{Type: Expired, ID: n.ID, Key: "node." + n.ID})
			}
			flush := func() {
				old := d.Snapshot()
				emit(Event{Type: Left, ID: "orders-00000", Key: "node.orders-00000"})
				for old.Node("orders-00000") != nil {
					<-old.Superseded()
					old = d.Snapshot()
				}
				n := benchNodes(b, 1)[0]
				emit(Event{Type: Put, ID: n.ID, Key: "node." + n.ID, Node: n})
				for old.Node("orders-00000") == nil {
					<-old.Superseded()
					old = d.Snapshot()
				}
			}
			for i := range before {
				lapse(i)
			}
			flush()
			kept := heap() - empty
			b.ResetTimer()
			for i := range b.N {
				lapse(before + i)
			}
			flush()
			b.StopTimer()
			b.ReportMetric(kept/(1<<20), "MiB")
			runtime.KeepAlive(d)
		})
	}
}
