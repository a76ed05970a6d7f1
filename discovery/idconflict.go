package discovery

import "time"

// idConflict notices two processes that announce one id: when its record changes
// hands, and is back in the first ones within a lease. A node that merely moves, or
// is replaced by its successor, does not come back.
type idConflict struct {
	before  string        // who wrote the record before the one who did last
	changed time.Duration // when that changed
	told    bool          // it goes on with every heartbeat, and is said once
}

// observe reports whether the record that stands from now on shows a conflict for the
// first time.
func (c *idConflict) observe(was, is *Node, lease, at time.Duration) bool {
	from, to := writer(was), writer(is)
	if from == to {
		return false
	}
	first := to == c.before && at-c.changed < lease && !c.told
	c.before, c.changed, c.told = from, at, c.told || first
	return first
}

// writer tells who wrote a record: the process, or where that does not say, the
// endpoint.
func writer(n *Node) string {
	if instance := n.Instance(); instance != "" {
		return instance
	}
	return n.Endpoint.String()
}
