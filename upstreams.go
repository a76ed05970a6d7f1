package caddydiscovery

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
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
	"golang.org/x/time/rate"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
	"github.com/caddy-discovery/caddy-discovery/internal/health"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

const (
	schemeAuto         = "auto"
	defaultSyncTimeout = caddy.Duration(2 * time.Second)

	// How many lines a second a source logs of having no node, or having one again.
	turnRate = 20
)

// Upstreams is a dynamic upstream source that returns the nodes that a registry
// lists as alive right now. The registry is watched, not polled, by one
// connection for all handlers that name the same registry; a request costs one
// atomic load. A registry that is away drops nobody: the last known nodes stay
// in use.
//
// Nodes that are draining, in maintenance or have weight 0 get no new requests. Under the
// policies random, random_choose, round_robin, least_conn, least_load and least_latency the
// others get requests by their weights. Whatever policy of Caddy's the handler has, the source returns
// only the nodes that it would choose of all, because each one more costs Caddy a lock.
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
// `{http.reverse_proxy.upstream.node.tried}` | The ids of the nodes that the request went to so far, this one last, separated by commas
// `{http.reverse_proxy.upstream.node.session}` | With sticky: whether the client's session was `kept`, is `new` or has `moved` here
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

	// Only nodes that announce the host of the request, in their metadata "hosts", and of
	// those the ones with the longest path that fits it, in "paths". A host that a node
	// announces as it is comes before a wildcard. Nodes that announce no host get no
	// request. Which hosts records may announce the global option discovery says. Default:
	// false
	Route bool `json:"route,omitempty"`

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
	// hashed from a value of it, and among which the handler's policy then chooses.
	// Default: the policy chooses among all of them
	Pick *Pick `json:"pick,omitempty"`

	// How many of these nodes this proxy uses at all, so that connections and memory stay
	// bounded in a large fleet. Proxies that list themselves in the same registry, by the
	// registrar app, and whose sources have a subset and the same service, where, prefer
	// and scheme, share the nodes evenly: each node is used by as many of them as any
	// other, or one more. Then it is raised where so many proxies could not use all nodes
	// with it. Otherwise the nodes are drawn by a hash of proxy_id, which leaves some idle.
	// Other nodes replace those that cannot serve. It comes before pick, and with prefer
	// counts for each tier. Default: all of them
	Subset int `json:"subset,omitempty"`

	// What tells this proxy from the others for subset. Two processes with one id count
	// as one proxy. Default: the host name, the start of Caddy's instance ID, and where
	// the first HTTP server listens
	ProxyID string `json:"proxy_id,omitempty"`

	// How long a new node takes to get its full share of the requests, beginning
	// with a tenth of it. It needs a policy that knows shares (random, random_choose,
	// round_robin, least_conn, least_load, least_latency, and cookie with one of them to
	// fall back to) or pick. Nodes that were there when
	// this proxy first saw the registry are not new. Default: no time
	SlowStart caddy.Duration `json:"slow_start,omitempty"`

	// Keeps the requests of a client at one node, by a cookie. Default: each request goes
	// where the policy sends it
	Sticky *Sticky `json:"sticky,omitempty"`

	// Active health checks of the nodes. Default: none
	Health *Health `json:"health,omitempty"`

	// Which nodes get no requests for some time because their requests fail. Default:
	// none
	Outlier *Outlier `json:"outlier,omitempty"`

	// How many requests are tried again, where the handler has lb_retries or
	// lb_try_duration. Default: all that it would
	RetryBudget *RetryBudget `json:"retry_budget,omitempty"`

	// What is counted of the requests to the nodes. Default: nothing
	Metrics *TrafficMetrics `json:"metrics,omitempty"`

	// How long requests wait for the first listing of the registry, counted from
	// when the directory was opened. Default: 2s
	SyncTimeout caddy.Duration `json:"sync_timeout,omitempty"`

	// For how long the last known nodes stay in use while the registry is away. After
	// that there are none until it is back. Default: for ever
	MaxStale caddy.Duration `json:"max_stale,omitempty"`

	// From here on in the order of use: Provision looks at the handler, opens the
	// directory and says which nodes requests get; start begins to follow the registry;
	// GetUpstreams asks pickers; Cleanup releases what others may share.

	handler   *reverseproxy.Handler
	https     bool           // the transport speaks TLS
	insecure  bool           // and takes any certificate
	wrapper   *policyWrapper // nil if nothing needs what requests have been through
	observers observers
	counted   bool // in the metrics of traffic
	shortlist shortlist
	limited   shortlist // in its place where nodes name how many requests they take
	beside    bool      // other sources may be beside this one, under multi
	number    int       // of this source in its handler, from 1
	rules     *discovery.Rules
	unguarded bool // see tellUnguarded

	directory *sharedDirectory
	health    *sourceChecks   // nil without health checks
	outliers  *sourceOutliers // nil without ejection
	subset    *subset         // nil without one
	static    picker.Query    // what is asked for whatever the request
	builder   picker.Builder
	pickers   picker.Cache
	routes    picker.Routes // in their place with Route, unless queries vary
	hosts     *hostUser     // nil without Route

	starting  sync.Once
	cold      coldStart
	outdated  atomic.Bool  // the last known nodes are given up
	waiting   atomic.Int32 // requests that wait; less than 0 when the config has left, too
	releasing sync.Once

	logger  *zap.Logger
	turns   *rate.Limiter // of lines that the source has no node, or has one again
	emitter *emitter      // nil where another source of the config emits the events
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
		if app := parentOf[*caddyhttp.App](ctx); app != nil {
			servers = listenersOf(app)
		}
		u.ProxyID = defaultNodeID(servers)
	}
	if err := u.inspectHandler(ctx); err != nil {
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
	u.cold.directory, u.cold.timeout = u.directory.Directory, time.Duration(u.SyncTimeout)
	u.provisionPickers()
	if err := u.provisionOptions(ctx, b); err != nil {
		return err
	}
	// A config that is only validated gets no further than here.
	return onEvent(ctx, "started", func() {
		keepInstanceID()
		u.directory.join(u)
		u.start()
		if u.subset != nil {
			u.subset.start(u.Subset, u.mayServe)
		}
		if u.emitter, err = emitEvents(ctx, u.directory, u.logger); err != nil {
			u.logger.Error("no events will be emitted", zap.Error(err))
		}
	})
}

