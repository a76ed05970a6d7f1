package natslink_test

import (
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/discovery/internal/backendtest"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	patience = backendtest.Patience
	secret   = backendtest.Secret
)

var wantError = backendtest.WantError

func open(t *testing.T, config natslink.Config) *natslink.Conn {
	t.Helper()
	conn, err := natslink.New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func mustGet(t *testing.T, conn *natslink.Conn) *natslink.Link {
	t.Helper()
	link, err := conn.Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := link.Flush(); err != nil {
		t.Fatal(err)
	}
	return link
}

func await(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s has not happened after %v", what, patience)
	}
}

// silent returns the address of a server that accepts and says nothing.
func silent(t *testing.T) (address string, accepted <-chan struct{}) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	calls := make(chan struct{}, 10)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			calls <- struct{}{}
		}
	}()
	t.Cleanup(func() { listener.Close(); <-done })
	return listener.Addr().String(), calls
}
