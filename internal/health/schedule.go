package health

import (
	"slices"
	"sort"
	"time"
)

const (
	// checksAtOnce bounds the checks of one queue that are under way.
	checksAtOnce = 256
	// maxUnderWay bounds those of both.
	maxUnderWay = 2 * checksAtOnce
)

// A schedule says whose check is next. Targets whose last check ran into its timeout
// have a queue of their own, so that they wait for each other only.
type schedule struct {
	prompt, late queue
}

// A queue holds targets by when they are due. A slice does better than a heap, because
// all checks have one interval: but for the first time a target is added at the end.
type queue struct {
	waiting  []*target // sorted
	underWay int
}

func (s *schedule) queues() [2]*queue { return [2]*queue{&s.prompt, &s.late} }

func (s *schedule) queue(t *target) *queue {
	if t.late {
		return &s.late
	}
	return &s.prompt
}

// add puts targets, which are due at one time and have one queue, into that.
func (s *schedule) add(targets ...*target) {
	if len(targets) == 0 {
		return
	}
	q, due := s.queue(targets[0]), targets[0].due
	i := sort.Search(len(q.waiting), func(i int) bool { return q.waiting[i].due.After(due) })
	q.waiting = slices.Insert(q.waiting, i, targets...)
}

// take takes out a target that is due and may be checked now; nil if there is none.
// It is matched by ended, before which the target's queue must not change.
func (s *schedule) take(now time.Time) *target {
	for _, q := range s.queues() {
		if q.free() && !q.waiting[0].due.After(now) {
			t := q.waiting[0]
			q.waiting[0] = nil
			q.waiting = q.waiting[1:]
			q.underWay++
			return t
		}
	}
	return nil
}

// ended notes that a target that was taken has been checked.
func (s *schedule) ended(t *target) { s.queue(t).underWay-- }

// sweep takes out the targets that are dropped.
func (s *schedule) sweep() {
	for _, q := range s.queues() {
		q.waiting = slices.DeleteFunc(q.waiting, func(t *target) bool { return t.dropped })
	}
}

// wait returns when the next target is due that may be checked then, as far as no
// check ends before.
func (s *schedule) wait(now time.Time) time.Duration {
	wait := time.Hour
	for _, q := range s.queues() {
		if q.free() {
			wait = min(wait, q.waiting[0].due.Sub(now))
		}
	}
	return max(wait, 0)
}

// free reports whether a target waits, and one more may be checked.
func (q *queue) free() bool { return q.underWay < checksAtOnce && len(q.waiting) > 0 }
