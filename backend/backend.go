// Package backend has the kinds of registry that a Caddy configuration can name: the
// modules in the namespace discovery.registries, what all of them have in common, and
// how they are written and loaded. Another plugin adds one with a module that
// implements Backend, and gives it URLs with
// [github.com/caddy-discovery/caddy-discovery/discovery/registries.Register];
// examples/backend in the repository is such a plugin.
package backend

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

// namespace is that of the modules that are backends.
const namespace = "discovery.registries"

// A Backend is a kind of registry: what the guest modules in the namespace
// discovery.registries implement. When one is provisioned, placeholders in its
// exported fields have been replaced and defaults filled in, so that two of them
// that encode to the same JSON name the same registry. Its methods may be called
// concurrently from then on.
//
// Fields with secrets have pass, token, secret, cred, nkey, key_file, tls_, user or auth
// in their JSON names: those are left out where a file is named after the registry.
//
// For a Caddyfile a backend implements
// [github.com/caddyserver/caddy/v2/caddyconfig/caddyfile.Unmarshaler]: its name is the
// first token, the URLs are the arguments of that, and [Options.UnmarshalBlock] reads the
// block. An error without file and line gets them from [Unmarshal].
type Backend interface {
	caddy.Module

	// Open returns the registry, without connecting to it: the directory and
	// the registrar connect, and retry. The logger outlives every config.
	Open(log *slog.Logger) (discovery.Registry, error)

	// Addresses returns where the registry is, as host:port. No node may have its
	// endpoint there; if all of it is on loopback, nodes may be on loopback, too. None if
	// it is reached by other means than a network: then nodes are on loopback only where
	// the source's allow names that.
	Addresses() []string

	// Common returns the options that every backend has. To embed Options is to
	// implement it.
	Common() Options
}

// A LoginReporter is a backend that knows whether its registry is told who connects. To
// a registry on loopback without a login anybody on the machine can write, and a source
// says so in the log.
type LoginReporter interface {
	// HasLogin reports whether the configuration names a user, a token or the like.
	HasLogin() bool
}

// Options are the options of a registry that every backend has. A backend embeds
// them.
type Options struct {
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
	// at most 24 hours old. Whose hosts are, and which certificates were allowed, is
	// kept with it, for longer. Default: true
	WarmStart *bool `json:"warm_start,omitempty"`
}

// Common returns the options themselves, for Backend.
func (o Options) Common() Options { return o }

// Provision fills in the defaults. Its error names the option that it refuses. A
// backend with a Provision of its own calls it from there.
func (o *Options) Provision(caddy.Context) error {
	if err := caddyblock.CheckDuration("ttl", o.TTL); err != nil {
		return err
	}
	o.TTL = cmp.Or(o.TTL, caddy.Duration(discovery.DefaultTTL))
	o.WarmStart = cmp.Or(o.WarmStart, new(true))
	o.LossGuard = cmp.Or(o.LossGuard, new(discovery.DefaultLossGuard))
	if *o.LossGuard < 0 || *o.LossGuard > 100 {
		return fmt.Errorf("loss_guard: invalid percentage %d, want 1 to 100, or 0 for none", *o.LossGuard)
	}
	return nil
}

// DirectoryOptions returns the options of the directory of a registry, as far as its
// backend says them. It fails if that does not encode to a JSON object.
func DirectoryOptions(b Backend) (discovery.Options, error) {
	o := b.Common()
	options := discovery.Options{TTL: time.Duration(o.TTL), LossGuard: o.LossGuard, Addresses: b.Addresses()}
	if o.WarmStart == nil || *o.WarmStart {
		name, err := publicName(b)
		if err != nil {
			return discovery.Options{}, fmt.Errorf("naming the registry's warm-start file: %w", err)
		}
		options.WarmStart = discovery.WarmStart{
			Path:     filepath.Join(caddy.AppDataDir(), "discovery", name+".json"),
			Registry: name,
		}
	}
	return options, nil
}

// A Key stands for a registry with all its settings, secrets included, which is why it
// is a hash.
type Key [sha256.Size]byte

// KeyOf returns the key of a backend that was provisioned: the same one for another
// with the same settings.
func KeyOf(b Backend) (Key, error) {
	settings, err := json.Marshal(b)
	if err != nil {
		return Key{}, fmt.Errorf("encoding the settings of the registry: %w", err)
	}
	return sha256.Sum256(append([]byte(b.CaddyModule().ID+" "), settings...)), nil
}

// Load loads and provisions the backend that raw is: the value of the field of parent
// with that name, which has the tag
// `caddy:"namespace=discovery.registries inline_key=backend"`. Nil is the only registry
// that the discovery app declares, and Named one of those.
func Load(ctx caddy.Context, parent any, field string, raw json.RawMessage) (Backend, error) {
	if raw == nil {
		return new(Named).find(ctx)
	}
	return load(ctx, parent, field, raw)
}

// LoadDeclared is Load for the registry that a declaration is about, which is none that has
// a name already.
func LoadDeclared(ctx caddy.Context, parent any, field string, raw json.RawMessage) (Backend, error) {
	if raw == nil {
		return nil, errors.New(`the registry is missing; want {"backend": …, "urls": […]}`)
	}
	if name, err := backendOf(raw); err == nil && name == named {
		return nil, fmt.Errorf("it cannot be another one that has a name; want one of the backends %s", strings.Join(backends(), ", "))
	}
	return load(ctx, parent, field, raw)
}

// backendOf returns the name of the backend that raw is.
func backendOf(raw json.RawMessage) (string, error) {
	// Where Caddy cannot find the module's name, it prints everything beside it.
	var name struct{ Backend string }
	if err := json.Unmarshal(raw, &name); err != nil || name.Backend == "" {
		return "", errors.New(`the registry's backend is missing; want {"backend": "<name>", …}`)
	}
	return name.Backend, nil
}

func load(ctx caddy.Context, parent any, field string, raw json.RawMessage) (Backend, error) {
	if _, err := backendOf(raw); err != nil {
		return nil, err
	}
	module, err := ctx.LoadModule(parent, field)
	if err != nil {
		return nil, fmt.Errorf("loading the registry: %w", err)
	}
	switch b := module.(type) {
	case *Named:
		return b.declared, nil
	case Backend:
		return b, nil
	}
	return nil, fmt.Errorf("loading the registry: %T is not a backend", module)
}

// ReplaceGlobals replaces Caddy's global placeholders ({env.X}, {file.…}) in
// place. An unknown or empty one is an error that does not tell its value.
func ReplaceGlobals(fields ...*string) error {
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
