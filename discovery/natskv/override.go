package natskv

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
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
	// overridesWait is how long a listing of the nodes waits for that of the
	// overrides, so that a draining node does not begin with a burst of requests.
	overridesWait = 250 * time.Millisecond
)

// Overrides returns all overrides by the node's id. Without the bucket there are
// none. It fails as every call does.
func (r *Registry) Overrides(ctx context.Context) (map[string]discovery.Override, error) {
	var all map[string]discovery.Override
	err := r.do(ctx, "reading the overrides", r.overrideNeeds("CONSUMER.CREATE."), func(ctx context.Context, s *session) error {
		kv, err := s.js.KeyValue(ctx, r.config.Bucket+overridesSuffix)
		if errors.Is(err, jetstream.ErrBucketNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		w, err := kv.WatchAll(ctx)
		if err != nil {
			return err
		}
		defer func() { _ = w.Stop() }()
		all = make(map[string]discovery.Override)
		for {
			select {
			case e, ok := <-w.Updates():
				switch {
				case !ok:
					return discovery.ErrBroken
				case e == nil:
					return nil
				}
				r.config.override(all, e)
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	})
	return all, err
}

// SetOverride replaces the node's override. The bucket of overrides is created if
// it is missing, unless the configuration forbids it. It fails with
// [discovery.ErrInvalid] for an override or an id that cannot be kept, and
// otherwise as every call does.
func (r *Registry) SetOverride(ctx context.Context, id string, o discovery.Override) error {
	what := fmt.Sprintf("overriding node %q", id)
	record, err := discovery.AppendOverride(nil, o)
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
		_, err = kv.Put(ctx, encode(id), record)
		return err
	})
}

func (r *Registry) createOverrides(ctx context.Context, s *session, bucket string) (jetstream.KeyValue, error) {
	if r.config.NoCreate {
		return nil, fmt.Errorf("%w: bucket %q does not exist and create is off; create it with: nats kv add %s --history=%d --storage=%s --replicas=%d",
			discovery.ErrNotFound, bucket, bucket, overridesHistory, r.config.Storage, r.config.Replicas)
	}
	config := jetstream.KeyValueConfig{
		Bucket:      bucket,
		Description: "what operators have decided about the nodes of a fleet",
		History:     overridesHistory,
		MaxBytes:    r.config.MaxBytes,
		Storage:     jetstream.FileStorage,
		Replicas:    r.config.Replicas,
	}
	if r.config.Storage == StorageMemory {
		config.Storage = jetstream.MemoryStorage
	}
	kv, err := s.js.CreateKeyValue(ctx, config)
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

// override takes up an entry of the bucket of overrides. One that cannot be read
// decides nothing.
func (c *Config) override(all map[string]discovery.Override, e jetstream.KeyValueEntry) {
	id, ok := decode(e.Key())
	if !ok {
		id = e.Key()
	}
	o, err := discovery.ParseOverride(e.Value())
	if e.Operation() != jetstream.KeyValuePut || err != nil {
		delete(all, id)
		return
	}
	all[id] = o
}

// overseer follows the overrides for one watch of the nodes.
type overseer struct {
	registry *Registry
	session  *session
	emit     func(discovery.Event)
	known    sync.Once
	ready    chan struct{} // closed when the overrides are known, or known to be unknown
}

// follow emits the overrides whenever they change, until ctx ends. Whatever goes
// wrong, the last ones stand: nobody may be put back into service because a bucket
// cannot be read.
//
// Unlike the nodes it uses the client's own watch, which may stop without a word,
// and compares it with the bucket from time to time: a decision that comes late in
// a rare case does little harm.
func (o *overseer) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := o.watch(ctx)
		o.known.Do(func() { close(o.ready) })
		wait := overridesInterval
		if err != nil && !errors.Is(err, jetstream.ErrBucketNotFound) && !errors.Is(err, discovery.ErrBroken) {
			wait = overridesPatience
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

func (o *overseer) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, bucket := o.registry, o.registry.config.Bucket+overridesSuffix
	call := func(f func(ctx context.Context) error) error {
		ctx, cancel := context.WithTimeout(ctx, operationTimeout)
		defer cancel()
		return f(ctx)
	}
	var kv jetstream.KeyValue
	err := call(func(ctx context.Context) (err error) {
		kv, err = o.session.js.KeyValue(ctx, bucket)
		return err
	})
	if errors.Is(err, jetstream.ErrBucketNotFound) && r.overridden.Load() {
		o.tell(nil) // it was removed, and with it what it said
	}
	if err != nil {
		return err
	}
	var created time.Time
	state := func(ctx context.Context) (uint64, error) {
		stream, err := o.session.js.Stream(ctx, streamPrefix+bucket)
		if err != nil {
			return 0, err
		}
		info := stream.CachedInfo()
		if created.IsZero() {
			created = info.Created
		}
		if !created.Equal(info.Created) {
			return 0, fmt.Errorf("%w: the bucket was recreated", discovery.ErrBroken)
		}
		return info.State.LastSeq, nil
	}
	if err := call(func(ctx context.Context) error { _, err := state(ctx); return err }); err != nil {
		return err
	}
	w, err := kv.WatchAll(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = w.Stop() }()
	all := make(map[string]discovery.Override)
	listed, reached := false, uint64(0)
	patrol := time.NewTicker(patrolInterval)
	defer patrol.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e, ok := <-w.Updates():
			switch {
			case !ok:
				return discovery.ErrBroken
			case e == nil:
				listed = true
			default:
				r.config.override(all, e)
				reached = max(reached, e.Revision())
			}
			if listed && len(w.Updates()) == 0 {
				if len(all) > 0 || r.overridden.Load() {
					o.tell(all)
				}
				o.known.Do(func() { close(o.ready) })
			}
		case <-patrol.C:
			before := reached
			var last uint64
			err := call(func(ctx context.Context) (err error) {
				last, err = state(ctx)
				return err
			})
			if err != nil {
				return err
			}
			if last > before && len(w.Updates()) == 0 {
				return fmt.Errorf("%w: the bucket is ahead of the watch", discovery.ErrBroken)
			}
		}
	}
}

func (o *overseer) tell(all map[string]discovery.Override) {
	o.registry.overridden.Store(len(all) > 0)
	o.emit(discovery.Event{Type: discovery.Overridden, Overrides: maps.Clone(all)})
}

var _ discovery.Overrider = (*Registry)(nil)
