package natskv

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// overridesSuffix makes the name of the bucket of overrides out of that of the
	// nodes. It has no TTL, and is created by whoever writes the first one.
	overridesSuffix = "_overrides"
	// overridesHistory is how many decisions about one node stay readable.
	overridesHistory = 10
	// overridesInterval is how often a bucket that is not there yet is looked for,
	// and overridesPatience how long after something else went wrong.
	overridesInterval = time.Second
	overridesPatience = 10 * time.Second
	// A listing of the nodes waits for the overrides for four times as long as it
	// took to begin, which are as many questions, within these bounds.
	overridesWait    = time.Second
	overridesWaitMax = 10 * time.Second
)

// Overrides returns all overrides by the node's id. Without the bucket there are
// none. It fails as every call does.
func (r *Registry) Overrides(ctx context.Context) (map[string]discovery.Override, error) {
	var all map[string]discovery.Override
	err := r.do(ctx, "reading the overrides", r.overrideNeeds(feedNeeds()...), func(ctx context.Context, s *session) error {
		f, _, err := r.openOverrides(ctx, s)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.close(ctx)
		all = make(map[string]discovery.Override)
		return f.list(ctx, func(m *message) { r.config.override(all, m) })
	})
	if err != nil {
		return nil, err
	}
	return r.clock.Locally(all), nil
}

// openOverrides opens a feed of the bucket of overrides, and returns its stream as
// it was before.
func (r *Registry) openOverrides(ctx context.Context, s *session) (*feed, *jetstream.StreamInfo, error) {
	info, err := r.overridesInfo(ctx, s)
	if err != nil {
		return nil, nil, err
	}
	f, err := s.open(ctx, info, jetstream.DeliverLastPerSubjectPolicy, "")
	return f, info, err
}

// overridesInfo returns the stream of the bucket of overrides, and takes up the clock
// by which they end: that of the server that leads it. Servers before 2.10 do not tell
// the time, and it counts as ours.
func (r *Registry) overridesInfo(ctx context.Context, s *session) (*jetstream.StreamInfo, error) {
	asked := time.Now()
	stream, err := s.js.Stream(ctx, streamPrefix+r.config.Bucket+overridesSuffix)
	if err != nil {
		return nil, err
	}
	info := stream.CachedInfo()
	r.clock.Observe(info.TimeStamp, asked, time.Now())
	return info, nil
}

