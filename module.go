// Package caddydiscovery is a Caddy plugin that proxies to whatever a fleet's
// registry lists as alive now, and lists the proxy itself there.
package caddydiscovery

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"
	"go.uber.org/zap/exp/zapslog"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

func init() {
	caddy.RegisterModule(new(Upstreams))
	caddy.RegisterModule(new(LeastLoad))
	caddy.RegisterModule(Registrar{})
	caddy.RegisterModule(NATSKV{})
	caddy.RegisterModule(NATS{})
	caddy.RegisterModule(Redis{})
	caddy.RegisterModule(Admin{})
}

// A Backend is a kind of registry: what the guest modules in the namespace
// discovery.registries implement. When one is provisioned, placeholders in its
// exported fields have been replaced and defaults filled in, so that two of them
// that encode to the same JSON name the same registry.
type Backend interface {
	caddy.Module

	// Open returns the registry, without connecting to it: the directory and
	// the registrar connect, and retry. The logger outlives every config.
	Open(log *slog.Logger) (discovery.Registry, error)

	// Addresses returns where the registry is, as host:port.
	Addresses() []string

	// Directory returns the options of the directory.
	Directory() DirectoryOptions
}

// DirectoryOptions are the options of a registry that every backend has.
type DirectoryOptions struct {
	// How long a node counts as live after it was last heard, unless its record
	// names a lease of its own. Default: 30s
	TTL caddy.Duration `json:"ttl,omitempty"`

	// When more than this share of the nodes, or of those of one service, in
	// percent, and at least three of them, lapse within one lease, or the last nodes
	// of a service do, the heartbeats are doubted rather than the nodes: each is
	// dialled, and stays for as long as it accepts connections and does not close
	// them at once, or until most others have been heard again for a lease. Nodes
	// that no source asks for do not count. 0 turns this off. Default: 50
	LossGuard *int `json:"loss_guard,omitempty"`

	// Whether the list of nodes is kept on disk, below Caddy's data directory, for a
	// start while the registry is away. It is used when half of sync_timeout has
	// passed without a listing, each node as soon as it accepts a connection, and is
	// at most 24 hours old. Default: true
	WarmStart *bool `json:"warm_start,omitempty"`
}

// Directory returns the options themselves, for Backend.
func (o DirectoryOptions) Directory() DirectoryOptions { return o }

func (o *DirectoryOptions) provision() error {
	if err := caddyblock.CheckDuration("ttl", o.TTL); err != nil {
		return err
	}
	if o.TTL == 0 {
		o.TTL = caddy.Duration(discovery.DefaultTTL)
	}
	if o.WarmStart == nil {
		on := true
		o.WarmStart = &on
	}
	if o.LossGuard == nil {
		share := discovery.DefaultLossGuard
		o.LossGuard = &share
	}
	if *o.LossGuard < 0 || *o.LossGuard > 100 {
		return fmt.Errorf("loss_guard: invalid percentage %d, want 1 to 100, or 0 for none", *o.LossGuard)
	}
	return nil
}

// core returns the options as the core takes them. They have been provisioned,
// unless somebody else's backend forgot to.
func (o DirectoryOptions) core() discovery.Options {
	options := discovery.Options{TTL: time.Duration(o.TTL)}
	if o.LossGuard != nil {
		options.LossGuard = *o.LossGuard
		if *o.LossGuard == 0 {
			options.LossGuard = -1
		}
	}
	return options
}

// loadBackend loads the guest module of a registry.
func loadBackend(ctx caddy.Context, parent any, field string, raw json.RawMessage) (Backend, error) {
	if raw == nil {
		return nil, fmt.Errorf(`the registry is missing; want {"backend": …, "urls": […]}`)
	}
	// Where Caddy cannot find the module's name, it prints everything beside it.
	var name struct{ Backend string }
	if err := json.Unmarshal(raw, &name); err != nil || name.Backend == "" {
		return nil, errors.New(`the registry's backend is missing; want {"backend": "<name>", …}`)
	}
	module, err := ctx.LoadModule(parent, field)
	if err != nil {
		return nil, fmt.Errorf("loading the registry: %w", err)
	}
	backend, ok := module.(Backend)
	if !ok {
		return nil, fmt.Errorf("loading the registry: %T is not a backend", module)
	}
	return backend, nil
}

// The pools outlive every config: a reload with the same registry takes over its
// connection and its directory as they are. What lives here holds nothing of a
// config: no caddy.Context, and no logger of one.
var (
	registries  = caddy.NewUsagePool() // poolKey → *sharedRegistry
	directories = caddy.NewUsagePool() // poolKey → *sharedDirectory
)

