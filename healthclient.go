package caddydiscovery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

// healthClient reaches nodes for health checks as the requests of a handler reach
// them: with its TLS settings, its local address and its versions of HTTP. Its
// connections are its own, so that no check waits until a node that is busy, and
// healthy, has one left for it.
type healthClient struct {
	http http.RoundTripper
	dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// checkIdle bounds the connections that are kept from one check to the next. In a
// larger fleet each check makes another one.
const checkIdle = 1024

// newHealthClient returns the client of a handler that is provisioned.
func newHealthClient(handler *reverseproxy.Handler) *healthClient {
	own := func(shared *http.Transport) *healthClient {
		t := shared.Clone()
		t.MaxConnsPerHost = 0
		t.MaxIdleConns, t.MaxIdleConnsPerHost = checkIdle, 1
		if _, ok := shared.TLSNextProto["h2"]; ok {
			// What is there leads to the connections of the other transport.
			t.TLSNextProto, t.ForceAttemptHTTP2 = nil, true
		}
		return &healthClient{http: t, dial: t.DialContext}
	}
	transport := traffic.Real(handler.Transport)
	switch t := transport.(type) {
	case *reverseproxy.HTTPTransport:
		if !slices.Contains(t.Versions, "3") {
			return own(t.Transport)
		}
		// It knows no limit of connections.
		return &healthClient{http: t, dial: t.Transport.DialContext}
	case reverseproxy.TLSTransport:
		if t.TLSEnabled() {
			return &healthClient{http: transport, dial: new(net.Dialer).DialContext}
		}
	}
	return own(http.DefaultTransport.(*http.Transport))
}

// Close lets go of idle connections, where they are its own.
func (c *healthClient) Close() {
	if own, ok := c.http.(*http.Transport); ok {
		own.CloseIdleConnections()
	}
}

// Dial opens a connection to host:port.
func (c *healthClient) Dial(ctx context.Context, address string) (net.Conn, error) {
	return c.dial(withCheck(ctx, nil, address), "tcp", address)
}

// Do returns a node's answer to a request.
func (c *healthClient) Do(req *http.Request, node *discovery.Entry) (*http.Response, error) {
	return c.http.RoundTrip(req.WithContext(withCheck(req.Context(), node, req.URL.Host)))
}

// withCheck puts into the context what Caddy's transports expect to find in that of a
// request: among it the placeholders of the upstream, of which the name for TLS may
// be made.
func withCheck(ctx context.Context, node *discovery.Entry, address string) context.Context {
	ctx = context.WithValue(ctx, caddy.ReplacerCtxKey, upstreamReplacer(node, address))
	return context.WithValue(ctx, caddyhttp.VarsCtxKey, map[string]any{
		"reverse_proxy.proxy_protocol_info": reverseproxy.ProxyProtocolInfo{AddrPort: netip.MustParseAddrPort("127.0.0.1:1")},
	})
}

// upstreamReplacer knows the placeholders that depend on the node alone.
func upstreamReplacer(node *discovery.Entry, address string) *caddy.Replacer {
	repl := caddy.NewReplacer()
	if host, port, err := net.SplitHostPort(address); err == nil {
		repl.Set("http.reverse_proxy.upstream.address", caddy.JoinNetworkAddress("tcp", host, port))
		repl.Set("http.reverse_proxy.upstream.hostport", address)
		repl.Set("http.reverse_proxy.upstream.host", host)
		repl.Set("http.reverse_proxy.upstream.port", port)
	}
	repl.Map(func(name string) (any, bool) { return nodeValue(node, name) })
	return repl
}

// checkTransport refuses checks that the handler's transport cannot make as it makes
// requests.
func (h *Health) checkTransport(transport http.RoundTripper) error {
	if h.TCP {
		return nil
	}
	if m, ok := transport.(caddy.Module); ok && m.CaddyModule().ID == "http.reverse_proxy.transport.fastcgi" {
		return errors.New("health: the handler speaks FastCGI to its nodes, and checks speak HTTP, so that every node would be found ill; want 'health { tcp }', which checks whether they accept connections")
	}
	t, ok := transport.(*reverseproxy.HTTPTransport)
	if !ok || t.TLS == nil || !strings.Contains(t.TLS.ServerName, "{") {
		return nil
	}
	if _, err := upstreamReplacer(nil, "127.0.0.1:80").ReplaceOrErr(t.TLS.ServerName, false, true); err != nil {
		return fmt.Errorf("health: tls_server_name %q depends on the request, and a check has none: %w; "+
			"want a fixed name, or placeholders of the node such as {http.reverse_proxy.upstream.host} or {http.reverse_proxy.upstream.node.metadata.name}; "+
			"or 'health { tcp }', which checks whether nodes accept connections", t.TLS.ServerName, err)
	}
	return nil
}
