package natspubsub_test

import (
	"testing"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/backendtest"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestMain(m *testing.M) {
	if natstest.Child() {
		return
	}
	goleak.VerifyTestMain(m)
}

const (
	patience = backendtest.Patience
	secret   = backendtest.Secret
)

var (
	wantError = backendtest.WantError
	node      = backendtest.Node
	announce  = backendtest.Announce
	withdraw  = backendtest.Withdraw
	record    = backendtest.Record
	watch     = backendtest.Watch
	await     = backendtest.Await
)

// start starts a server without JetStream, which nothing here needs.
func start(t testing.TB, options ...natstest.Option) *natstest.Server {
	t.Helper()
	return natstest.Start(t, append([]natstest.Option{natstest.NoJetStream()}, options...)...)
}

// config names the server, and listens for as long as a test may wait: whatever
// does not wait for that comes earlier for sure.
func config(s *natstest.Server) natspubsub.Config {
	return natspubsub.Config{URLs: []string{s.URL()}, Listen: 2 * patience}
}

func open(t testing.TB, config natspubsub.Config) *natspubsub.Registry {
	t.Helper()
	r, err := natspubsub.Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// publish says something as any member of the fleet may.
func publish(t testing.TB, nc *nats.Conn, subject, data string) {
	t.Helper()
	if err := nc.Publish(subject, []byte(data)); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
}

// listen returns what is said on a subject from now on.
func listen(t testing.TB, nc *nats.Conn, subject string) *nats.Subscription {
	t.Helper()
	s, err := nc.SubscribeSync(subject)
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return s
}

func next(t testing.TB, s *nats.Subscription) *nats.Msg {
	t.Helper()
	m, err := s.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// puts returns the next n records. Whether the listing ends before the last of
// them depends on how busy the machine is.
func puts(t testing.TB, w *backendtest.Watcher, n int) map[string]discovery.Node {
	t.Helper()
	nodes := make(map[string]discovery.Node)
	for range n {
		e := w.Next()
		for e.Type == discovery.Synced {
			e = w.Next()
		}
		if e.Type != discovery.Put {
			t.Fatalf("got %s of %q (%v), want a put", e.Type, e.ID, e.Err)
		}
		nodes[e.ID] = e.Node
	}
	return nodes
}
