package natskv_test

import (
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/backendtest"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestVerify(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken, "there is none")
	w := watch(t, r)
	w.Listing()
	backendtest.WantVerified(t, r, w, r)

	s.Stop()
	if err := r.Verify(t.Context()); err == nil {
		t.Error("a stopped server verifies")
	}
	wantError(t, w.Broken(), discovery.ErrBroken)
}

// A bucket may hold more than the watch is about.
func TestVerifyStreamWithOtherSubjects(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	js := s.JetStream()
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: "KV_catga_nodes", Subjects: []string{"$KV.catga_nodes.>", "other.>"}, MaxMsgsPerSubject: 1,
	}); err != nil {
		t.Fatal(err)
	}
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, r)
	w.Listing()
	if _, err := js.Publish(t.Context(), "other.x", nil); err != nil {
		t.Fatal(err)
	}
	if err := r.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	announce(t, r, node(t, "a"))
	w.Want(discovery.Put, "a")
}
