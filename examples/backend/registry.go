// Package filebackend is a registry in a file on disk, for the proxies and services
// of one machine. It is the example of a backend that lives outside of the plugin's
// repository: registry.go knows nothing of Caddy, module.go makes it one of Caddy's
// modules, and both name exported things only.
package filebackend

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gofrs/flock"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/registries"
)

// Scheme is that of URLs such as file:///run/fleet/nodes.json.
const Scheme = "file"

const (
	defaultPoll = 200 * time.Millisecond
	expiry      = 10 * time.Minute // how long a record is kept that nobody renews
	maxSize     = 64 << 20         // of the file: who can write it is not trusted with our memory
)

func init() {
	registries.Register("file", func(url string) (discovery.Registry, error) { return Open(url, 0) }, Scheme)
}

// contents is what the file holds.
type contents struct {
	Epoch     string                     `json:"epoch"`    // another one if the file was made anew
	Revision  uint64                     `json:"revision"` // counts the changes
	Records   map[string]record          `json:"records"`  // by id
	Overrides map[string]json.RawMessage `json:"overrides,omitempty"`
}

type record struct {
	Revision uint64          `json:"revision"`
	Written  time.Time       `json:"written"`
	Data     json.RawMessage `json:"data"`
}

// A Registry is a registry in a file. All its methods may be called concurrently.
type Registry struct {
	path  string
	poll  time.Duration
	watch atomic.Pointer[watch] // the current one
}

// watch is a call of Watch as Verify sees it.
type watch struct {
	look  chan chan struct{} // has the watch look at the file now, and close what it got
	ended chan struct{}
}

// Open returns the registry in the file that the URL names, without looking for it.
// Its folder must be there by the time the registry is used; the file is made then. A
// watch looks at the file each time that poll has passed, by default five times in a
// second. The error wraps [discovery.ErrInvalid].
func Open(url string, poll time.Duration) (*Registry, error) {
	scheme, path, found := strings.Cut(url, "://")
	if !found || !strings.EqualFold(scheme, Scheme) || !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%w registry URL %q, want one such as file:///run/fleet/nodes.json", discovery.ErrInvalid, discovery.Clip(url))
	}
	return &Registry{path: filepath.Clean(path), poll: cmp.Or(max(poll, 0), defaultPoll)}, nil
}

// String implements fmt.Stringer.
func (r *Registry) String() string { return Scheme + "://" + r.path }

// Close implements io.Closer. Nothing stays open between two calls.
func (r *Registry) Close() error { return nil }

// Watch implements discovery.Watcher.
func (r *Registry) Watch(ctx context.Context, emit func(discovery.Event)) error {
	w := &watch{look: make(chan chan struct{}), ended: make(chan struct{})}
	defer close(w.ended)
	r.watch.Store(w)
	listed, err := r.born(ctx)
	if err != nil {
		return err
	}
	var parser discovery.Parser
	emit(overridden(listed))
	for _, id := range slices.Sorted(maps.Keys(listed.Records)) {
		event := put(&parser, id, listed.Records[id])
		event.Age = max(time.Since(listed.Records[id].Written), 0)
		emit(event)
	}
	emit(discovery.Event{Type: discovery.Synced, Listing: discovery.Listing{
		Epoch: listed.Epoch, Revision: listed.Revision, Expiry: expiry,
	}})
	ticker := time.NewTicker(r.poll)
	defer ticker.Stop()
	for {
		var looked chan struct{}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case looked = <-w.look:
		case <-ticker.C:
		}
		now, err := r.read()
		if err != nil {
			return fmt.Errorf("%w: %w", discovery.ErrBroken, err)
		}
		if now.Epoch != listed.Epoch || now.Revision < listed.Revision {
			return fmt.Errorf("%w: %s was made anew", discovery.ErrBroken, r)
		}
		emitChanges(&parser, listed, now, emit)
		listed = now
		if looked != nil {
			close(looked)
		}
	}
}

