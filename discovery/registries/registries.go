// Package registries opens a registry of any kind by its URL, for programs that
// leave the choice to whoever runs them. A program that knows its registry imports
// that backend alone.
package registries

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/caddy-discovery/caddy-discovery/discovery"
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
	switch backend, _ := Backend(url); backend {
	case NATSKV:
		return natskv.Open(natskv.Config{URLs: []string{url}})
	case NATS:
		return natspubsub.Open(natspubsub.Config{URLs: []string{url}})
	case Redis:
		return redis.Open(redis.Config{URLs: []string{url}})
	default:
		return nil, fmt.Errorf("%w registry URL: want one that starts with %s://", discovery.ErrInvalid, strings.Join(Schemes(), "://, "))
	}
}

// The backends, by the names that they have in a configuration.
const (
	NATSKV = "nats_kv"
	NATS   = "nats"
	Redis  = "redis"
)

// backends are those that the schemes of URLs name.
var backends = map[string]string{
	"nats":            NATSKV,
	"tls":             NATSKV,
	natspubsub.Scheme: NATS,
	"redis":           Redis,
	"rediss":          Redis,
	"redis+sentinel":  Redis,
	"rediss+sentinel": Redis,
	"redis+cluster":   Redis,
	"rediss+cluster":  Redis,
}

// Backend returns which backend a URL names by its scheme, in whatever case that is
// written, and whether it names one.
func Backend(url string) (name string, ok bool) {
	scheme, _, found := strings.Cut(url, "://")
	name, ok = backends[strings.ToLower(scheme)]
	return name, found && ok
}

// Schemes returns those of the URLs that name a backend, sorted.
func Schemes() []string { return slices.Sorted(maps.Keys(backends)) }
