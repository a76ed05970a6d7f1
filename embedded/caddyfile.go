package embedded

import (
	"math"
	"strings"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/dustin/go-humanize"
)

func init() {
	httpcaddyfile.RegisterGlobalOption("nats_server", parseGlobalOption)
}

// parseGlobalOption reads the global option into the app's configuration.
func parseGlobalOption(d *caddyfile.Dispenser, existing any) (any, error) {
	d.Next()
	if existing != nil {
		return nil, d.Err("nats_server may be given only once")
	}
	d.Prev()
	app := new(App)
	if err := app.UnmarshalCaddyfile(d); err != nil {
		return nil, err
	}
	return httpcaddyfile.App{
		Name:  "nats_server",
		Value: caddyconfig.JSON(app, nil),
	}, nil
}

// UnmarshalCaddyfile reads the global option:
//
//	nats_server {
//		listen    <host:port>            # default 127.0.0.1:4222
//		store     <dir>                  # default: nats in Caddy's data directory
//		max_store <size>                 # default 256MiB
//		user      <name> <password>      # required unless listen is a loopback address
//		tls       <certificate> <key>
//	}
//
// Each line may be given once.
func (a *App) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // nats_server
	if d.NextArg() {
		return d.Errf("unexpected argument %q after nats_server: want a block, or nothing for the defaults", d.Val())
	}
	seen := make(map[string]bool)
	var listen caddyfile.Dispenser
	for d.NextBlock(0) {
		option := d.Val()
		var want string
		switch option {
		case "listen":
			want = "<host:port>, such as " + defaultListen
		case "store":
			want = "<dir>"
		case "max_store":
			want = "<size>, such as 256MiB"
		case "user":
			want = "<name> <password>"
		case "tls":
			want = "<certificate> <key>"
		default:
			return d.Errf("unknown nats_server option %q: want listen, store, max_store, user or tls", option)
		}
		if seen[option] {
			return d.Errf("nats_server option %s may be given only once", option)
		}
		seen[option] = true

		args := d.RemainingArgs()
		arity := 1
		if option == "user" || option == "tls" {
			arity = 2
		}
		if len(args) != arity {
			// Not what was given: it may be a password.
			return d.Errf("nats_server option %s has %d arguments: want %s %s", option, len(args), option, want)
		}
		for _, arg := range args {
			if arg == "" {
				return d.Errf("nats_server option %s has an empty argument: want %s %s", option, option, want)
			}
		}

		switch option {
		case "listen":
			a.Listen = args[0]
			listen = *d
			if err := checkListen(args[0]); err != nil && !strings.Contains(args[0], "{") {
				return d.Errf("nats_server option listen: %v", err)
			}
		case "store":
			a.Store = args[0]
		case "max_store":
			size, err := humanize.ParseBytes(args[0])
			if err != nil || size == 0 || size > math.MaxInt64 {
				return d.Errf("nats_server option max_store has the value %q: want a size greater than 0, such as 256MiB", args[0])
			}
			a.MaxStore = int64(size)
		case "user":
			a.User = &User{Name: args[0], Password: args[1]}
		case "tls":
			a.TLS = &TLS{Certificate: args[0], Key: args[1]}
		}
		if d.NextBlock(1) {
			return d.Errf("nats_server option %s takes no block, but one starts with %q", option, d.Val())
		}
	}
	if seen["listen"] && !strings.Contains(a.Listen, "{") && a.User == nil && !isLoopback(a.Listen) {
		return listen.WrapErr(needsUser(a.Listen))
	}
	return nil
}

// Interface guard.
var _ caddyfile.Unmarshaler = (*App)(nil)
