package caddydiscovery

import (
	"container/heap"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"golang.org/x/net/http/httpguts"
	"golang.org/x/time/rate"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
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
	if h.URI == "" && !h.TCP {
		h.URI = "/"
	}
	if uri, err := url.ParseRequestURI(h.URI); !h.TCP && (err != nil || uri.Host != "" || !strings.HasPrefix(h.URI, "/")) {
		return fmt.Errorf("health: invalid uri %q, want a path such as /healthz", h.URI)
	}
	for name, d := range map[string]*caddy.Duration{"interval": &h.Interval, "timeout": &h.Timeout} {
		if err := caddyblock.CheckDuration("health: "+name, *d); err != nil {
			return err
		}
	}
	if h.Interval == 0 {
		h.Interval = caddy.Duration(10 * time.Second)
	}
	if h.Timeout == 0 {
		h.Timeout = caddy.Duration(5 * time.Second)
	}
	for name, n := range map[string]int{"passes": h.Passes, "fails": h.Fails} {
		if n < 0 || n > maxChecks {
			return fmt.Errorf("health: invalid %s %d, want 1 to %d", name, n, maxChecks)
		}
	}
	h.Passes = max(h.Passes, 1)
	if h.Fails == 0 {
		h.Fails = 2
	}
	if h.Status == "" && !h.TCP {
		h.Status = "2xx"
	}
	if err := checkStatus(h.Status); err != nil && !h.TCP {
		return fmt.Errorf("health: status: %w", err)
	}
	if h.Port < 0 || h.Port > 65535 {
		return fmt.Errorf("health: invalid port %d, want 1 to 65535", h.Port)
	}
	for _, name := range slices.Sorted(maps.Keys(h.Headers)) {
		if err := checkHeader(name, h.Headers[name]); err != nil {
			return fmt.Errorf("health: header %w", err)
		}
	}
	if _, err := h.request(context.Background(), "http", "127.0.0.1:80", "127.0.0.1:80"); err != nil {
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
		if err := replaceGlobals(&values[i]); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if !httpguts.ValidHeaderFieldValue(values[i]) {
			return fmt.Errorf("%s: invalid value, want one without control characters", name)
		}
	}
	return nil
}

// request returns the request of a check. The host is what the endpoint says, which
// may be a name.
func (h *Health) request(ctx context.Context, scheme, address, host string) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+address+h.URI, nil)
	if err != nil {
		return nil, err
	}
	if address != host && h.Port == 0 {
		req.Host = host
	}
	req.Header.Set("User-Agent", "caddy-discovery")
	for name, values := range h.Headers {
		if http.CanonicalHeaderKey(name) == "Host" {
			req.Host = values[0]
			continue
		}
		req.Header[http.CanonicalHeaderKey(name)] = values
	}
	return req, nil
}

const maxChecks = 100

// checkStatus accepts a number or a class.
func checkStatus(s string) error {
	if n, err := strconv.Atoi(strings.ReplaceAll(s, "xx", "00")); err != nil || len(s) != 3 || n < 100 || n > 599 {
		return fmt.Errorf("invalid value %q, want a number such as 200 or a class such as 2xx", s)
	}
	return nil
}

// accepts reports whether the status of an answer passes.
func (h *Health) accepts(status int) bool {
	if class, found := strings.CutSuffix(h.Status, "xx"); found {
		return strconv.Itoa(status/100) == class
	}
	return strconv.Itoa(status) == h.Status
}

const (
	// checksAtOnce bounds the checks that are under way, and as many again of nodes
	// whose last one ran into its timeout: they wait for each other and for nobody
	// else.
	checksAtOnce = 256
	// healthQuiet is how long after a change of some node's health another one may
	// wait, to be taken up together with what follows.
	healthQuiet = 50 * time.Millisecond
	// maxCheckBody is how much of an answer is read so that its connection can be
	// used again.
	maxCheckBody = 4 << 10
)

// checkers outlive every config, as the directories do.
var checkers = caddy.NewUsagePool() // poolKey → *checker

