package embedded

import (
	"strings"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"

	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
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
	var (
		user User
		cert TLS
	)
	return caddyblock.Block{
		What: "nats_server",
		Options: caddyblock.Options{
			"listen":    caddyblock.Text("<host:port>, such as "+defaultListen, &a.Listen),
			"store":     caddyblock.Text("<dir>", &a.Store),
			"max_store": caddyblock.Size(&a.MaxStore),
			"user":      section(&a.User, &user, caddyblock.Texts("<name> <password>", &user.Name, &user.Password)),
			"tls":       section(&a.TLS, &cert, caddyblock.Texts("<certificate> <key>", &cert.Certificate, &cert.Key)),
		},
		Check: func() error {
			if a.Listen == "" || strings.Contains(a.Listen, "{") {
				return nil // what a placeholder comes to is checked by Provision
			}
			_, _, err := a.parseListen(a.Listen)
			return err
		},
	}.Parse(d)
}

// section is an option that fills a part of the configuration, and puts it in its place
// if it is given.
func section[T any](to **T, part *T, option caddyblock.Option) caddyblock.Option {
	set := option.Set
	option.Set = func(args []string) error {
		*to = part
		return set(args)
	}
	return option
}
