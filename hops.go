package caddydiscovery

import (
	"context"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"

	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

// maxHops is through how many proxy handlers of Caddy a request may have come, this
// one included. Tiers of proxies in a row are usual; proxies that list each other,
// so that requests go round between them, are not, and nothing else would end that
// but timeouts and headers that grow too large.
const maxHops = 10

// hops returns through how many proxy handlers of Caddy a request has come: each
// adds itself to the header Via (RFC 9110, section 7.6.3), which HTTP/2 and WebSocket
// requests have as well. A client that makes up such entries fails its own request.
func hops(header http.Header) (n int) {
	for _, via := range header["Via"] {
		for hop := range strings.SplitSeq(via, ",") {
			// The protocol comes first, and a comment may follow.
			if _, by, _ := strings.Cut(strings.TrimSpace(hop), " "); by == "Caddy" || strings.HasPrefix(by, "Caddy ") {
				n++
			}
		}
	}
	return n
}

// refuseLoop answers 508 Loop Detected.
func (w *policyWrapper) refuseLoop(r *http.Request, rw http.ResponseWriter, hops int) *reverseproxy.Upstream {
	w.loops.Do(func() {
		w.logger.Warn("refusing requests that have come through too many proxy handlers of Caddy by their header Via: "+
			"proxies that list each other as nodes, or a header that a client made up; said once a minute",
			zap.Int("handlers", hops), zap.Int("most", maxHops), zap.String("host", r.Host), zap.String("remote_addr", r.RemoteAddr))
	})
	return w.refuse(r, rw, http.StatusLoopDetected)
}

// refuse answers with a status, and returns an upstream by which the handler
// leaves it at that. A client can make up the header, so that nothing may come of it
// that lasts or is done again: the handler counts each failure of an upstream for as
// long as fail_duration, and tries again what lb_retry_match names. Of a request that
// has been canceled it does neither. The request is the handler's own copy, and the
// upstream nobody's.
//
// Only of Caddy's HTTP transport, and of ours before any other, is it known that it returns
// that a request has been canceled before it dials. With another one the handler gets an address that it
// cannot parse, of which it makes a 502 by itself.
func (w *policyWrapper) refuse(r *http.Request, rw http.ResponseWriter, status int) *reverseproxy.Upstream {
	switch w.handler.Transport.(type) {
	case *reverseproxy.HTTPTransport, *traffic.Transport:
	default:
		return &reverseproxy.Upstream{Dial: "loop:detected", Host: new(reverseproxy.Host)}
	}
	// With a body, because writers such as that of encode keep the status until there
	// is one, and the handler sets another one for those who cancel a request.
	http.Error(rw, http.StatusText(status), status)
	ctx, cancel := context.WithCancel(r.Context())
	cancel()
	*r = *r.WithContext(ctx)
	return &reverseproxy.Upstream{Dial: "127.0.0.1:9", Host: new(reverseproxy.Host)}
}

// warnOfLoops says that requests which go round cannot be noticed.
func (u *Upstreams) warnOfLoops() {
	h := u.handler.Headers
	if h == nil || h.Request == nil {
		return
	}
	_, set := h.Request.Set["Via"]
	for _, name := range h.Request.Delete {
		set = set || strings.EqualFold(name, "Via") || name == "*"
	}
	if set {
		u.logger.Warn("header_up takes the header Via away, by which requests that go round between proxies are noticed",
			zap.String("service", u.Service))
	}
}