// A checker checks the nodes of a directory that its sources are interested in.
// One goroutine, run, decides; sources read.
type checker struct {
	directory *sharedDirectory
	options   Health
	scheme    string
	key       poolKey
	question  poolKey // what is asked, and how: equal for checks that would have the same result
	log       *zap.Logger
	lines     *rate.Limiter

	prober  atomic.Pointer[prober] // of the newest config
	version atomic.Uint64          // counts the published changes
	dirty   atomic.Bool            // there are changes that are not published yet
	passed  atomic.Uint64
	failed  atomic.Uint64

	once    sync.Once
	cancel  context.CancelFunc
	done    chan struct{}
	stirred chan struct{} // the interested have changed; has room for one
	// others are the other checks of this registry from when a source joined: those of
	// the config that is about to be replaced may have ended before its nodes are admitted.
	others atomic.Pointer[[]*checker]

	nodes atomic.Pointer[map[string]*patient] // by id; what is published is not changed

	mu         sync.RWMutex // guards what follows; nothing else happens under it
	interested map[*Upstreams]struct{}
	changed    chan struct{} // closed at the next publication
}

// health is what the checks have shown of a node.
type health int32

const (
	unchecked health = iota
	presumed         // healthy by other checks; this one has no result yet
	healthy
	unhealthy
)

// known reports whether this check has had a result.
func (h health) known() bool { return h == healthy || h == unhealthy }

// serves reports whether a node may get requests.
func (h health) serves() bool { return h == healthy || h == presumed }

// A patient is a node that is checked. Only its health is read by others.
type patient struct {
	health atomic.Int32

	id, address, instance string
	host                  string           // what the endpoint calls it
	since                 time.Time        // when it was admitted
	node                  *discovery.Entry // as it was listed last
	passes, fails         int
	lane                  int
	checks                uint64 // how many were made
	visit                 uint64 // another one if what was checked is another process now
	due                   time.Time
	index                 int // in the lane's queue; -1 while it is checked
}

// result is how one check ended.
type result struct {
	patient *patient
	visit   uint64
	err     error // nil: passed
	late    bool  // it ran into the timeout
	lane    int
	began   time.Time
}

// acquireChecker returns the checks of a source with the given settings, not
// started unless another config did. Each call is matched by one of leave.
func acquireChecker(u *Upstreams, backend Backend, transport http.RoundTripper) (*checker, error) {
	registry, err := keyOf(backend)
	if err != nil {
		return nil, err
	}
	scheme := "http"
	if u.https {
		scheme = "https"
	}
	identify := func(options Health) (poolKey, error) {
		settings, err := json.Marshal([]any{options, scheme, transport})
		if err != nil {
			return poolKey{}, fmt.Errorf("encoding the settings of the health checks: %w", err)
		}
		return sha256.Sum256(slices.Concat(registry[:], settings, trust(transport))), nil
	}
	key, err := identify(*u.Health)
	if err != nil {
		return nil, err
	}
	question, err := identify(u.Health.question())
	if err != nil {
		return nil, err
	}
	v, _, err := checkers.LoadOrNew(key, func() (caddy.Destructor, error) {
		directory, err := acquireDirectory(backend)
		if err != nil {
			return nil, err
		}
		c := &checker{
			directory:  directory,
			options:    *u.Health,
			scheme:     scheme,
			key:        key,
			question:   question,
			log:        processLogger("discovery.health").With(zap.String("registry", directory.registry.conn.String())),
			lines:      rate.NewLimiter(20, 20),
			done:       make(chan struct{}),
			stirred:    make(chan struct{}, 1),
			interested: make(map[*Upstreams]struct{}),
			changed:    make(chan struct{}),
		}
		c.nodes.Store(new(map[string]*patient))
		return c, nil
	})
	if err != nil {
		return nil, err
	}
	c := v.(*checker)
	c.mu.Lock()
	c.interested[u] = struct{}{}
	c.mu.Unlock()
	others := c.findOthers()
	c.others.Store(&others)
	c.stir()
	return c, nil
}

