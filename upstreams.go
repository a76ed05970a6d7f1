package caddydiscovery

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
	"github.com/caddy-discovery/caddy-discovery/internal/health"
)

const (
	schemeAuto         = "auto"
	defaultSyncTimeout = caddy.Duration(2 * time.Second)
)

// Upstreams is a dynamic upstream source that returns the nodes that a registry
// lists as alive right now. The registry is watched, not polled, by one
// connection for all handlers that name the same registry; a request costs one
// atomic load. A registry that is away drops nobody: the last known nodes stay
// in use.
//
// Nodes that are draining, in maintenance or have weight 0 get no new requests.
// Nodes with the role "proxy" are left out unless service or where asks for
// something, and this very process is always left out, so that proxies that list
// themselves do not proxy to each other in a circle. A request that has come through
// more than ten proxy handlers of Caddy, by its header Via, is answered with 508.
//
// Once a node is chosen there are placeholders for it, for headers that go to the
// node and for whatever comes after the handler, such as the directive log_append:
//
// Placeholder | Description
// ------------|-------------
// `{http.reverse_proxy.upstream.node.id}` | The node's id
// `{http.reverse_proxy.upstream.node.hostport}` | Host and port of its endpoint; `.host` and `.port` are each alone
// `{http.reverse_proxy.upstream.node.load}` | The load that it reported last
// `{http.reverse_proxy.upstream.node.metadata.*}` | A value of its metadata
//
// Over plain HTTP a node with a host name is dialled at an address of it that was
// checked, and Caddy's own `{http.reverse_proxy.upstream.hostport}` is that address: a
// node that serves by its name wants
// `header_up Host {http.reverse_proxy.upstream.node.hostport}`. For static upstreams
// beside nodes `host`, `port` and `hostport` are those of the upstream.
type Upstreams struct {
	// The registry to watch.
	RegistryRaw json.RawMessage `json:"registry,omitempty" caddy:"namespace=discovery.registries inline_key=backend"`

	// Only nodes whose metadata "service" is this. Placeholders are expanded for
	// each request; one that expands to nothing matches no node. Default: nodes
	// of every service
	Service string `json:"service,omitempty"`

	// Only nodes whose metadata fulfil all of these. Placeholders in the values
	// are expanded for each request. Default: no condition
	Where []Criterion `json:"where,omitempty"`

	// Nodes that fulfil these come first; others are used only when none of
	// these can serve. Earlier criteria win over later ones. Default: no
	// preference
	Prefer []Criterion `json:"prefer,omitempty"`

	// Which scheme the nodes must serve: "http", "https", or "auto" for what the
	// handler's transport speaks. A node whose endpoint names no scheme fits
	// both. Default: auto
	Scheme string `json:"scheme,omitempty"`

	// Where the nodes' endpoints may point: if anything is given, only there. Each
	// is an IP address, a CIDR range, "private_ranges" for all private and loopback
	// ranges, or a pattern of host names such as "*.example.com", in which * stands
	// for any characters. Where a host name is allowed by a range, all its addresses
	// must be. Loopback (unless the registry is reached by loopback only),
	// link-local, unspecified, broadcast and multicast addresses and those of cloud
	// metadata are denied unless a range that lies inside of theirs is allowed;
	// Caddy's admin port on this machine, what this Caddy serves itself and the
	// registry itself are denied unless their single address is. Default: everywhere
	// else
	Allow []string `json:"allow,omitempty"`

	// Where the nodes' endpoints may not point, in the form of allow. It wins over
	// allow. A host name is denied if any of its addresses is. Default: nothing
	// more than what is said there
	Deny []string `json:"deny,omitempty"`
	// How many of these nodes a request may go to, drawn for each request or
	// hashed from a value of it. Without it weights have no effect but for weight
	// 0. Default: all of them
	Pick *Pick `json:"pick,omitempty"`

	// How many of these nodes this proxy uses at all: always the same ones, chosen
	// by a hash of proxy_id, so that connections and memory stay bounded in a
	// large fleet. Other nodes replace those that cannot serve. It comes before
	// pick, and with prefer counts for each tier. Default: all of them
	Subset int `json:"subset,omitempty"`

	// What tells this proxy from the others for subset. Default: the host name, the
	// start of Caddy's instance ID, and where the first HTTP server listens
	ProxyID string `json:"proxy_id,omitempty"`

	// How long a new node takes to get its full share of the requests, beginning
	// with a tenth of it. It needs pick. Nodes that were there when this proxy
	// first saw the registry are not new. Default: no time
	SlowStart caddy.Duration `json:"slow_start,omitempty"`

	// Active health checks of the nodes. Default: none
	Health *Health `json:"health,omitempty"`

	// How long requests wait for the first listing of the registry, counted from
	// when the directory was opened. Default: 2s
	SyncTimeout caddy.Duration `json:"sync_timeout,omitempty"`

	// For how long the last known nodes stay in use while the registry is away. After
	// that there are none until it is back. Default: for ever
	MaxStale caddy.Duration `json:"max_stale,omitempty"`

	directory *sharedDirectory
	handler   *reverseproxy.Handler
	health    *sourceChecks // nil without health checks
	checks    sync.Once
	rules     *discovery.Rules
	unguarded bool          // see tellUnguarded
	https     bool          // the transport speaks TLS
	insecure  bool          // and takes any certificate
	fallback  bool          // the handler has static upstreams
	varying   bool          // the pool depends on the request
	proxy     uint64        // hash of proxy_id
	observer  *observer     // nil if nothing needs one
	limits    limits        // of the handler's passive health checks, where they matter
	random    func() uint64 // for pick
	logger    *zap.Logger
	emitter   *emitter // nil where another source of the config emits the events

	current  atomic.Pointer[view]
	build    sync.Mutex // held while a view is built; the old one serves meanwhile
	starving atomic.Bool
	outdated atomic.Bool
	waiters  waiters

	restoring sync.Once
	restore   *time.Timer
}

