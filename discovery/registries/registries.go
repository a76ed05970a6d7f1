// Package registries opens a registry of any kind by its URL, for programs that
// leave the choice to whoever runs them. A program that knows its registry imports
// that backend alone.
package registries

import (
	"fmt"
	"strings"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
	"github.com/caddy-discovery/caddy-discovery/discovery/redis"
)

// Open returns the registry that the URL names: nats:// or tls:// for a JetStream
// KV bucket, nats+pubsub:// for NATS subjects, redis://, rediss://,
// redis+sentinel:// or redis+cluster:// for Redis. The path is the bucket, the
// prefix or the database; user info is the login. It does not connect. The error
// wraps [discovery.ErrInvalid] and shows no secret.
func Open(url string) (discovery.Registry, error) {
	scheme, _, _ := strings.Cut(url, "://")
	switch scheme = strings.ToLower(scheme); {
	case scheme == "nats", scheme == "tls":
		return natskv.Open(natskv.Config{Config: natsconn.Config{URLs: []string{url}}})
	case scheme == natspubsub.Scheme:
		return natspubsub.Open(natspubsub.Config{Config: natsconn.Config{URLs: []string{url}}})
	case strings.HasPrefix(scheme, "redis"):
		return redis.Open(redis.Config{URLs: []string{url}})
	default:
		return nil, fmt.Errorf("%w registry URL: want one that starts with nats://, tls://, nats+pubsub://, redis://, rediss://, redis+sentinel:// or redis+cluster://",
			discovery.ErrInvalid)
	}
}
