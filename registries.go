package caddydiscovery

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

func init() {
	httpcaddyfile.RegisterGlobalOption(backend.App, parseRegistries)
}

// Registries is an app that declares registries by name, for all that use one: sources,
// matchers, permissions and the registrar. It opens none itself.
type Registries struct {
	// The registries, by name.
	Registries map[string]*DeclaredRegistry `json:"registries,omitempty"`
}

// DeclaredRegistry is a registry that has a name.
type DeclaredRegistry struct {
	// The registry.
	RegistryRaw json.RawMessage `json:"registry,omitempty" caddy:"namespace=discovery.registries inline_key=backend"`

	// Which hosts the records of the registry may announce, in their metadata "hosts":
	// names such as shop.example.com. One such as *.apps.example.com stands for all names
	// with one label in the place of *, and for itself. Default: any host name, but no
	// wildcard
	Hosts []string `json:"hosts,omitempty"`

	// Hosts that only the services may announce that are named here. Hosts need not name
	// them, too. Default: of two services that announce one host it is that of the one which
	// this proxy knew first
	Claims []HostClaim `json:"claims,omitempty"`

	backend backend.Backend
	key     backend.Key
}

// HostClaim keeps hosts to services.
type HostClaim struct {
	// The service, in which * stands for any characters, such as billing*.
	Service string `json:"service,omitempty"`

	// The hosts. One such as *.apps.example.com stands for all names with one label in the
	// place of * that no other claim has.
	Hosts []string `json:"hosts,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (Registries) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  backend.App,
		New: func() caddy.Module { return new(Registries) },
	}
}

// Provision checks the registries.
func (app *Registries) Provision(ctx caddy.Context) error {
	names := slices.Sorted(maps.Keys(app.Registries))
	for _, name := range names {
		if err := backend.CheckName(name); err != nil {
			return err
		}
		if err := app.Registries[name].provision(ctx); err != nil {
			return fmt.Errorf("registry %s: %w", name, err)
		}
	}
	return app.checkShared(names)
}

func (r *DeclaredRegistry) provision(ctx caddy.Context) (err error) {
	if r == nil {
		return errors.New(`it is null; want {"registry": {"backend": …, "urls": […]}}`)
	}
	if r.backend, err = backend.LoadDeclared(ctx, r, "RegistryRaw", r.RegistryRaw); err != nil {
		return err
	}
	if err := r.expand(); err != nil {
		return err
	}
	if err := r.check(); err != nil {
		return err
	}
	r.key, err = backend.KeyOf(r.backend)
	return err
}

// expand expands global placeholders in the hosts.
func (r *DeclaredRegistry) expand() error {
	for i := range r.Hosts {
		if err := backend.ReplaceGlobals(&r.Hosts[i]); err != nil {
			return fmt.Errorf("hosts: %w", err)
		}
	}
	for i := range r.Claims {
		c := &r.Claims[i]
		if err := backend.ReplaceGlobals(&c.Service); err != nil {
			return fmt.Errorf("claim: %w", err)
		}
		for j := range c.Hosts {
			if err := backend.ReplaceGlobals(&c.Hosts[j]); err != nil {
				return fmt.Errorf("claim %s: %w", c.Service, err)
			}
		}
	}
	return nil
}

// check refuses hosts and claims that are none.
func (r *DeclaredRegistry) check() error {
	_, err := discovery.NewHostRules(r.hostOptions())
	return err
}

func (r *DeclaredRegistry) hostOptions() discovery.HostOptions {
	o := discovery.HostOptions{Names: r.Hosts}
	for _, c := range r.Claims {
		o.Claims = append(o.Claims, discovery.HostClaim(c))
	}
	return o
}

// checkShared refuses two declarations of the same registry that say different things of
// hosts.
func (app *Registries) checkShared(names []string) error {
	first := make(map[backend.Key]string)
	for _, name := range names {
		r := app.Registries[name]
		other, found := first[r.key]
		if !found {
			first[r.key] = name
		} else if !reflect.DeepEqual(r.hostOptions(), app.Registries[other].hostOptions()) {
			return fmt.Errorf("%s and %s are the same registry, with different hosts and claims; want these to be equal, or one name", other, name)
		}
	}
	return nil
}

// declaredHosts returns what a config declares of the hosts of a registry.
func declaredHosts(ctx caddy.Context, key backend.Key) (discovery.HostOptions, error) {
	app, err := ctx.AppIfConfigured(backend.App)
	if errors.Is(err, caddy.ErrNotConfigured) {
		return discovery.HostOptions{}, nil
	}
	if err != nil {
		return discovery.HostOptions{}, err
	}
	for _, r := range app.(*Registries).Registries {
		if r.key == key {
			return r.hostOptions(), nil
		}
	}
	return discovery.HostOptions{}, nil
}

// Registry returns the registry of that name; of no name the only one.
func (app *Registries) Registry(name string) (backend.Backend, error) {
	r, err := backend.Find(app.Registries, name)
	if err != nil {
		return nil, err
	}
	return r.backend, nil
}

// Start has the names shown. Who uses a registry opens it.
func (app *Registries) Start() error {
	runningDeclarations.mu.Lock()
	defer runningDeclarations.mu.Unlock()
	runningDeclarations.apps = append(runningDeclarations.apps, app)
	return nil
}

// Stop has the names of the config before shown, or none.
func (app *Registries) Stop() error {
	runningDeclarations.mu.Lock()
	defer runningDeclarations.mu.Unlock()
	runningDeclarations.apps = slices.DeleteFunc(runningDeclarations.apps, func(other *Registries) bool { return other == app })
	return nil
}

// Cleanup is for where Stop was not called: see Registrar.Cleanup.
func (app *Registries) Cleanup() error { return app.Stop() }

// runningDeclarations are those of the running configs, of which there are two during a
// reload, the newest last.
var runningDeclarations struct {
	mu   sync.Mutex
	apps []*Registries
}

// declaredName returns the name that the running config gives a registry, the first one of
// several; "" for none.
func declaredName(key backend.Key) string {
	runningDeclarations.mu.Lock()
	defer runningDeclarations.mu.Unlock()
	if len(runningDeclarations.apps) == 0 {
		return ""
	}
	declared := runningDeclarations.apps[len(runningDeclarations.apps)-1].Registries
	for _, name := range slices.Sorted(maps.Keys(declared)) {
		if declared[name].key == key {
			return name
		}
	}
	return ""
}

// parseRegistries sets up the app from the global option, which may be given several
// times. Syntax:
//
//	discovery {
//	    registry <name> [<backend>] [<url>...] {
//	        <backend options>
//	        hosts <host...>
//	        claim <service> <host...>
//	    }
//	}
func parseRegistries(d *caddyfile.Dispenser, existing any) (any, error) {
	app := Registries{Registries: make(map[string]*DeclaredRegistry)}
	if existing != nil {
		if err := json.Unmarshal(existing.(httpcaddyfile.App).Value, &app); err != nil {
			return nil, d.WrapErr(err)
		}
	}
	d.Next() // consume the name
	if d.NextArg() {
		return nil, d.Errf("discovery: unexpected argument %q, want a block with 'registry <name> <url>'", discovery.RedactURL(d.Val()))
	}
	if err := (caddyblock.Block{What: "discovery", Options: caddyblock.Options{
		"registry": {Usage: "<name> [<backend>] [<url>...] { <options> }", Repeatable: true, Custom: app.declare},
	}}).Parse(d); err != nil {
		return nil, err
	}
	return httpcaddyfile.App{Name: backend.App, Value: caddyconfig.JSON(app, nil)}, nil
}

// declare reads one registry. The dispenser stands before its name.
func (app *Registries) declare(d *caddyfile.Dispenser) error {
	if !d.NextArg() {
		return caddyblock.ErrUsage
	}
	name := d.Val()
	if err := backend.CheckName(name); err != nil {
		return err
	}
	if app.Registries[name] != nil {
		return fmt.Errorf("the name %s is given twice; declared are %s", name, strings.Join(slices.Sorted(maps.Keys(app.Registries)), ", "))
	}
	r := new(DeclaredRegistry)
	app.Registries[name] = r
	return r.unmarshal(d)
}

func (r *DeclaredRegistry) unmarshal(d *caddyfile.Dispenser) (err error) {
	r.RegistryRaw, err = backend.UnmarshalDeclared(d, caddyblock.Options{
		"hosts": {Usage: "<host...>", Min: 1, Max: -1, Repeatable: true, Set: func(args []string) error {
			r.Hosts = append(r.Hosts, args...)
			return checkHosts(args)
		}},
		"claim": {Usage: "<service> <host...>", Min: 2, Max: -1, Repeatable: true, Set: func(args []string) error {
			r.Claims = append(r.Claims, HostClaim{Service: args[0], Hosts: args[1:]})
			if args[0] == "" {
				return errors.New("the service is empty, want one such as billing or billing*")
			}
			return checkHosts(args[1:])
		}},
	})
	if err != nil {
		return caddyblock.Placed(err)
	}
	return nil
}

// checkHosts refuses what no placeholder can make a host name.
func checkHosts(args []string) error {
	literal := slices.DeleteFunc(slices.Clone(args), func(arg string) bool { return strings.Contains(arg, "{") })
	_, err := discovery.NewHostRules(discovery.HostOptions{Names: literal})
	return err
}

// Interface guards
var (
	_ caddy.App            = (*Registries)(nil)
	_ caddy.Provisioner    = (*Registries)(nil)
	_ caddy.CleanerUpper   = (*Registries)(nil)
	_ backend.Declarations = (*Registries)(nil)
)
