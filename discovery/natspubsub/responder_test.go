package natspubsub

import (
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// A call that still has a connection which is lost does not make the next one answer
// twice.
func TestLostConnectionIsNotServed(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.NoJetStream())
	r, err := Open(Config{URLs: []string{s.URL()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	endpoint, err := discovery.ParseEndpoint("http://10.0.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Announce(t.Context(), discovery.Node{ID: "a", Endpoint: endpoint}); err != nil {
		t.Fatal(err)
	}
	lost, err := r.connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	lost.Close()
	link, err := r.connect(t.Context())
	if err != nil || link == lost {
		t.Fatalf("connected again: %v, %v", link, err)
	}
	before := link.NumSubscriptions()
	_ = r.responder.serve(lost)
	if _, err := r.connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if now := link.NumSubscriptions(); now != before {
		t.Errorf("%d subscriptions, want %d", now, before)
	}
}
