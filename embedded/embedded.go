// Package embedded puts the registry in the box: a NATS server with JetStream
// that runs inside Caddy, for one machine without a broker.
//
// It is an app of its own, and part of a build only when that build names it:
//
//	xcaddy build \
//		--with github.com/caddy-discovery/caddy-discovery \
//		--with github.com/caddy-discovery/caddy-discovery/embedded
//
// It knows nothing of the rest of the plugin but how options are parsed, and the
// rest knows nothing of it: what they share is a NATS address.
package embedded

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"go.uber.org/zap"
)

// Defaults of [App].
const (
	defaultListen   = "127.0.0.1:4222"
	defaultMaxStore = 256 << 20
)

func init() {
	caddy.RegisterModule(new(App))
}

// App runs a NATS server with JetStream inside Caddy, so that a fleet on one
// machine needs no broker of its own. Services and `dynamic discovery` reach it
// like any NATS server, by default at `nats://127.0.0.1:4222`.
//
// The server starts with the configuration and is kept across reloads that do
// not change it, together with its clients. A reload that does change it stops
// the old server and starts the new one on the same store; if the new one
// cannot start, the old one comes back and the reload fails.
type App struct {
	// The address to listen on: an IP address or host name and a port.
	// Anything but a loopback address is refused unless `user` is set, and
	// earns a warning unless `tls` is. Placeholders are replaced.
	// Default: `127.0.0.1:4222`.
	Listen string `json:"listen,omitempty"`

	// The folder that holds the streams; it is created with mode 0700, and
	// belongs to one Caddy alone. Placeholders are replaced.
	// Default: `nats` in Caddy's data directory.
	Store string `json:"store,omitempty"`

	// How much all buckets together may reserve on disk, in bytes, and once
	// more in memory for those that ask for memory storage. Buckets that are
	// there already stay, even if they are larger than a new limit.
	// Default: 268435456 (256 MiB).
	MaxStore int64 `json:"max_store,omitempty"`

	// The one user that may connect. Default: anybody may, which is accepted
	// on loopback only.
	User *User `json:"user,omitempty"`

	// The certificate to serve TLS with. Default: no TLS.
	TLS *TLS `json:"tls,omitempty"`

	settings    settings
	certificate *tls.Certificate
	// instance is what this app holds in the pool between Start and Stop.
	instance *instance
}

// User is the one user that may connect to the server.
type User struct {
	// The user's name. Placeholders are replaced. Required.
	Name string `json:"name,omitempty"`

	// The user's password, or its bcrypt hash. Placeholders are replaced.
	// Required.
	Password string `json:"password,omitempty"`
}

