package caddydiscovery

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// TestHostOfTheEndpoint has nodes that serve by the host name that their record names.
func TestHostOfTheEndpoint(t *testing.T) {
	host := func(t *testing.T) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Host) }))
		t.Cleanup(s.Close)
		_, port, _ := net.SplitHostPort(s.Listener.Addr().String())
		return port
	}
	registry, m := newMemory(t)
	port, node, static := freeport.String(t), host(t), host(t)
	list(t, m, "a", "http://localhost:"+node)
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy 127.0.0.1:`+static+` {
			dynamic discovery {
				registry memory `+registry+` {
					address 127.0.0.1:4222
					loss_guard off
				}
			}
			header_up Host {http.reverse_proxy.upstream.node.hostport}
			header_down X-Node "{rp.upstream.node.host} {rp.upstream.node.port}"
			header_down X-Dialled {rp.upstream.hostport}
		}
	}`)
	url := "http://127.0.0.1:" + port
	eventually(t, "the node serves", func() bool { _, body := get(t, url); return body == "localhost:"+node })
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if got := resp.Header.Get("X-Node"); got != "localhost "+node {
		t.Errorf("host and port %q", got)
	}
	if got := resp.Header.Get("X-Dialled"); got != "127.0.0.1:"+node {
		t.Errorf("it is dialled at %q, want the address that was checked", got)
	}
	m.Expire("a")
	eventually(t, "the static upstream serves by its own", func() bool { _, body := get(t, url); return body == "127.0.0.1:"+static })
}

// TestRetryAtAnotherAddress holds that a request which comes back goes to another
// address of the node, where its host name has one and no other node is left.
func TestRetryAtAnotherAddress(t *testing.T) {
	m := discoverytest.NewMemory()
	m.Put("a", []byte(`{"nodeId":"a","endpoint":"http://orders:80"}`))
	d := discovery.NewDirectory(m.Open(), discovery.Options{
		Lookup: func(context.Context, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}, nil
		},
		Probe: func(context.Context, string) error { return errors.New("connection refused") },
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- d.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	<-d.Synced()
	eventually(t, "the name is resolved", func() bool { return d.Snapshot().Node("a").Address() != "" })

	registry, memory := newMemory(t)
	list(t, memory, "b", "http://10.0.0.3:80")
	u := source(t, "registry memory "+registry)
	var tried picker.AddressSet
	for _, want := range []string{"10.0.0.1:80", "10.0.0.2:80", "10.0.0.1:80"} {
		upstreams := u.upstreams([]*discovery.Entry{d.Snapshot().Node("a")}, &tried, new(lookup))
		if len(upstreams) != 1 || upstreams[0].Dial != want {
			t.Fatalf("after %v: %v, want %s", tried, upstreams, want)
		}
		tried.Add(upstreams[0].Dial)
	}
}
