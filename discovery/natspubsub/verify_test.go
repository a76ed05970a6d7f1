package natspubsub_test

import (
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/backendtest"
)

func TestVerify(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken, "there is none")
	w := watch(t, r)
	w.Listing()
	backendtest.WantVerified(t, r, w, open(t, config(s)))

	s.Stop()
	if err := r.Verify(t.Context()); err == nil {
		t.Error("a stopped server verifies")
	}
	wantError(t, w.Broken(), discovery.ErrBroken)
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken, "there is none")
}
