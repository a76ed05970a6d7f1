package discovery

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// watchUntil is a Watcher that emits nothing and ends with its context.
type watchUntil struct{}

func (watchUntil) Watch(ctx context.Context, _ func(Event)) error {
	<-ctx.Done()
	return nil
}

// A watch that was given up is told why, ends once, and is started again.
func TestSupervisorGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSupervisor(watchUntil{}, new(atomic.Uint64))
		if s.giveUp(ErrBroken) {
			t.Error("a watch was given up before there was one")
		}
		s.start(t.Context())
		why := errors.New("no answer")
		if !s.giveUp(why) || s.giveUp(why) {
			t.Error("a watch is not given up once")
		}
		if m := <-s.messages; !errors.Is(m.ended, why) {
			t.Errorf("it ended with %v", m.ended)
		}
		s.ended()
		s.startLater()
		<-s.retry.C
		s.start(t.Context())
		if s.number != 2 || s.broken {
			t.Errorf("watch %d, broken: %v", s.number, s.broken)
		}
		s.stop()
	})
}

// The revision that is shown is that of what was listed whole, and shows together with
// the epoch whether data was lost.
func TestSupervisorRevision(t *testing.T) {
	var shown atomic.Uint64
	s := newSupervisor(watchUntil{}, &shown)
	listing := func(l Listing) (wiped bool) {
		s.number++
		s.seen, s.listed = 0, false
		s.observe(l.Revision - 1)
		before := shown.Load()
		if wiped = s.wiped(l); shown.Load() != before {
			t.Error("a listing that is under way is shown")
		}
		s.complete(l, now())
		return wiped
	}
	for i, step := range []struct {
		listing Listing
		after   uint64 // the revision of an event after it
		wiped   bool
	}{
		{Listing{Epoch: "a", Revision: 7}, 9, false},
		{Listing{Epoch: "a", Revision: 9}, 12, false},
		{Listing{Epoch: "a", Revision: 11}, 5, true},
		{Listing{Epoch: "b", Revision: 12}, 0, true},
	} {
		if wiped := listing(step.listing); wiped != step.wiped {
			t.Errorf("step %d: wiped %v", i, wiped)
		}
		s.observe(step.after)
		if want := max(step.listing.Revision, step.after); shown.Load() != want {
			t.Errorf("step %d: revision %d, want %d", i, shown.Load(), want)
		}
	}
}