// A Criterion is a condition on a node's metadata.
type Criterion struct {
	// The metadata key.
	Key string `json:"key,omitempty"`

	// The values, one of which the key must have.
	Values []string `json:"values,omitempty"`
}

// CaddyModule returns the Caddy module information.
func (*Upstreams) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.upstreams.discovery",
		New: func() caddy.Module { return new(Upstreams) },
	}
}

// Provision sets up the source. It needs no registry to be there.
func (u *Upstreams) Provision(ctx caddy.Context) error {
	u.logger = ctx.Logger()
	if err := u.checkOptions(); err != nil {
		return err
	}
	if u.ProxyID == "" && u.Subset > 0 {
		var servers []listener
		for _, parent := range ctx.Modules() {
			if app, ok := parent.(*caddyhttp.App); ok {
				servers = listenersOf(app)
			}
		}
		u.ProxyID = defaultNodeID(servers)
	}
	u.proxy = hash(u.ProxyID)
	if err := u.meetParent(ctx); err != nil {
		return err
	}
	if err := exposeMetrics(ctx); err != nil {
		return err
	}
	b, err := backend.Load(ctx, u, "RegistryRaw", u.RegistryRaw)
	if err != nil {
		return err
	}
	if err := u.provisionAccess(ctx, b); err != nil {
		return err
	}
	if u.directory, err = acquireDirectory(b); err != nil {
		return fmt.Errorf("opening the registry: %w", err)
	}
	if u.Health != nil {
		if u.health, err = acquireChecks(u, b, u.handler.Transport); err != nil {
			return fmt.Errorf("opening the health checks: %w", err)
		}
	}
	// A config that is only validated gets no further than here.
	return onEvent(ctx, "started", func() {
		keepInstanceID()
		u.enlist()
		u.start()
		if u.emitter, err = emitEvents(ctx, u.directory, u.logger); err != nil {
			u.logger.Error("no events will be emitted", zap.Error(err))
		}
	})
}

// start begins to follow the registry and to check the nodes.
func (u *Upstreams) start() {
	u.directory.start()
	u.scheduleRestore()
	u.startChecks()
}

