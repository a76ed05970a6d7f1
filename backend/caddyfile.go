package backend

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/registries"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

// Unmarshal reads a registry from Caddyfile tokens, and returns the JSON of its
// module. The dispenser stands at the backend's name, or at that of a registry which is
// declared elsewhere:
//
//	<backend> [<url>...] {
//	    <backend options>
//	}
//
// The error names file and line.
func Unmarshal(d *caddyfile.Dispenser) (json.RawMessage, error) {
	name := d.Val()
	if !isBackend(name) {
		if isName(name) && d.CountRemainingArgs() == 0 {
			raw, err := unmarshalName(d, name)
			if err == nil && d.NextBlock(d.Nesting()) {
				err = d.Errf("registry %s: its options stand where it is declared; want no block, or one of the backends %s before it", name, strings.Join(backends(), ", "))
			}
			return raw, err
		}
		return nil, d.Errf("registry: unknown backend %q, want one of %s, or the name of a registry", discovery.RedactURL(name), strings.Join(backends(), ", "))
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

// backends returns the names of the backends there are, sorted.
func backends() (names []string) {
	for _, m := range caddy.GetModules(namespace) {
		if m.ID.Name() != named {
			names = append(names, m.ID.Name())
		}
	}
	return names
}

func isBackend(name string) bool {
	_, err := caddy.GetModule(namespace + "." + name)
	return err == nil
}

// UnmarshalURLs reads a registry from the URLs on the rest of the line, whose scheme
// names the backend, or from its name, and returns the JSON of its module; nil if there
// are none. What the line is of stands at the head of a message. The error names file and
// line.
func UnmarshalURLs(d *caddyfile.Dispenser, what string) (json.RawMessage, error) {
	var urls []string
	var tokens []caddyfile.Token
	for d.NextArg() {
		if len(urls) == 0 && isName(d.Val()) {
			raw, err := unmarshalName(d, d.Val())
			if err != nil {
				return nil, fmt.Errorf("%s: %w", what, err)
			}
			return raw, nil
		}
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

// UnmarshalDeclared reads the registry that a declaration is about, and returns the JSON of
// its module. The dispenser stands at the declared name; behind it come
//
//	[<backend>] [<url>...] {
//	    <backend options>
//	    <own options>
//	}
//
// with the options that the declaration has itself. The error names file and line.
func UnmarshalDeclared(d *caddyfile.Dispenser, own caddyblock.Options) (json.RawMessage, error) {
	declared := d.Token()
	var tokens []caddyfile.Token
	var words []string
	for d.NextArg() {
		tokens, words = append(tokens, d.Token()), append(words, d.Val())
	}
	what := "registry " + declared.Text
	switch {
	case len(words) == 0:
		return nil, d.Errf("%s: want a URL behind the name, or one of the backends %s", what, strings.Join(backends(), ", "))
	case words[0] == named:
		return nil, d.Errf("%s: it cannot be another one that has a name; want a URL, or one of the backends %s", what, strings.Join(backends(), ", "))
	case !isBackend(words[0]):
		name, err := NameOf(words...)
		if err != nil {
			return nil, d.Errf("%s: %w; for anything else write one of the backends %s before it", what, err, strings.Join(backends(), ", "))
		}
		first := tokens[0]
		first.Text = name
		tokens = append([]caddyfile.Token{first}, tokens...)
	}
	theirs, ours := divideBlock(d, own)
	inner := caddyfile.NewDispenser(append(tokens, theirs...))
	inner.Next()
	raw, err := Unmarshal(inner)
	if err != nil {
		return nil, err
	}
	inner = caddyfile.NewDispenser(append([]caddyfile.Token{declared}, ours...))
	inner.Next()
	return raw, caddyblock.Block{What: what, Options: own}.Parse(inner)
}

// divideBlock returns the block behind the dispenser's line as two: one with the lines of
// the options, one with all others.
func divideBlock(d *caddyfile.Dispenser, options caddyblock.Options) (others, those []caddyfile.Token) {
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if others == nil {
			d.Prev()
			others, those = []caddyfile.Token{d.Token()}, []caddyfile.Token{d.Token()}
			d.Next()
		}
		if _, ok := options[d.Val()]; ok {
			those = append(those, d.NextSegment()...)
		} else {
			others = append(others, d.NextSegment()...)
		}
	}
	if others != nil {
		others, those = append(others, d.Token()), append(those, d.Token())
	}
	return others, those
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
