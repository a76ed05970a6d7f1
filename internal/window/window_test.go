package window

import (
	"sync"
	"testing"
	"time"
)

func TestWhatHasJustHappened(t *testing.T) {
	var w Window
	const length = 8 * time.Second
	expect := func(now time.Duration, events, kind int) {
		t.Helper()
		if e, k := w.Sum(now, length); e != events || k != kind {
			t.Errorf("at %v: %d events and %d of the kind, want %d and %d", now, e, k, events, kind)
		}
	}
	expect(0, 0, 0)
	start := time.Hour
	w.Add(start, length, 1, 1)
	w.Add(start+3*time.Second, length, 1, 0)
	w.Add(start+3*time.Second+time.Millisecond, length, 5, 2)
	expect(start+3*time.Second+time.Millisecond, 7, 3)
	expect(start+8*time.Second-1, 7, 3)
	expect(start+8*time.Second, 6, 2)
	expect(start+11*time.Second, 0, 0)
	w.Add(start+80*time.Second, length, 1, 0)
	expect(start+80*time.Second, 1, 0)
	w.Add(start+80*time.Second, length, 2*most, 2*most)
	expect(start+80*time.Second, most, most)
	w.Clear()
	expect(start+80*time.Second, 0, 0)
}

func TestManyCountAtOnce(t *testing.T) {
	var w Window
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 1000 {
				w.Add(time.Minute, time.Second, 1, 1)
			}
		})
	}
	group.Wait()
	if events, kind := w.Sum(time.Minute, time.Second); events != 8000 || kind != 8000 {
		t.Errorf("%d events and %d of the kind, want 8000 of each", events, kind)
	}
}
