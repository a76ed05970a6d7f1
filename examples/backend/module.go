package filebackend

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func init() { caddy.RegisterModule(File{}) }

// File is a registry in a file of this machine.
type File struct {
	backend.Options

	// The file: one URL, file:// and an absolute path. Placeholders such as {env.X} are
	// expanded.
	URLs []string `json:"urls,omitempty"`

	// How often to look at the file. Default: 200ms
	Poll caddy.Duration `json:"poll,omitempty"`

	registry *Registry
}

// CaddyModule returns the Caddy module information.
func (File) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "discovery.registries.file", New: func() caddy.Module { return new(File) }}
}

// UnmarshalCaddyfile sets up the backend from Caddyfile tokens. Syntax:
//
//	registry file <url> {
//	    poll       <duration>
//	    ttl        <duration>
//	    loss_guard <percent>|off
//	    warm_start on|off
//	}
func (f *File) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name
	f.URLs = d.RemainingArgs()
	return f.UnmarshalBlock(d, "file", map[string]func([]string) error{
		"poll": func(args []string) error {
			poll, err := caddy.ParseDuration(strings.Join(args, " "))
			if err != nil || poll <= 0 {
				return errors.New("want a duration above 0 such as 200ms")
			}
			f.Poll = caddy.Duration(poll)
			return nil
		},
	})
}

// Provision expands placeholders and checks the options.
func (f *File) Provision(ctx caddy.Context) error {
	if err := f.Options.Provision(ctx); err != nil {
		return err
	}
	if len(f.URLs) != 1 {
		return fmt.Errorf("have %d URLs, want one such as file:///run/fleet/nodes.json", len(f.URLs))
	}
	if err := backend.ReplaceGlobals(&f.URLs[0]); err != nil {
		return err
	}
	var err error
	if f.registry, err = Open(f.URLs[0], time.Duration(f.Poll)); err != nil {
		return err
	}
	// Two spellings of one registry become equal.
	f.URLs, f.Poll = []string{f.registry.String()}, caddy.Duration(f.registry.poll)
	return nil
}

// Open returns the registry.
func (f *File) Open(*slog.Logger) (discovery.Registry, error) {
	return Open(f.registry.String(), f.registry.poll)
}

// Addresses returns none: no network leads to the registry.
func (f *File) Addresses() []string { return nil }

// Interface guards
var (
	_ backend.Backend       = (*File)(nil)
	_ caddy.Provisioner     = (*File)(nil)
	_ caddyfile.Unmarshaler = (*File)(nil)
)
