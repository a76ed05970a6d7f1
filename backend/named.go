package backend

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

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Named is a registry that the discovery app declares: it stands for that one, with all
// its settings, and may be named in as many places as need it.
type Named struct {
	// The name. Default: that of the only registry that is declared
	Name string `json:"name,omitempty"`

	// Where a Caddyfile names it, as file:line, for the message if there is none of that
	// name.
	Caddyfile string `json:"caddyfile,omitempty"`

	declared Backend
}

// named is the name of the module, in the place of that of a backend.
const named = "named"

// App is the name of the app that declares registries.
const App = "discovery"

// Declarations are what the app of that name knows.
type Declarations interface {
	// Registry returns the registry of that name; of no name the only one. The error
	// names those that there are.
	Registry(name string) (Backend, error)
}

// CaddyModule returns the Caddy module information.
func (Named) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  namespace + "." + named,
		New: func() caddy.Module { return new(Named) },
	}
}

// Provision finds the registry.
func (n *Named) Provision(ctx caddy.Context) (err error) {
	if n.declared, err = n.find(ctx); err != nil && n.Caddyfile != "" {
		return fmt.Errorf("%w, at %s", err, n.Caddyfile)
	}
	return err
}

func (n *Named) find(ctx caddy.Context) (Backend, error) {
	app, err := ctx.AppIfConfigured(App)
	if errors.Is(err, caddy.ErrNotConfigured) {
		return nil, noRegistry(n.Name, nil)
	}
	if err != nil {
		return nil, err
	}
	return app.(Declarations).Registry(n.Name)
}

// UnmarshalCaddyfile reads the name. Syntax:
//
//	registry named [<name>]
func (n *Named) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume "named"
	n.Caddyfile = fmt.Sprintf("%s:%d", d.File(), d.Line())
	if d.NextArg() {
		n.Name = d.Val()
		if err := CheckName(n.Name); err != nil {
			return d.WrapErr(err)
		}
	}
	if d.NextArg() {
		return d.Errf("registry %s: unexpected argument %q, want the name alone", n.Name, discovery.RedactURL(d.Val()))
	}
	if d.NextBlock(d.Nesting()) {
		return d.Errf("registry %s: its options stand where it is declared, in the global option discovery; want no block", n.Name)
	}
	return nil
}

// Find returns one of the declared registries; of no name the only one.
func Find[T any](declared map[string]T, name string) (found T, err error) {
	found, ok := declared[name]
	if name == "" && len(declared) == 1 {
		for _, found = range declared {
			ok = true
		}
	}
	if !ok {
		return found, noRegistry(name, slices.Sorted(maps.Keys(declared)))
	}
	return found, nil
}

// noRegistry returns the error of a name that is not declared, or of one that was left
// out.
func noRegistry(name string, declared []string) error {
	there := "none is declared"
	if len(declared) > 0 {
		there = "declared are " + strings.Join(declared, ", ")
	}
	const declare = "the global option 'discovery { registry <name> <url> }' declares one"
	switch {
	case name != "":
		return fmt.Errorf("there is no registry %q; %s; %s", discovery.Clip(discovery.RedactURL(name)), there, declare)
	case len(declared) > 1:
		return fmt.Errorf("the registry is missing, and several are declared; want one of %s", strings.Join(declared, ", "))
	}
	return fmt.Errorf("the registry is missing; write its URL, or a line 'registry <backend> [<url>...]' into the block; %s, to be named in many places", declare)
}

// maxName is the length of the name of a registry in bytes.
const maxName = 64

// CheckName refuses what cannot name a registry: what could be a URL, a placeholder or a
// backend is none.
func CheckName(name string) error {
	if !isName(name) {
		return fmt.Errorf("invalid name %q of a registry, want letters, digits, '-', '_' and '.', at most %d, such as main", discovery.Clip(discovery.RedactURL(name)), maxName)
	}
	if isBackend(name) {
		return fmt.Errorf("a registry cannot be named %q, which is a backend; want a name such as main", name)
	}
	return nil
}

func isName(s string) bool {
	return s != "" && len(s) <= maxName && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("-_.", r)
	})
}

// unmarshalName returns the JSON of the registry whose name the dispenser stands at.
// Without a name it is the only one.
func unmarshalName(d *caddyfile.Dispenser, name string) (json.RawMessage, error) {
	token := d.Token()
	token.Text = named
	tokens := []caddyfile.Token{token}
	if name != "" {
		token.Text = name
		tokens = append(tokens, token)
		for d.NextArg() {
			tokens = append(tokens, d.Token())
		}
	}
	n := new(Named)
	if err := n.UnmarshalCaddyfile(caddyfile.NewDispenser(tokens)); err != nil {
		return nil, err
	}
	return caddyconfig.JSONModuleObject(n, "backend", named, nil), nil
}

// OnlyDeclared returns the JSON that stands for the only registry that is declared, for
// a line that names none. The dispenser stands at it.
func OnlyDeclared(d *caddyfile.Dispenser) (json.RawMessage, error) { return unmarshalName(d, "") }

// Interface guards
var (
	_ caddy.Provisioner     = (*Named)(nil)
	_ caddyfile.Unmarshaler = (*Named)(nil)
)
