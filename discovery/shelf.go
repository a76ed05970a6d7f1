package discovery

import "time"

// shelf holds nodes that are not in use, in the order of a time that each has.
type shelf struct {
	queue    timeQueue[tracked]
	byID     map[string]*tracked
	byRecord map[string]*tracked
}

func newShelf() shelf {
	return shelf{queue: newLeases(), byID: make(map[string]*tracked), byRecord: make(map[string]*tracked)}
}

// add puts a node on the shelf with its time, in place of what was there of it.
func (s *shelf) add(t *tracked, at time.Duration) {
	for _, old := range []*tracked{s.byID[t.entry.Node.ID], s.byRecord[t.record()]} {
		if old != nil {
			s.drop(old)
		}
	}
	s.postpone(t, at)
	s.byID[t.entry.Node.ID] = t
	s.byRecord[t.record()] = t
}

// drop takes a node off, if it is there.
func (s *shelf) drop(t *tracked) {
	if s.byID[t.entry.Node.ID] != t {
		return
	}
	s.queue.remove(t)
	delete(s.byID, t.entry.Node.ID)
	delete(s.byRecord, t.record())
	t.probe.withdraw()
}

// postpone sets the time of a node.
func (s *shelf) postpone(t *tracked, at time.Duration) {
	t.due = at
	s.queue.put(t)
}
