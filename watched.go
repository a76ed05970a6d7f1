package caddydiscovery

import (
	"context"
	"fmt"
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

// observers are those of a source, in the order in which they are told.
type observers []traffic.Observer

// observe has the observer told what becomes of the attempts that go to nodes of this
// source. It is called from Provision, once the handler is known, and for nobody who
// watches nothing: it puts a transport that watches before that of the handler, and has
// it noted which node each attempt goes to.
func (u *Upstreams) observe(ctx caddy.Context, o traffic.Observer) error {
	u.observers = append(u.observers, o)
	w := wrapPolicy(u.handler, u.logger)
	u.wrapper, w.tracks, w.watches = w, true, true
	return watchTransport(ctx, u.handler)
}

// watchTransport puts a transport that watches before that of a handler. Caddy makes its
// default only after the sources are provisioned, so that the same one is made here if
// the configuration names none; as a module it is cleaned up with the config.
func watchTransport(ctx caddy.Context, handler *reverseproxy.Handler) error {
	if _, ok := handler.Transport.(*traffic.Transport); ok {
		return nil // for another observer
	}
	if handler.Transport == nil {
		made, err := ctx.LoadModuleByID("http.reverse_proxy.transport.http", nil)
		if err != nil {
			return fmt.Errorf("making Caddy's default transport: %w", err)
		}
		handler.Transport = made.(http.RoundTripper)
	}
	handler.Transport = &traffic.Transport{Next: handler.Transport, Of: exchangeOf}
	return nil
}

// watched are the attempts of a request of which somebody wants to know what becomes.
type watched struct {
	attempts

	sent     int // how many attempts there were
	upstream *reverseproxy.Upstream
	next     *traffic.Exchange // of the attempt that goes there; nil if it goes to no node
	first    traffic.Exchange  // for the usual case, to save an allocation

	// For sessions: what the request was before header_up of an attempt, and what becomes
	// of its session if the attempt under way is answered.
	header    http.Header
	sessions  []*session // of the sources, for the present attempt
	inline    [1]*session
	placement placement
	response  http.ResponseWriter
}

func newWatched(r *http.Request) *attempts {
	w := &watched{header: r.Header}
	w.sessions = w.inline[:0]
	w.watched = w
	return &w.attempts
}

// selected notes where the next attempt goes: to a node that a source with these observers
// returned, or elsewhere if it is nil.
func (w *watched) selected(up *reverseproxy.Upstream, node *discovery.Entry, o *observers) {
	w.upstream, w.next = up, nil
	if node != nil && len(*o) > 0 {
		w.next = &w.first
		if w.sent > 0 {
			// A transport may still be sending the body of an earlier attempt.
			w.next = new(traffic.Exchange)
		}
		w.next.Prepare(node, w.sent, *o)
	}
	w.sent++
}

// exchangeOf returns the exchange that a request begins which a handler gives to its
// transport, nil if it goes to no node that is watched. The handler does so after it has
// called the policy, in the same goroutine. By the upstream it is known that no other
// handler has chosen since, and that it is no health check of Caddy's.
func exchangeOf(r *http.Request) *traffic.Exchange {
	a := watchedIn(r.Context())
	if a == nil || a.next == nil {
		return nil
	}
	if to, ok := reverseproxy.GetDialInfo(r.Context()); !ok || to.Upstream != a.upstream {
		return nil
	}
	x := a.next
	a.next = nil
	return x
}

// watchedIn returns the attempts of the request with the context at the handler that has
// it now, nil if they are not watched.
func watchedIn(ctx context.Context) *watched {
	vars, _ := ctx.Value(caddyhttp.VarsCtxKey).(map[string]any)
	if a, ok := vars[attemptsKey].(*attempts); ok {
		return a.watched
	}
	return nil
}
