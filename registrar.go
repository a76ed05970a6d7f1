package caddydiscovery

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/systemload"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
	"github.com/caddy-discovery/caddy-discovery/internal/health"
)

// Registrar is an app that keeps this proxy's own endpoints listed in
// registries, so that the next tier can find it. It never gives up: while a
// registry is away it retries, and after one lost its data it announces anew. A
// reload that leaves a node as it is does not touch its record. When Caddy
// exits, or no running config announces the node any more, the node is first
// announced as draining and then removed.
type Registrar struct {
	// The nodes to keep listed.
	Nodes []*ProxyNode `json:"nodes,omitempty"`

	config    *caddyevents.App // which there is one of in each config
	log       *zap.Logger
	announced *announcedConfig // between Start and Stop
}

// ProxyNode is one endpoint of this proxy in one registry.
type ProxyNode struct {
	// The registry in which to list the node.
	RegistryRaw json.RawMessage `json:"registry,omitempty" caddy:"namespace=discovery.registries inline_key=backend"`

	// The node's id. Default: the host name, the start of Caddy's instance ID, and
	// where the first HTTP server listens
	NodeID string `json:"node_id,omitempty"`

	// Where the node serves: http://host:port, https://host:port or host:port.
	// Default: the local address that reaches the registry, as it is at each
	// heartbeat, with the scheme and port of the first HTTP server
	Endpoint string `json:"endpoint,omitempty"`

	// The node's metadata. "role" is "proxy" unless it is set here. "subsets" cannot be
	// set: it says which fleets this Caddy shares with other proxies, by the option subset
	// of upstream sources that watch the same registry.
	Metadata map[string]string `json:"metadata,omitempty"`

	// How often the record is renewed. Default: 10s
	Heartbeat caddy.Duration `json:"heartbeat,omitempty"`

	// How long the node counts as live after it was last heard. Default: three
	// heartbeats
	TTL caddy.Duration `json:"ttl,omitempty"`

	// The node's load: "system" for the load average of the last minute per
	// core, or a placeholder that gives a number of 0 or more. While it gives none,
	// the last one is announced, and before any that of the system. Default: system
	Load string `json:"load,omitempty"`

	// Announce the node only while this URL answers with a status of 2xx, for a
	// Caddy that stands beside the service it speaks for. Default: always
	HealthURL string `json:"health_url,omitempty"`

	// How long the node is announced as draining before its record goes; the
	// proxy answers all the while. Default: 2s
	Drain *caddy.Duration `json:"drain,omitempty"`

	// End the drain as soon as no request is under way: neither one that this Caddy
	// answers over HTTP/1 or HTTP/2, nor one, or a WebSocket, that it has sent to an
	// upstream. It takes two seconds at least, and as long as drain at most. Default: it
	// takes as long as drain
	DrainUntilIdle bool `json:"drain_until_idle,omitempty"`

	backend backend.Backend
	servers []listener // of the HTTP app, for the default endpoint
	claims  string     // which fleets this proxy shares with others; see claimSubsets
}

// CaddyModule returns the Caddy module information.
func (Registrar) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "registrar",
		New: func() caddy.Module { return new(Registrar) },
	}
}

// Provision checks the configuration. It needs no registry to be there.
func (app *Registrar) Provision(ctx caddy.Context) error {
	if err := exposeMetrics(ctx); err != nil {
		return fmt.Errorf("registrar: %w", err)
	}
	events, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("registrar: getting the events app: %w", err)
	}
	app.config, app.log = events.(*caddyevents.App), ctx.Logger()
	given := make(map[announcementKey]bool)
	for i, n := range app.Nodes {
		if n == nil {
			return fmt.Errorf(`registrar: node %d is null; want {"registry": …}`, i+1)
		}
		if err := n.provision(ctx); err != nil {
			return fmt.Errorf("registrar: node %d: %w", i+1, err)
		}
		key, err := n.key()
		if err != nil {
			return fmt.Errorf("registrar: node %d: %w", i+1, err)
		}
		if given[key] {
			return fmt.Errorf("registrar: node %d: the registry already gets a node %q from this config; want another node_id", i+1, n.NodeID)
		}
		given[key] = true
	}
	// A config that fails to start, say because a port is taken, must not have
	// been announced: nobody could reach it.
	if err := onEvent(ctx, "started", func() {
		keepInstanceID()
		announcements.enforce(app.announced)
	}); err != nil {
		return err
	}
	// On exit Caddy stops its apps in no particular order, so that the listeners
	// might close first. Its own event comes before all of them.
	return onEvent(ctx, "stopping", func() {
		if caddy.Exiting() {
			announcements.withdraw(app.announced)
		}
	})
}

func (n *ProxyNode) provision(ctx caddy.Context) error {
	var err error
	if n.backend, err = backend.Load(ctx, n, "RegistryRaw", n.RegistryRaw); err != nil {
		return err
	}
	if err := n.complete(); err != nil {
		return err
	}
	if n.DrainUntilIdle {
		if err := trackOwnWork(ctx); err != nil {
			return err
		}
	}
	servers, err := listeners(ctx)
	if n.Endpoint == "" {
		if err != nil {
			return err
		}
		n.servers = servers
	}
	if n.NodeID == "" {
		n.NodeID = defaultNodeID(servers)
	}
	return n.checkNode()
}

