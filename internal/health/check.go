package health

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Options say what a check asks, how often, and what the answers mean.
type Options struct {
	HTTPS    bool          // whether nodes are asked over TLS
	TCP      bool          // only open a connection, and ask nothing
	URI      string        // path, and maybe a query, that is asked for by GET
	Headers  http.Header   // of the request; Host sets the host that is asked for
	Port     int           // to check instead of the endpoint's; 0: that one
	Status   string        // that passes: a number, or a class such as 2xx
	Timeout  time.Duration // how long a node may take to answer
	Interval time.Duration // from one check of a node to the next
	Passes   int           // in a row that make a node healthy that has failed
	Fails    int           // in a row that make a healthy node unhealthy

	// Question is the same for checks that would have the same result: it tells what
	// is asked, and over which transport.
	Question string
	// Count is called by Run after each check.
	Count func(passed bool)
	// Logger is told at level Warn which nodes become unhealthy, and at level Info
	// which are healthy again.
	Logger *slog.Logger
}

// A Client reaches nodes for checks in the way in which requests reach them. Its
// methods may be called from many goroutines.
type Client interface {
	// Do returns a node's answer to a request. Redirects are not followed.
	Do(req *http.Request, node *discovery.Entry) (*http.Response, error)
	// Dial opens a connection to host:port.
	Dial(ctx context.Context, address string) (net.Conn, error)
	// Close lets go of idle connections.
	Close()
}

// maxCheckBody is how much of an answer is read so that its connection can be used
// again.
const maxCheckBody = 4 << 10

// check makes one check of a node that is dialled at the address, and returns why it
// does not pass.
func (o *Options) check(ctx context.Context, client Client, node *discovery.Entry, address string) error {
	if o.Port != 0 {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return err
		}
		address = net.JoinHostPort(host, strconv.Itoa(o.Port))
	}
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	if o.TCP {
		conn, err := client.Dial(ctx, address)
		if err != nil {
			return err
		}
		return conn.Close()
	}
	req, err := o.Request(ctx, address, node.Node.Endpoint.Address())
	if err != nil {
		return err
	}
	resp, err := client.Do(req, node)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxCheckBody)); err != nil {
		return err
	}
	if !o.accepts(resp.StatusCode) {
		return fmt.Errorf("status %d, want %s", resp.StatusCode, o.Status)
	}
	return nil
}

// Request returns the request of a check of a node that is dialled at the address.
// The host is what its endpoint says, which may be a name.
func (o *Options) Request(ctx context.Context, address, host string) (*http.Request, error) {
	scheme := "http"
	if o.HTTPS {
		scheme = "https"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+address+o.URI, nil)
	if err != nil {
		return nil, err
	}
	if address != host && o.Port == 0 {
		req.Host = host
	}
	req.Header.Set("User-Agent", "caddy-discovery")
	for name, values := range o.Headers {
		if http.CanonicalHeaderKey(name) == "Host" {
			req.Host = values[0]
			continue
		}
		req.Header[http.CanonicalHeaderKey(name)] = values
	}
	return req, nil
}

// CheckStatus refuses what is neither the number of a status nor a class of them.
func CheckStatus(s string) error {
	if n, err := strconv.Atoi(strings.ReplaceAll(s, "xx", "00")); err != nil || len(s) != 3 || n < 100 || n > 599 {
		return fmt.Errorf("invalid value %q, want a number such as 200 or a class such as 2xx", s)
	}
	return nil
}

// accepts reports whether the status of an answer passes.
func (o *Options) accepts(status int) bool {
	if class, found := strings.CutSuffix(o.Status, "xx"); found {
		return strconv.Itoa(status/100) == class
	}
	return strconv.Itoa(status) == o.Status
}

// maxURLBody is how much is read of the answer to the check of a URL.
const maxURLBody = 64 << 10

// URL returns a check that a service makes of itself: it passes while the URL answers
// with 2xx. Redirects are not followed.
func URL(target string) func(context.Context) error {
	// A client of its own, so that connections to a service that is being
	// watched are not shared with anything.
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxURLBody))
		if resp.StatusCode < 200 || resp.StatusCode > 299 {
			return fmt.Errorf("health_url answered %s, want 2xx", resp.Status)
		}
		return nil
	}
}
