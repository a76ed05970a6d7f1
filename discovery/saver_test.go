package discovery

import (
	"errors"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// A list that takes long to write takes no more than its share of the time.
func TestRest(t *testing.T) {
	for took, want := range map[time.Duration]time.Duration{
		0:                      saveDelay,
		time.Millisecond:       saveDelay,
		20 * time.Millisecond:  saveDelay,
		50 * time.Millisecond:  5 * time.Second,
		600 * time.Millisecond: time.Minute,
		time.Hour:              time.Minute,
		math.MaxInt64:          time.Minute,
	} {
		if got := rest(took); got != want {
			t.Errorf("after writing for %v the file rests %v, want %v", took, got, want)
		}
	}
}

// A list is saved after a change, and from time to time while it is confirmed; what was
// not saved by the end is saved then.
func TestSaverSavesWhatChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "list.json")
		s := newSaver(WarmStart{Path: path, Registry: "r"}, slog.New(slog.DiscardHandler))
		lists := 0
		list := func() *savedList { lists++; return &savedList{Written: time.Now()} }
		pass := func(d time.Duration, confirmed bool) {
			for end := time.After(d); ; {
				select {
				case l := <-s.loads.done:
					s.loads.take(l, func(*savedList) {})
				case r := <-s.saves.done:
					s.saves.take(r, s.saved)
				case <-s.timer.C:
					s.save(confirmed, list)
				case <-end:
					return
				}
			}
		}
		expect := func(want int, when string) {
			t.Helper()
			if lists != want {
				t.Errorf("%s it was saved %d times, want %d", when, lists, want)
			}
		}
		pass(time.Hour, true)
		expect(0, "before there was a list")
		s.changed()
		s.changed()
		pass(saveDelay-time.Nanosecond, true)
		expect(0, "just after a change")
		pass(time.Second, true)
		expect(1, "after two changes")
		pass(time.Hour, true)
		expect(7, "an hour in which it was confirmed later")
		pass(time.Hour, false)
		expect(7, "an hour in which it was not")
		s.changed()
		s.stop(false, list)
		expect(8, "at the end")
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	})
}

// What cannot be saved is tried again, until it can.
func TestSaverTriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSaver(WarmStart{Path: filepath.Join(t.TempDir(), "list.json")}, slog.New(slog.DiscardHandler))
		s.loads.wait()
		s.saved(saving{err: errors.New("no room")})
		if !s.dirty || !s.failing {
			t.Error("a list that could not be saved counts as saved")
		}
		start := time.Now()
		<-s.timer.C
		if waited := time.Since(start); waited != saveRetry {
			t.Errorf("it is tried again after %v", waited)
		}
		s.saved(saving{})
		if s.failing {
			t.Error("a failure is not forgotten")
		}
		s.stop(false, func() *savedList { return &savedList{} })
	})
}
