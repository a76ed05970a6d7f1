// Package natskv keeps a registry in a JetStream key-value bucket: one key a
// node, its value the record. Changes are pushed, records expire by the server's
// own clock, and past revisions stay readable. What operators decide about the nodes
// stands in another bucket, whose name ends in _overrides.
//
// A watch is a consumer of its own that is read to the first irregularity, and
// then ends; see [Registry.Watch].
package natskv

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"cmp"
	"slices"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

// A Registry is one bucket behind one connection, with the bucket of its overrides.
// Beside [discovery.Registry] it implements [discovery.Verifier], [discovery.Locator],
// [discovery.Reader], [discovery.Historian] and [discovery.Overrider]. Everything but
// Close may be called concurrently.
//
// Each call may fail with ErrUnreachable, ErrCredentials, ErrPermission,
// ErrUnsupported or ErrNotFound of package discovery, with ErrInvalid for an id, a
// record or a bucket that is none, and with the context's error; it lasts five seconds
// at most. Its methods say what else they return.
type Registry struct {
	config Config // resolved
	conn   *natslink.Conn
	clock  discovery.RegistryClock // that of the overrides

	watch atomic.Pointer[watch] // the one that runs

	mu      sync.Mutex // guards what follows; no I/O happens under it
	session *session   // of the last connection
	own     map[string]ownRecord
}

// An ownRecord is a record that was put here last, by its key.
type ownRecord struct {
	instance string
	revision uint64
}

// Open returns the registry that config names. It does not connect: the first
// call that needs the connection does. The error is that of [Config.Resolve].
func Open(config Config) (*Registry, error) {
	config, err := config.Resolve()
	if err != nil {
		return nil, err
	}
	conn, err := natslink.New(config.conn())
	if err != nil {
		return nil, err
	}
	return &Registry{config: config, conn: conn, own: make(map[string]ownRecord)}, nil
}

// String names the bucket and its servers, and no secret.
func (r *Registry) String() string { return r.config.String() }

// Close closes the connection, which ends every call that is under way.
func (r *Registry) Close() error { return r.conn.Close() }

// Located returns the servers that the cluster has told of beside those
// configured, as host:port.
func (r *Registry) Located() []string { return r.conn.Located() }

// Announce puts the node's record. Each put renews the record's stay in the
// bucket. A bucket that is missing is created first, unless the configuration
// forbids it. It fails with [discovery.ErrFull] when the bucket has no room.
func (r *Registry) Announce(ctx context.Context, n discovery.Node) error {
	record, invalid := discovery.AppendRecord(nil, n, time.Now())
	key := r.config.key(n.ID)
	return r.do(ctx, fmt.Sprintf("announcing node %q", n.ID), invalid, r.writes(key), func(ctx context.Context, s *session) error {
		revision, err := s.put(ctx, key, record)
		if err != nil {
			return err
		}
		r.noteOwn(key, ownRecord{n.Instance(), revision})
		return nil
	})
}

// noteOwn keeps what was put here last.
func (r *Registry) noteOwn(key string, own ownRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.own[key] = own
}

// lastOwn returns what was put here last, the zero ownRecord if there is none.
func (r *Registry) lastOwn(key string) ownRecord {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.own[key]
}

// put writes a record, to the bucket that stands there by now.
func (s *session) put(ctx context.Context, key string, record []byte) (uint64, error) {
	kv, err := s.bucket(ctx)
	if err != nil {
		return 0, err
	}
	revision, err := kv.Put(ctx, key, record)
	if !errors.Is(err, jetstream.ErrNoStreamResponse) {
		return revision, err
	}
	s.kv.Store(nil) // nobody stores it: the bucket was removed since it was found
	if kv, err = s.bucket(ctx); err != nil {
		return 0, err
	}
	return kv.Put(ctx, key, record)
}

// Drain puts the node's record in place of the one that stands, if that names the
// same instance, and reports whether it did.
func (r *Registry) Drain(ctx context.Context, n discovery.Node) (own bool, err error) {
	record, invalid := discovery.AppendRecord(nil, n, time.Now())
	key := r.config.key(n.ID)
	err = r.do(ctx, fmt.Sprintf("announcing that node %q drains", n.ID), invalid, r.readsAndWrites(key), func(ctx context.Context, s *session) (err error) {
		own, err = r.change(ctx, s, key, n, func(kv jetstream.KeyValue, last uint64) error {
			revision, err := kv.Update(ctx, key, record, last)
			if err == nil {
				r.noteOwn(key, ownRecord{n.Instance(), revision})
			}
			return err
		})
		return err
	})
	return own, err
}

// Withdraw removes the node's record if its metadata names the same instance as
// n does. A record that is not there, or is somebody else's, is no error.
func (r *Registry) Withdraw(ctx context.Context, n discovery.Node) error {
	key := r.config.key(n.ID)
	return r.do(ctx, fmt.Sprintf("withdrawing node %q", n.ID), discovery.ValidateID(n.ID), r.readsAndWrites(key), func(ctx context.Context, s *session) error {
		_, err := r.change(ctx, s, key, n, func(kv jetstream.KeyValue, last uint64) error {
			err := kv.Delete(ctx, key, jetstream.LastRevision(last))
			if err == nil {
				r.mu.Lock()
				defer r.mu.Unlock()
				delete(r.own, key)
			}
			return err
		})
		return err
	})
}

// replicaLag is how long a replica that has not heard of a write is left to hear of
// it.
const replicaLag = 10 * time.Millisecond