// checkOptions checks and completes what was configured. Global placeholders are
// expanded once, here.
func (u *Upstreams) checkOptions() error {
	if err := caddyblock.CheckDuration("sync_timeout", u.SyncTimeout); err != nil {
		return err
	}
	if err := caddyblock.CheckDuration("max_stale", u.MaxStale); err != nil {
		return err
	}
	if err := caddyblock.CheckDuration("slow_start", u.SlowStart); err != nil {
		return err
	}
	if u.SlowStart > 0 && u.Pick == nil {
		return errors.New("slow_start needs pick: without it every node is returned, and Caddy's policies know no shares; want a line such as 'pick 2'")
	}
	if u.SyncTimeout == 0 {
		u.SyncTimeout = defaultSyncTimeout
	}
	u.random = randomly
	if u.Subset < 0 {
		return fmt.Errorf("subset: invalid number %d, want 1 or more", u.Subset)
	}
	if u.Health != nil {
		if err := u.Health.check(); err != nil {
			return err
		}
	}
	if err := backend.ReplaceGlobals(&u.ProxyID); err != nil {
		return fmt.Errorf("proxy_id: %w", err)
	}
	switch u.Scheme {
	case "":
		u.Scheme = schemeAuto
	case schemeAuto, "http", "https":
	default:
		return fmt.Errorf("scheme: invalid value %q, want auto, http or https", u.Scheme)
	}
	repl := caddy.NewReplacer()
	expand := func(s *string) {
		if strings.Contains(*s, "{") {
			*s = repl.ReplaceKnown(*s, "")
			u.varying = u.varying || strings.Contains(*s, "{")
		}
	}
	expand(&u.Service)
	for name, criteria := range map[string][]Criterion{"where": u.Where, "prefer": u.Prefer} {
		for _, c := range criteria {
			if c.Key == "" || len(c.Values) == 0 {
				return fmt.Errorf("%s: a criterion needs a key and at least one value, have key %q and %d values", name, c.Key, len(c.Values))
			}
			for i := range c.Values {
				expand(&c.Values[i])
			}
		}
	}
	return nil
}

// meetParent learns from the handler that the source belongs to, and refuses what
// cannot work there.
func (u *Upstreams) meetParent(ctx caddy.Context) error {
	var handler *reverseproxy.Handler
	for _, m := range ctx.Modules() {
		if h, ok := m.(*reverseproxy.Handler); ok {
			handler = h
		}
	}
	if handler == nil {
		return errors.New("the discovery source works in a reverse_proxy handler only")
	}
	u.handler = handler
	u.meetTransport(handler.Transport)
	u.fallback = len(handler.Upstreams) > 0
	if u.Health != nil {
		if err := u.Health.checkTransport(handler.Transport); err != nil {
			return err
		}
	}
	policy := policyOf(handler)
	if _, ok := policy.(*reverseproxy.WeightedRoundRobinSelection); ok {
		return errors.New("lb_policy weighted_round_robin gives its weights by position, and a discovered list has no fixed positions; " +
			"want another policy, such as random, round_robin or least_conn")
	}
	if u.Pick != nil {
		if err := u.Pick.check(policy); err != nil {
			return err
		}
	}
	u.watch(ctx, handler, policy)
	if hc := handler.HealthChecks; hc != nil && hc.Active != nil {
		u.logger.Warn("the handler's active health checks (health_uri and the like) look at static upstreams only, not at discovered nodes; passive health checks look at both; " +
			"to check discovered nodes, write 'health { uri <path> }' into dynamic discovery")
	}
	return nil
}

// watch has an observer look at the handler's attempts, if there is anything that
// it should see.
func (u *Upstreams) watch(ctx caddy.Context, handler *reverseproxy.Handler, policy reverseproxy.Selector) {
	lb := handler.LoadBalancing
	retries := lb != nil && (lb.Retries > 0 || lb.TryDuration > 0)
	if hc := handler.HealthChecks; hc != nil && hc.Passive != nil && (u.Pick != nil || u.Subset > 0 || len(u.Prefer) > 0) {
		u.limits.checks = hc.Passive
	}
	_, byLoad := policy.(*LeastLoad)
	nodes := mentionsNodes(ctx, handler)
	o := observe(handler, u.logger)
	u.warnOfLoops()
	if !retries && !byLoad && !nodes && u.limits.checks == nil {
		return
	}
	u.observer = o
	u.observer.tracks = true
	u.observer.hosts = u.observer.hosts || u.limits.checks != nil
	u.observer.nodes = u.observer.nodes || nodes
}

// Cleanup lets go of the directory, which ends if nobody else uses it. Caddy does
// not wait for the requests of a config that another one replaces.
func (u *Upstreams) Cleanup() error {
	u.delist()
	if u.emitter != nil {
		u.emitter.stop()
	}
	if u.waiters.leave(func() {
		if err := u.letGo(); err != nil {
			u.logger.Error("cleaning up after the last request", zap.Error(err))
		}
	}) {
		return nil
	}
	return u.letGo()
}

