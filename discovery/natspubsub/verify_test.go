package natspubsub_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func TestVerify(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken, "there is none")
	w := watch(t, r)
	w.Listing()
	if err := r.Verify(t.Context()); err != nil {
		t.Errorf("of an empty fleet: %v", err)
	}

	// Nobody takes the event, so it is not emitted yet.
	announce(t, open(t, config(s)), node(t, "a"))
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken, "not got")
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := r.Verify(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a short context: %v", err)
	}
	result := make(chan error)
	go func() { result <- r.Verify(t.Context()) }()
	w.Want(discovery.Put, "a")
	if err := <-result; err != nil {
		t.Errorf("once it was emitted: %v", err)
	}

	s.Stop()
	if err := r.Verify(t.Context()); err == nil {
		t.Error("a stopped server verifies")
	}
	wantError(t, w.Broken(), discovery.ErrBroken)
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken, "there is none")
}