// born returns what the file holds, and makes the file if it is not there: from then
// on its epoch tells whether somebody removed it.
func (r *Registry) born(ctx context.Context) (*contents, error) {
	c, err := r.read()
	if err != nil || c.Epoch != "" {
		return c, err
	}
	if err := r.change(ctx, func(c *contents) bool { return c.Epoch == "" }); err != nil {
		return nil, err
	}
	return r.read()
}

// emitChanges emits what became of the records, in the order in which that was
// written, and of the overrides.
func emitChanges(parser *discovery.Parser, before, now *contents, emit func(discovery.Event)) {
	if before.Revision == now.Revision {
		return
	}
	if !maps.EqualFunc(before.Overrides, now.Overrides, func(a, b json.RawMessage) bool { return bytes.Equal(a, b) }) {
		emit(overridden(now))
	}
	for _, id := range slices.Sorted(maps.Keys(before.Records)) {
		if _, ok := now.Records[id]; !ok {
			event := discovery.Event{Type: discovery.Left, ID: id, Revision: now.Revision}
			if time.Since(before.Records[id].Written) > expiry {
				event.Type = discovery.Expired
			}
			emit(event)
		}
	}
	written := slices.SortedFunc(maps.Keys(now.Records), func(a, b string) int {
		return cmp.Compare(now.Records[a].Revision, now.Records[b].Revision)
	})
	for _, id := range written {
		if rec := now.Records[id]; rec.Revision != before.Records[id].Revision {
			event := put(parser, id, rec)
			event.Delay = max(time.Since(rec.Written), 0)
			emit(event)
		}
	}
}

// put returns the event of a record, which is whatever somebody wrote there.
func put(parser *discovery.Parser, id string, rec record) discovery.Event {
	event := discovery.Event{Type: discovery.Put, ID: id, Revision: rec.Revision}
	var err error
	if event.Node, err = parser.Parse(rec.Data); err == nil && event.Node.ID != id {
		err = discovery.Forbid(fmt.Errorf("%w record: the key names another node, %q", discovery.ErrInvalid, discovery.Clip(id)))
	}
	if err != nil {
		return discovery.Event{Type: discovery.Rejected, ID: id, Revision: rec.Revision, Err: err}
	}
	return event
}

func overridden(c *contents) discovery.Event {
	return discovery.Event{Type: discovery.Overridden, Overrides: c.overrides()}
}

// overrides returns those that can be read.
func (c *contents) overrides() map[string]discovery.Override {
	all := make(map[string]discovery.Override, len(c.Overrides))
	for id, data := range c.Overrides {
		if o, err := discovery.ParseOverride(data); err == nil {
			all[id] = o
		}
	}
	return all
}