func (u *Upstreams) letGo() error {
	var err error
	if u.health != nil {
		err = u.health.release()
	}
	u.stopRestore()
	if u.directory != nil {
		err = errors.Join(err, u.directory.release())
	}
	u.closeIdle()
	return err
}

// lateRequests is how long the last requests of a config are under way, nearly
// always.
const lateRequests = 5 * time.Second

// closeIdle closes the idle connections of a transport that nobody else cleans up:
// Caddy does so for one that the configuration names, and keeps those of its
// default for two minutes. After some reloads under load a large fleet would have
// as many connections to each node.
func (u *Upstreams) closeIdle() {
	if u.handler == nil {
		return
	}
	if t, ok := u.handler.Transport.(*reverseproxy.HTTPTransport); ok && t.Transport != nil {
		t.Transport.CloseIdleConnections()
		// A request of the old config that is sent from now on, because it had to wait
		// or to try again, leaves another one.
		time.AfterFunc(time.Duration(u.SyncTimeout)+lateRequests, t.Transport.CloseIdleConnections)
	}
}

// GetUpstreams returns the nodes for a request: sorted by id, or in the order in
// which they were picked. They are freshly allocated, because Caddy writes to them
// (https://github.com/caddyserver/caddy/issues/5736).
func (u *Upstreams) GetUpstreams(r *http.Request) ([]*reverseproxy.Upstream, error) {
	s := screen{limits: u.limits, ramp: time.Duration(u.SlowStart)}
	pool := u.poolFor(r)
	if u.MaxStale > 0 && u.givenUp() {
		return u.upstreams(nil, nil)
	}
	var c *course
	if u.observer != nil {
		c = u.observer.course(r)
	}
	if c == nil {
		var few [4]*discovery.Entry // on the stack
		return u.upstreams(u.choose(pool, &s, r, few[:0]), nil)
	}
	s.tried = &c.tried
	if !c.tried.empty() {
		u.tellFailed(pool, &c.tried)
	}
	var few []*discovery.Entry
	if len(c.batches) == 0 {
		few = c.room.entries[:0]
	}
	nodes := u.choose(pool, &s, r, few)
	upstreams, err := u.upstreams(nodes, &c.tried)
	if len(upstreams) > 0 {
		c.batches = append(c.batches, batch{first: upstreams[0], nodes: nodes})
	}
	return upstreams, err
}

// tellFailed tells the directory which nodes behind host names have failed a request.
func (u *Upstreams) tellFailed(p *pool, tried *addressSet) {
	for _, t := range p.tiers {
		for _, nodes := range [][]*discovery.Entry{t.nodes, t.reserve} {
			for _, e := range nodes {
				if e.Named() && dialledAtAny(e, tried) {
					u.directory.Failed(e, u.dial(e))
				}
			}
		}
	}
}

// upstreams makes what Caddy wants of nodes. One that is tried again is dialled at
// another address, if its host name has one.
func (u *Upstreams) upstreams(nodes []*discovery.Entry, tried *addressSet) ([]*reverseproxy.Upstream, error) {
	u.directory.stats.lookup(len(nodes) > 0)
	if len(nodes) == 0 {
		return nil, nil // see observer.choose for static upstreams
	}
	block := make([]reverseproxy.Upstream, len(nodes))
	upstreams := make([]*reverseproxy.Upstream, len(nodes))
	for i, e := range nodes {
		block[i].Dial = u.dial(e)
		if !tried.empty() && !u.https && tried.has(block[i].Dial) {
			block[i].Dial = e.AddressBeside(tried.has)
		}
		upstreams[i] = &block[i]
	}
	return upstreams, nil
}

// givenUp reports whether the view is older than max_stale, and logs when that
// begins and ends.
func (u *Upstreams) givenUp() bool {
	age := u.directory.Stale()
	given := age > time.Duration(u.MaxStale)
	if u.outdated.Load() == given || u.outdated.Swap(given) == given {
		return given
	}
	if given {
		u.logger.Warn("giving up the last known nodes: the registry has been away for longer than max_stale",
			zap.String("service", u.Service), zap.Duration("away", age.Round(time.Millisecond)), zap.Bool("static_upstreams", u.fallback))
	} else {
		u.logger.Info("the registry is back; its nodes are in use again", zap.String("service", u.Service))
	}
	return given
}