// SetOverride replaces the node's override. The bucket of overrides is created if
// it is missing, unless the configuration forbids it. It fails with
// [discovery.ErrInvalid] for an override or an id that cannot be kept, and
// otherwise as every call does.
func (r *Registry) SetOverride(ctx context.Context, id string, o discovery.Override) error {
	what := fmt.Sprintf("overriding node %q", id)
	err := o.Validate()
	if err == nil {
		err = discovery.ValidateID(id)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	bucket := r.config.Bucket + overridesSuffix
	return r.do(ctx, what, append(r.overrideNeeds("STREAM.CREATE."), "$KV."+bucket+"."), func(ctx context.Context, s *session) error {
		kv, err := s.js.KeyValue(ctx, bucket)
		if errors.Is(err, jetstream.ErrBucketNotFound) {
			kv, err = r.createOverrides(ctx, s, bucket)
		}
		if err != nil {
			return err
		}
		if !o.Until.IsZero() {
			if _, err := r.overridesInfo(ctx, s); err != nil {
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

func (r *Registry) createOverrides(ctx context.Context, s *session, bucket string) (jetstream.KeyValue, error) {
	if r.config.NoCreate {
		return nil, fmt.Errorf("%w: bucket %q does not exist and create is off; create it with: nats kv add %s --history=%d --storage=%s --replicas=%d",
			discovery.ErrNotFound, bucket, bucket, overridesHistory, r.config.Storage, max(r.config.Replicas, 1))
	}
	config := jetstream.KeyValueConfig{
		Bucket:      bucket,
		Description: "what operators have decided about the nodes of a fleet",
		History:     overridesHistory,
		MaxBytes:    r.config.MaxBytes,
	}
	kv, err := r.createBucket(ctx, s, config)
	if errors.Is(err, jetstream.ErrBucketExists) {
		return s.js.KeyValue(ctx, bucket) // somebody else was faster
	}
	if err != nil {
		return nil, fmt.Errorf("creating bucket %q: %w", bucket, err)
	}
	return kv, nil
}

// ClearOverride removes the node's override. One that is not there is no error. It
// fails as every call does.
func (r *Registry) ClearOverride(ctx context.Context, id string) error {
	what := fmt.Sprintf("clearing the override of node %q", id)
	if err := discovery.ValidateID(id); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	bucket := r.config.Bucket + overridesSuffix
	return r.do(ctx, what, append(r.overrideNeeds(), "$KV."+bucket+"."), func(ctx context.Context, s *session) error {
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

// overrideNeeds returns the subjects of the bucket of overrides; see do.
func (r *Registry) overrideNeeds(more ...string) []string {
	needs := append(more, "STREAM.INFO.")
	for i := range needs {
		needs[i] += streamPrefix + r.config.Bucket + overridesSuffix
	}
	return needs
}

// override takes up an entry of the bucket of overrides. One that cannot be read, or
// whose key can be no node's id, decides nothing, nor does one beyond as many as there
// may be nodes.
func (c *Config) override(all map[string]discovery.Override, m *message) {
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

// overseer follows the overrides for one watch of the nodes, beside its loop: it
// leaves what it finds for the loop, which alone emits.
type overseer struct {
	registry *Registry
	session  *session
	// found are the newest overrides, until the loop has taken them; wake holds a
	// token then.
	found atomic.Pointer[map[string]discovery.Override]
	wake  chan struct{}
	ready chan struct{} // closed when the overrides are known, or known to be unknown
	known sync.Once
	last  map[string]discovery.Override // what was left last; nil before the first
	ahead time.Duration                 // how far the server's clock was then
}

func newOverseer(r *Registry, s *session) *overseer {
	return &overseer{registry: r, session: s, wake: make(chan struct{}, 1), ready: make(chan struct{})}
}

// take returns overrides that are to be emitted, nil if there are none.
func (o *overseer) take() map[string]discovery.Override {
	if all := o.found.Swap(nil); all != nil {
		return *all
	}
	return nil
}

// leave leaves the overrides for the loop, if they differ from the last ones: also if
// that is because one of the clocks was set.
func (o *overseer) leave(all map[string]discovery.Override) {
	defer o.known.Do(func() { close(o.ready) })
	o.ahead = o.registry.clock.Ahead()
	all = o.registry.clock.Locally(all)
	if o.last != nil && maps.EqualFunc(o.last, all, discovery.Override.Equal) {
		return
	}
	o.last = all
	left := maps.Clone(all)
	o.found.Store(&left)
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// follow leaves the overrides for the loop whenever they change, until ctx ends.
// Whatever goes wrong, the last ones stand: nobody may be put back into service
// because a bucket cannot be read.
//
// From time to time it compares what it has with the bucket, as the watch of the
// nodes does, but less strictly: a decision that comes late in a rare case does
// little harm.
func (o *overseer) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := o.watch(ctx)
		o.known.Do(func() { close(o.ready) })
		wait := overridesInterval
		if err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) && !errors.Is(err, discovery.ErrBroken) {
			wait = overridesPatience
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

func (o *overseer) watch(ctx context.Context) error {
	r := o.registry
	ctx, release := o.session.link.Guard(ctx, o.session.concerns(r.overrideNeeds(feedNeeds()...)))
	defer release()
	call := func(f func(ctx context.Context) error) error {
		bounded, cancel := context.WithTimeout(ctx, operationTimeout)
		defer cancel()
		if err := f(bounded); ctx.Err() == nil {
			return err
		}
		return context.Cause(ctx)
	}
	var (
		f    *feed
		info *jetstream.StreamInfo
	)
	err := call(func(ctx context.Context) (err error) {
		f, info, err = r.openOverrides(ctx, o.session)
		return err
	})
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		o.leave(nil) // there are none, or it was removed, and with it what it said
	}
	if err != nil {
		return err
	}
	defer f.close(ctx)

	all := make(map[string]discovery.Override)
	listed, changed := f.listed == 0, true
	reached := uint64(0) // up to which revision all is known
	compared := time.Now()
	for {
		if listed && (changed || r.clock.Ahead() != o.ahead) && len(f.messages) == 0 {
			o.leave(all)
			changed = false
		}
		m, err := f.next(ctx)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return fmt.Errorf("%w: %w", discovery.ErrBroken, err)
		case m != nil:
			r.config.override(all, m)
			reached = max(reached, m.sequence)
			listed, changed = listed || m.number >= f.listed || m.pending == 0, true
		case !listed: // what was to be listed may have gone before it was sent
			err := call(func(ctx context.Context) (err error) {
				listed, err = f.exhausted(ctx, f.received)
				return err
			})
			if err != nil {
				return err
			}
		}
		if time.Since(compared) < patrolInterval || len(f.messages) > 0 {
			continue
		}
		compared = time.Now()
		err = call(func(ctx context.Context) (err error) {
			reached, err = o.compare(ctx, f, info, reached)
			return err
		})
		if err != nil {
			return err
		}
	}
}

// compare returns up to which revision the bucket of overrides is known, or why
// the feed is no longer to be trusted.
func (o *overseer) compare(ctx context.Context, f *feed, before *jetstream.StreamInfo, reached uint64) (uint64, error) {
	now, err := o.registry.overridesInfo(ctx, o.session)
	if err != nil {
		return 0, err
	}
	last := now.State.LastSeq
	switch {
	case !now.Created.Equal(before.Created):
		return 0, fmt.Errorf("%w: the bucket was recreated", discovery.ErrBroken)
	case last < max(reached, before.State.LastSeq):
		return 0, fmt.Errorf("%w: the bucket went back, it lost data", discovery.ErrBroken)
	case last <= reached:
		return reached, nil
	}
	// It may no longer hold what was written last.
	done, err := f.exhausted(ctx, f.received)
	if err != nil {
		return 0, err
	}
	if !done && len(f.messages) == 0 {
		return 0, fmt.Errorf("%w: the bucket is ahead of the watch", discovery.ErrBroken)
	}
	return max(reached, last), nil
}

var _ discovery.Overrider = (*Registry)(nil)
