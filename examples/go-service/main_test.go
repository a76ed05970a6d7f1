package main

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/registries"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestRun follows the service through its life, as a proxy does, on every kind of
// registry.
func TestRun(t *testing.T) {
	server := natstest.Start(t)
	for name, url := range map[string]string{
		"nats_kv": server.URL(),
		"nats":    strings.Replace(server.URL(), "nats://", "nats+pubsub://", 1),
		"redis":   redistest.Start(t).URL(),
	} {
		t.Run(name, func(t *testing.T) { follow(t, url) })
	}
}

func follow(t *testing.T, url string) {
	registry, err := registries.Open(url)
	if err != nil {
		t.Fatal(err)
	}
	defer registry.Close()
	directory := discovery.NewDirectory(registry, discovery.Options{})
	watching, stopWatching := context.WithCancel(context.Background())
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		_ = directory.Run(watching)
	}()
	defer func() { stopWatching(); <-watched }()
	until := func(what string, ok func(*discovery.Entry) bool) *discovery.Entry {
		t.Helper()
		deadline := time.After(30 * time.Second)
		for {
			snapshot := directory.Snapshot()
			if e := snapshot.Node("orders-1"); ok(e) {
				return e
			}
			select {
			case <-snapshot.Superseded():
			case <-deadline:
				t.Fatalf("waited in vain until the service %s", what)
			}
		}
	}

	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, url, "127.0.0.1:0", "orders-1", "orders", time.Second) }()
	e := until("is listed", func(e *discovery.Entry) bool { return e != nil && e.Serves() })
	if e.Node.Service() != "orders" {
		t.Errorf("service %q, want orders", e.Node.Service())
	}
	answer := func() string {
		t.Helper()
		resp, err := http.Get(e.Node.Endpoint.String())
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	if got := answer(); got != "hello from orders-1\n" {
		t.Errorf("answered %q", got)
	}
	stop()
	until("drains", func(e *discovery.Entry) bool { return e != nil && e.State() == discovery.StateDraining })
	answer() // it still does
	until("is gone", func(e *discovery.Entry) bool { return e == nil })
	if err := <-done; err != nil {
		t.Errorf("run returned %v", err)
	}
	http.DefaultClient.CloseIdleConnections()
}
