// Package natskv keeps a registry in a JetStream key-value bucket: one key a
// node, its value the record. Changes are pushed, records expire by the server's
// own clock, and past revisions stay readable.
//
// A watch is a consumer of its own that is read to the first irregularity, and
// then ends; see [Registry.Watch].
package natskv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

const (
	// operationTimeout bounds whatever asks the registry and waits.
	operationTimeout = 5 * time.Second

	// streamPrefix makes the name of a stream out of that of a bucket.
	streamPrefix = "KV_"
)

// A Registry is one bucket behind one connection. It implements
// [discovery.Registry], [discovery.Verifier] and [discovery.Historian].
type Registry struct {
	config Config // resolved
	conn   *natslink.Conn
	clock  discovery.RegistryClock // that of the overrides

	mu      sync.Mutex // guards what follows; no I/O happens under it
	session *session   // of the last connection
	watch   *watch     // the one that runs
	// written are our own records, by key.
	written map[string]written
}

// written is a record that was put here last.
type written struct {
	instance string
	revision uint64
}

// A session is what stands on one connection.
type session struct {
	link *natslink.Link
	js   jetstream.JetStream
	api  string // prefix of the subjects of the JetStream API
	// overrides is the name of the stream of the overrides. What is denied there
	// is of no concern to those who do not ask for it.
	overrides string

	mu sync.Mutex
	kv jetstream.KeyValue // once the bucket was found
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
	return &Registry{config: config, conn: conn, written: make(map[string]written)}, nil
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
// forbids it. It fails with [discovery.ErrFull] when the bucket has no room, and
// otherwise as every call does: with ErrInvalid, ErrUnreachable, ErrCredentials,
// ErrPermission, ErrUnsupported or ErrNotFound of package discovery.
func (r *Registry) Announce(ctx context.Context, n discovery.Node) error {
	what := fmt.Sprintf("announcing node %q", n.ID)
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	key := r.config.key(n.ID)
	return r.do(ctx, what, r.writes(key), func(ctx context.Context, s *session) error {
		revision, err := r.put(ctx, s, key, record)
		if err != nil {
			return err
		}
		r.wrote(key, n, revision)
		return nil
	})
}

// wrote notes a record of ours.
func (r *Registry) wrote(key string, n discovery.Node, revision uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.written[key] = written{n.Instance(), revision}
}

func (r *Registry) put(ctx context.Context, s *session, key string, record []byte) (uint64, error) {
	kv, err := r.bucket(ctx, s)
	if err != nil {
		return 0, err
	}
	revision, err := kv.Put(ctx, key, record)
	if !errors.Is(err, jetstream.ErrNoStreamResponse) {
		return revision, err
	}
	// Nobody stores it: the bucket was removed since it was found.
	s.mu.Lock()
	s.kv = nil
	s.mu.Unlock()
	if kv, err = r.bucket(ctx, s); err != nil {
		return 0, err
	}
	return kv.Put(ctx, key, record)
}

// Drain puts the node's record in place of the one that stands, if that names the
// same instance. Its errors are those of Announce.
func (r *Registry) Drain(ctx context.Context, n discovery.Node) (own bool, err error) {
	what := fmt.Sprintf("announcing that node %q drains", n.ID)
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return false, fmt.Errorf("%s: %w", what, err)
	}
	key := r.config.key(n.ID)
	err = r.do(ctx, what, r.readsAndWrites(key), func(ctx context.Context, s *session) (err error) {
		own, err = r.change(ctx, s, key, n, func(kv jetstream.KeyValue, last uint64) error {
			revision, err := kv.Update(ctx, key, record, last)
			if err == nil {
				r.wrote(key, n, revision)
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
	what := fmt.Sprintf("withdrawing node %q", n.ID)
	if err := discovery.ValidateID(n.ID); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	key := r.config.key(n.ID)
	return r.do(ctx, what, r.readsAndWrites(key), func(ctx context.Context, s *session) error {
		_, err := r.change(ctx, s, key, n, func(kv jetstream.KeyValue, last uint64) error {
			err := kv.Delete(ctx, key, jetstream.LastRevision(last))
			if err == nil {
				r.mu.Lock()
				defer r.mu.Unlock()
				delete(r.written, key)
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
	kv, err := r.existing(ctx, s)
	if kv == nil || err != nil {
		return false, err
	}
	r.mu.Lock()
	last := r.written[key]
	r.mu.Unlock()
	if last.instance != n.Instance() {
		last.revision = 0
	}
	for {
		if last.revision == 0 {
			entry, err := kv.Get(ctx, key)
			if errors.Is(err, jetstream.ErrKeyNotFound) {
				return false, nil
			}
			if err != nil {
				return false, err
			}
			current, err := discovery.ParseNode(entry.Value())
			if own := err == nil && current.Instance() == n.Instance(); !own {
				return false, nil // somebody else's record, readable or not
			}
			last.revision = entry.Revision()
		}
		err := write(kv, last.revision)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, jetstream.ErrKeyRevisionMismatch):
			// Somebody was faster. It may have been an announcement of our own whose
			// caller did not wait for it. Any replica may tell, also one that is behind.
			last.revision = 0
			select {
			case <-time.After(replicaLag):
			case <-ctx.Done():
				return false, ctx.Err()
			}
		case errors.Is(err, jetstream.ErrNoStreamResponse):
			if _, gone := s.js.Stream(ctx, streamPrefix+r.config.Bucket); errors.Is(gone, jetstream.ErrStreamNotFound) {
				return false, nil
			}
			return false, err
		default:
			return false, err
		}
	}
}

// existing returns the bucket, nil if there is none: to leave is no reason to
// create it.
func (r *Registry) existing(ctx context.Context, s *session) (jetstream.KeyValue, error) {
	s.mu.Lock()
	kv := s.kv
	s.mu.Unlock()
	if kv != nil {
		return kv, nil
	}
	stream, err := s.js.Stream(ctx, streamPrefix+r.config.Bucket)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := r.check(stream); err != nil {
		return nil, err
	}
	return r.bucket(ctx, s)
}

// Record returns the node's record, the zero Node if there is none. Its errors are
// those of Withdraw.
func (r *Registry) Record(ctx context.Context, id string) (discovery.Node, error) {
	what := fmt.Sprintf("reading the record of node %q", id)
	if err := discovery.ValidateID(id); err != nil {
		return discovery.Node{}, fmt.Errorf("%s: %w", what, err)
	}
	key := r.config.key(id)
	var node discovery.Node
	err := r.do(ctx, what, reads, func(ctx context.Context, s *session) error {
		kv, err := r.bucket(ctx, s)
		if err != nil {
			return err
		}
		entry, err := kv.Get(ctx, key)
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		r.mu.Lock()
		last := r.written[key]
		r.mu.Unlock()
		if last.revision > entry.Revision() {
			return nil // of a replica that has not heard of our last put yet
		}
		if n, err := discovery.ParseNode(entry.Value()); err == nil {
			node = n
		}
		return nil
	})
	return node, err
}

// reads are the subjects that reading a key needs; see do.
var reads = []string{"DIRECT.GET.", "STREAM.MSG.GET."}

func (r *Registry) readsAndWrites(key string) []string { return append(r.writes(key), reads...) }

// writes returns the subjects that a write of the key needs; see do.
func (r *Registry) writes(key string) []string {
	return []string{"$KV." + r.config.Bucket + "." + key}
}

// do runs f on the connection, for five seconds at most, and explains its error.
// needs are the beginnings of the subjects that f publishes to, beside those
// that find and create the bucket: as soon as the server denies one of them, f's
// context ends.
func (r *Registry) do(ctx context.Context, what string, needs []string, f func(context.Context, *session) error) error {
	bounded, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	s, err := r.connect(bounded)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	denied := s.link.Denied()
	guarded, release := s.link.Guard(bounded, s.concerns(append(slices.Clip(needs), "STREAM.INFO.", "STREAM.CREATE.", "INFO")))
	defer release()
	err = f(guarded, s)
	if err == nil {
		return nil
	}
	err = r.explain(ctx, guarded, s.link, err)
	if now := s.link.Denied(); now != denied && errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, discovery.ErrPermission) {
		// Something was denied meanwhile that we did not know we needed.
		err = now
	}
	return fmt.Errorf("%s: %w%s", what, err, r.importHint(s, needs, err))
}

// importHint says what may be wrong where a key of another domain gives no answer:
// the subjects of the keys are imported by themselves, and a server drops silently
// what nobody imports.
func (r *Registry) importHint(s *session, needs []string, err error) string {
	if r.config.Domain == "" || !errors.Is(err, context.DeadlineExceeded) || s.link.Err() != nil {
		return ""
	}
	for _, need := range needs {
		if need[0] == '$' {
			return fmt.Sprintf(" on %q; if the bucket is another account's, import its $KV.> as %s$KV.> as well", s.api+need, s.api)
		}
	}
	return ""
}

// concerns returns whether a denied subject is one of these. Those that do not
// begin with "$" are of the JetStream API.
func (s *session) concerns(needs []string) func(subject string) bool {
	return func(subject string) bool {
		for _, need := range needs {
			if strings.Contains(subject, s.overrides) != strings.Contains(need, s.overrides) {
				continue
			}
			if strings.HasPrefix(subject, s.api+need) || need[0] == '$' && strings.HasPrefix(subject, need) {
				return true
			}
		}
		return false
	}
}

// connect returns the session of the connection that stands.
func (r *Registry) connect(ctx context.Context) (*session, error) {
	link, err := r.conn.Get(ctx)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.session != nil && r.session.link == link {
		return r.session, nil
	}
	s := &session{link: link, api: jetstream.DefaultAPIPrefix, overrides: streamPrefix + r.config.Bucket + overridesSuffix}
	if r.config.Domain == "" {
		s.js, err = jetstream.New(link.Conn)
	} else {
		s.api = "$JS." + r.config.Domain + ".API."
		s.js, err = jetstream.NewWithDomain(link.Conn, r.config.Domain)
	}
	if err != nil {
		return nil, err
	}
	r.session = s
	return s, nil
}

// bucket returns the bucket for reading and writing keys, found or created once
// a connection.
func (r *Registry) bucket(ctx context.Context, s *session) (jetstream.KeyValue, error) {
	s.mu.Lock()
	kv := s.kv
	s.mu.Unlock()
	if kv != nil {
		return kv, nil
	}
	if _, err := r.ensure(ctx, s); err != nil {
		return nil, err
	}
	kv, err := s.js.KeyValue(ctx, r.config.Bucket)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kv = kv
	return kv, nil
}

// ensure returns the bucket's stream, creating the bucket if it is missing and
// may be created. A bucket that exists is never changed: to create or update in
// one would silently rewrite the history and the TTL that its owner chose.
func (r *Registry) ensure(ctx context.Context, s *session) (*jetstream.StreamInfo, error) {
	name := streamPrefix + r.config.Bucket
	stream, err := s.js.Stream(ctx, name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if r.config.NoCreate {
			return nil, fmt.Errorf("%w: bucket %q does not exist and create is off; create it with: nats kv add %s --ttl=%s --history=%d --max-bucket-size=%d --storage=%s --replicas=%d",
				discovery.ErrNotFound, r.config.Bucket, r.config.Bucket,
				r.config.BucketTTL, r.config.History, r.config.MaxBytes, r.config.Storage, max(r.config.Replicas, 1))
		}
		if err := r.create(ctx, s); err != nil {
			return nil, fmt.Errorf("creating bucket %q: %w", r.config.Bucket, err)
		}
		stream, err = s.js.Stream(ctx, name)
	}
	if err != nil {
		return nil, err
	}
	if err := r.check(stream); err != nil {
		return nil, err
	}
	return stream.CachedInfo(), nil
}

// check reports what has the name of the bucket and is none.
func (r *Registry) check(stream jetstream.Stream) error {
	if stream.CachedInfo().Config.MaxMsgsPerSubject < 1 {
		return fmt.Errorf("%w bucket %q: stream %s%s exists but is no key-value bucket; name another bucket",
			discovery.ErrInvalid, r.config.Bucket, streamPrefix, r.config.Bucket)
	}
	return nil
}

func (r *Registry) create(ctx context.Context, s *session) error {
	config := jetstream.KeyValueConfig{
		Bucket:      r.config.Bucket,
		Description: "nodes of a fleet",
		TTL:         r.config.BucketTTL,
		History:     uint8(r.config.History),
		MaxBytes:    r.config.MaxBytes,
		// With it the server tells of each record that expires. A marker needs
		// to live no longer than a record.
		LimitMarkerTTL: r.config.BucketTTL.Truncate(time.Second),
	}
	_, err := r.createBucket(ctx, s, config)
	if errors.Is(err, jetstream.ErrLimitMarkerTTLNotSupported) {
		config.LimitMarkerTTL = 0
		_, err = r.createBucket(ctx, s, config)
	}
	if errors.Is(err, jetstream.ErrBucketExists) {
		return nil // somebody else was faster, with another configuration
	}
	return err
}

var (
	_ discovery.Registry  = (*Registry)(nil)
	_ discovery.Verifier  = (*Registry)(nil)
	_ discovery.Historian = (*Registry)(nil)
	_ discovery.Locator   = (*Registry)(nil)
	_ discovery.Reader    = (*Registry)(nil)
)
