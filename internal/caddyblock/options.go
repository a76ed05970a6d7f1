package caddyblock

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/dustin/go-humanize"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Text is an option with one argument, which must not be empty.
func Text(usage string, to *string) Option { return Texts(usage, to) }

// Texts is an option with several arguments, none of which may be empty.
func Texts(usage string, to ...*string) Option {
	return Option{Usage: usage, Min: len(to), Max: len(to), Set: func(args []string) error {
		for i, arg := range args {
			if arg == "" {
				return fmt.Errorf("an argument is empty, want %s", usage)
			}
			*to[i] = arg
		}
		return nil
	}}
}

// Value is an option with one argument that parse reads or refuses.
func Value[T any](usage string, to *T, parse func(arg string) (T, error)) Option {
	return Option{Usage: usage, Min: 1, Max: 1, Set: func(args []string) error {
		v, err := parse(args[0])
		if err != nil {
			return err
		}
		*to = v
		return nil
	}}
}

// Present is an option that is set by being there.
func Present(to *bool) Option {
	return Option{Usage: "(no arguments)", Set: func([]string) error {
		*to = true
		return nil
	}}
}

// OneOf is an option with one of the accepted words.
func OneOf(to *string, accepted ...string) Option {
	usage := strings.Join(accepted, "|")
	return Value(usage, to, func(arg string) (string, error) {
		if !slices.Contains(accepted, arg) {
			return "", fmt.Errorf("invalid value %q, want %s", arg, usage)
		}
		return arg, nil
	})
}

// Switch is an option that is on or off, and off where it is left out.
func Switch(to *bool) Option { return Value("on|off", to, parseSwitch) }

// OptionalSwitch is an option that is on, off or left out.
func OptionalSwitch(to **bool) Option {
	return Value("on|off", to, func(arg string) (*bool, error) {
		on, err := parseSwitch(arg)
		return &on, err
	})
}

func parseSwitch(arg string) (on bool, err error) {
	if arg != "on" && arg != "off" {
		return false, fmt.Errorf("invalid value %q, want on|off", arg)
	}
	return arg == "on", nil
}

// Duration is an option with a duration above 0.
func Duration(to *caddy.Duration) Option {
	return Value("<duration>", to, func(arg string) (caddy.Duration, error) {
		v, err := caddy.ParseDuration(arg)
		if err != nil || v <= 0 {
			return 0, fmt.Errorf("invalid duration %q, want one above 0 such as 500ms, 10s or 5m", arg)
		}
		return caddy.Duration(v), nil
	})
}

// OptionalDuration is an option with a duration for which 0 has a meaning of its own.
func OptionalDuration(to **caddy.Duration) Option {
	return Value("<duration>", to, func(arg string) (*caddy.Duration, error) {
		v, err := caddy.ParseDuration(arg)
		if err != nil || v < 0 {
			return nil, fmt.Errorf("invalid duration %q, want 0s or one such as 500ms, 10s or 5m", arg)
		}
		return new(caddy.Duration(v)), nil
	})
}

// CheckDuration is the check of a JSON configuration that Duration is of a Caddyfile.
func CheckDuration(name string, d caddy.Duration) error {
	if d < 0 {
		return fmt.Errorf("%s: invalid duration %v, want one above 0", name, time.Duration(d))
	}
	return nil
}

// CheckURL refuses the value of an option that names a URL to ask by GET, and is none.
func CheckURL(name, value string) error {
	u, err := url.Parse(value)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return fmt.Errorf("%s: invalid URL %q, want http://host[:port][/path] or https://…", name, discovery.RedactURL(value))
	}
	return nil
}

// Number is an option with a number between two others.
func Number(to *int, least, most int) Option {
	return Value("<n>", to, func(arg string) (int, error) {
		v, err := strconv.Atoi(arg)
		if err != nil || v < least || v > most {
			return 0, fmt.Errorf("invalid number %q, want %d to %d", arg, least, most)
		}
		return v, nil
	})
}

// PercentOrOff is an option with a percentage of at least 1, or the word off for 0.
func PercentOrOff(to **int) Option {
	return Value("<percent>|off", to, func(arg string) (*int, error) {
		if arg == "off" {
			return new(0), nil
		}
		v, err := strconv.Atoi(strings.TrimSuffix(arg, "%"))
		if err != nil || v < 1 || v > 100 {
			return nil, fmt.Errorf("invalid percentage %q, want 1 to 100, or off", arg)
		}
		return &v, nil
	})
}

// Size is an option with a number of bytes above 0.
func Size(to *int64) Option {
	return Value("<size>", to, func(arg string) (int64, error) {
		v, err := humanize.ParseBytes(arg)
		if err != nil || v == 0 || v > 1<<62 {
			return 0, fmt.Errorf("invalid size %q, want one above 0 such as 10MiB or 1GiB", arg)
		}
		return int64(v), nil
	})
}

// Header is an option with the name and a value of a header field. It adds to those
// that were given before.
func Header(to *http.Header) Option {
	return Option{Usage: "<name> <value>", Min: 2, Max: 2, Repeatable: true, Set: func(args []string) error {
		if args[0] == "" {
			return errors.New("the name is empty, want <name> <value>")
		}
		if *to == nil {
			*to = make(http.Header)
		}
		to.Add(args[0], args[1])
		return nil
	}}
}
