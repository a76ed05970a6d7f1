package redis

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"sync/atomic"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A Registry is a fleet's list in Redis. It implements [discovery.Registry] and all
// that a registry may implement beside it: [discovery.Verifier], [discovery.ChangeSource],
// [discovery.Locator], [discovery.Reader], [discovery.Historian] and
// [discovery.Overrider]. All its methods but Close may be called concurrently.
//
// It keeps at most three connections to a server: one for commands, and while it is
// watched one that waits for changes, or is subscribed to those of the overrides, and
// one that is subscribed to notifications.
type Registry struct {
	client    *client
	layout    layout
	overrides *overrides

	watching atomic.Pointer[watch] // the newest watch once it has listed, or nil
	changes  atomic.Value          // a string
}

// A layout writes and reads records as they are laid out. All but history and watch are
// for use within [client.do].
type layout interface {
	// put writes a node's record, which renews its lease.
	put(ctx context.Context, n discovery.Node, record []byte) error
	// replace is put where the record that stands names the same instance, and
	// reports whether it does.
	replace(ctx context.Context, n discovery.Node, record []byte) (own bool, err error)
	// remove removes a node's record if it names the same instance.
	remove(ctx context.Context, n discovery.Node) error
	// record reads a node's record, "" if there is none.
	record(ctx context.Context, id string) (string, error)
	// history reads a node's past records, newest first, up to limit if that is not 0.
	history(ctx context.Context, id string, limit int) ([]discovery.Revision, error)
	// override writes the record of an override, or removes it if that is "", and tells
	// watchers that one has changed.
	override(ctx context.Context, id, record string) error
	// watch begins a watch. Its view is used by that watch only.
	watch(ctx context.Context, f *feed) (view, error)
}

// Open returns a connection to a registry, which need not be up: nothing is
// dialled yet. The caller closes it. The error wraps [discovery.ErrInvalid].
func Open(c Config) (*Registry, error) {
	c, err := c.Resolve()
	if err == nil {
		err = c.checkFiles()
	}
	if err != nil {
		return nil, err
	}
	client := newClient(c)
	r := &Registry{client: client, overrides: &overrides{client: client}}
	if c.Layout == LayoutKeys {
		r.layout = newKeys(client)
	} else {
		r.layout = newSortedSet(client)
	}
	return r, nil
}

// String names the registry, without a secret, such as
// "redis://127.0.0.1:6379/0/catga:nodes".
func (r *Registry) String() string { return r.client.config.String() }

// Changes returns how the newest watch learns of changes: "stream", "notifications",
// "stream and notifications" or "poll"; "" before the first watch.
func (r *Registry) Changes() string {
	return as[string](r.changes.Load())
}

// Announce puts the node's record and renews its lease. Its error wraps
// [discovery.ErrInvalid], [discovery.ErrUnreachable], [discovery.ErrCredentials],
// [discovery.ErrPermission], [discovery.ErrFull], [discovery.ErrUnsupported] or
// [discovery.ErrNotFound] (no such master), or is that of the context.
func (r *Registry) Announce(ctx context.Context, n discovery.Node) error {
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err == nil {
		err = r.client.do(ctx, func(ctx context.Context) error { return r.layout.put(ctx, n, record) })
	}
	return during(err, "announcing node %q", n.ID)
}

// Drain puts the node's record in place of the one that stands, if that is of the
// same instance, and reports whether it is. It returns the errors of
// [Registry.Announce].
func (r *Registry) Drain(ctx context.Context, n discovery.Node) (own bool, err error) {
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err == nil {
		own, err = ask(ctx, r.client, func(ctx context.Context) (bool, error) { return r.layout.replace(ctx, n, record) })
	}
	return own, during(err, "announcing that node %q drains", n.ID)
}

// Withdraw removes the node's record if it is still of the same instance. It returns
// the errors of [Registry.Announce].
func (r *Registry) Withdraw(ctx context.Context, n discovery.Node) error {
	err := r.client.do(ctx, func(ctx context.Context) error { return r.layout.remove(ctx, n) })
	return during(err, "withdrawing node %q", n.ID)
}

// Record returns the node's record as our writers put it, the zero Node if there is
// none that can be read; those of foreign writers in a sorted set cannot be found by
// their node. It returns the errors of [Registry.Announce].
func (r *Registry) Record(ctx context.Context, id string) (discovery.Node, error) {
	record, err := ask(ctx, r.client, func(ctx context.Context) (string, error) { return r.layout.record(ctx, id) })
	n, unread := discovery.ParseNode([]byte(record))
	if err != nil || unread != nil {
		n = discovery.Node{}
	}
	return n, during(err, "reading the record of node %q", id)
}

