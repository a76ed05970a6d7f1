package natskv_test

import (
	"testing"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/discovery/internal/backendtest"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
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
	record    = backendtest.Record
	watch     = backendtest.Watch
)

func open(t testing.TB, config natskv.Config) *natskv.Registry {
	t.Helper()
	r, err := natskv.Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func put(t *testing.T, kv jetstream.KeyValue, key, value string) uint64 {
	t.Helper()
	revision, err := kv.PutString(t.Context(), key, value)
	if err != nil {
		t.Fatal(err)
	}
	return revision
}
