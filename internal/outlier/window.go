package outlier

import (
	"sync/atomic"
	"time"
)

// steps is into how many steps a window is divided: what it counts is that of between
// seven and eight eighths of it.
const steps = 8

// A window counts the requests of a node in the time that has just passed, and how many
// of them failed. It may be used by many goroutines, without a lock.
type window struct {
	// Each has the number of its step, and the counts in it, in 24, 20 and 20 bits.
	counts [steps]atomic.Uint64
}

const windowMost = 1<<20 - 1

// stepOf returns the number of the step at a time.
func stepOf(now, length time.Duration) uint64 { return uint64(now/(length/steps)) & (1<<24 - 1) }

// add counts a request.
func (w *window) add(now, length time.Duration, failed bool) {
	step := stepOf(now, length)
	c := &w.counts[step%steps]
	for {
		old := c.Load()
		requests, failures := old>>20&windowMost, old&windowMost
		if old>>40 != step {
			requests, failures = 0, 0
		}
		if requests == windowMost {
			return // the share will not change any more
		}
		requests++
		if failed {
			failures++
		}
		if c.CompareAndSwap(old, step<<40|requests<<20|failures) {
			return
		}
	}
}

// sum returns what was counted.
func (w *window) sum(now, length time.Duration) (requests, failures int) {
	step := stepOf(now, length)
	for i := range w.counts {
		if c := w.counts[i].Load(); (step-c>>40)&(1<<24-1) < steps {
			requests += int(c >> 20 & windowMost)
			failures += int(c & windowMost)
		}
	}
	return requests, failures
}

// clear forgets what was counted.
func (w *window) clear() {
	for i := range w.counts {
		w.counts[i].Store(0)
	}
}