// poolFor returns the pool for a request, which may have to wait for it soon after
// a cold start or the beginning of the health checks.
func (u *Upstreams) poolFor(r *http.Request) *pool {
	u.start()
	if snapshot := u.directory.Snapshot(); snapshot.Synced {
		if p := u.pool(snapshot, r); len(p.tiers) > 0 || u.health == nil {
			return p
		}
	}
	// A reload does not end what a request of the old config waits for.
	u.waiters.enter()
	defer u.waiters.exit()
	p := u.pool(u.snapshot(r), r)
	if len(p.tiers) == 0 && u.health != nil && (u.MaxStale == 0 || !u.givenUp()) {
		p = u.awaitChecks(r)
	}
	return p
}

// waiters are requests that need something a while longer than their config runs.
type waiters struct {
	mu    sync.Mutex // guards what follows; nothing else happens under it
	count int
	after func() // left for the last of them to do
}

func (w *waiters) enter() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.count++
}

func (w *waiters) exit() {
	w.mu.Lock()
	var after func()
	if w.count--; w.count == 0 {
		after, w.after = w.after, nil
	}
	w.mu.Unlock()
	if after != nil {
		after()
	}
}

// leave reports whether there are any, and then leaves after for the last one.
func (w *waiters) leave(after func()) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.count > 0 {
		w.after = after
	}
	return w.count > 0
}

// snapshot returns the directory's snapshot. Soon after a cold start it waits
// for the first listing, or, when half of that time has passed, for a node of the
// last known list.
func (u *Upstreams) snapshot(r *http.Request) *discovery.Snapshot {
	snapshot := u.directory.Snapshot()
	if snapshot.Synced {
		return snapshot
	}
	left := time.Until(time.Unix(0, u.directory.opened.Load()).Add(time.Duration(u.SyncTimeout)))
	if left <= 0 {
		return snapshot
	}
	timer := time.NewTimer(left)
	defer timer.Stop()
	half := time.NewTimer(time.Until(u.restoresAt()))
	defer half.Stop()
	var superseded <-chan struct{} // nil, which blocks, before half the time has passed
	for {
		select {
		case <-u.directory.Synced():
			return u.directory.Snapshot()
		case <-timer.C:
			return u.directory.Snapshot()
		case <-r.Context().Done():
			return u.directory.Snapshot()
		case <-half.C:
		case <-superseded:
		}
		snapshot = u.directory.Snapshot()
		if snapshot.Synced || snapshot.Number > 0 && len(u.pool(snapshot, r).tiers) > 0 {
			return snapshot
		}
		superseded = snapshot.Superseded()
	}
}

// A view is what a source made of one snapshot.
type view struct {
	snapshot *discovery.Snapshot
	health   uint64 // version of the health checks
	fixed    *pool  // where the pool does not depend on the request

	values map[string]map[string]bool // where it does: what criteria's keys have for values

	mu     sync.RWMutex
	pools  map[string]*pool // by the expanded values
	pooled int              // bytes of all of them, about
}

// Bounds of what one view keeps, because clients may choose among the values that
// nodes have: pools, and bytes of all of them. With consistent hashing a pool of
// 10,000 nodes takes more than ten megabytes.
const (
	maxPools  = 1000
	maxPooled = 128 << 20
)

// keep keeps a pool for later requests with the same values. Where there is no
// room it takes that of others, so that odd values do not shut out those that are
// asked for often. The newest pool is always kept, however large it is: to
// build it anew for each request would cost more.
func (v *view) keep(key string, p *pool, pick *Pick) {
	p.bytes = p.size(pick)
	v.mu.Lock()
	defer v.mu.Unlock()
	if old := v.pools[key]; old != nil {
		if !old.overdue() {
			return
		}
		v.drop(key)
	}
	for other := range v.pools {
		if len(v.pools) < maxPools && v.pooled+len(key)+p.bytes <= maxPooled {
			break
		}
		v.drop(other)
	}
	v.pools[key] = p
	v.pooled += len(key) + p.bytes
}

