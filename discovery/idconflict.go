package discovery

import (
	"context"
	"errors"
	"time"
)

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

// otherWriter is what a Registrar knows of another process that announces its node.
// Both overwrite each other's record, and proxies go now to the one, now to the
// other. Each goes on announcing: nobody can tell which of them is right.
type otherWriter struct {
	unreadable bool      // the record may not be read
	until      time.Time // until when another's record belongs to the same conflict
	told       bool
}

// recordTimeout bounds the look at the record, which must not cost the heartbeat
// its time.
const recordTimeout = time.Second

// check looks whose record stands in the registry, before it is renewed. Once is no
// conflict: the other may be the successor of a process that has just been replaced,
// or its predecessor. The one that comes back is.
func (w *otherWriter) check(ctx context.Context, reader Reader, n Node, o RegistrarOptions) {
	if reader == nil || w.unreadable {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, min(recordTimeout, o.Heartbeat/2))
	defer cancel()
	stands, err := reader.Record(ctx, n.ID)
	switch {
	case errors.Is(err, ErrPermission):
		w.unreadable = true // until it is announced anew: not every writer may read
	case err != nil:
		// Announcing says why.
	case stands.ID == "" || stands.Instance() == n.Instance():
		if w.told && time.Now().After(w.until) {
			w.told = false
			o.Logger.Info("no other process announces this node any more", "node", n.ID)
		}
	default:
		if time.Now().Before(w.until) && !w.told {
			w.told = true
			o.Logger.Warn("another process announces the same node, and each overwrites the other's record; give each an id of its own",
				"node", n.ID,
				"endpoint", n.Endpoint.String(), "other_endpoint", stands.Endpoint.String(),
				"instance", n.Instance(), "other_instance", stands.Instance())
		}
		// The other may beat as seldom as its lease allows.
		w.until = time.Now().Add(max(stands.LeaseOr(DefaultTTL), o.TTL))
	}
}