// complete expands placeholders and completes the options that depend on nothing
// else, or refuses them.
func (n *ProxyNode) complete() error {
	if err := cmp.Or(
		backend.ReplaceGlobals(&n.NodeID, &n.Endpoint, &n.HealthURL),
		caddyblock.CheckDuration("heartbeat", n.Heartbeat),
		caddyblock.CheckDuration("ttl", n.TTL),
	); err != nil {
		return err
	}
	n.Heartbeat = cmp.Or(n.Heartbeat, caddy.Duration(discovery.DefaultHeartbeat))
	n.TTL = cmp.Or(n.TTL, 3*n.Heartbeat)
	if n.Drain != nil && *n.Drain < 0 {
		return fmt.Errorf("drain: invalid duration %v, want 0s or more", time.Duration(*n.Drain))
	}
	if n.DrainUntilIdle && (n.Drain == nil || *n.Drain == 0) {
		return errors.New("drain_until_idle needs to know for how long at most; want drain, such as 30s")
	}
	metadata := map[string]string{discovery.KeyRole: discovery.RoleProxy}
	for k, v := range n.Metadata {
		if k == discovery.KeySubsets {
			return fmt.Errorf("metadata %s: Caddy itself says there which fleets it shares with other proxies; want another key", k)
		}
		if err := backend.ReplaceGlobals(&v); err != nil {
			return fmt.Errorf("metadata %s: %w", k, err)
		}
		metadata[k] = v
	}
	n.Metadata = metadata
	switch {
	case n.Load == "":
		n.Load = "system"
	case n.Load != "system" && !strings.Contains(n.Load, "{"):
		return fmt.Errorf("load: invalid value %q, want system or a placeholder that gives a number", n.Load)
	}
	if n.HealthURL != "" {
		return caddyblock.CheckURL("health_url", n.HealthURL)
	}
	return nil
}

// checkNode checks the record that will be announced.
func (n *ProxyNode) checkNode() error {
	// A stand-in endpoint lets everything else be checked now, although the
	// default one is found out only when the config runs.
	endpoint, err := discovery.ParseEndpoint(cmp.Or(n.Endpoint, "http://127.0.0.1:80"))
	if err != nil {
		return err
	}
	return n.options().Validate(n.node(endpoint))
}

func (n *ProxyNode) node(endpoint discovery.Endpoint) discovery.Node {
	metadata := n.Metadata
	if n.claims != "" {
		metadata = maps.Clone(metadata)
		metadata[discovery.KeySubsets] = n.claims
	}
	// The load stands until the node's own gives a number.
	return discovery.Node{ID: n.NodeID, Endpoint: endpoint, Metadata: metadata, Load: systemload.PerCore()}
}

func (n *ProxyNode) options() discovery.RegistrarOptions {
	o := discovery.RegistrarOptions{
		Heartbeat: time.Duration(n.Heartbeat),
		TTL:       time.Duration(n.TTL),
		Drain:     (*time.Duration)(n.Drain),
		Load:      n.load,
	}
	if n.DrainUntilIdle {
		o.Busy = hasWork
	}
	if n.HealthURL != "" {
		o.Ready = health.URL(n.HealthURL)
	}
	return o
}

func (n *ProxyNode) load() float64 {
	if n.Load == "system" {
		return systemload.PerCore()
	}
	v, err := strconv.ParseFloat(strings.TrimSpace(caddy.NewReplacer().ReplaceAll(n.Load, "")), 64)
	if err != nil {
		return math.NaN()
	}
	return v
}

// follows reports whether the endpoint is the machine's address, which may change
// while Caddy runs.
func (n *ProxyNode) follows() bool {
	return n.Endpoint == "" && n.servers[0].wildcard()
}

// resolveTimeout bounds one look for the endpoint.
const resolveTimeout = 5 * time.Second

// resolve returns the endpoint to announce. It may take as long as a look-up of
// the registry's name, which is why it is not part of loading a config.
func (n *ProxyNode) resolve(ctx context.Context) (discovery.Endpoint, error) {
	if n.Endpoint != "" {
		return discovery.ParseEndpoint(n.Endpoint)
	}
	first := n.servers[0]
	host := first.host
	if n.follows() {
		ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
		defer cancel()
		var err error
		if host, err = localAddress(ctx, n.backend.Addresses()); err != nil {
			return discovery.Endpoint{}, err
		}
	}
	return discovery.ParseEndpoint(first.scheme + "://" + net.JoinHostPort(host, strconv.FormatUint(uint64(first.port), 10)))
}

// announcesAs reports whether both configs say the same about a node of one id in one
// registry.
func (n *ProxyNode) announcesAs(other *ProxyNode) bool {
	if other == nil {
		return false
	}
	a, b := *n, *other
	a.RegistryRaw, a.backend, b.RegistryRaw, b.backend = nil, nil, nil, nil
	return reflect.DeepEqual(a, b)
}

// Start acquires the nodes, so that those which the config before announced
// stay listed. What is new is announced when every app has started.
func (app *Registrar) Start() (err error) {
	if err := app.claimSubsets(); err != nil {
		return err
	}
	app.announced, err = announcements.acquire(app.Nodes)
	return err
}

// Stop releases the nodes. Those that no other config announces leave, in the
// background: the proxy goes on, and so may the reload.
func (app *Registrar) Stop() error {
	announcements.release(app.announced)
	app.announced = nil
	settleInstanceID()
	return nil
}

// Cleanup releases the nodes where Stop was not called: Caddy drops a config
// whose remote admin endpoint or config loader fails, after its apps have
// started, without stopping them.
func (app *Registrar) Cleanup() error { return app.Stop() }

// Interface guards
var (
	_ caddy.App          = (*Registrar)(nil)
	_ caddy.Provisioner  = (*Registrar)(nil)
	_ caddy.CleanerUpper = (*Registrar)(nil)
)
