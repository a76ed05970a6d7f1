// Package caddydiscovery is a Caddy plugin that proxies to whatever a fleet's
// registry lists as alive now, and lists the proxy itself there.
package caddydiscovery

import (
	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/internal/cli"
)

func init() {
	caddy.RegisterModule(new(Upstreams))
	caddy.RegisterModule(new(LeastLoad))
	caddy.RegisterModule(new(LeastLatency))
	caddy.RegisterModule(Registries{})
	caddy.RegisterModule(new(Discovered))
	caddy.RegisterModule(Registrar{})
	caddy.RegisterModule(backend.NATSKV{})
	caddy.RegisterModule(backend.NATS{})
	caddy.RegisterModule(backend.Redis{})
	caddy.RegisterModule(backend.Named{})
	caddy.RegisterModule(Admin{})
	caddy.RegisterModule(new(StatusPage))
	caddy.RegisterModule(new(Permission))
	caddycmd.RegisterCommand(cli.Command(processLogger("registrar")))
}
