package traffic

import (
	"fmt"
	"net/http"
	"net/url"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// Transport sends requests by another transport, and watches those that are exchanges.
//
// Caddy asks a transport for what it can do beyond sending by whether it has certain
// methods. This one has all of them, and where the other one lacks it answers as Caddy
// takes it where there is none.
type Transport struct {
	// Next is the handler's own transport.
	Next http.RoundTripper
	// Of returns the exchange that a request begins, nil if it is not watched.
	Of func(*http.Request) *Exchange
	// Failed returns the error that the handler gets in place of one that the other
	// transport returned. Nil: the same.
	Failed func(*http.Request, error) error
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := t.roundTrip(req)
	if err != nil && t.Failed != nil {
		err = t.Failed(req, err)
	}
	return res, err
}

func (t *Transport) roundTrip(req *http.Request) (*http.Response, error) {
	x := t.Of(req)
	if x == nil {
		if err := req.Context().Err(); err != nil { // not all transports look before they dial
			if req.Body != nil {
				_ = req.Body.Close()
			}
			return nil, err
		}
		return t.Next.RoundTrip(req)
	}
	defer x.returned()
	x.send(req)
	res, err := t.Next.RoundTrip(req)
	x.received(res, err)
	return res, err
}

// Real returns the transport behind one that watches, or the transport itself.
func Real(transport http.RoundTripper) http.RoundTripper {
	if t, ok := transport.(*Transport); ok {
		return t.Next
	}
	return transport
}

// TLSEnabled implements reverseproxy.TLSTransport.
func (t *Transport) TLSEnabled() bool {
	next, ok := t.Next.(reverseproxy.TLSTransport)
	return ok && next.TLSEnabled()
}

// EnableTLS implements reverseproxy.TLSTransport.
func (t *Transport) EnableTLS(base *reverseproxy.TLSConfig) error {
	if next, ok := t.Next.(reverseproxy.TLSTransport); ok {
		return next.EnableTLS(base)
	}
	return fmt.Errorf("the transport %T has no TLS", t.Next)
}

// EnableH2C implements reverseproxy.H2CTransport.
func (t *Transport) EnableH2C() error {
	if next, ok := t.Next.(reverseproxy.H2CTransport); ok {
		return next.EnableH2C()
	}
	return fmt.Errorf("the transport %T has no h2c", t.Next)
}

// ProxyProtocolEnabled implements reverseproxy.ProxyProtocolTransport.
func (t *Transport) ProxyProtocolEnabled() bool {
	next, ok := t.Next.(reverseproxy.ProxyProtocolTransport)
	return ok && next.ProxyProtocolEnabled()
}

// OverrideHealthCheckScheme implements reverseproxy.HealthCheckSchemeOverriderTransport.
func (t *Transport) OverrideHealthCheckScheme(base *url.URL, port string) {
	if next, ok := t.Next.(reverseproxy.HealthCheckSchemeOverriderTransport); ok {
		next.OverrideHealthCheckScheme(base, port)
	}
}

// RequiresContentLength implements reverseproxy.ContentLengthRequiredTransport.
func (t *Transport) RequiresContentLength() bool {
	next, ok := t.Next.(reverseproxy.ContentLengthRequiredTransport)
	return ok && next.RequiresContentLength()
}

// DefaultBufferSizes implements reverseproxy.BufferedTransport.
func (t *Transport) DefaultBufferSizes() (request, response int64) {
	if next, ok := t.Next.(reverseproxy.BufferedTransport); ok {
		return next.DefaultBufferSizes()
	}
	return 0, 0
}

// RequestHeaderOps implements reverseproxy.RequestHeaderOpsTransport.
func (t *Transport) RequestHeaderOps() *headers.HeaderOps {
	if next, ok := t.Next.(reverseproxy.RequestHeaderOpsTransport); ok {
		return next.RequestHeaderOps()
	}
	return nil
}

// CloseIdleConnections does for http.Client what the other transport does.
func (t *Transport) CloseIdleConnections() {
	if next, ok := t.Next.(interface{ CloseIdleConnections() }); ok {
		next.CloseIdleConnections()
	}
}

// Interface guards
var (
	_ http.RoundTripper                                = (*Transport)(nil)
	_ reverseproxy.TLSTransport                        = (*Transport)(nil)
	_ reverseproxy.H2CTransport                        = (*Transport)(nil)
	_ reverseproxy.ProxyProtocolTransport              = (*Transport)(nil)
	_ reverseproxy.HealthCheckSchemeOverriderTransport = (*Transport)(nil)
	_ reverseproxy.ContentLengthRequiredTransport      = (*Transport)(nil)
	_ reverseproxy.BufferedTransport                   = (*Transport)(nil)
	_ reverseproxy.RequestHeaderOpsTransport           = (*Transport)(nil)
)
