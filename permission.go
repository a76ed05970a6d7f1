package caddydiscovery

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
	"github.com/caddyserver/certmagic"
	"golang.org/x/time/rate"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

const (
	defaultLinger = caddy.Duration(72 * time.Hour)
	// maxNewNames is the most that a limit can be.
	maxNewNames = 10_000
	// maxHandshakes is how many handshakes wait at one time for the first listing. Others
	// get their answer at once.
	maxHandshakes = 1000
	// How often a second the storage is looked into at most, and how long that may take.
	lookRate    = 20
	lookTimeout = 5 * time.Second
)

// Permission allows on-demand certificates for the hosts that the nodes of a registry
// announce, as far as the registry's hosts name them: a new service has its certificate
// with the first request, and nobody gets one for a name that he makes up.
//
// A certificate is allowed for a name that a listed node announces in its metadata
// "hosts", and for some time after its last node has left. What was allowed is remembered
// together with the list of nodes (warm_start), so that a registry that is away, a restart
// or a gap in a deployment denies no renewal: a denial costs the certificate. For a
// wildcard that nodes announce each name has a certificate of its own.
type Permission struct {
	// The registry, which must be one that is declared with hosts. Default: the only one
	// that is declared
	RegistryRaw json.RawMessage `json:"registry,omitempty" caddy:"namespace=discovery.registries inline_key=backend"`

	// For how long a certificate is allowed after the last node that announced its name
	// has left, at most 720h. Default: 72h
	Linger caddy.Duration `json:"linger,omitempty"`

	// For how many new names certificates are allowed in a period, such as the one in
	// which an issuer limits them. A new name is one for which none was allowed before, as
	// far as it is remembered, and none is in Caddy's storage. Default: no limit
	Limit *NameLimit `json:"limit,omitempty"`

	// How long the handshake of a name that is not remembered waits for the first listing
	// of the registry, counted from the start of the config. Default: 2s
	SyncTimeout caddy.Duration `json:"sync_timeout,omitempty"`

	directory *sharedDirectory
	hosts     *hostUser
	storage   certmagic.Storage
	looks     *rate.Limiter // into the storage
	starting  sync.Once
	started   atomic.Int64 // in Unix nanoseconds
	waiting   atomic.Int32
}

