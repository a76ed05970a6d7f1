package caddydiscovery

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// The pools outlive every config: a reload with the same registry takes over its
// connection and its directory as they are. What lives here holds nothing of a
// config: no caddy.Context, and no logger of one.
var (
	registries  = caddy.NewUsagePool() // backend.Key → *sharedRegistry
	directories = caddy.NewUsagePool() // backend.Key → *sharedDirectory
)

// sharedRegistry is a connection, as long as somebody uses it.
//
// The registry is a field with a name, not embedded: what it can do beyond the
// interface (verify, remember) must reach the directory and the registrar.
type sharedRegistry struct {
	conn discovery.Registry
	key  backend.Key
}

func (r *sharedRegistry) Destruct() error { return r.conn.Close() }

// acquireRegistry returns the connection to a registry. Each call is matched by
// one of release.
func acquireRegistry(b backend.Backend) (*sharedRegistry, error) {
	key, err := backend.KeyOf(b)
	if err != nil {
		return nil, err
	}
	v, _, err := registries.LoadOrNew(key, func() (caddy.Destructor, error) {
		r, err := b.Open(slogOf(processLogger("discovery")))
		if err != nil {
			return nil, err
		}
		return &sharedRegistry{conn: r, key: key}, nil
	})
	if err != nil {
		return nil, err
	}
	return v.(*sharedRegistry), nil
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

	once   sync.Once
	opened atomic.Int64 // when it was started, in Unix nanoseconds
	cancel context.CancelFunc
	done   chan struct{}
}

// acquireDirectory returns the directory of a registry, not started unless
// another config did. Each call is matched by one of release.
func acquireDirectory(b backend.Backend) (*sharedDirectory, error) {
	key, err := backend.KeyOf(b)
	if err != nil {
		return nil, err
	}
	v, _, err := directories.LoadOrNew(key, func() (caddy.Destructor, error) {
		options, err := backend.DirectoryOptions(b)
		if err != nil {
			return nil, err
		}
		r, err := acquireRegistry(b)
		if err != nil {
			return nil, err
		}
		options.Logger = slogOf(processLogger("discovery")).With("registry", r.conn.String())
		d := &sharedDirectory{registry: r, backend: b.CaddyModule().ID.Name(), done: make(chan struct{})}
		options.Permit = d.permits
		d.Directory = discovery.NewDirectory(r.conn, options)
		d.stats = acquireStats(d.name(), d.Directory)
		return d, nil
	})
	if err != nil {
		return nil, err
	}
	return v.(*sharedDirectory), nil
}

// start makes the directory follow its registry. A config that is only validated
// never starts one.
func (d *sharedDirectory) start() {
	d.once.Do(func() {
		var ctx context.Context
		ctx, d.cancel = context.WithCancel(context.Background())
		d.opened.Store(time.Now().UnixNano())
		go func() {
			defer close(d.done)
			_ = d.Run(ctx) // it returns only when ctx ends
		}()
	})
}

func (d *sharedDirectory) release() error {
	_, err := directories.Delete(d.registry.key)
	return err
}

// Destruct ends the directory when nobody uses it any more.
func (d *sharedDirectory) Destruct() error {
	d.once.Do(func() {}) // from here on it cannot be started
	if d.cancel != nil {
		d.cancel()
		<-d.done
	}
	d.stats.release(d.Directory)
	return d.registry.release()
}