// provisionOptions sets up what is optional, in the order in which one relies on another.
func (u *Upstreams) provisionOptions(ctx caddy.Context, b backend.Backend) error {
	if u.Route {
		if err := u.provisionRoutes(ctx); err != nil {
			return err
		}
	}
	if u.Sticky != nil {
		if err := u.Sticky.provision(u.directory); err != nil {
			return err
		}
	}
	if err := u.provisionSubset(ctx); err != nil {
		return err
	}
	if u.Health != nil {
		if err := u.provisionChecks(b); err != nil {
			return err
		}
	}
	if u.Outlier != nil {
		if err := u.provisionOutliers(ctx, b); err != nil {
			return err
		}
	}
	if u.RetryBudget != nil {
		if err := u.provisionRetryBudget(ctx); err != nil {
			return err
		}
	}
	if u.Metrics != nil {
		if err := u.countTraffic(ctx); err != nil {
			return err
		}
	}
	return nil
}

// checkOptions checks and completes what was configured. Global placeholders are
// expanded once, here.
func (u *Upstreams) checkOptions() error {
	if err := cmp.Or(caddyblock.CheckDuration("sync_timeout", u.SyncTimeout), caddyblock.CheckDuration("max_stale", u.MaxStale),
		caddyblock.CheckDuration("slow_start", u.SlowStart)); err != nil {
		return err
	}
	if u.SyncTimeout == 0 {
		u.SyncTimeout = defaultSyncTimeout
	}
	if u.Subset < 0 {
		return fmt.Errorf("subset: invalid number %d, want 1 or more", u.Subset)
	}
	if u.Health != nil {
		if err := u.Health.check(); err != nil {
			return err
		}
	}
	if u.Sticky != nil {
		if err := u.Sticky.check(); err != nil {
			return fmt.Errorf("sticky: %w", err)
		}
	}
	if u.Outlier != nil {
		if err := u.Outlier.check(); err != nil {
			return err
		}
	}
	if u.RetryBudget != nil {
		if err := u.RetryBudget.check(); err != nil {
			return err
		}
	}
	if u.Metrics != nil {
		if err := u.Metrics.check(); err != nil {
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
	u.Service = repl.ReplaceKnown(u.Service, "")
	for name, criteria := range map[string][]Criterion{"where": u.Where, "prefer": u.Prefer} {
		for _, c := range criteria {
			if c.Key == "" || len(c.Values) == 0 {
				return fmt.Errorf("%s: a criterion needs a key and at least one value, have key %q and %d values", name, c.Key, len(c.Values))
			}
			for i := range c.Values {
				c.Values[i] = repl.ReplaceKnown(c.Values[i], "")
			}
		}
	}
	return nil
}

// inspectHandler learns from the handler that the source belongs to, and refuses what
// cannot work there.
func (u *Upstreams) inspectHandler(ctx caddy.Context) error {
	if u.handler = parentOf[*reverseproxy.Handler](ctx); u.handler == nil {
		return errors.New("the discovery source works in a reverse_proxy handler only")
	}
	w := wrapPolicy(u.handler, u.logger)
	w.routes = w.routes || u.Route
	u.inspectTransport(w.transport)
	if u.Health != nil {
		if err := u.Health.checkTransport(w.transport); err != nil {
			return err
		}
	}
	if _, ok := w.Selector.(*reverseproxy.WeightedRoundRobinSelection); ok {
		return errors.New("lb_policy weighted_round_robin gives its weights by position, and a discovered list has no fixed positions; " +
			"want lb_policy round_robin, which goes by the weights in the nodes' records (metadata \"weight\")")
	}
	if u.Sticky != nil {
		if err := u.Sticky.attach(ctx, u, w); err != nil {
			return err
		}
	}
	if err := u.chooseShortlist(ctx, w); err != nil {
		return err
	}
	u.track(w, mentionsNodes(ctx, u.handler))
	if err := u.learn(ctx, w); err != nil {
		return err
	}
	u.warnOfLoops()
	if hc := u.handler.HealthChecks; hc != nil && hc.Active != nil {
		u.logger.Warn("the handler's active health checks (health_uri and the like) look at static upstreams only, not at discovered nodes; passive health checks look at both; " +
			"to check discovered nodes, write 'health { uri <path> }' into dynamic discovery")
	}
	return nil
}

// chooseShortlist decides which nodes requests get, by what the handler's policy needs.
func (u *Upstreams) chooseShortlist(ctx caddy.Context, w *policyWrapper) error {
	u.beside = parentOf[*reverseproxy.MultiUpstreams](ctx) != nil
	w.beside = u.beside
	w.sources++
	u.number = w.sources
	if u.Pick != nil {
		if err := u.Pick.check(w.Selector); err != nil {
			return err
		}
		u.shortlist = u.Pick.shortlist()
		u.limited = u.shortlist
	} else {
		u.shortlist = shortlistFor(w.Selector, u.passive() != nil)
		u.limited = shortlistFor(w.Selector, true)
		w.shown = u.shortlist.shown
		if l, ok := w.Selector.(learner); ok {
			l.weighBy(u.builder.Share)
		}
	}
	if u.SlowStart > 0 {
		return u.shortlist.checkSlowStart(w.Selector)
	}
	return nil
}

// passive returns the passive health checks of the handler, nil if there are none.
func (u *Upstreams) passive() *reverseproxy.PassiveHealthChecks {
	if hc := u.handler.HealthChecks; hc != nil {
		return hc.Passive
	}
	return nil
}

// track has the wrapper note what requests have been through if anything needs that:
// retries, a policy of ours, least_conn, the passive health checks of candidates that are few, or
// placeholders of the chosen node.
func (u *Upstreams) track(w *policyWrapper, nodes bool) {
	lb := u.handler.LoadBalancing
	_, learns := w.Selector.(learner)
	passive := u.passive() != nil && (u.shortlist.size > 0 || u.Subset > 0 || len(u.Prefer) > 0)
	if passive {
		u.builder.Unavailable = passiveChecks{u.passive()}.unavailable
	}
	counts := u.shortlist.counts
	if passive || nodes || counts || learns || u.beside || lb.Retries > 0 || lb.TryDuration > 0 {
		u.wrapper, w.tracks = w, true
		w.hosts = w.hosts || passive || counts
		w.nodes = w.nodes || nodes
	}
}

// provisionPickers tells the pickers which nodes the source uses and how it picks among
// them.
func (u *Upstreams) provisionPickers() {
	u.pickers.Query = *u.query(func(s string) string { return s })
	u.static = picker.Query{Service: u.Service, ByService: u.Service != "" && !varies(u.Service)}
	for _, c := range u.pickers.Query.Where {
		if !slices.ContainsFunc(c.Values, varies) {
			u.static.Where = append(u.static.Where, c)
		}
	}
	u.pickers.Varies = varies(u.Service) || slices.ContainsFunc(slices.Concat(u.Where, u.Prefer), func(c Criterion) bool {
		return slices.ContainsFunc(c.Values, varies)
	})
	u.pickers.Builder = &u.builder
	u.pickers.Version = func() uint64 { return 0 }
	u.turns = rate.NewLimiter(turnRate, turnRate)
	u.pickers.Built, u.pickers.Charge = u.onBuilt, u.directory.Charge

	b := &u.builder
	b.Scheme = u.Scheme
	if u.Scheme == schemeAuto {
		b.Scheme = map[bool]string{true: "https", false: "http"}[u.https]
	}
	b.Proxies = u.Service != "" || len(u.Where) > 0 || u.Route
	b.Own, b.Denied = announcedHere, u.denied
	b.Subset, b.ProxyID = u.Subset, u.ProxyID
	b.Random, b.SlowStart = rand.Uint64, time.Duration(u.SlowStart)
	b.Strategy, b.TLS, b.Token = u.shortlist.strategy, u.https, u.shortlist.token
	b.InFlight, b.Clock, b.Usage = inFlight, traffic.Now, memberOf
}

// provisionChecks has the nodes checked that the source wants.
func (u *Upstreams) provisionChecks(b backend.Backend) (err error) {
	if u.health, err = acquireChecks(u.Health, b, u.https, wrapPolicy(u.handler, u.logger).transport, u.mayServe); err != nil {
		return fmt.Errorf("opening the health checks: %w", err)
	}
	u.cold.checks = u.health
	u.pickers.Version = u.health.Version
	u.builder.Check, u.builder.Unchecked = u.checked, u.cold.unchecked
	return nil
}

// checked returns what the health checks have against a node.
func (u *Upstreams) checked(e *discovery.Entry) picker.Reason {
	switch state, _ := u.health.Of(e); {
	case state == health.Unchecked:
		return picker.NotChecked
	case !state.Serves():
		return picker.Unhealthy
	}
	return ""
}

// varies reports whether a value depends on the request.
func varies(s string) bool { return strings.Contains(s, "{") }

// start begins to follow the registry and to check the nodes. Requests call it, too:
// servers accept them before Caddy says "started".
func (u *Upstreams) start() {
	u.starting.Do(func() {
		u.hosts.join()
		u.directory.start()
		u.cold.begin(time.Unix(0, u.directory.opened.Load()))
		if u.health != nil {
			u.health.start(newHealthClient(u.handler))
		}
		if u.outliers != nil {
			u.outliers.start()
		}
	})
}

// GetUpstreams returns the nodes for a request among which the handler's policy is to
// choose. They are freshly allocated, because Caddy writes to them
// (https://github.com/caddyserver/caddy/issues/5736).
func (u *Upstreams) GetUpstreams(r *http.Request) ([]*reverseproxy.Upstream, error) {
	q := u.queryOf(r)
	p := u.pickerFor(r, q)
	var a *attempts
	var tried *picker.AddressSet
	w := u.wrapper
	if p.Limited() {
		if w = wrapPolicy(u.handler, u.logger); !w.limited.Load() { // which all requests read
			w.limited.Store(true)
		}
	}
	if w != nil {
		if a = w.attempts(r); a != nil {
			tried = &a.tried
		}
	}
	given := u.givenUp()
	var is *session
	if u.Sticky != nil && a != nil && !given {
		is = u.session(a, q)
	}
	if given || p.Empty() && !is.keeps() {
		u.directory.stats.lookups.count(false)
		return u.none(), nil
	}
	u.tellFailed(p, is, tried)
	var l lookup
	var nodes []*discovery.Entry
	var race *picker.Race
	if is.keeps() {
		nodes, race = u.pickWithin(is, p, r, tried, &l)
	} else {
		nodes, race = u.pick(p, r, tried, &l)
	}
	upstreams := u.upstreams(nodes, tried, &l)
	if a != nil {
		a.returned(candidates{source: u.number, upstreams: upstreams, nodes: nodes, race: race, observers: &u.observers, session: is})
	}
	return upstreams, nil
}

// pick returns the nodes for an attempt, and under multi what decides between them and
// those of other sources.
func (u *Upstreams) pick(p *picker.Picker, r *http.Request, tried *picker.AddressSet, l *lookup) ([]*discovery.Entry, *picker.Race) {
	s := &u.shortlist
	if p.Limited() {
		s = &u.limited
	}
	choice := s.choice(r)
	if u.beside {
		choice.Race = new(picker.Race)
	}
	nodes := p.Pick(tried, choice, l.room(s.size))
	if u.beside && u.Pick != nil { // each of them counts as one
		return nodes, &picker.Race{Resort: choice.Race.Resort}
	}
	return nodes, choice.Race
}

// tellFailed has other addresses of nodes found at which a request has failed.
func (u *Upstreams) tellFailed(p *picker.Picker, is *session, tried *picker.AddressSet) {
	if tried.Empty() {
		return
	}
	for _, e := range u.failedAt(p, is, tried) {
		if e.Named() {
			u.directory.Failed(e, u.dial(e)) // its name may stand for other addresses
		}
	}
}

// failedAt returns the nodes at which a request has failed. That of its session is none of
// the picker's while it drains.
func (u *Upstreams) failedAt(p *picker.Picker, is *session, tried *picker.AddressSet) []*discovery.Entry {
	at := p.At(tried)
	if is.keeps() && tried.Has(u.dial(is.node)) && !slices.Contains(at, is.node) {
		at = append(at, is.node)
	}
	return at
}

// none returns what there is where no node can serve. Alone that is nothing. Under multi,
// which logs for each request that a source has none, it is a stand-in for the static
// upstreams, if there are any: see policyWrapper.choose.
func (u *Upstreams) none() []*reverseproxy.Upstream {
	if !u.beside || len(u.handler.Upstreams) == 0 {
		return nil
	}
	return []*reverseproxy.Upstream{{Dial: u.handler.Upstreams[0].Dial, MaxRequests: standsForStatic}}
}

// A lookup has the room for what is returned. Where that is no more than two nodes it
// takes one allocation.
type lookup struct{ few *fewUpstreams }

type fewUpstreams struct {
	nodes     [2]*discovery.Entry
	upstreams [2]*reverseproxy.Upstream
	block     [2]reverseproxy.Upstream
}

// room returns where so many nodes can be put; 0: they need no room.
func (l *lookup) room(n int) []*discovery.Entry {
	switch {
	case n == 0:
		return nil
	case n > len(l.few.nodes):
		return make([]*discovery.Entry, 0, n)
	}
	l.few = new(fewUpstreams)
	return l.few.nodes[:0]
}

// upstreams returns so many upstreams.
func (l *lookup) upstreams(n int) []*reverseproxy.Upstream {
	var block []reverseproxy.Upstream
	var upstreams []*reverseproxy.Upstream
	if l.few != nil && n <= len(l.few.block) {
		block, upstreams = l.few.block[:n], l.few.upstreams[:n]
	} else {
		block, upstreams = make([]reverseproxy.Upstream, n), make([]*reverseproxy.Upstream, n)
	}
	for i := range upstreams {
		upstreams[i] = &block[i]
	}
	return upstreams
}

// pickerFor returns the picker for a request, which may have to wait for it: see
// coldStart.
func (u *Upstreams) pickerFor(r *http.Request, q *picker.Query) *picker.Picker {
	u.start()
	if snapshot := u.directory.Snapshot(); snapshot.Synced && u.hosts.seen(snapshot) {
		if p := u.picker(snapshot, r, q); !p.Empty() || u.health == nil {
			return p
		}
	}
	u.waiting.Add(1)
	defer func() {
		if err := u.leave(); err != nil {
			u.logger.Error("cleaning up after the last request", zap.Error(err))
		}
	}()
	pick := func(s *discovery.Snapshot) *picker.Picker { return u.picker(s, r, q) }
	listed := u.cold.awaitListing(r.Context(), func(s *discovery.Snapshot) bool { return !pick(s).Empty() })
	p := pick(u.hosts.await(r.Context(), listed))
	if p.Empty() && u.health != nil && !u.givenUp() {
		p = u.cold.awaitChecks(r.Context(), pick)
	}
	return p
}

// picker returns the picker of a snapshot for a request with that query.
func (u *Upstreams) picker(s *discovery.Snapshot, r *http.Request, q *picker.Query) *picker.Picker {
	if u.Route {
		return u.routed(s, r, q)
	}
	return u.pickers.Picker(s, q)
}

// queryOf returns what a request asks for beside its host and path; nil where all ask for the same.
func (u *Upstreams) queryOf(r *http.Request) *picker.Query {
	if !u.pickers.Varies {
		return nil
	}
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		repl = caddy.NewReplacer()
	}
	return u.query(func(s string) string { return repl.ReplaceAll(s, "") })
}

// query returns what the source asks for, with its placeholders expanded.
func (u *Upstreams) query(expand func(string) string) *picker.Query {
	criteria := func(configured []Criterion) []picker.Criterion {
		expanded := make([]picker.Criterion, len(configured))
		for i, c := range configured {
			expanded[i] = picker.Criterion{Key: c.Key, Values: make([]string, len(c.Values))}
			for j, v := range c.Values {
				expanded[i].Values[j] = expand(v)
			}
		}
		return expanded
	}
	return &picker.Query{ByService: u.Service != "", Service: expand(u.Service), Where: criteria(u.Where), Prefer: criteria(u.Prefer)}
}

// upstreams makes what Caddy wants of nodes. One that is tried again is dialled at
// another address, if its host name has one. Where there is none, policyWrapper.choose
// falls back to static upstreams.
func (u *Upstreams) upstreams(nodes []*discovery.Entry, tried *picker.AddressSet, l *lookup) []*reverseproxy.Upstream {
	u.directory.stats.lookups.count(len(nodes) > 0)
	upstreams := l.upstreams(len(nodes))
	for i, e := range nodes {
		up := upstreams[i]
		up.Dial = u.dial(e)
		if e.Capacity() > 0 {
			up.MaxRequests = u.maxRequests(e)
		}
		if !tried.Empty() && !u.https && tried.Has(up.Dial) {
			up.Dial = e.AddressBeside(tried.Has)
		}
	}
	return upstreams
}

// maxRequests returns how many requests a node that names a capacity may have at a time.
// Where the handler has a limit for all, which Caddy fills in where there is none, the
// smaller one counts.
func (u *Upstreams) maxRequests(e *discovery.Entry) int {
	if p := u.passive(); p != nil && p.UnhealthyRequestCount > 0 {
		return min(e.Capacity(), p.UnhealthyRequestCount)
	}
	return e.Capacity()
}

// givenUp reports whether the registry has been away for longer than max_stale, and
// logs when that begins and ends.
func (u *Upstreams) givenUp() bool {
	if u.MaxStale == 0 {
		return false
	}
	age := u.directory.Stale()
	given := age > time.Duration(u.MaxStale)
	if u.outdated.Load() == given || u.outdated.Swap(given) == given {
		return given
	}
	if given {
		u.logger.Warn("giving up the last known nodes: the registry has been away for longer than max_stale",
			zap.String("service", u.Service), zap.Duration("away", age.Round(time.Millisecond)), zap.Bool("static_upstreams", len(u.handler.Upstreams) > 0))
	} else {
		u.logger.Info("the registry is back; its nodes are in use again", zap.String("service", u.Service))
	}
	return given
}

// onBuilt is told of new pickers, and logs when the source begins or ends to have no
// node: once each, not for each request, and a node that comes and goes as fast as it can
// writes no more than turnRate lines a second.
func (u *Upstreams) onBuilt(snapshot *discovery.Snapshot, p *picker.Picker, turned bool) {
	u.tellUnguarded(snapshot.Nodes())
	switch {
	case !turned || !u.turns.Allow():
		return
	case !p.Empty():
		u.logger.Info("nodes can serve again", zap.String("service", u.Service), zap.Int("nodes", len(p.First())))
		return
	}
	reasons, candidates := u.builder.Reasons(snapshot, &u.pickers.Query)
	u.logger.Warn("no node can serve",
		zap.String("service", u.Service),
		zap.Int("listed", len(snapshot.Nodes())),
		zap.Int("of_this_service", candidates),
		zap.Any("because", reasons),
		zap.Bool("static_upstreams", len(u.handler.Upstreams) > 0))
}

// mayServe reports whether some requests may go to the node, as its state and its checks
// allow it.
func (u *Upstreams) mayServe(e *discovery.Entry) bool { return u.builder.Wants(e, &u.static) }

// wants reports whether it matters to the source that the node is there: some requests
// may go to it, or it is a proxy that shares the nodes.
func (u *Upstreams) wants(e *discovery.Entry) bool {
	return u.mayServe(e) || u.subset.shares(e) && u.denied(e) == ""
}

// standing returns why no request gets the node, "" if some requests do, and whether
// that is because it fails its health checks or its requests.
func (u *Upstreams) standing(e *discovery.Entry) (reason string, unhealthy bool) {
	r := u.builder.Reason(e, &u.static)
	if r != picker.OtherService && u.MaxStale > 0 && u.directory.Stale() > time.Duration(u.MaxStale) {
		return "max_stale", false
	}
	if r == picker.Ejected {
		return u.outliers.reason(e), true
	}
	if r == "" && isFull(e) {
		return fmt.Sprintf("full: %d requests in flight, capacity %d", inFlight(e), e.Capacity()), false
	}
	return string(r), r.Unhealthy()
}

// isFull reports whether a node has as many requests as it takes.
func isFull(e *discovery.Entry) bool { return e.Capacity() > 0 && inFlight(e) >= e.Capacity() }

// until returns until when the node is ejected, the zero time if it is not.
func (u *Upstreams) until(e *discovery.Entry) time.Time {
	if u.outliers != nil {
		if x := u.outliers.Of(e); x != nil {
			return x.Until
		}
	}
	return time.Time{}
}

// describe says in a few words which nodes the source asks for.
func (u *Upstreams) describe() string {
	var parts []string
	if u.Service != "" {
		parts = append(parts, "service "+u.Service)
	}
	for _, c := range u.Where {
		parts = append(parts, "where "+c.Key+" "+strings.Join(c.Values, " "))
	}
	if u.Scheme != schemeAuto {
		parts = append(parts, "scheme "+u.Scheme)
	}
	if u.Route {
		parts = append(parts, "route")
	}
	if len(parts) == 0 {
		return "every service"
	}
	return strings.Join(parts, ", ")
}

// Cleanup releases the directory, which ends if nobody else uses it. Caddy does
// not wait for the requests of a config that another one replaces.
func (u *Upstreams) Cleanup() error {
	if u.directory != nil {
		u.directory.leave(u)
	}
	if u.emitter != nil {
		u.emitter.stop()
	}
	if u.subset != nil {
		u.subset.release()
	}
	settleInstanceID()
	return u.leave()
}

// leave is called by the config when it ends, and by each request that waits: what
// others may share is released by the last of them.
func (u *Upstreams) leave() (err error) {
	if u.waiting.Add(-1) < 0 {
		u.releasing.Do(func() { err = u.release() })
	}
	return err
}

func (u *Upstreams) release() error {
	u.starting.Do(func() {}) // from here on nothing is started
	u.cold.end()
	if u.Sticky != nil {
		u.Sticky.release()
	}
	var err error
	if u.health != nil {
		err = u.health.release()
	}
	u.hosts.leave()
	if u.outliers != nil {
		err = errors.Join(err, u.outliers.release())
	}
	if u.directory != nil {
		u.stopCounting()
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
	if t, ok := traffic.Real(u.handler.Transport).(*reverseproxy.HTTPTransport); ok && t.Transport != nil {
		t.Transport.CloseIdleConnections()
		// A request of the old config that is sent from now on, because it had to wait
		// or to try again, leaves another one.
		time.AfterFunc(time.Duration(u.SyncTimeout)+lateRequests, t.Transport.CloseIdleConnections)
	}
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Upstreams)(nil)
	_ caddy.CleanerUpper          = (*Upstreams)(nil)
	_ reverseproxy.UpstreamSource = (*Upstreams)(nil)
)
