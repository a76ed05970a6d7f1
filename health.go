package caddydiscovery

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"golang.org/x/net/http/httpguts"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
	"github.com/caddy-discovery/caddy-discovery/internal/health"
)

// Health are active health checks of discovered nodes: Caddy's own look at static
// upstreams only. A node gets no request before it has passed a check; where no
// node has been checked yet, requests wait, and all nodes serve after sync_timeout.
// Sources of one registry with the same settings share the checks and their
// results, also across reloads. A reload that changes the settings keeps the
// results where the same is asked, and otherwise lets a node that was healthy
// serve until its first result.
//
// The checks go over a transport like the handler's own, so that they see the TLS
// settings that requests will see, by connections of their own, so that they do not
// wait for requests. Redirects are not followed.
type Health struct {
	// The path, and maybe a query, that is asked for by GET. Default: /
	URI string `json:"uri,omitempty"`

	// Only open a connection, and ask nothing: for nodes that do not speak HTTP, such
	// as those behind php_fastcgi. It excludes uri, status and headers. Default: ask
	TCP bool `json:"tcp,omitempty"`

	// The time from one check of a node to the next. Default: 10s
	Interval caddy.Duration `json:"interval,omitempty"`

	// How long a node may take to answer. Default: 5s
	Timeout caddy.Duration `json:"timeout,omitempty"`

	// How many checks in a row a node that has failed must pass to become healthy
	// again. A node that was never checked needs one. Default: 1
	Passes int `json:"passes,omitempty"`

	// How many checks in a row a healthy node must fail to become unhealthy.
	// Default: 2
	Fails int `json:"fails,omitempty"`

	// The status that passes: a number, or a class such as 2xx. Default: 2xx
	Status string `json:"status,omitempty"`

	// The port to check. Default: that of the node's endpoint
	Port int `json:"port,omitempty"`

	// Header fields of the check. Host sets the host that is asked for. Global
	// placeholders are replaced. Default: none
	Headers http.Header `json:"headers,omitempty"`
}

// check completes what was configured, or refuses it.
func (h *Health) check() error {
	if h.TCP && (h.URI != "" || h.Status != "" || len(h.Headers) > 0) {
		return errors.New("health: tcp asks nothing, so that uri, status and header have no meaning beside it; want either")
	}
	if err := cmp.Or(caddyblock.CheckDuration("health: interval", h.Interval), caddyblock.CheckDuration("health: timeout", h.Timeout)); err != nil {
		return err
	}
	for name, n := range map[string]int{"passes": h.Passes, "fails": h.Fails} {
		if n < 0 || n > maxChecks {
			return fmt.Errorf("health: invalid %s %d, want 1 to %d", name, n, maxChecks)
		}
	}
	h.Interval = cmp.Or(h.Interval, caddy.Duration(10*time.Second))
	h.Timeout = cmp.Or(h.Timeout, caddy.Duration(5*time.Second))
	h.Passes, h.Fails = cmp.Or(h.Passes, 1), cmp.Or(h.Fails, 2)
	if !h.TCP {
		h.URI, h.Status = cmp.Or(h.URI, "/"), cmp.Or(h.Status, "2xx")
		if uri, err := url.ParseRequestURI(h.URI); err != nil || uri.Host != "" || !strings.HasPrefix(h.URI, "/") {
			return fmt.Errorf("health: invalid uri %q, want a path such as /healthz", h.URI)
		}
		if err := health.CheckStatus(h.Status); err != nil {
			return fmt.Errorf("health: status: %w", err)
		}
	}
	if h.Port < 0 || h.Port > 65535 {
		return fmt.Errorf("health: invalid port %d, want 1 to 65535", h.Port)
	}
	for _, name := range slices.Sorted(maps.Keys(h.Headers)) {
		if err := checkHeader(name, h.Headers[name]); err != nil {
			return fmt.Errorf("health: header %w", err)
		}
	}
	options := h.options(false)
	if _, err := options.Request(context.Background(), "127.0.0.1:80", "127.0.0.1:80"); err != nil {
		return fmt.Errorf("health: invalid uri %q: %w", h.URI, err)
	}
	return nil
}

// checkHeader replaces the placeholders in the values of a header field, and refuses
// what no request can carry.
func checkHeader(name string, values []string) error {
	if !httpguts.ValidHeaderFieldName(name) {
		return fmt.Errorf("%q: invalid name, want one such as X-Check", name)
	}
	if len(values) == 0 {
		return fmt.Errorf("%s has no value, want one", name)
	}
	for i := range values {
		if err := backend.ReplaceGlobals(&values[i]); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if !httpguts.ValidHeaderFieldValue(values[i]) {
			return fmt.Errorf("%s: invalid value, want one without control characters", name)
		}
	}
	return nil
}

