package integration

import (
	"context"
	"errors"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// A registry is a real server, written to as a fleet in the wild would.
type registry interface {
	// block is the Caddyfile line that names it; more options may go into its
	// block.
	block(options string) string
	// flags are those of caddy discovery that name it.
	flags() []string
	// persistent tells whether the server keeps what was written.
	persistent() bool
	// put writes a record, as a join and as a heartbeat.
	put(id, record string)
	// remove deletes a record as a node that says goodbye does.
	remove(id string)
	// record returns what stands there for a node, "" if nothing does.
	record(id string) string
	// clients counts the connections on the server, less the test's own, of
	// which one process and registry may have no more than maxClients.
	clients() int
	maxClients() int
	// accepted counts the connections that the server ever took.
	accepted() uint64
	// stop takes the server away, and restart brings it back with its data, at
	// the same address.
	stop()
	restart()
}

// registries are the kinds of registry that every scenario runs on.
var registries = []struct {
	name  string
	start func(t *testing.T) registry
}{
	{"nats_kv", newKV},
	{"nats", newBroadcast},
	{"redis_sorted_set", newSortedSet},
	{"redis_keys", newKeys},
}

// onEach runs a scenario on every kind of registry.
func onEach(t *testing.T, scenario func(t *testing.T, r registry)) {
	for _, kind := range registries {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			scenario(t, kind.start(t))
		})
	}
}

type kv struct {
	t      *testing.T
	server *natstest.Server
	bucket jetstream.KeyValue
}

func newKV(t *testing.T) registry {
	server := natstest.Start(t)
	// The bucket as the Catga fleet makes it.
	bucket := server.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 10, Storage: jetstream.FileStorage})
	return &kv{t, server, bucket}
}

func (k *kv) block(options string) string {
	return "registry nats_kv " + k.server.URL() + " {\n" + options + "\n}"
}

func (k *kv) flags() []string { return []string{"--registry", k.server.URL()} }

func (k *kv) put(id, record string) {
	k.t.Helper()
	if _, err := k.bucket.PutString(context.Background(), "node."+id, record); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kv) remove(id string) {
	k.t.Helper()
	if err := k.bucket.Delete(context.Background(), "node."+id); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kv) record(id string) string {
	k.t.Helper()
	entry, err := k.bucket.Get(context.Background(), "node."+id)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return ""
	}
	if err != nil {
		k.t.Fatal(err)
	}
	return string(entry.Value())
}

func (k *kv) clients() int { return k.server.NumClients() - 1 }

func (k *kv) persistent() bool { return true }

func (k *kv) maxClients() int { return 1 }

func (k *kv) accepted() uint64 {
	k.t.Helper()
	v, err := k.server.Server().Varz(nil)
	if err != nil {
		k.t.Fatal(err)
	}
	return v.TotalConnections
}

func (k *kv) stop()    { k.server.Stop() }
func (k *kv) restart() { k.server.Restart() }
