package natslink_test

import (
	"context"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestSilentServer(t *testing.T) {
	t.Parallel()
	address, _ := silent(t)
	_, err := open(t, natslink.Config{URLs: []string{"nats://" + address}}).Get(t.Context())
	wantError(t, err, discovery.ErrUnreachable, address, "does not answer")
}

func TestProbe(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	proxy := natstest.NewProxy(t, s.Addr())
	conn := open(t, natslink.Config{URLs: []string{"nats://" + proxy.Addr()}})
	link := mustGet(t, conn)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := link.Probe(ctx); err != nil {
		t.Errorf("Probe of a live server: %v", err)
	}
	proxy.Freeze()
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	wantError(t, link.Probe(short), discovery.ErrUnreachable, proxy.Addr())
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrUnreachable, "does not answer")
}

// Nobody asks anything, and still a dead connection is noticed.
func TestSilenceIsNoticed(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	proxy := natstest.NewProxy(t, s.Addr())
	link := mustGet(t, open(t, natslink.Config{URLs: []string{"nats://" + proxy.Addr()}}))
	proxy.Freeze()
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrUnreachable, "stopped answering")
}
