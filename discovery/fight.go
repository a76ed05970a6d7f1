package discovery

import (
	"context"
	"errors"
	"time"
)

// rivalry is what a Registrar knows of another process that announces its node.
// Both overwrite each other's record, and proxies go now to the one, now to the
// other. Each goes on announcing: nobody can tell which of them is right.
type rivalry struct {
	blind bool      // the record may not be read
	until time.Time // until when another's record belongs to the same fight
	told  bool
}

// recordTimeout bounds the look at the record, which must not cost the heartbeat
// its time.
const recordTimeout = time.Second

// look looks whose record stands in the registry, before it is renewed. Once is no
// fight: the other may be the successor of a process that has just been replaced,
// or its predecessor. The one that comes back is.
func (v *rivalry) look(ctx context.Context, a Announcer, instance string, n Node, o RegistrarOptions) {
	reader, ok := a.(Reader)
	if !ok || v.blind {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, min(recordTimeout, o.Heartbeat/2))
	defer cancel()
	stands, err := reader.Record(ctx, n.ID)
	switch {
	case errors.Is(err, ErrPermission):
		v.blind = true // until it is announced anew: not every writer may read
		return
	case err != nil:
		return // announcing says why
	case stands.ID == "" || stands.Instance() == instance:
		if v.told && time.Now().After(v.until) {
			v.told = false
			o.Logger.Info("no other process announces this node any more", "node", n.ID)
		}
		return
	}
	if time.Now().Before(v.until) && !v.told {
		v.told = true
		o.Logger.Warn("another process announces the same node, and each overwrites the other's record; give each an id of its own",
			"node", n.ID,
			"endpoint", n.Endpoint.String(), "other_endpoint", stands.Endpoint.String(),
			"instance", instance, "other_instance", stands.Instance())
	}
	// The other may beat as seldom as its lease allows.
	lease := stands.Lease()
	if lease == 0 {
		lease = DefaultTTL
	}
	v.until = time.Now().Add(max(lease, o.TTL))
}
