package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// A broadcast is a fleet on core NATS: it joins, heartbeats and leaves as .NET
// nodes do, and answers a query as ours do, since nothing is kept for those who
// come late.
type broadcast struct {
	t      *testing.T
	server *natstest.Server

	mu     sync.Mutex
	conn   *nats.Conn
	fleet  map[string]string // what this test announces, by id
	others map[string]string // what was heard of others
}

const prefix = "catga.nodes"

func newBroadcast(t *testing.T) registry {
	b := &broadcast{t: t, server: natstest.Start(t, natstest.NoJetStream()), fleet: make(map[string]string), others: make(map[string]string)}
	b.connect()
	return b
}

// connect listens to what is said, and answers for the fleet.
func (b *broadcast) connect() {
	b.t.Helper()
	b.conn = b.server.Conn()
	must := func(_ *nats.Subscription, err error) {
		b.t.Helper()
		if err != nil {
			b.t.Fatal(err)
		}
	}
	must(b.conn.Subscribe(prefix+".query", func(m *nats.Msg) {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, record := range b.fleet {
			_ = m.Respond([]byte(record))
		}
	}))
	hear := func(m *nats.Msg) {
		if n, err := discovery.ParseNode(m.Data); err == nil {
			b.mu.Lock()
			b.others[n.ID] = string(m.Data)
			b.mu.Unlock()
		}
	}
	must(b.conn.Subscribe(prefix+".join", hear))
	must(b.conn.Subscribe(prefix+".heartbeat", hear))
	must(b.conn.Subscribe(prefix+".leave", func(m *nats.Msg) {
		var leave struct{ NodeID string }
		if json.Unmarshal(m.Data, &leave) == nil {
			b.mu.Lock()
			delete(b.others, leave.NodeID)
			delete(b.fleet, leave.NodeID) // somebody said goodbye for it
			b.mu.Unlock()
		}
	}))
	if err := b.conn.Flush(); err != nil {
		b.t.Fatal(err)
	}
}

func (b *broadcast) block(options string) string {
	return "registry nats " + b.server.URL() + " {\n" + options + "\n}"
}

func (b *broadcast) flags() []string {
	return []string{"--registry", strings.Replace(b.server.URL(), "nats://", "nats+pubsub://", 1)}
}

func (b *broadcast) say(subject, message string) {
	b.t.Helper()
	if err := b.conn.Publish(prefix+"."+subject, []byte(message)); err != nil {
		b.t.Fatal(err)
	}
}

// put joins when the record is new or another one. Otherwise it heartbeats, as
// both kinds of writers do.
func (b *broadcast) put(id, record string) {
	b.t.Helper()
	b.mu.Lock()
	known := b.fleet[id] == record
	b.fleet[id] = record
	b.mu.Unlock()
	if known {
		b.say("heartbeat", fmt.Sprintf(`{"nodeId":%q,"load":0.42,"timestamp":"2025-10-10T12:00:10.7654321Z"}`, id))
		b.say("heartbeat", record)
		return
	}
	b.say("join", record)
}

func (b *broadcast) remove(id string) {
	b.t.Helper()
	b.mu.Lock()
	delete(b.fleet, id)
	b.mu.Unlock()
	b.say("leave", fmt.Sprintf(`{"NodeId":%q}`, id))
}

func (b *broadcast) record(id string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if record, ok := b.fleet[id]; ok {
		return record
	}
	return b.others[id]
}

func (b *broadcast) clients() int { return b.server.NumClients() - 1 }

func (b *broadcast) persistent() bool { return false }

func (b *broadcast) maxClients() int { return 1 }

func (b *broadcast) accepted() uint64 {
	b.t.Helper()
	v, err := b.server.Server().Varz(nil)
	if err != nil {
		b.t.Fatal(err)
	}
	return v.TotalConnections
}

func (b *broadcast) stop() { b.server.Stop() }

func (b *broadcast) restart() {
	b.server.Restart()
	if !strings.HasPrefix(b.conn.Status().String(), "CONNECTED") {
		eventually(b.t, "the fleet is connected again", b.conn.IsConnected)
	}
}
