// Package caddydiscovery is a Caddy plugin that proxies to whatever a fleet's
// registry lists as alive now, and lists the proxy itself there.
package caddydiscovery

import (
	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/backend"
)

func init() {
	caddy.RegisterModule(new(Upstreams))
	caddy.RegisterModule(new(LeastLoad))
	caddy.RegisterModule(Registrar{})
	caddy.RegisterModule(backend.NATSKV{})
	caddy.RegisterModule(backend.NATS{})
	caddy.RegisterModule(backend.Redis{})
	caddy.RegisterModule(Admin{})
	caddy.RegisterModule(new(StatusPage))
}