// drop lets go of a pool. The caller holds the lock.
func (v *view) drop(key string) {
	v.pooled -= len(key) + v.pools[key].bytes
	delete(v.pools, key)
}

// pool returns the source's pool of a snapshot. The first request that sees a
// new snapshot builds it; those that come meanwhile get the one before, so that
// no request waits for another, unless nobody was in that one.
func (u *Upstreams) pool(snapshot *discovery.Snapshot, r *http.Request) *pool {
	v := u.current.Load()
	if v == nil || v.snapshot != snapshot || u.health != nil && v.health != u.health.Version() || v.fixed != nil && v.fixed.overdue() {
		if v == nil {
			u.build.Lock()
		} else if !u.build.TryLock() {
			if p := u.poolOf(v, r); len(p.tiers) > 0 {
				return p
			}
			u.build.Lock()
		}
		var turns bool
		v, turns = u.renew(snapshot)
		u.build.Unlock()
		if turns {
			u.tellStarvation(v)
		}
		u.tellUnguarded(v.snapshot)
	}
	return u.poolOf(v, r)
}

// renew makes the view of a snapshot the current one, unless a newer one is, and
// reports whether the source begins or ends to have no node with it.
func (u *Upstreams) renew(snapshot *discovery.Snapshot) (*view, bool) {
	var health uint64
	if u.health != nil {
		health = u.health.Version()
	}
	if v := u.current.Load(); v != nil && (v.snapshot.Number > snapshot.Number ||
		v.snapshot.Number == snapshot.Number && v.health >= health && (v.fixed == nil || !v.fixed.overdue())) {
		return v, false
	}
	v, turns := &view{snapshot: snapshot, health: health}, false
	if u.varying {
		v.pools = make(map[string]*pool)
		v.values = u.values(snapshot)
	} else {
		v.fixed = u.newPool(snapshot, u.wish(nil))
		if last := u.current.Load(); last != nil {
			v.fixed.inherit(last.fixed)
		}
		v.fixed.prepare(u.Pick)
		// A pool that waits for first checks is not empty yet.
		if starving := len(v.fixed.tiers) == 0; v.fixed.awaits.IsZero() {
			turns = u.starving.Swap(starving) != starving
		}
	}
	u.current.Store(v)
	return v, turns
}

// values returns, for each key of a criterion, the values that nodes have.
func (u *Upstreams) values(snapshot *discovery.Snapshot) map[string]map[string]bool {
	values := make(map[string]map[string]bool)
	for _, criteria := range [][]Criterion{u.Where, u.Prefer} {
		for _, c := range criteria {
			values[c.Key] = make(map[string]bool)
		}
	}
	for _, e := range snapshot.Nodes() {
		for key, known := range values {
			if v, ok := e.Node.Metadata[key]; ok && !known[v] {
				known[v] = true
			}
		}
	}
	return values
}

// reduce leaves out of a wish what no node has, so that what clients make up costs
// nothing: all of it gets one pool. It reports false if no node can fulfil the
// wish.
func (v *view) reduce(w wish) bool {
	for i, criteria := range [][]Criterion{w.where, w.prefer} {
		for j, c := range criteria {
			criteria[j].Values = slices.DeleteFunc(c.Values, func(value string) bool { return !v.values[c.Key][value] })
			if i == 0 && len(criteria[j].Values) == 0 {
				return false
			}
		}
	}
	return true
}

func (u *Upstreams) poolOf(v *view, r *http.Request) *pool {
	if v.fixed != nil {
		return v.fixed
	}
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		repl = caddy.NewReplacer()
	}
	w := u.wish(repl)
	if !v.reduce(w) || u.Service != "" && len(v.snapshot.Service(w.service)) == 0 {
		return new(pool)
	}
	key := w.key()
	v.mu.RLock()
	p := v.pools[key]
	v.mu.RUnlock()
	if p != nil && !p.overdue() {
		return p
	}
	p = u.newPool(v.snapshot, w)
	p.prepare(u.Pick)
	v.keep(key, p, u.Pick)
	return p
}

// wish is what a request asks for: the source's filters, expanded.
type wish struct {
	service string
	where   []Criterion
	prefer  []Criterion
}