// question returns what decides about the result of a single check. How often it
// is asked, and how many results make a change, is left out.
func (h *Health) question() Health {
	q := *h
	q.Interval, q.Timeout, q.Passes, q.Fails = 0, 0, 0, 0
	return q
}

// trust returns what a transport trusts and how it shows itself, which its JSON
// does not tell once it is provisioned.
func trust(transport http.RoundTripper) []byte {
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
	var all []byte
	for _, p := range parts {
		sum := sha256.Sum256(p)
		all = append(all, sum[:]...)
	}
	return all
}

// wants reports whether the source may send requests to the node, as far as that
// does not depend on the request.
func (u *Upstreams) wants(e *discovery.Entry) bool {
	n := &e.Node
	if !strings.Contains(u.Service, "{") && u.Service != "" && n.Service() != u.Service {
		return false
	}
	w := wish{}
	for _, c := range u.Where {
		if !slices.ContainsFunc(c.Values, func(v string) bool { return strings.Contains(v, "{") }) {
			w.where = append(w.where, c)
		}
	}
	return u.mismatch(e, w) == ""
}

// startChecks begins the health checks, if there are to be some.
func (u *Upstreams) startChecks() {
	if u.health != nil {
		u.checks.Do(func() { u.health.start(newProber(u.handler)) })
	}
}

// awaitChecks returns the pool as soon as somebody is in it, or nobody is awaited
// any more. When the checks of a pool's nodes have only just begun, as after a cold
// start or the first config that has checks, all of them are unchecked.
func (u *Upstreams) awaitChecks(r *http.Request) *pool {
	for {
		changed := u.health.next()
		p := u.pool(u.directory.Snapshot(), r)
		if len(p.tiers) > 0 || p.awaits.IsZero() {
			return p
		}
		timer := time.NewTimer(time.Until(p.awaits))
		select {
		case <-changed:
		case <-timer.C:
		case <-r.Context().Done():
			timer.Stop()
			return p
		}
		timer.Stop()
	}
}

// leave ends the interest of a source.
func (c *checker) leave(u *Upstreams) error {
	c.mu.Lock()
	delete(c.interested, u)
	c.mu.Unlock()
	c.stir()
	_, err := checkers.Delete(c.key)
	return err
}

// Destruct ends the checks when nobody is interested any more.
func (c *checker) Destruct() error {
	c.once.Do(func() {}) // from here on they cannot be started
	if c.cancel != nil {
		c.cancel()
		<-c.done
		c.prober.Load().close()
	}
	return c.directory.release()
}

// start begins to check, with the prober of the config that runs now. A config
// that is only validated never gets here.
func (c *checker) start(p *prober) {
	if old := c.prober.Swap(p); old != nil {
		old.close()
	}
	c.once.Do(func() {
		var ctx context.Context
		ctx, c.cancel = context.WithCancel(context.Background())
		go func() {
			defer close(c.done)
			c.run(ctx)
		}()
	})
}

func (c *checker) stir() {
	select {
	case c.stirred <- struct{}{}:
	default:
	}
}

// of returns what the checks have shown of the node, and since when it is checked:
// the zero time if it is not yet.
func (c *checker) of(e *discovery.Entry) (health, time.Time) {
	p := (*c.nodes.Load())[e.Node.ID]
	if p == nil || p.address != c.dial(e) || p.instance != e.Node.Instance() {
		return unchecked, time.Time{}
	}
	return health(p.health.Load()), p.since
}

// elsewhere returns what other checks of this registry have shown of a node: the
// same, if they ask the same.
func (c *checker) elsewhere(e *discovery.Entry, others []*checker) health {
	result := unchecked
	for _, other := range others {
		switch h, _ := other.of(e); {
		case h.known() && other.question == c.question:
			return h
		case h.serves():
			result = presumed
		}
	}
	return result
}

