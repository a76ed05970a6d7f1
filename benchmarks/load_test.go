package benchmarks

import (
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// workers is how many connections ask, each its next request when it has the
// answer to the one before.
const workers = 16

// keys is how many values the requests have for policies that hash.
const keys = 997

// A turn is what was measured while one proxy served.
type turn struct {
	requests int
	rate     float64 // requests a second
	p50, p99 time.Duration
	cpu      time.Duration // of the proxy, for each request
	memory   int64         // of the proxy, at the end
}

// drive has the workers ask a proxy, first for a run-in that is not measured, and
// then for a while that is. Every answer must have the status 200.
func drive(b *testing.B, address string, p *program, runIn, length time.Duration) turn {
	b.Helper()
	var group sync.WaitGroup
	var measuring, done atomic.Bool
	times := make([][]time.Duration, workers)
	for i := range times {
		c := dial(b, address)
		group.Go(func() {
			defer c.Close()
			for n := i; !done.Load(); n += workers {
				began := time.Now()
				if status := c.get(b, strconv.Itoa(n%keys)); status != 200 {
					b.Errorf("%s answered with status %d", address, status)
					return
				}
				if measuring.Load() {
					times[i] = append(times[i], time.Since(began))
				}
			}
		})
	}
	time.Sleep(runIn)
	used, began := p.cpu(b), time.Now()
	measuring.Store(true)
	time.Sleep(length)
	measuring.Store(false)
	used, took := p.cpu(b)-used, time.Since(began)
	done.Store(true)
	group.Wait()
	if b.Failed() {
		b.FailNow()
	}

	var all []time.Duration
	for _, t := range times {
		all = append(all, t...)
	}
	if len(all) == 0 {
		return turn{}
	}
	return turn{
		requests: len(all),
		rate:     float64(len(all)) / took.Seconds(),
		p50:      percentile(all, 50),
		p99:      percentile(all, 99),
		cpu:      used / time.Duration(len(all)),
		memory:   p.memory(b),
	}
}
