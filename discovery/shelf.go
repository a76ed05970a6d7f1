package discovery

import (
	"container/heap"
	"time"
)

// shelf holds nodes that are not in use, each for a time.
type shelf struct {
	queue    leaseQueue
	byID     map[string]*tracked
	byRecord map[string]*tracked
}

func newShelf() shelf {
	return shelf{byID: make(map[string]*tracked), byRecord: make(map[string]*tracked)}
}

func (s *shelf) len() int { return len(s.queue) }

// add puts a node on the shelf until a time, in place of what was there of it.
func (s *shelf) add(t *tracked, until time.Duration) {
	for _, old := range []*tracked{s.byID[t.entry.Node.ID], s.byRecord[t.record()]} {
		if old != nil {
			s.drop(old)
		}
	}
	t.due = until
	heap.Push(&s.queue, t)
	s.byID[t.entry.Node.ID] = t
	s.byRecord[t.record()] = t
}

// drop takes a node off, if it is there.
func (s *shelf) drop(t *tracked) {
	if s.byID[t.entry.Node.ID] != t {
		return
	}
	heap.Remove(&s.queue, t.index)
	delete(s.byID, t.entry.Node.ID)
	delete(s.byRecord, t.record())
	t.probe = 0
}

// postpone sets another time for a node that is there.
func (s *shelf) postpone(t *tracked, until time.Duration) {
	t.due = until
	heap.Fix(&s.queue, t.index)
}

// expire takes those off whose time was over at a time.
func (s *shelf) expire(at time.Duration) {
	for len(s.queue) > 0 && s.queue[0].due <= at {
		s.drop(s.queue[0])
	}
}
