package backend

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/registries"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

// Unmarshal reads a registry from Caddyfile tokens, and returns the JSON of its
// module. The dispenser stands at the backend's name:
//
//	<backend> [<url>...] {
//	    <backend options>
//	}
//
// The error names file and line.
func Unmarshal(d *caddyfile.Dispenser) (json.RawMessage, error) {
	name := d.Val()
	var known []string
	for _, m := range caddy.GetModules(namespace) {
		known = append(known, m.ID.Name())
	}
	if !slices.Contains(known, name) {
		return nil, d.Errf("registry: unknown backend %q, want one of %s", discovery.RedactURL(name), strings.Join(known, ", "))
	}
	module, err := caddyfile.UnmarshalModule(d, namespace+"."+name)
	switch {
	case err == nil:
	case strings.Contains(err.Error(), ", at "): // as a dispenser's errors have it
		return nil, err
	default:
		return nil, d.WrapErr(fmt.Errorf("registry %s: %w", name, err))
	}
	return caddyconfig.JSONModuleObject(module, "backend", name, nil), nil
}

// UnmarshalURLs reads a registry from the URLs on the rest of the line, whose scheme
// names the backend, and returns the JSON of its module; nil if there are none. What
// the line is of stands at the head of a message. The error names file and line.
func UnmarshalURLs(d *caddyfile.Dispenser, what string) (json.RawMessage, error) {
	var urls []string
	var tokens []caddyfile.Token
	for d.NextArg() {
		urls, tokens = append(urls, d.Val()), append(tokens, d.Token())
		switch _, err := NameOf(urls...); {
		case errors.Is(err, errScheme):
			return nil, d.Errf("%s: %w; for anything else write a line 'registry <backend> <url>' into the block", what, err)
		case err != nil:
			return nil, d.Errf("%s: %w", what, err)
		}
	}
	if len(urls) == 0 {
		return nil, nil
	}
	name := tokens[0]
	name.Text, _ = NameOf(urls...)
	inner := caddyfile.NewDispenser(append([]caddyfile.Token{name}, tokens...))
	inner.Next()
	return Unmarshal(inner)
}

// errScheme is returned by NameOf for a URL of no backend.
var errScheme = errors.New("does not name a backend by its scheme")

// NameOf returns the backend that URLs name by their schemes, "" if there are none.
// The error shows no secret.
func NameOf(urls ...string) (string, error) {
	var backend string
	for _, u := range urls {
		name, ok := registries.Backend(u)
		switch {
		case !ok:
			return "", fmt.Errorf("%s %w, want one of %s", discovery.RedactURL(u), errScheme, strings.Join(registries.Schemes(), "://, ")+"://")
		case backend != "" && name != backend:
			return "", fmt.Errorf("the URLs name two backends, %s and %s; want one", backend, name)
		}
		backend = name
	}
	return backend, nil
}

// UnmarshalBlock reads the block of a backend with that name, if there is one behind
// the dispenser's line: the options that every backend has,
//
//	ttl        <duration>
//	loss_guard <percent>|off
//	warm_start on|off
//
// and its own, each of which is given at most once, and is read or refused by a func
// that gets its arguments. The error names file, line and option.
func (o *Options) UnmarshalBlock(d *caddyfile.Dispenser, name string, own map[string]func(args []string) error) error {
	options := o.grammar()
	for option, set := range own {
		options[option] = caddyblock.Option{Usage: "…", Max: -1, Set: set}
	}
	return caddyblock.Block{What: "registry " + name, Options: options}.Parse(d)
}

func (o *Options) grammar() caddyblock.Options {
	return caddyblock.Options{
		"ttl":        caddyblock.Duration(&o.TTL),
		"loss_guard": caddyblock.PercentOrOff(&o.LossGuard),
		"warm_start": caddyblock.OptionalSwitch(&o.WarmStart),
	}
}

// unmarshalBlock reads the arguments and the block of one of the backends here, whose
// own options are given, and checks what they come to as far as no placeholder can
// change it.
func unmarshalBlock[T any](d *caddyfile.Dispenser, module *T, urls *[]string, options caddyblock.Options, more ...caddyblock.Options) error {
	d.Next() // consume the name
	name := d.Val()
	*urls = d.RemainingArgs()
	return caddyblock.Block{
		What:    "registry " + name,
		Options: options.With(more...),
		// A backend needs nothing of a config to be provisioned.
		Check: caddyblock.Literals(module, func(m *T) error {
			return any(m).(caddy.Provisioner).Provision(caddy.Context{})
		}),
	}.Parse(d)
}
