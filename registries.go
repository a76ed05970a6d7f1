package caddydiscovery

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

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

	backend backend.Backend
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
	for _, name := range slices.Sorted(maps.Keys(app.Registries)) {
		if err := backend.CheckName(name); err != nil {
			return err
		}
		if err := app.Registries[name].provision(ctx); err != nil {
			return fmt.Errorf("registry %s: %w", name, err)
		}
	}
	return nil
}

func (r *DeclaredRegistry) provision(ctx caddy.Context) (err error) {
	if r == nil {
		return errors.New(`it is null; want {"registry": {"backend": …, "urls": […]}}`)
	}
	r.backend, err = backend.LoadDeclared(ctx, r, "RegistryRaw", r.RegistryRaw)
	return err
}

// Registry returns the registry of that name; of no name the only one.
func (app *Registries) Registry(name string) (backend.Backend, error) {
	r, err := backend.Find(app.Registries, name)
	if err != nil {
		return nil, err
	}
	return r.backend, nil
}

// Start does nothing: who uses a registry opens it.
func (*Registries) Start() error { return nil }

// Stop does nothing.
func (*Registries) Stop() error { return nil }

// parseRegistries sets up the app from the global option, which may be given several
// times. Syntax:
//
//	discovery {
//	    registry <name> [<backend>] [<url>...] {
//	        <backend options>
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
	r.RegistryRaw, err = backend.UnmarshalDeclared(d, nil)
	if err != nil {
		return caddyblock.Placed(err)
	}
	return nil
}

// Interface guards
var (
	_ caddy.App            = (*Registries)(nil)
	_ caddy.Provisioner    = (*Registries)(nil)
	_ backend.Declarations = (*Registries)(nil)
)
