package caddydiscovery

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
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

	held []*announcement // what this config keeps alive, between Start and Stop
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

	// The node's metadata. "role" is "proxy" unless it is set here.
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

	backend  backend.Backend
	servers  []listener // of the HTTP app, for the default endpoint
	settings string     // everything above, resolved, to tell a change
}

// listener is where an HTTP server of this config listens.
type listener struct {
	scheme, host string
	port         uint
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
	ids := make(map[announcementKey]int)
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
		if ids[key] > 0 {
			return fmt.Errorf("registrar: node %d: the registry already gets a node %q from this config; want another node_id", i+1, n.NodeID)
		}
		ids[key]++
	}
	// A config that fails to start, say because a port is taken, must not have
	// been announced: nobody could reach it.
	if err := onEvent(ctx, "started", app.announceAll); err != nil {
		return err
	}
	// On exit Caddy stops its apps in no particular order, so that the listeners
	// might close first. Its own event comes before all of them.
	return onEvent(ctx, "stopping", func() {
		if caddy.Exiting() {
			app.leaveAll()
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
	if err := n.checkNode(); err != nil {
		return err
	}
	settings, err := json.Marshal(n)
	if err != nil {
		return err
	}
	n.settings = fmt.Sprint(string(settings), n.servers)
	return nil
}

// complete expands placeholders and completes the options that depend on nothing
// else, or refuses them.
func (n *ProxyNode) complete() error {
	if err := backend.ReplaceGlobals(&n.NodeID, &n.Endpoint, &n.HealthURL); err != nil {
		return err
	}
	for _, d := range []struct {
		name  string
		value caddy.Duration
	}{{"heartbeat", n.Heartbeat}, {"ttl", n.TTL}} {
		if err := caddyblock.CheckDuration(d.name, d.value); err != nil {
			return err
		}
	}
	if n.Drain != nil && *n.Drain < 0 {
		return fmt.Errorf("drain: invalid duration %v, want 0s or more", time.Duration(*n.Drain))
	}
	metadata := map[string]string{discovery.KeyRole: discovery.RoleProxy}
	for k, v := range n.Metadata {
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
	endpoint := n.Endpoint
	if endpoint == "" {
		endpoint = "http://127.0.0.1:80"
	}
	parsed, err := discovery.ParseEndpoint(endpoint)
	if err != nil {
		return err
	}
	return n.options().Validate(n.node(parsed))
}

// defaultNodeID is stable across restarts of one Caddy on one host, and tells it from
// others there: those that share a data directory have one instance ID, but not all
// of them can listen at one place.
func defaultNodeID(servers []listener) string {
	id, err := os.Hostname()
	if err != nil || id == "" {
		id = "caddy"
	}
	// A read-only file system is no reason not to be listed.
	if instance, err := instanceID(); err == nil {
		id += "-" + instance[:8]
	}
	if len(servers) == 0 {
		return id
	}
	if first := servers[0]; !first.wildcard() {
		id += "-" + strings.ReplaceAll(first.host, ":", ".")
	}
	return id + "-" + strconv.FormatUint(uint64(servers[0].port), 10)
}

// wildcard reports whether it listens on every address of the machine.
func (l listener) wildcard() bool {
	ip := net.ParseIP(l.host)
	return l.host == "" || ip != nil && ip.IsUnspecified()
}

// listeners returns where the HTTP app's servers listen, in the order of their
// names. Its provisioning has decided by then which of them speak TLS.
func listeners(ctx caddy.Context) ([]listener, error) {
	missing := errors.New("there is no HTTP server whose address could be the endpoint; want the option endpoint <url>")
	app, err := ctx.AppIfConfigured("http")
	switch {
	case errors.Is(err, caddy.ErrNotConfigured):
		return nil, missing
	case err != nil:
		return nil, err
	}
	found := listenersOf(app.(*caddyhttp.App))
	if len(found) == 0 {
		return nil, missing
	}
	return found, nil
}

// listenersOf is listeners for those who have the app, which need not have been
// provisioned: then nothing is known of TLS.
func listenersOf(app *caddyhttp.App) (found []listener) {
	for _, name := range slices.Sorted(maps.Keys(app.Servers)) {
		if name == "remaining_auto_https_redirects" {
			continue // Caddy's own, and nothing to proxy to
		}
		server := app.Servers[name]
		if server == nil {
			continue
		}
		for _, address := range server.Listen {
			if backend.ReplaceGlobals(&address) != nil {
				continue // the app itself says so
			}
			a, err := caddy.ParseNetworkAddress(address)
			if err != nil || a.IsUnixNetwork() || a.StartPort == 0 {
				continue
			}
			scheme := "http"
			if len(server.TLSConnPolicies) > 0 && a.StartPort != uint(httpPort(app)) {
				scheme = "https"
			}
			found = append(found, listener{scheme, a.Host, a.StartPort})
		}
	}
	return found
}

func httpPort(app *caddyhttp.App) int {
	if app.HTTPPort != 0 {
		return app.HTTPPort
	}
	return caddyhttp.DefaultHTTPPort
}

func (n *ProxyNode) node(endpoint discovery.Endpoint) discovery.Node {
	// The load stands until the node's own gives a number.
	return discovery.Node{ID: n.NodeID, Endpoint: endpoint, Metadata: n.Metadata, Load: discovery.SystemLoad()}
}

func (n *ProxyNode) options() discovery.RegistrarOptions {
	o := discovery.RegistrarOptions{
		Heartbeat: time.Duration(n.Heartbeat),
		TTL:       time.Duration(n.TTL),
		Drain:     (*time.Duration)(n.Drain),
		Load:      n.load,
	}
	if n.HealthURL != "" {
		o.Ready = health.URL(n.HealthURL)
	}
	return o
}

func (n *ProxyNode) load() float64 {
	if n.Load == "system" {
		return discovery.SystemLoad()
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

// heartbeat is how often the record is renewed, and the machine's address looked at.
func (n *ProxyNode) heartbeat() time.Duration {
	return cmp.Or(time.Duration(n.Heartbeat), discovery.DefaultHeartbeat)
}

// lease is how long a record stands that is not renewed.
func (n *ProxyNode) lease() time.Duration {
	return cmp.Or(time.Duration(n.TTL), 3*n.heartbeat())
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

// resolveRetry is how long to wait before an endpoint is looked for again, up to
// twice as long.
const resolveRetry = 500 * time.Millisecond

// localAddress returns the local address from which the registry is reached. No
// packet is sent: connecting a UDP socket only asks the routing table. While that
// knows no way, or the registry's name does not resolve, there is no answer: a
// guess would be listed for the whole fleet.
func localAddress(ctx context.Context, registry []string) (string, error) {
	if len(registry) == 0 {
		return "127.0.0.1", nil // it is reached by other means than a network
	}
	var err error
	for _, address := range registry {
		var conn net.Conn
		if conn, err = new(net.Dialer).DialContext(ctx, "udp", address); err != nil {
			continue
		}
		var host string
		host, _, err = net.SplitHostPort(conn.LocalAddr().String())
		_ = conn.Close()
		if err == nil {
			return host, nil
		}
	}
	return "", fmt.Errorf("finding the local address that reaches the registry: %w; the option endpoint <url> makes that unnecessary", err)
}

// Start takes hold of the nodes, so that those which the config before announced
// stay listed. What is new is announced when every app has started.
func (app *Registrar) Start() error {
	keepInstanceID()
	for _, n := range app.Nodes {
		a, err := hold(n)
		if err != nil {
			_ = app.Stop()
			return err
		}
		app.held = append(app.held, a)
	}
	return nil
}

// Stop lets go of the nodes. Those that no other config announces leave, in the
// background: the proxy goes on, and so may the reload.
func (app *Registrar) Stop() error {
	announcements.Lock()
	announcements.inForce.drop(app)
	announcements.Unlock()
	for i, a := range app.held {
		a.release(app.Nodes[i])
	}
	app.held = nil
	return nil
}

// Cleanup lets go of the nodes where Stop was not called: Caddy drops a config
// whose remote admin endpoint or config loader fails, after its apps have
// started, without stopping them.
func (app *Registrar) Cleanup() error { return app.Stop() }

// announceAll makes this config the one that says how its nodes are announced.
func (app *Registrar) announceAll() {
	announcements.Lock()
	announcements.inForce.put(app)
	announcements.Unlock()
	for _, a := range app.held {
		a.poke()
	}
}

// leaveAll takes all nodes of an exiting Caddy out of service, and returns when
// their records are gone.
func (app *Registrar) leaveAll() {
	announcements.Lock()
	announcements.inForce.apps = nil
	announcements.inForce.tell() // who waits for a successor waits no longer
	announcements.Unlock()
	var group sync.WaitGroup
	for _, a := range app.held {
		group.Go(a.leave)
	}
	group.Wait()
}

// announcements are the nodes that this process keeps listed. They outlive the
// configs that ask for them.
var announcements = struct {
	sync.Mutex
	nodes   map[announcementKey]*announcement
	inForce inForce
	// leaving counts those that are on their way out, so that an exit can wait.
	leaving sync.WaitGroup
}{nodes: make(map[announcementKey]*announcement)}

func init() {
	caddy.OnExit(func(context.Context) { announcements.leaving.Wait() })
}

type announcementKey struct {
	registry backend.Key
	id       string
}

func (n *ProxyNode) key() (announcementKey, error) {
	registry, err := backend.KeyOf(n.backend)
	return announcementKey{registry, n.NodeID}, err
}

// instances are the tokens of this process's own records.
var instances sync.Map

// announcedHere reports whether a record with the token was written by this
// process.
func announcedHere(instance string) bool {
	if instance == "" {
		return false
	}
	_, ok := instances.Load(instance)
	return ok
}

// announcement keeps one node listed, for as long as a config wants it.
type announcement struct {
	key      announcementKey
	kind     string // of registry
	registry *sharedRegistry
	cancel   context.CancelFunc
	done     chan struct{}
	// changed holds at most one token. The first one starts the announcing.
	changed chan struct{}
	// renewal holds at most one token, which makes it announce as it does, at once.
	renewal chan struct{}
	stands  atomic.Bool // the registry has taken the record

	// wanted are the configs that want the node, newest last: the newest one
	// says how. Should it fail to start, the one before says so again. Guarded
	// by announcements.
	wanted []*ProxyNode
}

// hold notes that a config wants a node to be announced, and how; poke puts that
// into force. It is matched by one of release.
func hold(n *ProxyNode) (*announcement, error) {
	key, err := n.key()
	if err != nil {
		return nil, err
	}
	registry, err := acquireRegistry(n.backend)
	if err != nil {
		return nil, fmt.Errorf("opening the registry: %w", err)
	}
	announcements.Lock()
	defer announcements.Unlock()
	a := announcements.nodes[key]
	if a == nil {
		a = &announcement{
			key: key, kind: n.backend.CaddyModule().ID.Name(), registry: registry, done: make(chan struct{}),
			changed: make(chan struct{}, 1), renewal: make(chan struct{}, 1),
		}
		a.wanted = []*ProxyNode{n}
		var ctx context.Context
		ctx, a.cancel = context.WithCancel(context.Background())
		announcements.nodes[key] = a
		go a.run(ctx)
		return a, nil
	}
	a.wanted = append(a.wanted, n)
	return a, registry.release() // a holds the registry already
}

func (a *announcement) poke() {
	select {
	case a.changed <- struct{}{}:
	default:
	}
}

// release ends a config's wish. After the last one the node leaves.
func (a *announcement) release(n *ProxyNode) {
	announcements.Lock()
	defer announcements.Unlock()
	a.wanted = slices.DeleteFunc(a.wanted, func(w *ProxyNode) bool { return w == n })
	if len(a.wanted) > 0 {
		a.poke()
		return
	}
	if announcements.nodes[a.key] == a {
		delete(announcements.nodes, a.key)
		lease := n.lease()
		announcements.leaving.Go(func() { a.giveWay(lease) })
	}
}

// leave withdraws the node and returns when that is done. It may be called more
// than once.
func (a *announcement) leave() {
	a.cancel()
	<-a.done
}

func (a *announcement) current() *ProxyNode {
	announcements.Lock()
	defer announcements.Unlock()
	if len(a.wanted) == 0 {
		return nil
	}
	return a.wanted[len(a.wanted)-1]
}

// run keeps the registrar as the newest config wants it.
func (a *announcement) run(ctx context.Context) {
	defer close(a.done)
	defer a.registry.release() //nolint:errcheck // closing has nobody to tell
	log := processLogger("registrar").With(zap.String("registry", a.registry.conn.String()))
	stats := acquireStats(a.registry.conn.String(), nil)
	defer stats.release(nil)

	var (
		registrar  *discovery.Registrar
		running    sync.WaitGroup
		settings   string
		unresolved string // why there is no endpoint, as it was told last
		node       discovery.Node
		options    discovery.RegistrarOptions
	)
	defer func() {
		running.Wait()
		if registrar != nil {
			instances.Delete(registrar.Instance())
		}
	}()
	look := time.NewTimer(0) // for the endpoint
	look.Stop()
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.renewal:
			if registrar != nil {
				_ = registrar.Update(node, options) // they were good before
			}
			continue
		case <-a.changed:
		case <-look.C:
		}
		n := a.current()
		if n == nil || n.settings == settings && !n.follows() {
			continue
		}
		endpoint, err := n.resolve(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			// At the start of a machine the network may come up after us, and later
			// it may be away for a while.
			if err.Error() != unresolved {
				log.Warn("cannot find the endpoint; retrying", zap.String("node", n.NodeID), zap.Error(err))
			}
			unresolved = err.Error()
			look.Reset(resolveRetry + rand.N(resolveRetry))
			continue
		}
		unresolved = ""
		if n.follows() {
			look.Reset(n.heartbeat())
		}
		if n.settings == settings && endpoint == node.Endpoint {
			continue
		}
		if n.settings == settings {
			log.Info("the endpoint has changed", zap.String("node", n.NodeID),
				zap.String("before", node.Endpoint.String()), zap.String("endpoint", endpoint.String()))
		}
		node, options, settings = n.node(endpoint), n.options(), n.settings
		options.Logger = slogOf(log)
		options.OnHeartbeat = func(err error) { stats.heartbeats.count(err == nil) }
		if registrar != nil {
			err = registrar.Update(node, options)
		} else if registrar, err = discovery.NewRegistrar(ownRecord{a.registry.conn, a}, node, options); err == nil {
			instances.Store(registrar.Instance(), struct{}{})
			running.Go(func() {
				if err := registrar.Run(ctx); err != nil {
					log.Warn("cannot leave", zap.Error(err))
				}
			})
		}
		if err != nil {
			log.Error("cannot announce", zap.String("node", n.NodeID), zap.Error(err))
		}
	}
}

// Interface guards
var (
	_ caddy.App          = (*Registrar)(nil)
	_ caddy.Provisioner  = (*Registrar)(nil)
	_ caddy.CleanerUpper = (*Registrar)(nil)
)
