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
	k, ok := kindOf(url)
	if !ok {
		return nil, fmt.Errorf("%w registry URL: want one that starts with %s://", discovery.ErrInvalid, strings.Join(Schemes(), "://, "))
	}
	return k.open(url)
}

// The backends, by the names that they have in a configuration.
const (
	NATSKV = "nats_kv"
	NATS   = "nats"
	Redis  = "redis"
)

// kind is a backend that the scheme of a URL names.
type kind struct {
	name string
	open func(url string) (discovery.Registry, error)
}

var kinds = make(map[string]kind) // by scheme

func init() {
	Register(NATSKV, func(url string) (discovery.Registry, error) {
		return natskv.Open(natskv.Config{URLs: []string{url}})
	}, "nats", "tls")
	Register(NATS, func(url string) (discovery.Registry, error) {
		return natspubsub.Open(natspubsub.Config{URLs: []string{url}})
	}, natspubsub.Scheme)
	Register(Redis, func(url string) (discovery.Registry, error) {
		return redis.Open(redis.Config{URLs: []string{url}})
	}, "redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
}

// Register gives URLs to another backend: Open calls open for those with one of the
// schemes, and Caddy takes them for registries of its module
// discovery.registries.<name>. It is called by init functions, and panics if a scheme
// is not lower case or is taken.
func Register(name string, open func(url string) (discovery.Registry, error), schemes ...string) {
	for _, scheme := range schemes {
		if _, taken := kinds[scheme]; taken || scheme != strings.ToLower(scheme) {
			panic(fmt.Sprintf("registering the registry %s: the scheme %q is taken or not lower case", name, scheme))
		}
		kinds[scheme] = kind{name, open}
	}
}

func kindOf(url string) (kind, bool) {
	scheme, _, found := strings.Cut(url, "://")
	k, ok := kinds[strings.ToLower(scheme)]
	return k, found && ok
}

// Backend returns which backend a URL names by its scheme, in whatever case that is
// written, and whether it names one.
func Backend(url string) (name string, ok bool) {
	k, ok := kindOf(url)
	return k.name, ok
}

// Schemes returns those of the URLs that name a backend, sorted.
func Schemes() []string { return slices.Sorted(maps.Keys(kinds)) }