// NameLimit is a number of new names in a period.
type NameLimit struct {
	// How many names.
	Names int `json:"names,omitempty"`

	// In which time.
	Period caddy.Duration `json:"period,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*Permission) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "tls.permission.discovery",
		New: func() caddy.Module { return new(Permission) },
	}
}

// Provision sets up the permission. It needs no registry to be there.
func (p *Permission) Provision(ctx caddy.Context) error {
	if err := p.check(); err != nil {
		return err
	}
	p.Linger = cmp.Or(p.Linger, defaultLinger)
	p.SyncTimeout = cmp.Or(p.SyncTimeout, defaultSyncTimeout)
	p.storage, p.looks = ctx.Storage(), rate.NewLimiter(lookRate, 10*lookRate)
	if err := exposeMetrics(ctx); err != nil {
		return err
	}
	registry := p.RegistryRaw
	b, err := backend.Load(ctx, p, "RegistryRaw", registry)
	if err != nil {
		return err
	}
	if p.directory, err = acquireDirectory(b); err != nil {
		return fmt.Errorf("opening the registry: %w", err)
	}
	if p.hosts, err = newHostUser(ctx, p.directory); err != nil {
		return err
	}
	if !p.hosts.rules.Restrict() {
		return errNoHosts(registry)
	}
	// A config that is only validated gets no further than here.
	return onEvent(ctx, "started", p.start)
}

// errNoHosts is the error of a registry that does not say which hosts may be announced.
func errNoHosts(registry json.RawMessage) error {
	var named struct{ Name, Caddyfile string }
	_ = json.Unmarshal(registry, &named) // what has no name is shown without
	err := errors.New("permission discovery: the registry does not say for which names there may be certificates; " +
		"declare it in the global option discovery with a line such as 'hosts *.apps.example.com shop.example.com'")
	if named.Name != "" {
		err = fmt.Errorf("permission discovery: registry %s does not say for which names there may be certificates; "+
			"add a line such as 'hosts *.apps.example.com shop.example.com' where it is declared", named.Name)
	}
	if named.Caddyfile != "" {
		err = fmt.Errorf("%w, at %s", err, named.Caddyfile)
	}
	return err
}

// check checks what was configured.
func (p *Permission) check() error {
	if err := cmp.Or(caddyblock.CheckDuration("linger", p.Linger), caddyblock.CheckDuration("sync_timeout", p.SyncTimeout)); err != nil {
		return err
	}
	switch {
	case time.Duration(p.Linger) > discovery.MaxLinger:
		return fmt.Errorf("linger: %v is too long, want at most %gh", time.Duration(p.Linger), discovery.MaxLinger.Hours())
	case p.Limit == nil:
		return nil
	case p.Limit.Names < 1 || p.Limit.Names > maxNewNames:
		return fmt.Errorf("limit: invalid number %d of names, want 1 to %d", p.Limit.Names, maxNewNames)
	case p.Limit.Period <= 0:
		return fmt.Errorf("limit: invalid period %v, want one above 0 such as 168h", time.Duration(p.Limit.Period))
	}
	return nil
}

// start begins to follow the registry. Handshakes call it, too: servers accept them before
// Caddy says "started".
func (p *Permission) start() {
	p.starting.Do(func() {
		p.started.Store(time.Now().UnixNano())
		p.hosts.join()
		p.directory.start()
		p.directory.permit(p)
	})
}

// CertificateAllowed returns nil if there may be a certificate for the name. A denial wraps
// [caddytls.ErrPermissionDenied], and so does the answer that it is not known yet: Caddy
// would write a line at level error for each handshake of a name that somebody makes up.
func (p *Permission) CertificateAllowed(ctx context.Context, name string) error {
	p.start()
	policy := discovery.CertificatePolicy{Linger: time.Duration(p.Linger)}
	if p.Limit != nil {
		policy.Limit, policy.Period = p.Limit.Names, time.Duration(p.Limit.Period)
		policy.Has = func(name string) bool { return p.hasCertificate(ctx, name) }
	}
	waiting, cancel := p.patience(ctx)
	defer cancel()
	if _, err := p.directory.AllowCertificate(waiting, name, policy); err != nil {
		return fmt.Errorf("%s: %w: %w", discovery.Clip(strconv.QuoteToASCII(name)), caddytls.ErrPermissionDenied, err)
	}
	return nil
}

// patience returns a context that ends when a handshake that is under way is not to wait
// any longer.
func (p *Permission) patience(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithDeadline(ctx, time.Unix(0, p.started.Load()).Add(time.Duration(p.SyncTimeout)))
	if p.waiting.Add(1) > maxHandshakes {
		cancel()
	}
	return ctx, func() {
		p.waiting.Add(-1)
		cancel()
	}
}

// hasCertificate reports whether Caddy's storage has a certificate for a name, by whichever
// issuer. A proxy whose own memory is gone, as in a container, or one of several with one
// storage, must not take what it serves for new. Where a limit is reached anybody can have
// it asked for names that a wildcard stands for, so that it looks so often only.
func (p *Permission) hasCertificate(ctx context.Context, name string) bool {
	if p.storage == nil || !p.looks.Allow() {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	issuers, err := p.storage.List(ctx, path.Dir(certmagic.StorageKeys.CertsPrefix("issuer")), false)
	return err == nil && slices.ContainsFunc(issuers, func(issuer string) bool {
		return p.storage.Exists(ctx, certmagic.StorageKeys.SiteCert(path.Base(issuer), name))
	})
}

// Cleanup releases the directory. A renewal that is under way may ask once more: it gets
// its answer from the last snapshot.
func (p *Permission) Cleanup() error {
	p.starting.Do(func() {}) // from here on nothing is started
	if p.directory == nil {
		return nil
	}
	p.directory.permitNoMore(p)
	p.hosts.leave()
	return p.directory.release()
}

// permit has the directory know who allows certificates for its hosts.
func (d *sharedDirectory) permit(p *Permission) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.permissions = append(d.permissions, p)
}

func (d *sharedDirectory) permitNoMore(p *Permission) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.permissions = slices.DeleteFunc(d.permissions, func(other *Permission) bool { return other == p })
}

// certificate returns since when a certificate is allowed for a host, the zero time if none
// is, and until when; the zero time for as long as nodes announce it.
func (d *sharedDirectory) certificate(h *discovery.Host) (since, until time.Time) {
	c, ok := d.Certificate(h.Name)
	d.mu.Lock()
	defer d.mu.Unlock()
	if !ok || len(d.permissions) == 0 {
		return time.Time{}, time.Time{}
	}
	if !h.Left.IsZero() {
		until = h.Left.Add(time.Duration(d.permissions[len(d.permissions)-1].Linger))
		if time.Now().After(until) {
			return time.Time{}, time.Time{}
		}
	}
	return c.First, until
}

// UnmarshalCaddyfile sets up the permission from Caddyfile tokens. Syntax:
//
//	permission discovery [<registry>] {
//	    linger       <duration>
//	    limit        <names> <duration>
//	    sync_timeout <duration>
//	}
func (p *Permission) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return unmarshalBlock(d, "permission discovery", &p.RegistryRaw, caddyblock.Options{
		"linger":       caddyblock.Duration(&p.Linger),
		"limit":        nameLimit(&p.Limit),
		"sync_timeout": caddyblock.Duration(&p.SyncTimeout),
	}, p.check)
}

// nameLimit is the option 'limit <names> <duration>'.
func nameLimit(to **NameLimit) caddyblock.Option {
	return caddyblock.Option{Usage: "<names> <duration>", Min: 2, Max: 2, Set: func(args []string) error {
		l := new(NameLimit)
		*to = l
		if err := caddyblock.Number(&l.Names, 1, maxNewNames).Set(args[:1]); err != nil {
			return err
		}
		return caddyblock.Duration(&l.Period).Set(args[1:])
	}}
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Permission)(nil)
	_ caddy.CleanerUpper          = (*Permission)(nil)
	_ caddyfile.Unmarshaler       = (*Permission)(nil)
	_ caddytls.OnDemandPermission = (*Permission)(nil)
)