// poolKey stands for a registry with all its settings, secrets included, which
// is why it is a hash.
type poolKey [sha256.Size]byte

func keyOf(b Backend) (poolKey, error) {
	settings, err := json.Marshal(b)
	if err != nil {
		return poolKey{}, fmt.Errorf("encoding the settings of the registry: %w", err)
	}
	return sha256.Sum256(append([]byte(b.CaddyModule().ID+" "), settings...)), nil
}

// sharedRegistry is a connection, as long as somebody uses it.
//
// The registry is a field with a name, not embedded: what it can do beyond the
// interface (verify, remember) must reach the directory and the registrar.
type sharedRegistry struct {
	conn discovery.Registry
	key  poolKey
}

func (r *sharedRegistry) Destruct() error { return r.conn.Close() }

// acquireRegistry returns the connection to a registry. Each call is matched by
// one of release.
func acquireRegistry(b Backend) (*sharedRegistry, error) {
	key, err := keyOf(b)
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
	emission emission
	told     atomic.Bool // see tellUnguarded

	once   sync.Once
	opened atomic.Int64 // when it was started, in Unix nanoseconds
	cancel context.CancelFunc
	done   chan struct{}
}

// acquireDirectory returns the directory of a registry, not started unless
// another config did. Each call is matched by one of release.
func acquireDirectory(b Backend) (*sharedDirectory, error) {
	key, err := keyOf(b)
	if err != nil {
		return nil, err
	}
	v, _, err := directories.LoadOrNew(key, func() (caddy.Destructor, error) {
		r, err := acquireRegistry(b)
		if err != nil {
			return nil, err
		}
		options := b.Directory().core()
		options.Logger = slogOf(processLogger("discovery")).With("registry", r.conn.String())
		options.Addresses = b.Addresses()
		d := &sharedDirectory{registry: r, backend: b.CaddyModule().ID.Name(), done: make(chan struct{})}
		options.Permit = d.permits
		if on := b.Directory().WarmStart; on == nil || *on {
			if options.WarmStart, err = warmStartOf(b); err != nil {
				return nil, errors.Join(fmt.Errorf("naming the registry's warm-start file: %w", err), r.release())
			}
		}
		d.Directory = discovery.NewDirectory(r.conn, options)
		d.stats = acquireStats(d.name(), d)
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
	d.stats.release(d)
	return d.registry.release()
}

// onEvent calls f once at an event of Caddy itself ("started", "stopping") of the
// config of ctx. It works in Provision only.
func onEvent(ctx caddy.Context, name string, f func()) error {
	events, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting the events app: %w", err)
	}
	return events.(*caddyevents.App).On(name, &eventHandler{f: f})
}

// eventHandler is a struct, not a func, because the events app encodes handlers
// into its debug log.
type eventHandler struct {
	f    func()
	once sync.Once
}

// Handle takes an event for Caddy's own only if no module is its origin: any module
// may give its events any name.
func (h *eventHandler) Handle(_ context.Context, e caddy.Event) error {
	if e.Origin() == nil {
		h.once.Do(h.f)
	}
	return nil
}

// processLogger returns a logger that writes wherever Caddy's default log goes at
// that moment. The logger of a config would be closed with its config.
func processLogger(name string) *zap.Logger {
	return zap.New(processCore{}).Named(name)
}

// slogOf returns the logger as package discovery takes one. Its lines look like those
// that are logged with zap.
func slogOf(log *zap.Logger) *slog.Logger {
	return slog.New(zapslog.NewHandler(log.Core(), zapslog.WithName(log.Name()), zapslog.AddStacktraceAt(math.MaxInt)))
}

type processCore struct{ fields []zapcore.Field }

func (c processCore) Enabled(l zapcore.Level) bool { return caddy.Log().Core().Enabled(l) }

func (c processCore) With(fields []zapcore.Field) zapcore.Core {
	return processCore{append(c.fields[:len(c.fields):len(c.fields)], fields...)}
}

func (c processCore) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return checked.AddCore(e, c)
	}
	return checked
}

func (c processCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	return caddy.Log().Core().Write(e, append(c.fields[:len(c.fields):len(c.fields)], fields...))
}

func (c processCore) Sync() error { return caddy.Log().Core().Sync() }

// replaceGlobals replaces Caddy's global placeholders ({env.X}, {file.…}) in
// place. An unknown or empty one is an error that does not tell its value.
func replaceGlobals(fields ...*string) error {
	repl := caddy.NewReplacer()
	for _, f := range fields {
		v, err := repl.ReplaceOrErr(*f, true, true)
		if err != nil {
			return err
		}
		*f = v
	}
	return nil
}
