package discovery_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// TestProbeDials holds the default probe against real sockets: what accepts a
// connection and closes it at once accepts for somebody else, who is not there.
func TestProbeDials(t *testing.T) {
	serve := func(with func(net.Conn)) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var serving sync.WaitGroup
		serving.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				t.Cleanup(func() { conn.Close() })
				with(conn)
			}
		})
		t.Cleanup(func() { l.Close(); serving.Wait() })
		return l.Addr().String()
	}
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()

	addresses := []struct{ id, address string }{
		{"waits", serve(func(net.Conn) {})},
		{"speaks", serve(func(conn net.Conn) { _, _ = conn.Write([]byte("220 hello\r\n")); conn.Close() })},
		{"closes", serve(func(conn net.Conn) { conn.Close() })},
		{"resets", serve(func(conn net.Conn) { _ = conn.(*net.TCPConn).SetLinger(0); conn.Close() })},
		{"refuses", gone.Addr().String()},
		// Nobody is there, and a machine without IPv6 cannot even send.
		{"unreachable", "[2001:db8::1]:80"},
	}
	w := newScripted()
	d := discovery.NewDirectory(w, discovery.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	s := <-w.streams
	for _, a := range addresses {
		node := newNode(a.id)
		if node.Endpoint, err = discovery.ParseEndpoint(a.address); err != nil {
			t.Fatal(err)
		}
		s.put("", 0, node)
	}
	s.sync(discovery.Listing{})
	for _, a := range addresses {
		s.emit(discovery.Event{Type: discovery.Expired, ID: a.id})
	}
	for deadline := time.Now().Add(20 * time.Second); states(d) != "speaks:held waits:held"; {
		if time.Now().After(deadline) {
			t.Fatalf("the nodes are [%s]", states(d))
		}
		select {
		case <-d.Snapshot().Superseded():
		case <-time.After(10 * time.Millisecond):
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
