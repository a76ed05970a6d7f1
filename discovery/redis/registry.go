package redis

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	goredis "github.com/redis/go-redis/v9"
)

// Interface guards.
var (
	_ discovery.Registry  = (*Registry)(nil)
	_ discovery.Verifier  = (*Registry)(nil)
	_ discovery.Historian = (*Registry)(nil)
	_ discovery.Overrider = (*Registry)(nil)
	_ discovery.Locator   = (*Registry)(nil)
	_ discovery.Reader    = (*Registry)(nil)
)

// A Registry is a fleet's list in Redis. All its methods but Close may be called
// concurrently. It keeps at most three connections to a server: one for
// commands, and while it is watched one that waits for changes, or is subscribed to
// those of the overrides, and one that is subscribed to notifications.
type Registry struct {
	config    Config // resolved
	connector *connector
	commands  goredis.UniversalClient
	layout    layout
	clock     discovery.RegistryClock // that of the overrides

	watching atomic.Pointer[watch] // the newest watch once it has listed, or nil
	push     atomic.Pointer[string]

	closing chan struct{} // closed by Close

	mu      sync.Mutex // guards closed, and that nothing is added to running then
	closed  bool
	running sync.WaitGroup // calls of the client library that may outlive their caller
}

// A layout knows how records are laid out.
type layout interface {
	discovery.Announcer
	discovery.Historian
	// record reads a node's record. It is for use within do.
	record(ctx context.Context, id string) (string, error)
	// watch begins a watch. Its view is used by that watch only.
	watch(ctx context.Context, w *watch) (view, error)
}

// Open returns a connection to a registry, which need not be up: nothing is
// dialled yet. The error wraps [discovery.ErrInvalid].
func Open(c Config) (*Registry, error) {
	c, err := c.Resolve()
	if err != nil {
		return nil, err
	}
	d, err := newConnector(c)
	if err != nil {
		return nil, err
	}
	r := &Registry{config: c, connector: d, commands: d.commands(), closing: make(chan struct{})}
	if c.Layout == LayoutKeys {
		r.layout = newKeysLayout(r)
	} else {
		r.layout = newSortedSet(r)
	}
	return r, nil
}

// String names the registry, without a secret, such as
// "redis://127.0.0.1:6379/0/catga:nodes".
func (r *Registry) String() string { return r.config.String() }

// Changes tells, for a log, how the newest watch learns of changes: "stream",
// "notifications", "stream and notifications" or "poll"; "" before the first
// watch.
func (r *Registry) Changes() string {
	if p := r.push.Load(); p != nil {
		return *p
	}
	return ""
}

// Announce puts the node's record and renews its lease. Its error wraps
// [discovery.ErrInvalid], ErrUnreachable, ErrCredentials, ErrPermission,
// ErrFull, ErrUnsupported or ErrNotFound (no such master), or is that of the
// context.
func (r *Registry) Announce(ctx context.Context, n discovery.Node) error {
	if err := r.layout.Announce(ctx, n); err != nil {
		return fmt.Errorf("announcing node %q: %w", n.ID, err)
	}
	return nil
}

// Drain puts the node's record in place of the one that stands, if that is of the
// same instance. Its errors are those of Announce.
func (r *Registry) Drain(ctx context.Context, n discovery.Node) (own bool, err error) {
	if own, err = r.layout.Drain(ctx, n); err != nil {
		return false, fmt.Errorf("announcing that node %q drains: %w", n.ID, err)
	}
	return own, nil
}

// Withdraw removes the node's record if it is still of the same instance. Its
// errors are those of Announce.
func (r *Registry) Withdraw(ctx context.Context, n discovery.Node) error {
	if err := r.layout.Withdraw(ctx, n); err != nil {
		return fmt.Errorf("withdrawing node %q: %w", n.ID, err)
	}
	return nil
}

// Record returns the node's record as our writers put it; those of foreign writers
// in a sorted set cannot be found by their node. Its errors are those of Announce.
func (r *Registry) Record(ctx context.Context, id string) (discovery.Node, error) {
	var record string
	err := r.do(ctx, func(ctx context.Context) (err error) {
		record, err = r.layout.record(ctx, id)
		if errors.Is(err, goredis.Nil) {
			record, err = "", nil
		}
		return err
	})
	if err != nil {
		return discovery.Node{}, fmt.Errorf("reading the record of node %q: %w", id, err)
	}
	n, err := discovery.ParseNode([]byte(record))
	if err != nil {
		return discovery.Node{}, nil //nolint:nilerr // nothing that could be read stands there
	}
	return n, nil
}

// History returns what our writers recorded of a node, newest first; changes by
// foreign writers are not recorded. With LayoutKeys the error wraps
// [discovery.ErrUnsupported].
func (r *Registry) History(ctx context.Context, id string, limit int) ([]discovery.Revision, error) {
	revisions, err := r.layout.History(ctx, id, limit)
	if err != nil {
		return nil, fmt.Errorf("reading the history of node %q: %w", id, err)
	}
	return revisions, nil
}

// Close ends the calls that are under way and closes the connections.
func (r *Registry) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	close(r.closing)
	r.mu.Unlock()
	err := r.commands.Close()
	r.connector.close()
	r.running.Wait()
	return err
}

var errClosed = &failure{discovery.ErrUnreachable, "the registry was closed here"}

// do calls the client library, and returns as soon as the context ends, which
// the library does not: it goes by the context's deadline only, and would keep a
// caller for as long as the server may take to answer.
func (r *Registry) do(ctx context.Context, call func(context.Context) error) error {
	if err := ctx.Err(); err != nil {
		return explain(err)
	}
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return errClosed
	}
	r.running.Add(1)
	r.mu.Unlock()
	done := make(chan error, 1)
	go func() {
		defer r.running.Done()
		r.connector.followMaster(ctx)
		done <- call(ctx)
	}()
	select {
	case err := <-done:
		if deadline, ok := ctx.Deadline(); ok && isTimeout(err) && time.Until(deadline) < 10*time.Millisecond {
			// The socket's deadline is the context's, but it goes by a clock
			// that the library reads now and then only.
			err = context.DeadlineExceeded
		}
		return explain(err)
	case <-ctx.Done():
		return explain(ctx.Err())
	case <-r.closing:
		return errClosed
	}
}

// mark returns the epoch of the data, after having proposed one if there is
// none: only what somebody wrote can be seen to be gone. It returns "" where the
// server does not let it.
func (r *Registry) mark(ctx context.Context, meta string) (string, error) {
	var epoch string
	err := r.do(ctx, func(ctx context.Context) error {
		if err := r.commands.HSetNX(ctx, meta, "epoch", rand.Text()).Err(); err != nil {
			return err
		}
		var err error
		epoch, err = r.commands.HGet(ctx, meta, "epoch").Result()
		return err
	})
	var refused *failure
	if errors.As(err, &refused) && !errors.Is(err, discovery.ErrUnreachable) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return epoch, nil
}