// TLS names the files to serve TLS with. They are read whenever a
// configuration is loaded: a reload puts a renewed certificate into service
// without cutting anybody off.
type TLS struct {
	// The PEM file with the certificate and its chain. Placeholders are
	// replaced. Required.
	Certificate string `json:"certificate,omitempty"`

	// The PEM file with the certificate's private key. Placeholders are
	// replaced. Required.
	Key string `json:"key,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*App) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "nats_server",
		New: func() caddy.Module { return new(App) },
	}
}

// Provision resolves and checks the configuration. It reads the TLS files, but
// neither listens nor touches the store: `caddy validate` comes this way too.
func (a *App) Provision(ctx caddy.Context) error {
	var err error
	if a.settings, err = a.resolve(caddy.NewReplacer()); err != nil {
		return err
	}
	if !a.LoopbackOnly() && a.TLS == nil {
		ctx.Logger().Warn("the listen address can be reached from other machines, and without TLS the password and all records cross the network in the clear",
			zap.String("listen", a.settings.listen))
	}
	if a.TLS != nil {
		a.certificate, err = loadCertificate(a.settings.certificate, a.settings.key)
	}
	return err
}

// LoopbackOnly reports whether only this machine can reach the server. Whoever
// decides how far the records of a registry may be trusted can ask this of the
// app `nats_server` without importing this package. It is valid after
// Provision.
func (a *App) LoopbackOnly() bool { return isLoopback(a.settings.host) }

func isLoopback(host string) bool { return host == "localhost" || net.ParseIP(host).IsLoopback() }

// Start starts the server, or takes over the one that an equal configuration
// already runs.
func (a *App) Start() (err error) {
	a.instance, err = acquire(a.settings, a.certificate)
	return err
}

// Stop stops the server, unless a newer configuration uses it.
func (a *App) Stop() error {
	if a.instance == nil {
		return nil
	}
	a.instance = nil
	return release(a.settings)
}

// Cleanup stops the server where Stop was not called: Caddy drops a
// configuration whose admin endpoint fails after its apps have started without
// stopping them.
func (a *App) Cleanup() error { return a.Stop() }

// resolve replaces the placeholders, fills in the defaults and checks what can
// be checked without touching anything.
func (a *App) resolve(repl *caddy.Replacer) (settings, error) {
	s := settings{maxStore: a.MaxStore}
	var errs []error
	text := func(name, value string) string {
		v, err := repl.ReplaceOrErr(value, true, true)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
		return v
	}
	required := func(name, value string) string {
		if value == "" {
			errs = append(errs, fmt.Errorf("%s is missing", name))
			return ""
		}
		return text(name, value)
	}

	s.listen = text("listen", a.Listen)
	s.store = text("store", a.Store)
	if a.User != nil {
		s.user = required("user name", a.User.Name)
		s.password = required("user password", a.User.Password)
	}
	if a.TLS != nil {
		s.certificate = required("tls certificate", a.TLS.Certificate)
		s.key = required("tls key", a.TLS.Key)
	}
	if err := errors.Join(errs...); err != nil {
		return settings{}, err
	}

	s.listen = cmp.Or(s.listen, defaultListen)
	var err error
	if s.host, s.port, err = a.parseListen(s.listen); err != nil {
		return settings{}, err
	}
	// One folder has one name, so that two spellings of it are seen to clash.
	store, err := filepath.Abs(cmp.Or(s.store, filepath.Join(caddy.AppDataDir(), "nats")))
	if err != nil {
		return settings{}, fmt.Errorf("store %s: %w", s.store, err)
	}
	s.store = store
	if s.maxStore < 0 {
		return settings{}, fmt.Errorf("max_store %d: want a number of bytes greater than 0", s.maxStore)
	}
	s.maxStore = cmp.Or(s.maxStore, defaultMaxStore)
	return s, nil
}

// parseListen reads an address to listen on. Port 0 is refused although a kernel would
// accept it: no client could know where to connect.
func (a *App) parseListen(listen string) (host string, port int, err error) {
	host, digits, err := net.SplitHostPort(listen)
	n, invalid := strconv.ParseUint(digits, 10, 16)
	switch {
	case err != nil || invalid != nil || n == 0:
		return "", 0, fmt.Errorf("listen address %q: want a host and a port from 1 to 65535, such as %s", listen, defaultListen)
	case a.User == nil && !isLoopback(host):
		return "", 0, fmt.Errorf("listen address %s can be reached from other machines, and anybody could write to the registry: "+
			"set a user and password (and TLS), or listen on a loopback address such as %s", listen, defaultListen)
	}
	return host, int(n), nil
}

// loadCertificate reads a certificate and its key.
func loadCertificate(certificate, key string) (*tls.Certificate, error) {
	c, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		// The error names neither file when their contents are at fault.
		return nil, fmt.Errorf("tls certificate %s with key %s: %w", certificate, key, err)
	}
	return &c, nil
}

// Interface guards
var (
	_ caddy.App             = (*App)(nil)
	_ caddy.Provisioner     = (*App)(nil)
	_ caddy.CleanerUpper    = (*App)(nil)
	_ caddyfile.Unmarshaler = (*App)(nil)
)