// change calls write with the revision of the record that stands, if that record
// names the same instance as n, and reports whether it was still there when it was
// written. A record that was put here last need not be read first: that saves a
// round trip where the registry is far away.
func (r *Registry) change(ctx context.Context, s *session, key string, n discovery.Node, write func(kv jetstream.KeyValue, last uint64) error) (bool, error) {
	kv, err := s.existing(ctx)
	if kv == nil || err != nil {
		return false, err
	}
	last := uint64(0)
	if own := r.lastOwn(key); own.instance == n.Instance() {
		last = own.revision
	}
	for {
		if last == 0 {
			var stands discovery.Node
			stands, last, err = read(ctx, kv, key)
			if err != nil || last == 0 || stands.Instance() != n.Instance() {
				return false, err
			}
		}
		err := write(kv, last)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, jetstream.ErrKeyRevisionMismatch):
			// Somebody was faster. It may have been an announcement of our own whose
			// caller did not wait for it. Any replica may tell, also one that is behind.
			last = 0
			select {
			case <-time.After(replicaLag):
			case <-ctx.Done():
				return false, ctx.Err()
			}
		case errors.Is(err, jetstream.ErrNoStreamResponse):
			if _, gone := s.stream(ctx); errors.Is(gone, jetstream.ErrStreamNotFound) {
				return false, nil
			}
			return false, err
		default:
			return false, err
		}
	}
}

// read returns the record that stands under the key and its revision, which is 0 if
// there is none that can be read.
func read(ctx context.Context, kv jetstream.KeyValue, key string) (n discovery.Node, revision uint64, err error) {
	entry, err := kv.Get(ctx, key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return n, 0, nil
	}
	if err != nil {
		return n, 0, err
	}
	if n, err = discovery.ParseNode(entry.Value()); err != nil {
		return discovery.Node{}, 0, nil
	}
	return n, entry.Revision(), nil
}

// Record returns the node's record, the zero Node if there is none that can be read.
func (r *Registry) Record(ctx context.Context, id string) (discovery.Node, error) {
	key := r.config.key(id)
	var node discovery.Node
	err := r.do(ctx, fmt.Sprintf("reading the record of node %q", id), discovery.ValidateID(id), reads, func(ctx context.Context, s *session) error {
		kv, err := s.bucket(ctx)
		if err != nil {
			return err
		}
		n, revision, err := read(ctx, kv, key)
		if r.lastOwn(key).revision <= revision { // else a replica has not heard of our last put yet
			node = n
		}
		return err
	})
	return node, err
}

// History returns the revisions that the bucket still holds of the node, newest
// first, whichever form of key they stand under. A node that was never heard of
// has none, and so has every node of a bucket that does not exist but may be
// created.
func (r *Registry) History(ctx context.Context, id string, limit int) ([]discovery.Revision, error) {
	var revisions []discovery.Revision
	err := r.do(ctx, fmt.Sprintf("reading the history of node %q", id), discovery.ValidateID(id), feedNeeds(), func(ctx context.Context, s *session) error {
		info, err := s.stream(ctx)
		if errors.Is(err, jetstream.ErrStreamNotFound) && !r.config.NoCreate {
			return nil
		}
		if err != nil {
			return err
		}
		for _, key := range r.config.keysOf(id) {
			of, err := s.revisions(ctx, info, key, id)
			if err != nil {
				return err
			}
			revisions = append(revisions, of...)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(revisions, func(a, b discovery.Revision) int { return cmp.Compare(b.Number, a.Number) })
	if limit > 0 && len(revisions) > limit {
		revisions = revisions[:limit]
	}
	return revisions, nil
}

// revisions reads those of one key.
func (s *session) revisions(ctx context.Context, info *jetstream.StreamInfo, key, id string) ([]discovery.Revision, error) {
	f, err := s.openFeed(ctx, info, jetstream.DeliverAllPolicy, key)
	if err != nil {
		return nil, err
	}
	defer f.close(ctx)
	var (
		revisions []discovery.Revision
		records   discovery.Parser
	)
	err = f.list(ctx, func(m *message) {
		event := s.config.event(m, &records)
		if event.Type != discovery.Put || event.ID == id {
			revisions = append(revisions, discovery.Revision{
				Number: m.sequence, Time: m.time, Type: event.Type, Node: event.Node, Err: event.Err,
			})
		}
	})
	return revisions, err
}

// reads are the subjects that reading a key needs; see do.
var reads = []string{"DIRECT.GET.", "STREAM.MSG.GET."}

func (r *Registry) readsAndWrites(key string) []string { return append(r.writes(key), reads...) }

// writes returns the subjects that a write of the key needs; see do.
func (r *Registry) writes(key string) []string {
	return []string{"$KV." + r.config.Bucket + "." + key}
}

// do runs f on the connection, for five seconds at most, and explains its error; see
// session.do. What is invalid from the start is not tried.
func (r *Registry) do(ctx context.Context, what string, invalid error, needs []string, f func(context.Context, *session) error) error {
	if invalid != nil {
		return fmt.Errorf("%s: %w", what, invalid)
	}
	bounded, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	s, err := r.connect(bounded)
	if err == nil {
		err = s.do(ctx, bounded, needs, func(ctx context.Context) error { return f(ctx, s) })
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// connect returns the session of the connection that stands.
func (r *Registry) connect(ctx context.Context) (*session, error) {
	link, err := r.conn.Get(ctx)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.session == nil || r.session.link != link {
		s, err := newSession(&r.config, &r.clock, link)
		if err != nil {
			return nil, err
		}
		r.session = s
	}
	return r.session, nil
}

// Interface guards
var (
	_ discovery.Registry  = (*Registry)(nil)
	_ discovery.Verifier  = (*Registry)(nil)
	_ discovery.Locator   = (*Registry)(nil)
	_ discovery.Reader    = (*Registry)(nil)
	_ discovery.Historian = (*Registry)(nil)
	_ discovery.Overrider = (*Registry)(nil)
)