// History returns up to limit changes that our writers recorded of a node, newest
// first, all there are if limit is 0; changes by foreign writers are not recorded. It
// returns the errors of [Registry.Announce], and with LayoutKeys one that wraps
// [discovery.ErrUnsupported].
func (r *Registry) History(ctx context.Context, id string, limit int) ([]discovery.Revision, error) {
	revisions, err := r.layout.history(ctx, id, limit)
	return revisions, during(err, "reading the history of node %q", id)
}

// Overrides returns all overrides by the node's id; when they end is by this machine's
// clock. One that cannot be read is left out. It returns the errors of
// [Registry.Announce].
func (r *Registry) Overrides(ctx context.Context) (map[string]discovery.Override, error) {
	records, err := r.overrides.read(ctx)
	if err != nil {
		return nil, err
	}
	return r.overrides.parse(records), nil
}

// SetOverride replaces the node's override. It returns the errors of
// [Registry.Announce].
func (r *Registry) SetOverride(ctx context.Context, id string, o discovery.Override) error {
	err := cmp.Or(o.Validate(), discovery.ValidateID(id))
	if err == nil && !o.Until.IsZero() {
		err = r.overrides.readClock(ctx)
	}
	var record []byte
	if err == nil {
		record, err = discovery.AppendOverride(nil, r.overrides.clock.ByRegistry(o))
	}
	if err == nil {
		err = r.client.do(ctx, func(ctx context.Context) error { return r.layout.override(ctx, id, string(record)) })
	}
	return during(err, "overriding node %q", id)
}

// ClearOverride removes the node's override. One that is not there is no error. It
// returns the errors of [Registry.Announce].
func (r *Registry) ClearOverride(ctx context.Context, id string) error {
	err := r.client.do(ctx, func(ctx context.Context) error { return r.layout.override(ctx, id, "") })
	return during(err, "clearing the override of node %q", id)
}

// Watch emits the overrides, every listed node, then Synced, then changes, as
// [discovery.Watcher] says. Its error wraps [discovery.ErrBroken] where the
// stream broke after the listing; else it is one of those of [Registry.Announce].
func (r *Registry) Watch(ctx context.Context, emit func(discovery.Event)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	w := newWatch(r.client, emit)
	defer func() {
		r.watching.CompareAndSwap(w, nil)
		close(w.ended)
		cancel()
		w.close()
	}()
	err := r.follow(ctx, w)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if cluster, ok := r.client.commands.(*goredis.ClusterClient); ok {
		// The next watch must not ask the servers of yesterday.
		cluster.ReloadState(ctx)
	}
	return fmt.Errorf("watching %s: %w", r, err)
}

// follow lists the registry and then follows it.
func (r *Registry) follow(ctx context.Context, w *watch) error {
	var err error
	if w.view, err = r.layout.watch(ctx, &w.feed); err != nil {
		return err
	}
	listing, err := w.list(ctx, r.overrides)
	if err != nil {
		return err
	}
	r.changes.Store(w.view.changes())
	r.watching.Store(w)
	if r.client.config.Mode != ModeSingle {
		w.group.Go(func() { r.client.locate(ctx) })
	}
	w.emit(discovery.Event{Type: discovery.Synced, Listing: listing})
	return w.run(ctx)
}

// Verify proves that the newest watch has emitted everything that was written
// before the call, by one more look at the registry. Its error wraps
// [discovery.ErrBroken] if nothing is being watched, or the watch ends meanwhile; else
// it is that of the context.
func (r *Registry) Verify(ctx context.Context) error {
	w := r.watching.Load()
	if w == nil {
		return fmt.Errorf("%w: nothing is being watched", discovery.ErrBroken)
	}
	return w.verify(ctx)
}

// Located returns the servers that no URL names, as host:port, sorted: those that
// were dialled because Sentinels or a cluster named them, and their replicas and
// other Sentinels as far as they tell.
func (r *Registry) Located() []string { return r.client.connector.servers.located() }

// Close ends the calls that are under way and closes the connections. It may be called
// more than once. An error says that a connection could not be closed.
func (r *Registry) Close() error { return r.client.close() }

// during says of an error what was being done to a node.
func during(err error, what, id string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf(what+": %w", id, err)
}

// digest returns what tells records apart that differ in more than the time: 16
// characters.
func digest(n discovery.Node) string {
	record, _ := discovery.AppendRecord(nil, n, time.Time{})
	h := fnv.New64a()
	_, _ = h.Write(record)
	return fmt.Sprintf("%016x", h.Sum64())
}

// Interface guards
var (
	_ discovery.Registry     = (*Registry)(nil)
	_ discovery.Verifier     = (*Registry)(nil)
	_ discovery.ChangeSource = (*Registry)(nil)
	_ discovery.Locator      = (*Registry)(nil)
	_ discovery.Reader       = (*Registry)(nil)
	_ discovery.Historian    = (*Registry)(nil)
	_ discovery.Overrider    = (*Registry)(nil)
)