// wish expands the filters. Without a replacer there is nothing to expand.
func (u *Upstreams) wish(repl *caddy.Replacer) wish {
	if repl == nil {
		return wish{service: u.Service, where: u.Where, prefer: u.Prefer}
	}
	expand := func(criteria []Criterion) []Criterion {
		expanded := make([]Criterion, len(criteria))
		for i, c := range criteria {
			expanded[i].Key = c.Key
			for _, v := range c.Values {
				if v = repl.ReplaceAll(v, ""); v != "" {
					expanded[i].Values = append(expanded[i].Values, v)
				}
			}
		}
		return expanded
	}
	return wish{service: repl.ReplaceAll(u.Service, ""), where: expand(u.Where), prefer: expand(u.Prefer)}
}

// key identifies an expanded wish among those of one source. The lengths keep
// values that contain separators apart.
func (w wish) key() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d:%s", len(w.service), w.service)
	for _, criteria := range [][]Criterion{w.where, w.prefer} {
		for _, c := range criteria {
			fmt.Fprintf(&b, "|%d", len(c.Values))
			for _, v := range c.Values {
				fmt.Fprintf(&b, ",%d:%s", len(v), v)
			}
		}
	}
	return b.String()
}

// matches reports whether the metadata fulfil the criterion.
func (c Criterion) matches(metadata map[string]string) bool {
	v, ok := metadata[c.Key]
	return ok && slices.Contains(c.Values, v)
}

// A pool is what a source makes of a snapshot for one wish. It never changes.
type pool struct {
	tiers []*tier // by preference; none is empty

	// awaits is when nodes that are kept out because they have not been checked yet
	// serve all the same, as long as nobody else does; zero if there are none.
	awaits time.Time

	bytes int // what the pool takes, about; set before others see it
}

// overdue reports whether the time has come that an empty pool waits for.
func (p *pool) overdue() bool { return !p.awaits.IsZero() && !time.Now().Before(p.awaits) }

// inherit gives the tiers the rings of those that they replace, to derive theirs
// from. Pools that depend on the request have to do without.
func (p *pool) inherit(last *pool) {
	if last == nil {
		return
	}
	for _, t := range p.tiers {
		for _, old := range last.tiers {
			if old.rank == t.rank {
				t.ring.Store(old.ring.Load())
			}
		}
	}
}

// prepare derives what the first request will need of the pool; its other tiers
// follow when they are needed.
func (p *pool) prepare(pick *Pick) {
	if len(p.tiers) > 0 {
		p.tiers[0].prepare(pick)
	}
}

// size returns about how many bytes the pool takes once all of it is in use.
func (p *pool) size(pick *Pick) int {
	const slot = 8 // a pointer, or a slot of an alias table
	size := 0
	for _, t := range p.tiers {
		size += (len(t.nodes) + len(t.reserve)) * slot
		switch {
		case pick == nil:
		case pick.Hash != "":
			_, points := ringStep(t.nodes)
			size += ringBytes(len(t.nodes), points)
		default:
			size += len(t.nodes) * slot
		}
	}
	return size
}

func (u *Upstreams) newPool(snapshot *discovery.Snapshot, w wish) *pool {
	candidates := snapshot.Nodes()
	if u.Service != "" {
		candidates = snapshot.Service(w.service)
		if w.service == "" {
			candidates = nil // it expanded to nothing
		}
	}
	nodes := make([]*discovery.Entry, 0, len(candidates))
	for _, e := range candidates {
		if u.obstacle(e, w) == "" {
			nodes = append(nodes, e)
		}
	}
	p := &pool{}
	if len(nodes) == 0 && u.health != nil {
		nodes, p.awaits = u.unchecked(candidates, w)
	}
	if len(nodes) == 0 {
		return p
	}
	if len(w.prefer) == 0 {
		p.tiers = []*tier{u.newTier("", nodes)}
		return p
	}

	// A node's tier is the binary number whose digits say which criteria it
	// fails, the earliest criterion first: an earlier line outweighs all later
	// ones together.
	tiers := make(map[string][]*discovery.Entry)
	for _, e := range nodes {
		fails := make([]byte, len(w.prefer))
		for i, c := range w.prefer {
			fails[i] = '1'
			if c.matches(e.Node.Metadata) {
				fails[i] = '0'
			}
		}
		tiers[string(fails)] = append(tiers[string(fails)], e)
	}
	for _, fails := range slices.Sorted(maps.Keys(tiers)) {
		p.tiers = append(p.tiers, u.newTier(fails, tiers[fails]))
	}
	return p
}

