package integration

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// A faultyRegistry is a registry that can be hurt. Its errors are the writers' to live
// with: a fleet goes on trying.
type faultyRegistry interface {
	// addresses are where its servers listen; block names the registry for Caddy,
	// at an address of a link to it, if it has but one server.
	addresses() []string
	block(address string) string
	// put and remove are what the nodes of a fleet do.
	put(id, record string) error
	remove(id string) error
	// list returns the ids of the records that stand there.
	list() ([]string, error)
}

// A faultyServer is a faultyRegistry of one server, which can be hurt in every way.
type faultyServer interface {
	faultyRegistry
	// wipe empties the registry and makes it another one.
	wipe() error
	kill()
	restart()
	pause()
	resume()
	// lockOut locks Caddy out, and denyAll takes from it every right but that to
	// connect; allow ends both.
	lockOut()
	denyAll()
	allow()
}

// A kind is a kind of registry, and how it comes to its test.
type kind struct {
	name  string
	start func(t *testing.T) faultyRegistry
	rare  bool // only make reliability has it: many servers, and little new
}

func rarely(k kind) kind {
	k.rare = true
	return k
}

var (
	kvKind        = kind{name: "nats_kv", start: func(t *testing.T) faultyRegistry { return startKV(t, fleetBucket) }}
	broadcastKind = kind{name: "nats", start: func(t *testing.T) faultyRegistry { return startBroadcast(t) }}
	setKind       = redisKind("sorted_set")
	keysKind      = redisKind("keys")

	leanKind = kind{name: "nats (.NET)", start: func(t *testing.T) faultyRegistry {
		r := startBroadcast(t)
		r.lean = true
		return r
	}}

	kvClusterKind        = kind{name: "nats_kv", start: func(t *testing.T) faultyRegistry { return startKVCluster(t) }}
	broadcastClusterKind = kind{name: "nats", start: func(t *testing.T) faultyRegistry { return startBroadcastCluster(t) }}

	// What these keep, they forget when they are restarted.
	forgetful = []kind{
		{name: "nats_kv", start: func(t *testing.T) faultyRegistry {
			config := fleetBucket
			config.Storage = jetstream.MemoryStorage
			return startKV(t, config)
		}},
		redisKind("sorted_set", redistest.Config("appendonly", "no")),
		redisKind("keys", redistest.Config("appendonly", "no")),
	}
	// These have an old state, in which one of the nodes was somewhere else.
	withOldState = []kind{
		{name: "nats_kv", start: func(t *testing.T) faultyRegistry {
			return startKV(t, keeping(time.Hour)).saveOldState(t) // the old state has not expired
		}},
		{name: setKind.name, start: func(t *testing.T) faultyRegistry { return setKind.start(t).(*faultyRedis).saveOldState() }},
		{name: keysKind.name, start: func(t *testing.T) faultyRegistry { return keysKind.start(t).(*faultyRedis).saveOldState() }},
	}
	withClock = []kind{redisKind("sorted_set", redistest.Clock()), redisKind("keys", redistest.Clock())}
)

// The users of a server that asks who comes: the fleet, and Caddy.
const (
	fleetUser = "fleet"
	edgeUser  = "edge"
	secret    = "s3cret"
)

func shortContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 2*time.Second)
}

// writeOldState writes where a node once was: nobody is there now.
func writeOldState(t *testing.T, r faultyRegistry) {
	t.Helper()
	old := camel("orders-3", "http://127.0.0.1:1", `"service":"orders","lease":"`+lease.String()+`"`)
	eventually(t, "the old state is written", func() bool { return r.put("orders-3", old) == nil })
}
