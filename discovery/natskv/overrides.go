package natskv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// overridesHistory is how many decisions about one node stay readable.
const overridesHistory = 10

// Overrides returns all overrides by the node's id. Without the bucket there are
// none.
func (r *Registry) Overrides(ctx context.Context) (map[string]discovery.Override, error) {
	var all map[string]discovery.Override
	err := r.do(ctx, "reading the overrides", nil, r.config.overrideNeeds(feedNeeds()...), func(ctx context.Context, s *session) error {
		f, _, err := s.openOverrides(ctx)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.close(ctx)
		all = make(map[string]discovery.Override)
		return f.list(ctx, func(m *message) { applyOverride(all, m) })
	})
	if err != nil {
		return nil, err
	}
	return r.clock.Locally(all), nil
}

// openOverrides opens a feed of the bucket of overrides, and returns its stream as
// it was before.
func (s *session) openOverrides(ctx context.Context) (*feed, *jetstream.StreamInfo, error) {
	info, err := s.overridesInfo(ctx)
	if err != nil {
		return nil, nil, err
	}
	f, err := s.openFeed(ctx, info, jetstream.DeliverLastPerSubjectPolicy, "")
	return f, info, err
}

// overridesInfo returns the stream of the bucket of overrides, and takes up the clock
// by which they end: that of the server that leads it. Servers before 2.10 do not tell
// the time, and it counts as ours.
func (s *session) overridesInfo(ctx context.Context) (*jetstream.StreamInfo, error) {
	asked := time.Now()
	stream, err := s.js.Stream(ctx, s.config.overridesStream())
	if err != nil {
		return nil, err
	}
	info := stream.CachedInfo()
	s.clock.Observe(info.TimeStamp, asked, time.Now())
	return info, nil
}

// SetOverride replaces the node's override. The bucket of overrides is created if
// it is missing, unless the configuration forbids it. It fails with
// [discovery.ErrInvalid] for an override that cannot be kept.
func (r *Registry) SetOverride(ctx context.Context, id string, o discovery.Override) error {
	bucket, invalid := r.config.overridesBucket(), cmp.Or(o.Validate(), discovery.ValidateID(id))
	needs := append(r.config.overrideNeeds("STREAM.CREATE."), "$KV."+bucket+".")
	return r.do(ctx, fmt.Sprintf("overriding node %q", id), invalid, needs, func(ctx context.Context, s *session) error {
		kv, err := s.js.KeyValue(ctx, bucket)
		if errors.Is(err, jetstream.ErrBucketNotFound) {
			if err := s.createOverrides(ctx); err != nil {
				return err
			}
			kv, err = s.js.KeyValue(ctx, bucket)
		}
		if err != nil {
			return err
		}
		if !o.Until.IsZero() {
			if _, err := s.overridesInfo(ctx); err != nil {
				return err
			}
		}
		record, err := discovery.AppendOverride(nil, r.clock.ByRegistry(o))
		if err != nil {
			return err
		}
		_, err = kv.Put(ctx, encode(id), record)
		return err
	})
}

// ClearOverride removes the node's override. One that is not there is no error.
func (r *Registry) ClearOverride(ctx context.Context, id string) error {
	bucket, invalid := r.config.overridesBucket(), discovery.ValidateID(id)
	needs := append(r.config.overrideNeeds(), "$KV."+bucket+".")
	return r.do(ctx, fmt.Sprintf("clearing the override of node %q", id), invalid, needs, func(ctx context.Context, s *session) error {
		kv, err := s.js.KeyValue(ctx, bucket)
		if errors.Is(err, jetstream.ErrBucketNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		return kv.Delete(ctx, encode(id))
	})
}

// overrideNeeds returns the subjects that finding the bucket of overrides needs, and
// more of them, for session.guard.
func (c *Config) overrideNeeds(more ...string) []string {
	needs := append(more, "STREAM.INFO.")
	for i := range needs {
		needs[i] += c.overridesStream()
	}
	return needs
}

// applyOverride takes over an entry of the bucket of overrides. One that cannot be read,
// or whose key can be no node's id, decides nothing, nor does one beyond as many as
// there may be nodes.
func applyOverride(all map[string]discovery.Override, m *message) {
	id, ok := decode(m.key)
	if !ok {
		id = m.key
	}
	o, err := discovery.ParseOverride(m.data)
	if m.removal() != discovery.Put || err != nil {
		delete(all, id)
		return
	}
	if _, known := all[id]; known || len(all) < discovery.MaxNodes && discovery.ValidateID(id) == nil {
		all[id] = o
	}
}