// unchecked returns those candidates that have waited for their first check for as
// long as sync_timeout, and otherwise when the first of them will have. Where some
// are known to be ill the others do not serve without a check, and are awaited for
// sync_timeout after the checks began only: not each time that one joins.
func (u *Upstreams) unchecked(candidates []*discovery.Entry, w wish) ([]*discovery.Entry, time.Time) {
	now := time.Now()
	var nodes []*discovery.Entry
	var next, began time.Time // began: the first of those that are known
	for _, e := range candidates {
		if u.ineligible(e, w) != "" {
			continue
		}
		h, since := u.health.Of(e)
		if h.Known() && (began.IsZero() || since.Before(began)) {
			began = since
		}
		if h != health.Unchecked {
			continue
		}
		if since.IsZero() {
			since = now // the checks are about to begin
		}
		until := since.Add(time.Duration(u.SyncTimeout))
		switch {
		case !until.After(now):
			nodes = append(nodes, e)
		case next.IsZero() || until.Before(next):
			next = until
		}
	}
	if !began.IsZero() {
		nodes = nil
		until := began.Add(time.Duration(u.SyncTimeout))
		switch {
		case !until.After(now):
			next = time.Time{}
		case until.Before(next):
			next = until
		}
	}
	if len(nodes) > 0 {
		next = time.Time{}
	}
	return nodes, next
}

// obstacle returns why a node of the wanted service gets no request by this
// source, "" if nothing is in the way.
func (u *Upstreams) obstacle(e *discovery.Entry, w wish) string {
	reason := u.ineligible(e, w)
	if reason == "" && u.health != nil {
		switch h, _ := u.health.Of(e); {
		case h == health.Unchecked:
			reason = "unhealthy: not checked yet"
		case !h.Serves():
			reason = "unhealthy"
		}
	}
	return reason
}

// ineligible returns why a node gets no request by this source whatever its checks
// say, "" if it may get some.
func (u *Upstreams) ineligible(e *discovery.Entry, w wish) string {
	switch {
	case e.Weight() == 0 && e.Node.State() == discovery.StateUp:
		return "weight 0"
	case !e.Serves():
		return string(e.State())
	}
	return u.mismatch(e, w)
}

// mismatch returns why a node does not belong to this source, whatever its state;
// "" if it does.
func (u *Upstreams) mismatch(e *discovery.Entry, w wish) string {
	n := &e.Node
	switch {
	case !u.fits(n.Endpoint.Scheme):
		return "scheme"
	case announcedHere(e.Instance()):
		return "this process itself"
	case e.Proxy() && u.Service == "" && len(u.Where) == 0:
		return "role proxy"
	}
	for _, c := range w.where {
		if !c.matches(n.Metadata) {
			return "where " + c.Key
		}
	}
	return u.denied(e)
}

// fits reports whether nodes of the scheme can be reached by the transport.
func (u *Upstreams) fits(scheme string) bool {
	switch {
	case scheme == "":
		return true
	case u.Scheme == schemeAuto:
		return (scheme == "https") == u.https
	default:
		return scheme == u.Scheme
	}
}

// tellStarvation logs that the source begins or ends to have no node: once each, not
// for each request.
func (u *Upstreams) tellStarvation(v *view) {
	snapshot, p := v.snapshot, v.fixed
	if len(p.tiers) > 0 {
		u.logger.Info("nodes can serve again", zap.String("service", u.Service), zap.Int("nodes", len(p.tiers[0].nodes)))
		return
	}
	reasons := make(map[string]int)
	candidates := snapshot.Nodes()
	if u.Service != "" {
		candidates = snapshot.Service(u.Service)
	}
	for _, e := range candidates {
		reasons[u.obstacle(e, u.wish(nil))]++
	}
	u.logger.Warn("no node can serve",
		zap.String("service", u.Service),
		zap.Int("listed", len(snapshot.Nodes())),
		zap.Int("of_this_service", len(candidates)),
		zap.Any("because", reasons),
		zap.Bool("static_upstreams", u.fallback))
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Upstreams)(nil)
	_ caddy.CleanerUpper          = (*Upstreams)(nil)
	_ reverseproxy.UpstreamSource = (*Upstreams)(nil)
)