// findOthers returns the other checks of this registry that are in use.
func (c *checker) findOthers() []*checker {
	var others []*checker
	checkers.Range(func(_, v any) bool {
		if other := v.(*checker); other != c && other.directory == c.directory && other.scheme == c.scheme {
			others = append(others, other)
		}
		return true
	})
	return others
}

// next returns a channel that is closed when the health of some node changes.
func (c *checker) next() <-chan struct{} {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.changed
}

// run checks until ctx ends, and returns when no check is under way any more.
func (c *checker) run(ctx context.Context) {
	w := &ward{checker: c, results: make(chan result, 2*checksAtOnce)}
	timer := time.NewTimer(0)
	defer timer.Stop()
	var running sync.WaitGroup
	defer running.Wait()
	for {
		snapshot := c.directory.Snapshot()
		if snapshot != w.snapshot {
			w.admit(snapshot)
		}
		wait := w.dispatch(ctx, &running)
		wait = min(wait, w.publish())
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return
		case <-snapshot.Superseded():
		case <-c.stirred:
			w.admit(snapshot)
		case r := <-w.results:
			w.note(r)
			for range len(w.results) {
				w.note(<-w.results)
			}
		case <-timer.C:
		}
	}
}

// A ward is the state of a checker that only its goroutine touches.
type ward struct {
	*checker
	snapshot  *discovery.Snapshot
	lanes     [2]lane // those who answer, and those who were late the last time
	results   chan result
	published time.Time
}

type lane struct {
	queue   patients
	running int
}

// admit brings the patients in line with a snapshot and the interested sources.
func (w *ward) admit(snapshot *discovery.Snapshot) {
	w.mu.RLock()
	interested := slices.Collect(maps.Keys(w.interested))
	w.mu.RUnlock()
	if len(interested) == 0 {
		return // the checks end, and those of the next config may still look at the results
	}
	w.snapshot = snapshot
	now := time.Now()
	var others []*checker
	if joined := w.others.Swap(nil); joined != nil {
		others = *joined
	}
	before := *w.nodes.Load()
	nodes := make(map[string]*patient, len(before))
	for _, e := range snapshot.Nodes() {
		if !slices.ContainsFunc(interested, func(u *Upstreams) bool { return u.wants(e) }) {
			continue
		}
		id := e.Node.ID
		old := before[id]
		if old != nil && old.address == w.dial(e) && old.instance == e.Node.Instance() {
			old.node = e
			nodes[id] = old
			continue
		}
		// Patients are replaced, not changed, because sources read them.
		p := &patient{id: id, node: e, address: w.dial(e), host: e.Node.Endpoint.Address(), instance: e.Node.Instance(), since: now, due: now}
		p.health.Store(int32(w.elsewhere(e, others)))
		if old != nil || health(p.health.Load()) != unchecked {
			w.dirty.Store(true)
		}
		nodes[id] = p
		heap.Push(&w.lanes[p.lane].queue, p)
	}
	for id, p := range before {
		if nodes[id] != p {
			w.discharge(p)
		}
	}
	w.nodes.Store(&nodes)
}

// discharge takes a patient out of its queue; the result of a check that is under
// way will be ignored.
func (w *ward) discharge(p *patient) {
	p.visit++
	if p.index >= 0 {
		heap.Remove(&w.lanes[p.lane].queue, p.index)
	}
}

// dispatch begins the checks that are due, as many as there is room for, and
// returns when to look again.
func (w *ward) dispatch(ctx context.Context, running *sync.WaitGroup) time.Duration {
	now := time.Now()
	wait := time.Hour
	for i := range w.lanes {
		l := &w.lanes[i]
		for l.running < checksAtOnce && len(l.queue) > 0 && !l.queue[0].due.After(now) {
			p := heap.Pop(&l.queue).(*patient)
			l.running++
			node := p.node
			r := result{patient: p, visit: p.visit, lane: i, began: now}
			running.Go(func() {
				r.err = w.ask(ctx, node, p.address, p.host)
				r.late = errors.Is(r.err, context.DeadlineExceeded)
				w.results <- r // there is room for all that may be under way
			})
		}
		if l.running < checksAtOnce && len(l.queue) > 0 {
			wait = min(wait, l.queue[0].due.Sub(now))
		}
	}
	return max(wait, 0)
}

