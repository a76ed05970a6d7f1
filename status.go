package caddydiscovery

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

func init() {
	httpcaddyfile.RegisterHandlerDirective("discovery_status", parseStatusPage)
	httpcaddyfile.RegisterDirectiveOrder("discovery_status", httpcaddyfile.Before, "reverse_proxy")
}

const defaultMaxStreams = 16

// StatusPage is a handler that serves one page, which shows the registries that
// this proxy watches, the fleet, and what becomes of it, live. The page has no
// external parts.
//
// It shows the topology of the fleet. Unless the connection comes from loopback and
// asks for a loopback name or address (so that no page with a name of its own reads
// it in a browser on this machine), or comes from an address that is allowed, the
// answer is 403. What counts is the address of the connection, not one in a header:
// behind another proxy on the same machine everybody comes from loopback, the page
// needs 'allow 127.0.0.1', and something else must guard it.
type StatusPage struct {
	// The networks (in CIDR notation, or single addresses) that may see the page
	// beside loopback, by whatever name. Default: none
	Allow []string `json:"allow,omitempty"`

	// How many pages may be kept up to date at one time, in the whole process.
	// Default: 16
	MaxStreams int `json:"max_streams,omitempty"`

	allow    []netip.Prefix
	stopping chan struct{}
}

// CaddyModule returns the Caddy module information.
func (*StatusPage) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.discovery_status",
		New: func() caddy.Module { return new(StatusPage) },
	}
}

// Provision sets up the handler.
func (p *StatusPage) Provision(ctx caddy.Context) error {
	for _, s := range p.Allow {
		network, err := parseNetwork(s)
		if err != nil {
			return fmt.Errorf("allow: %w", err)
		}
		p.allow = append(p.allow, network)
	}
	switch {
	case p.MaxStreams < 0:
		return fmt.Errorf("max_streams: invalid number %d, want 1 or more", p.MaxStreams)
	case p.MaxStreams == 0:
		p.MaxStreams = defaultMaxStreams
	}
	// Caddy waits for open requests before it lets go of a config. A stream would
	// hold it for ever; the page connects anew, to the config that comes next.
	p.stopping = make(chan struct{})
	return onEvent(ctx, "stopping", func() { close(p.stopping) })
}

// parseNetwork reads a network, or a single address.
func parseNetwork(s string) (netip.Prefix, error) {
	network, err := caddyhttp.CIDRExpressionToPrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("invalid network %q, want one such as 10.0.0.0/8 or fd00::/8", s)
	}
	return network.Masked(), nil
}

// parseStatusPage sets up the handler from Caddyfile tokens. Syntax:
//
//	discovery_status [<matcher>] {
//	    allow       <cidr|private_ranges...>
//	    max_streams <n>
//	}
func parseStatusPage(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	p := new(StatusPage)
	return p, p.UnmarshalCaddyfile(h.Dispenser)
}

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens, as parseStatusPage
// describes.
func (p *StatusPage) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name
	if d.NextArg() {
		return d.Errf("discovery_status: unexpected argument %q, want none but a matcher", d.Val())
	}
	return caddyblock.Block{What: "discovery_status", Options: caddyblock.Options{
		"allow": {Usage: "<cidr|private_ranges...>", Min: 1, Max: -1, Repeatable: true, Set: func(args []string) error {
			for _, arg := range args {
				if arg == "private_ranges" {
					p.Allow = append(p.Allow, caddyhttp.PrivateRangesCIDR()...)
					continue
				}
				if _, err := parseNetwork(arg); err != nil {
					return err
				}
				p.Allow = append(p.Allow, arg)
			}
			return nil
		}},
		"max_streams": caddyblock.Number(&p.MaxStreams, 1, 10_000),
	}}.Parse(d)
}

// ServeHTTP serves the page, or, if the query says "stream", what keeps it up to
// date.
func (p *StatusPage) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	if err := p.mayLook(r); err != nil {
		return caddyhttp.Error(http.StatusForbidden, err)
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		return caddyhttp.Error(http.StatusMethodNotAllowed, errors.New("the status page wants GET or HEAD"))
	}
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("Cross-Origin-Resource-Policy", "same-origin")
	header.Set("X-Frame-Options", "DENY")
	if r.URL.Query().Has("stream") {
		return p.serveStream(w, r)
	}
	header.Set("Content-Security-Policy", statusPage.policy)
	header.Set("Content-Type", "text/html; charset=utf-8")
	header.Set("Content-Length", strconv.Itoa(len(statusPage.html)))
	if r.Method == http.MethodGet {
		_, _ = w.Write(statusPage.html)
	}
	return nil
}

// mayLook returns why a request may not see the page.
//
// That a connection comes from loopback says that it comes from this machine, not
// who speaks: a page of anybody's that a browser shows here may have a name that has
// come to mean 127.0.0.1 (DNS rebinding), and would read what it asks for. Such a
// request names that page, in Host or in Origin.
func (p *StatusPage) mayLook(r *http.Request) error {
	address, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return errNotAllowed
	}
	remote := address.Addr().Unmap().WithZone("")
	switch {
	case slices.ContainsFunc(p.allow, func(n netip.Prefix) bool { return n.Contains(remote) }):
		return nil
	case !remote.IsLoopback():
		return errNotAllowed
	case !isLoopback(hostname(r.Host)):
		return errors.New("the status page is served to loopback by a loopback name or address only, such as localhost, unless 'allow' names 127.0.0.1")
	}
	for _, origin := range r.Header.Values("Origin") {
		if _, host, _ := strings.Cut(origin, "://"); !strings.EqualFold(host, r.Host) {
			return errors.New("the status page is no part of another page")
		}
	}
	return nil
}

var errNotAllowed = errors.New("the status page is for loopback and 'allow' only")

// hostname returns the host without its port.
func hostname(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
}

//go:embed status/page.html
var statusHTML string

//go:embed status/page.css
var statusCSS string

//go:embed status/page.js
var statusJS string

// statusPage is the page in one piece, and the policy that lets nothing in it run
// or load but what it is made of.
var statusPage = func() (page struct {
	html   []byte
	policy string
}) {
	page.html = []byte(strings.NewReplacer("{{style}}", statusCSS, "{{script}}", statusJS).Replace(statusHTML))
	hash := func(s string) string {
		sum := sha256.Sum256([]byte(s))
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	page.policy = "default-src 'none'; script-src " + hash(statusJS) + "; style-src " + hash(statusCSS) +
		"; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	return page
}()

// Interface guards
var (
	_ caddy.Provisioner           = (*StatusPage)(nil)
	_ caddyfile.Unmarshaler       = (*StatusPage)(nil)
	_ caddyhttp.MiddlewareHandler = (*StatusPage)(nil)
)
