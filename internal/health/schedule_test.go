package health

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func TestScheduleTakesWhatIsDueInOrder(t *testing.T) {
	var s schedule
	start := time.Now()
	for range 1000 {
		s.add(&target{due: start.Add(rand.N(time.Minute)), dropped: rand.N(4) == 0})
	}
	s.add() // nothing
	s.add(&target{due: start}, &target{due: start})
	s.sweep()
	left := len(s.prompt.waiting)
	last := start
	for i := range 61 {
		now := start.Add(time.Duration(i) * time.Second)
		for target := s.take(now); target != nil; target = s.take(now) {
			if target.dropped || target.due.After(now) || target.due.Before(last) {
				t.Fatalf("at %v it took one due %v, dropped %v, after one due %v", now, target.due, target.dropped, last)
			}
			last = target.due
			s.ended(target)
			left--
		}
		if left > 0 {
			if next := now.Add(s.wait(now)); next != s.prompt.waiting[0].due || next.Before(now) {
				t.Fatalf("at %v the next one is due %v, want %v", now, next, s.prompt.waiting[0].due)
			}
		}
	}
	if left != 0 || s.wait(last) != time.Hour {
		t.Errorf("%d are left, and the next one is due in %v", left, s.wait(last))
	}
}

func TestScheduleBoundsTheChecksOfEachQueue(t *testing.T) {
	var s schedule
	now := time.Now()
	for _, late := range []bool{true, false} {
		for range checksAtOnce + 1 {
			s.add(&target{due: now, late: late})
		}
	}
	var taken []*target
	for target := s.take(now); target != nil; target = s.take(now) {
		taken = append(taken, target)
	}
	if len(taken) != maxUnderWay || s.wait(now) != time.Hour {
		t.Fatalf("%d checks at once, and another one in %v, want %d and none", len(taken), s.wait(now), maxUnderWay)
	}
	i := slices.IndexFunc(taken, func(t *target) bool { return t.late })
	s.ended(taken[i])
	if next := s.take(now); next == nil || !next.late {
		t.Errorf("after the end of a late one %+v is next, want the late one that waits", next)
	}
	if next := s.take(now); next != nil {
		t.Errorf("%+v is taken beyond the bound", next)
	}
}
