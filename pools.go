package caddydiscovery

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

// The pools outlive every config: a reload with the same registry takes over its
// connection and its directory as they are. What lives here holds nothing of a
// config: no caddy.Context, and no logger of one.
var (
	registries  = caddy.NewUsagePool() // backend.Key → *sharedRegistry
	directories = caddy.NewUsagePool() // backend.Key → *sharedDirectory
)

// acquire returns what a pool has under a key, made by open if it has nothing.
func acquire[T caddy.Destructor](pool *caddy.UsagePool, key any, open func() (T, error)) (T, error) {
	v, _, err := pool.LoadOrNew(key, func() (caddy.Destructor, error) { return open() })
	if err != nil {
		return *new(T), err
	}
	return v.(T), nil
}

// sharedRegistry is a connection, as long as somebody uses it.
//
// The registry is a field with a name, not embedded: what it can do beyond the
// interface (verify, remember) must reach the directory and the registrar.
type sharedRegistry struct {
	conn discovery.Registry
	key  backend.Key
	kind string
}

func (r *sharedRegistry) Destruct() error { return r.conn.Close() }

// acquireRegistry returns the connection to a registry. Each call is matched by
// one of release.
func acquireRegistry(b backend.Backend) (*sharedRegistry, error) {
	key, err := backend.KeyOf(b)
	if err != nil {
		return nil, err
	}
	return acquire(registries, key, func() (*sharedRegistry, error) {
		r, err := b.Open(processLogger("discovery"))
		return &sharedRegistry{conn: r, key: key, kind: b.CaddyModule().ID.Name()}, err
	})
}

func (r *sharedRegistry) release() error {
	_, err := registries.Delete(r.key)
	return err
}

// sharedDirectory is a directory, as long as a source uses it.
type sharedDirectory struct {
	*discovery.Directory
	registry *sharedRegistry
	backend  string // the kind of registry
	stats    *stats
	events   eventCursor
	told     atomic.Bool // see tellUnguarded

	opened  atomic.Int64 // when it was started, in Unix nanoseconds
	running background

	mu          sync.Mutex
	members     []member // replaced, not changed
	hostUsers   []*hostUser
	hostOptions *discovery.HostOptions // as they were applied last; nil: not at all
	permissions []*Permission
}

// A member of a directory is a source that uses its nodes while its config runs.
type member interface {
	// describe says in a few words which nodes it asks for.
	describe() string
	// wants reports whether some request through it could reach the node.
	wants(e *discovery.Entry) bool
	// standing returns why the source sends no request to a node, "" if it sends
	// some, and whether that is because it fails its health checks or its requests.
	standing(e *discovery.Entry) (reason string, unhealthy bool)
	// until returns when that ends by itself, the zero time if it does not.
	until(e *discovery.Entry) time.Time
}

// acquireDirectory returns the directory of a registry, not started unless
// another config did. Each call is matched by one of release.
func acquireDirectory(b backend.Backend) (*sharedDirectory, error) {
	key, err := backend.KeyOf(b)
	if err != nil {
		return nil, err
	}
	return acquire(directories, key, func() (*sharedDirectory, error) {
		options, err := backend.DirectoryOptions(b)
		if err != nil {
			return nil, err
		}
		r, err := acquireRegistry(b)
		if err != nil {
			return nil, err
		}
		d := &sharedDirectory{registry: r, backend: b.CaddyModule().ID.Name()}
		options.Logger = processLogger("discovery").With("registry", d.name())
		options.Permit = d.wanted
		d.Directory = discovery.NewDirectory(r.conn, options)
		d.stats = acquireStats(d.name(), d.Directory)
		return d, nil
	})
}

// start makes the directory follow its registry. A config that is only validated
// never starts one.
func (d *sharedDirectory) start() {
	d.opened.CompareAndSwap(0, time.Now().UnixNano())
	d.running.start(func(ctx context.Context) { _ = d.Run(ctx) }) // it returns only when ctx ends
}

func (d *sharedDirectory) release() error {
	_, err := directories.Delete(d.registry.key)
	return err
}

// Destruct ends the directory when nobody uses it any more.
func (d *sharedDirectory) Destruct() error {
	d.running.end()
	d.stats.release(d.Directory)
	return d.registry.release()
}

// name returns the registry's name. It contains no secret.
func (d *sharedDirectory) name() string { return d.registry.conn.String() }

// join adds a source whose config runs. During a reload those of both configs are
// there.
func (d *sharedDirectory) join(m member) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.members = append(slices.Clip(d.members), m)
}

// leave removes a source, if it joined.
func (d *sharedDirectory) leave(m member) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.members = slices.DeleteFunc(slices.Clone(d.members), func(joined member) bool { return joined == m })
}

func (d *sharedDirectory) joined() []member {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.members
}

// wanted reports whether a request through any of the sources could reach the node:
// what none of them asks for or may reach is not probed, and that it is gone says
// nothing about those that are used.
func (d *sharedDirectory) wanted(e *discovery.Entry) bool {
	return slices.ContainsFunc(d.joined(), func(m member) bool { return m.wants(e) })
}

// namedSources returns the sources as they are shown, in the order in which they
// joined. Those that ask for the same are told apart by a number.
func (d *sharedDirectory) namedSources() []view.Source {
	var named []view.Source
	times := make(map[string]int)
	for _, m := range d.joined() {
		name := m.describe()
		if times[name]++; times[name] > 1 {
			name = fmt.Sprintf("%s #%d", name, times[name])
		}
		named = append(named, view.Source{Name: name, Standing: m.standing, Until: m.until})
	}
	return named
}

// runningDirectories returns the directories that follow a registry, sorted by its
// name.
func runningDirectories() []*sharedDirectory {
	var running []*sharedDirectory
	directories.Range(func(_, v any) bool {
		if d := v.(*sharedDirectory); d.opened.Load() != 0 {
			running = append(running, d)
		}
		return true
	})
	slices.SortFunc(running, func(a, b *sharedDirectory) int {
		return cmp.Or(strings.Compare(a.name(), b.name()), slices.Compare(a.registry.key[:], b.registry.key[:]))
	})
	return running
}
