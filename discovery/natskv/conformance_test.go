package natskv_test

import (
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// It is not parallel: the suite counts the goroutines of the whole process.
func TestConformance(t *testing.T) {
	discoverytest.Run(t, func(t *testing.T) discoverytest.Harness {
		return harness{natstest.StartProcess(t)}
	})
}

// A harness gives the suite a bucket on a server in a process of its own, whose
// goroutines the suite does not take for ours.
type harness struct{ server *natstest.Process }

func (h harness) Open(t *testing.T) discovery.Registry {
	return open(t, natskv.Config{URLs: []string{h.server.URL()}})
}

func (h harness) Addr() string { return strings.TrimPrefix(h.server.URL(), "nats://") }

func (h harness) OpenVia(t *testing.T, address string) discovery.Registry {
	return open(t, natskv.Config{URLs: []string{"nats://" + address}})
}

func (h harness) Write(t *testing.T, id, record string) {
	t.Helper()
	nc, err := nats.Connect(h.server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	kv, err := js.KeyValue(t.Context(), "catga_nodes")
	if err != nil {
		t.Fatal(err)
	}
	put(t, kv, "node."+id, record)
}

func (h harness) Break(*testing.T) { h.server.Stop() }

func (h harness) Restore(*testing.T) { h.server.Start() }

var _ discoverytest.RemoteHarness = harness{}