// Verify implements discovery.Verifier: it has the watch look at the file.
func (r *Registry) Verify(ctx context.Context) error {
	w, looked := r.watch.Load(), make(chan struct{})
	if w == nil {
		return fmt.Errorf("%w: nothing is being watched", discovery.ErrBroken)
	}
	for look := w.look; ; look = nil {
		select {
		case look <- looked:
		case <-looked:
			return nil
		case <-w.ended:
			return fmt.Errorf("%w: the watch has ended", discovery.ErrBroken)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Announce implements discovery.Announcer.
func (r *Registry) Announce(ctx context.Context, n discovery.Node) error {
	data, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return err
	}
	return r.change(ctx, func(c *contents) bool { return c.put(n.ID, data) })
}

// Drain implements discovery.Announcer.
func (r *Registry) Drain(ctx context.Context, n discovery.Node) (own bool, err error) {
	data, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return false, err
	}
	err = r.change(ctx, func(c *contents) bool {
		own = c.owns(n) && c.put(n.ID, data)
		return own
	})
	return own, err
}

// Withdraw implements discovery.Announcer.
func (r *Registry) Withdraw(ctx context.Context, n discovery.Node) error {
	return r.change(ctx, func(c *contents) bool {
		own := c.owns(n)
		if own {
			delete(c.Records, n.ID)
		}
		return own
	})
}

// Record implements discovery.Reader.
func (r *Registry) Record(_ context.Context, id string) (discovery.Node, error) {
	c, err := r.read()
	if err != nil {
		return discovery.Node{}, err
	}
	return c.node(id), nil
}

// Overrides implements discovery.Overrider.
func (r *Registry) Overrides(context.Context) (map[string]discovery.Override, error) {
	c, err := r.read()
	if err != nil {
		return nil, err
	}
	return c.overrides(), nil
}

// SetOverride implements discovery.Overrider.
func (r *Registry) SetOverride(ctx context.Context, id string, o discovery.Override) error {
	data, err := discovery.AppendOverride(nil, o)
	if err != nil {
		return err
	}
	return r.change(ctx, func(c *contents) bool {
		c.Overrides[id] = data
		return true
	})
}

// ClearOverride implements discovery.Overrider.
func (r *Registry) ClearOverride(ctx context.Context, id string) error {
	return r.change(ctx, func(c *contents) bool {
		_, ok := c.Overrides[id]
		delete(c.Overrides, id)
		return ok
	})
}

func (c *contents) put(id string, data []byte) bool {
	c.Records[id] = record{Revision: c.Revision + 1, Written: time.Now(), Data: data}
	return true
}

// node returns the record that stands, the zero Node if none can be read.
func (c *contents) node(id string) discovery.Node {
	n, err := discovery.ParseNode(c.Records[id].Data)
	if err != nil {
		return discovery.Node{}
	}
	return n
}

// owns reports whether the record that stands is of the same instance as n.
func (c *contents) owns(n discovery.Node) bool {
	standing := c.node(n.ID)
	return standing.ID == n.ID && standing.Instance() == n.Instance()
}

// read returns what the file holds, without records that nobody renewed.
func (r *Registry) read() (*contents, error) {
	c := new(contents)
	defer c.fill()
	f, err := os.Open(r.path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err = os.Stat(filepath.Dir(r.path)); err == nil {
			return c, nil // nobody has written anything yet
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errorOf(err), err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", discovery.ErrUnreachable, err)
	}
	if len(data) > maxSize {
		return nil, fmt.Errorf("%w: %s has more than %d bytes", discovery.ErrFull, r, maxSize)
	}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("%w registry %s: %w", discovery.ErrInvalid, r, err)
	}
	maps.DeleteFunc(c.Records, func(_ string, rec record) bool { return time.Since(rec.Written) > expiry })
	return c, nil
}

// fill makes the maps that are missing.
func (c *contents) fill() {
	if c.Records == nil {
		c.Records = make(map[string]record)
	}
	if c.Overrides == nil {
		c.Overrides = make(map[string]json.RawMessage)
	}
}

// errorOf returns the error of package discovery that fits one of a file.
func errorOf(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return discovery.ErrPermission
	}
	return discovery.ErrUnreachable
}

// change reads the file, changes it and puts it back in one step, if do says so.
func (r *Registry) change(ctx context.Context, do func(*contents) bool) error {
	lock := flock.New(r.path + ".lock")
	if _, err := lock.TryLockContext(ctx, time.Millisecond); err != nil {
		return fmt.Errorf("%w: locking %s: %w", errorOf(err), r, err)
	}
	defer lock.Close()
	c, err := r.read()
	if err != nil {
		return err
	}
	if !do(c) {
		return nil
	}
	if c.Epoch == "" {
		c.Epoch = rand.Text()
	}
	c.Revision++
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if len(data) > maxSize {
		return fmt.Errorf("%w: %s", discovery.ErrFull, r)
	}
	// Readers see the file as it was or as it is now, never a part.
	next := r.path + ".next"
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return fmt.Errorf("%w: %w", errorOf(err), err)
	}
	if err := os.Rename(next, r.path); err != nil {
		return fmt.Errorf("%w: %w", errorOf(err), err)
	}
	return nil
}

// What the registry can do beyond the interface.
var (
	_ discovery.Registry  = (*Registry)(nil)
	_ discovery.Verifier  = (*Registry)(nil)
	_ discovery.Reader    = (*Registry)(nil)
	_ discovery.Overrider = (*Registry)(nil)
)