const maxChecks = 100

// options returns the settings as the checker takes them.
func (h *Health) options(https bool) health.Options {
	return health.Options{
		HTTPS: https, TCP: h.TCP, URI: h.URI, Headers: h.Headers, Port: h.Port, Status: h.Status,
		Timeout: time.Duration(h.Timeout), Interval: time.Duration(h.Interval),
		Passes: h.Passes, Fails: h.Fails,
	}
}

// checkers outlive every config, as the directories do.
var checkers = caddy.NewUsagePool() // checkerKey → *sharedChecker

// A checkerKey stands for the health checks of one registry with one setting.
type checkerKey struct {
	question          backend.Key // what is asked, and over which transport
	interval, timeout caddy.Duration
	passes, fails     int
}

// key returns what the checks are shared by. How often they ask, and how many results
// make a change, is no part of the question.
func (h *Health) key(b backend.Backend, https bool, transport http.RoundTripper) (checkerKey, error) {
	registry, err := backend.KeyOf(b)
	if err != nil {
		return checkerKey{}, err
	}
	key := checkerKey{interval: h.Interval, timeout: h.Timeout, passes: h.Passes, fails: h.Fails}
	question := *h
	question.Interval, question.Timeout, question.Passes, question.Fails = 0, 0, 0, 0
	encoded, err := json.Marshal([]any{registry, question, https, transport, trust(transport)})
	if err != nil {
		return checkerKey{}, fmt.Errorf("encoding the settings of the health checks: %w", err)
	}
	key.question = sha256.Sum256(encoded)
	return key, nil
}

// sharedChecker are the health checks with one setting, as long as a source uses
// their results.
type sharedChecker struct {
	*health.Checker
	key       checkerKey
	directory *sharedDirectory
	https     bool
	running   background
}

// sourceChecks are the health checks that a source uses.
type sourceChecks struct {
	*sharedChecker
	unsubscribe func()
}

// acquireChecks returns the checks of those nodes of a registry that a source wants,
// not started unless another config did. Each call is matched by one of release.
func acquireChecks(h *Health, b backend.Backend, https bool, transport http.RoundTripper, wants func(*discovery.Entry) bool) (*sourceChecks, error) {
	key, err := h.key(b, https, transport)
	if err != nil {
		return nil, err
	}
	c, err := acquire(checkers, key, func() (*sharedChecker, error) {
		directory, err := acquireDirectory(b)
		if err != nil {
			return nil, err
		}
		options := h.options(https)
		options.Question = string(key.question[:])
		options.Count = directory.stats.checks.count
		options.Logger = processLogger("discovery.health").With("registry", directory.name())
		return &sharedChecker{Checker: health.New(directory.Directory, options), key: key, directory: directory, https: https}, nil
	})
	if err != nil {
		return nil, err
	}
	return &sourceChecks{c, c.Subscribe(wants, c.others())}, nil
}

// others returns the other checks of this registry that are in use.
func (c *sharedChecker) others() []*health.Checker {
	var others []*health.Checker
	checkers.Range(func(_, v any) bool {
		if other := v.(*sharedChecker); other != c && other.directory == c.directory && other.https == c.https {
			others = append(others, other.Checker)
		}
		return true
	})
	return others
}

// start begins to check, over the client of the config that runs now. A config that
// is only validated never gets here.
func (c *sharedChecker) start(client health.Client) {
	c.Use(client)
	c.running.start(c.Run)
}

// release ends the use of the checks by the source.
func (c *sourceChecks) release() error {
	c.unsubscribe()
	_, err := checkers.Delete(c.key)
	return err
}

// Destruct ends the checks when no source uses them any more.
func (c *sharedChecker) Destruct() error {
	c.running.end()
	return c.directory.release()
}

// trust returns what a transport trusts and how it shows itself, which its JSON
// does not tell once it is provisioned.
func trust(transport http.RoundTripper) [][]byte {
	t, ok := transport.(*reverseproxy.HTTPTransport)
	if !ok || t.Transport == nil || t.Transport.TLSClientConfig == nil {
		return nil
	}
	config := t.Transport.TLSClientConfig
	parts := [][]byte{fmt.Appendf(nil, "%q %v", config.ServerName, config.InsecureSkipVerify)}
	if config.RootCAs != nil {
		parts = append(parts, config.RootCAs.Subjects()...) //nolint:staticcheck // it lacks the system's roots, which are always the same
	}
	for _, c := range config.Certificates {
		parts = append(parts, c.Certificate...)
	}
	return parts
}
