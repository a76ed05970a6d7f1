// Package window counts what has just happened.
package window

import (
	"sync/atomic"
	"time"
)

// steps is into how many steps a window is divided: what it counts is that of between
// seven and eight eighths of its length.
const steps = 8

// A Window counts events of the time that has just passed, and how many of them were of a
// certain kind. It may be used by many goroutines, without a lock. The zero Window has
// counted nothing. Its length is told by who uses it, to be the same each time.
type Window struct {
	// Each has the number of its step, and the counts in it, in 24, 20 and 20 bits.
	counts [steps]atomic.Uint64
}

const most = 1<<20 - 1

// stepOf returns the number of the step at a time.
func stepOf(now, length time.Duration) uint64 { return uint64(now/(length/steps)) & (1<<24 - 1) }

// Add counts so many events and so many of the kind. A step counts a million of either, and
// then as if that was all.
func (w *Window) Add(now, length time.Duration, events, kind uint64) {
	step := stepOf(now, length)
	c := &w.counts[step%steps]
	for {
		old := c.Load()
		allEvents, allKind := old>>20&most, old&most
		if old>>40 != step {
			allEvents, allKind = 0, 0
		}
		if c.CompareAndSwap(old, step<<40|min(allEvents+events, most)<<20|min(allKind+kind, most)) {
			return
		}
	}
}

// Sum returns how many events there were, and how many of the kind.
func (w *Window) Sum(now, length time.Duration) (events, kind int) {
	step := stepOf(now, length)
	for i := range w.counts {
		if c := w.counts[i].Load(); (step-c>>40)&(1<<24-1) < steps {
			events += int(c >> 20 & most)
			kind += int(c & most)
		}
	}
	return events, kind
}

// Clear forgets what was counted.
func (w *Window) Clear() {
	for i := range w.counts {
		w.counts[i].Store(0)
	}
}
