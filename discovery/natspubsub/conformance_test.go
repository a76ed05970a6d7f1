package natspubsub_test

import (
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// It is not parallel: the suite counts the goroutines of the whole process.
func TestConformance(t *testing.T) {
	discoverytest.Run(t, func(t *testing.T) discoverytest.Harness {
		return harness{natstest.StartProcess(t)}
	})
}

// A harness gives the suite the default prefix on a server in a process of its
// own, whose goroutines the suite does not take for ours.
type harness struct{ server *natstest.Process }

func (h harness) Open(t *testing.T) discovery.Registry {
	return open(t, natspubsub.Config{URLs: []string{h.server.URL()}, Listen: 2 * patience})
}

func (h harness) Addr() string { return strings.TrimPrefix(h.server.URL(), "nats://") }

func (h harness) OpenVia(t *testing.T, address string) discovery.Registry {
	return open(t, natspubsub.Config{URLs: []string{"nats://" + address}, Listen: 2 * patience})
}

func (h harness) Write(t *testing.T, _, record string) {
	t.Helper()
	nc, err := nats.Connect(h.server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	publish(t, nc, "catga.nodes.heartbeat", record)
}

func (h harness) Break(*testing.T) { h.server.Stop() }

func (h harness) Restore(*testing.T) { h.server.Start() }

func (harness) Ephemeral() {}

var (
	_ discoverytest.EphemeralHarness = harness{}
	_ discoverytest.RemoteHarness    = harness{}
)
