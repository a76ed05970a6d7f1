package caddydiscovery

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
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

// refuseLoop has the handler answer 508 Loop Detected. Policies and sources cannot
// say with which status a request fails, but the cause of a context that has ended is
// what the transport returns before it dials, and Caddy takes over the status of that.
// The request is the handler's own copy. The upstream is nobody's.
func refuseLoop(r *http.Request, hops int) *reverseproxy.Upstream {
	ctx, cancel := context.WithCancelCause(r.Context())
	cancel(caddyhttp.Error(http.StatusLoopDetected, fmt.Errorf(
		"the request has come through %d proxy handlers of Caddy by its header Via, more than %d: "+
			"proxies that list each other as nodes, or a header that the client made up", hops, maxHops)))
	*r = *r.WithContext(ctx)
	r.Method = "LOOP" // so that it is not tried again as a GET would be
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