// dial returns the address at which a node is dialled; see Upstreams.dial.
func (c *checker) dial(e *discovery.Entry) string { return dialAddress(e, c.scheme == "https") }

// ask makes one check. The host is what the endpoint says, which may be a name.
func (c *checker) ask(ctx context.Context, node *discovery.Entry, address, host string) error {
	if c.options.Port != 0 {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return err
		}
		address = net.JoinHostPort(host, strconv.Itoa(c.options.Port))
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(c.options.Timeout))
	defer cancel()
	p := c.prober.Load()
	if c.options.TCP {
		return p.connect(ctx, address)
	}
	req, err := c.options.request(ctx, c.scheme, address, host)
	if err != nil {
		return err
	}
	return p.request(req, node, &c.options)
}

// note takes up how a check ended.
func (w *ward) note(r result) {
	w.lanes[r.lane].running--
	w.directory.stats.checks.count(r.err == nil)
	if r.err == nil {
		w.passed.Add(1)
	} else {
		w.failed.Add(1)
	}
	p := r.patient
	if p.visit != r.visit {
		return // it is gone, or another process has taken its place
	}
	was := health(p.health.Load())
	now := was
	if r.err == nil {
		p.passes, p.fails = p.passes+1, 0
		if !was.known() || p.passes >= w.options.Passes {
			now = healthy
		}
	} else {
		p.passes, p.fails = 0, p.fails+1
		if e := w.snapshot.Node(p.id); e != nil {
			w.directory.Failed(e, p.address) // it may be elsewhere by now
		}
		if !was.known() || p.fails >= w.options.Fails {
			now = unhealthy
		}
	}
	if now != was {
		w.dirty.Store(true)
		p.health.Store(int32(now))
		w.tell(p, was, now, r.err)
	}
	interval := time.Duration(w.options.Interval)
	if p.checks++; p.checks == 1 {
		// From here on the checks of a fleet that joined at once are spread.
		interval = time.Duration(rand.Float64() * float64(interval))
	}
	p.due = r.began.Add(interval)
	p.lane = 0
	if r.late {
		p.lane = 1
	}
	heap.Push(&w.lanes[p.lane].queue, p)
}

func (w *ward) tell(p *patient, was, now health, err error) {
	if !was.known() && now == healthy {
		return
	}
	change := discovery.Change{Type: discovery.ChangeRestored, ID: p.id, Reason: "it passes its health checks again", Entry: w.directory.Snapshot().Node(p.id)}
	if now != healthy {
		change.Type, change.Reason = discovery.ChangeEjected, "it fails its health checks: "+err.Error()
	}
	w.directory.Journal().Add(change)
	if !w.lines.Allow() {
		return
	}
	if now == healthy {
		w.log.Info("node is healthy again", zap.String("node", p.id), zap.String("address", p.address))
		return
	}
	w.log.Warn("node is unhealthy", zap.String("node", p.id), zap.String("address", p.address), zap.Error(err))
}

// publish makes the sources look again, if something changed, and returns when it
// must be called next.
func (w *ward) publish() time.Duration {
	if !w.dirty.Load() {
		return time.Hour
	}
	if wait := healthQuiet - time.Since(w.published); wait > 0 {
		return wait
	}
	w.published = time.Now()
	w.version.Add(1)
	w.dirty.Store(false)
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.changed)
	w.changed = make(chan struct{})
	return time.Hour
}

// patients is a heap.Interface ordered by due.
type patients []*patient

func (q patients) Len() int           { return len(q) }
func (q patients) Less(i, j int) bool { return q[i].due.Before(q[j].due) }
func (q patients) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *patients) Push(x any) {
	p := x.(*patient)
	p.index = len(*q)
	*q = append(*q, p)
}

func (q *patients) Pop() any {
	old := *q
	p := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	p.index = -1
	return p
}
