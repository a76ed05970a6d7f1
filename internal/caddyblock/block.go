// Package caddyblock parses blocks of options in a Caddyfile by a table, which is
// shorter than a switch for each block and gives every mistake the same clear
// message: file and line, the option, and what would be accepted.
package caddyblock

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A Block is the grammar of one block of options.
type Block struct {
	What    string // what the block belongs to, at the head of each message
	Options Options
	// Check, where given, returns what is wrong with all the options together. It is
	// called before the first line and after each one. See Literals.
	Check func() error
}

// Options are the grammar of a block's lines, by their names.
type Options map[string]Option

// With returns the options and those of others, such as those that several blocks
// have.
func (o Options) With(more ...Options) Options {
	all := maps.Clone(o)
	for _, options := range more {
		maps.Copy(all, options)
	}
	return all
}

// An Option is the grammar of one line.
type Option struct {
	Usage      string // the arguments, as a message shows them
	Min, Max   int    // how many arguments; Max < 0: no limit
	Repeatable bool   // it may be given more than once
	Set        func(args []string) error
	// Custom, where given, reads the line itself, and its block. Its error is
	// ErrUsage, one of Parse, one that Placed returned, or gets its place here.
	Custom func(d *caddyfile.Dispenser) error
}

// ErrUsage is returned by Option.Custom when its arguments are missing or too many.
var ErrUsage = errors.New("wrong arguments")

// placedError names its file and line.
type placedError struct{ error }

func (e placedError) Unwrap() error { return e.error }

// Placed marks an error that names its file and line, as those of a dispenser do.
func Placed(err error) error { return placedError{err} }

// Parse reads the block behind d's current line, if there is one. Its error names
// file and line.
func (b Block) Parse(d *caddyfile.Dispenser) error {
	if err := b.parse(d); err != nil {
		return Placed(err)
	}
	return nil
}

func (b Block) parse(d *caddyfile.Dispenser) error {
	given := make(map[string]bool)
	// Where each thing that Check found was wrong first: that line is named.
	since := make(map[string]caddyfile.Dispenser)
	check := func(at caddyfile.Dispenser) error {
		if b.Check == nil {
			return nil
		}
		err := b.Check()
		if err == nil {
			return nil
		}
		if before, ok := since[err.Error()]; ok {
			at = before
		}
		since[err.Error()] = at
		return at.WrapErr(fmt.Errorf("%s: %w", b.What, err))
	}
	wrong := check(*d)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		at := *d
		if err := b.line(d, given); err != nil {
			return err
		}
		wrong = check(at)
	}
	return wrong
}

// line reads one option, which d stands at.
func (b Block) line(d *caddyfile.Dispenser, given map[string]bool) error {
	name := d.Val()
	o, ok := b.Options[name]
	if !ok {
		return d.Errf("%s: unknown option %q, want one of %s", b.What, discovery.RedactURL(name),
			strings.Join(slices.Sorted(maps.Keys(b.Options)), ", "))
	}
	if given[name] && !o.Repeatable {
		return d.Errf("%s: option %s is given twice, want it once: %s %s", b.What, name, name, o.Usage)
	}
	given[name] = true
	var err error
	if o.Custom != nil {
		err = o.Custom(d)
	} else if args := d.RemainingArgs(); len(args) < o.Min || o.Max >= 0 && len(args) > o.Max {
		err = ErrUsage
	} else if err = o.Set(args); err == nil && d.NextBlock(d.Nesting()) {
		return d.Errf("%s: option %s takes no block, want: %s %s", b.What, name, name, o.Usage)
	}
	switch _, placed := errors.AsType[placedError](err); {
	case err == nil || placed:
		return err
	case errors.Is(err, ErrUsage):
		return d.Errf("%s: wrong number of arguments for option %s, want: %s %s", b.What, name, name, o.Usage)
	default:
		return d.WrapErr(fmt.Errorf("%s: option %s: %w", b.What, name, err))
	}
}
