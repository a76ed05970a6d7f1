package caddydiscovery

import (
	"iter"
	"math"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// A policyWrapper takes the place of a handler's selection policy and calls it. There it
// learns what nothing else shows: Caddy's own state of each candidate, which the handler
// fills in after a source has returned it, and which candidate is chosen. Since the
// handler calls the policy in the goroutine of the request, all of it can be read
// without a race.
//
// It also answers requests that go round, and decides what is left where the policy has
// no upstream to choose: see choose.
type policyWrapper struct {
	reverseproxy.Selector // the policy of the configuration

	handler   *reverseproxy.Handler
	transport http.RoundTripper // of the configuration; nil: Caddy's default
	logger    *zap.Logger
	loops     rate.Sometimes // for the log

	shown   int  // how many upstreams the policy chooses among at first; 0: all
	beside  bool // there may be upstreams of other sources: see merge
	sources int  // of ours that the handler has

	tracks  bool // what requests have been through is of interest
	hosts   bool // the candidates' states are of interest
	nodes   bool // the chosen node is asked for by a placeholder
	routes  bool // a source goes by the hosts that nodes announce
	watches bool // what becomes of the attempts is of interest: see observe
	sticky  bool // there are sessions

	budget  *retryBudget // of the handler's retries; nil: any number
	limited atomic.Bool  // nodes name how many requests they take: from then on as if tracks and hosts
}

// wrapPolicy puts a wrapper in the place of the handler's policy and returns it; the
// sources of one handler share it. It is called from the Provision of a source, and
// relies on the order in that of the handler (reverseproxy.go): it loads the transport
// and the policy before the source, and reads the policy for each request.
func wrapPolicy(handler *reverseproxy.Handler, logger *zap.Logger) *policyWrapper {
	if handler.LoadBalancing == nil {
		handler.LoadBalancing = new(reverseproxy.LoadBalancing)
	}
	policy := handler.LoadBalancing.SelectionPolicy
	if w, ok := policy.(*policyWrapper); ok {
		return w
	}
	if policy == nil {
		policy = reverseproxy.RandomSelection{} // Caddy's own default
	}
	w := &policyWrapper{Selector: policy, handler: handler, transport: handler.Transport, logger: logger, loops: rate.Sometimes{Interval: time.Minute}}
	handler.LoadBalancing.SelectionPolicy = w
	return w
}

// attempts are what one request has been through at one handler. They belong to the
// goroutine of the request.
type attempts struct {
	// request is the handler's copy of the request: the same one in all
	// attempts, and another one if the request comes to this or another handler again.
	request *http.Request
	tried   picker.AddressSet // where it was sent so far, all in vain
	chose   int               // how many times it was sent somewhere
	budget  budgeted
	current []candidates // what the sources returned for the present attempt
	merged  bool         // the policy sees them in another order
	chosen  *chosen      // nil unless it is asked for
	watched *watched     // nil unless what becomes of the attempts is of interest

	inline [1]candidates // for the usual case, to save an allocation
}

// candidates are what one source returned for one attempt.
type candidates struct {
	source    int // 1 for the first of the handler, and so on
	upstreams []*reverseproxy.Upstream
	nodes     []*discovery.Entry // of the upstreams, in their order
	race      *picker.Race       // nil where the policy chooses among those of this source alone
	observers *observers         // of the source
	session   *session           // what it makes of the request's cookies; nil if it has no sessions
}

// attemptsKey is where a request's variables keep its attempts, at whichever handler.
const attemptsKey = "discovery.attempts"

// attemptsOf returns the attempts of a request, nil if none are known, and its
// variables, nil if it does not come from Caddy's server.
func attemptsOf(r *http.Request) (*attempts, map[string]any) {
	vars, _ := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	if a, ok := vars[attemptsKey].(*attempts); ok && a.request == r {
		return a, vars
	}
	return nil, vars
}

// attempts returns the attempts of a request, nil if it has no variables to keep them
// in.
func (w *policyWrapper) attempts(r *http.Request) *attempts {
	a, vars := attemptsOf(r)
	if a != nil || vars == nil {
		return a
	}
	if w.watches {
		a = newWatched(r)
	} else {
		a = new(attempts)
	}
	a.request = r
	a.current = a.inline[:0]
	vars[attemptsKey] = a
	if w.nodes {
		a.chosen = chosenOf(vars, r)
		a.chosen.begin()
	}
	return a
}

// returned notes what a source returns for the present attempt, and who watches it.
func (a *attempts) returned(c candidates) {
	if len(c.upstreams) > 0 {
		a.current = append(a.current, c)
	}
}

// each yields the upstreams, each with the node that it is; nil if it is none: that of
// another source, or a static one.
func (a *attempts) each(pool reverseproxy.UpstreamPool) iter.Seq2[*discovery.Entry, *reverseproxy.Upstream] {
	return func(yield func(*discovery.Entry, *reverseproxy.Upstream) bool) {
		var next candidates // what is likely to come
		for _, up := range pool {
			if a != nil && (len(next.upstreams) == 0 || next.upstreams[0] != up) {
				next = a.from(up)
			}
			var e *discovery.Entry
			if len(next.upstreams) > 0 {
				e = next.nodes[0]
				next.upstreams, next.nodes = next.upstreams[1:], next.nodes[1:]
			}
			if !yield(e, up) {
				return
			}
		}
	}
}

// find returns which node an upstream is, and among which it was returned; without a node
// if it is none.
func (a *attempts) find(up *reverseproxy.Upstream) (*discovery.Entry, candidates) {
	for _, c := range a.current {
		if i := slices.Index(c.upstreams, up); i >= 0 {
			return c.nodes[i], c
		}
	}
	return nil, candidates{}
}

// from returns what a source returned, from an upstream on; nothing if it is not among it.
func (a *attempts) from(up *reverseproxy.Upstream) candidates {
	for _, c := range a.current {
		i := 0
		if a.merged {
			i = slices.Index(c.upstreams, up)
		}
		if i >= 0 && c.upstreams[i] == up {
			c.upstreams, c.nodes = c.upstreams[i:], c.nodes[i:]
			return c
		}
	}
	return candidates{}
}

// Select calls the policy, and notes what the handler found and the policy chose.
func (w *policyWrapper) Select(pool reverseproxy.UpstreamPool, r *http.Request, rw http.ResponseWriter) *reverseproxy.Upstream {
	if n := hops(r.Header); n > maxHops {
		return w.refuseLoop(r, rw, n)
	}
	if slices.ContainsFunc(pool, isForStatic) {
		pool = slices.DeleteFunc(slices.Clone(pool), isForStatic)
	}
	var a *attempts
	limited := w.limited.Load()
	if w.tracks || limited {
		a = w.attempts(r)
	}
	if w.beside && a != nil {
		a.forgetBut(pool)
	}
	if w.hosts || limited {
		for e, up := range a.each(pool) {
			noteHost(e, up)
		}
	}
	spent := w.budget != nil && a != nil && !w.budget.begin(a)
	var selected *reverseproxy.Upstream
	if w.sticky && a != nil {
		if lost := a.watched.refused(); lost != nil {
			lost.end(a.watched, rw.Header())
			a.putBack(nil)
			return w.refuse(r, rw, lost.status)
		}
		selected = a.sessionUpstream()
	}
	switch {
	case spent:
		selected = nil
	case selected == nil:
		selected = w.choose(pool, a, r, rw)
	}
	if a == nil {
		return selected
	}
	a.putBack(selected)
	if selected != nil {
		// If the request comes back, it failed there.
		a.tried.Add(selected.Dial)
		a.chose++
		if a.chosen != nil || a.watched != nil {
			node, among := a.find(selected)
			if a.chosen != nil {
				a.chosen.choose(node, selected.Dial)
			}
			if w.sticky {
				a.placed(among.session, node, rw)
			}
			if a.watched != nil {
				a.watched.selected(selected, node, among.observers)
			}
		}
	}
	a.current, a.merged = a.current[:0], false
	if w.sticky {
		a.watched.sessions = a.watched.sessions[:0]
	}
	return selected
}

// standsForStatic is how many requests an upstream may have that is none, and says that
// its source has no node.
const standsForStatic = math.MinInt

func isForStatic(up *reverseproxy.Upstream) bool { return up.MaxRequests == standsForStatic }

// choose asks the policy:
//
//   - Where no source has a node, from the handler's static upstreams. Caddy itself
//     falls back to them only if a source returns an error, which it logs for each
//     request, and never behind multi, which returns none.
//   - Where all of them have failed lately, from all, as if none had: a pool of
//     which everything fails is more likely judged wrongly than down, and a request
//     that is sent has a chance. Those that are full stay out, and so do all while
//     the handler's circuit breaker is open.
func (w *policyWrapper) choose(pool reverseproxy.UpstreamPool, a *attempts, r *http.Request, rw http.ResponseWriter) *reverseproxy.Upstream {
	if len(pool) == 0 {
		return w.Selector.Select(w.handler.Upstreams, r, rw)
	}
	selected := w.ask(pool, a, r, rw)
	if selected == nil && countsFailures(w.handler) && (w.handler.CB == nil || w.handler.CB.OK()) {
		selected = w.ask(withoutFailures(pool, a), a, r, rw)
	}
	return selected
}

// ask has the policy choose among the first upstreams, and if it can take none of them
// among those that stand in: to show it all at once would give each the same chance.
func (w *policyWrapper) ask(pool reverseproxy.UpstreamPool, a *attempts, r *http.Request, rw http.ResponseWriter) *reverseproxy.Upstream {
	shown := w.shown
	if w.beside && a != nil {
		if pool, a.merged = a.merge(pool); !a.merged {
			shown = 0
		}
	}
	for ; shown > 0 && len(pool) > shown; pool = pool[shown:] {
		if selected := w.Selector.Select(pool[:shown], r, rw); selected != nil {
			return selected
		}
	}
	return w.Selector.Select(pool, r, rw)
}

// countsFailures reports whether the handler leaves alone for some time what has failed.
func countsFailures(handler *reverseproxy.Handler) bool {
	hc := handler.HealthChecks
	return hc != nil && hc.Passive != nil && hc.Passive.FailDuration > 0
}

// withoutFailures returns the upstreams without the rules by which Caddy finds them
// failing. They stand for the same hosts, so that requests and failures count.
func withoutFailures(pool reverseproxy.UpstreamPool, a *attempts) reverseproxy.UpstreamPool {
	block := make([]reverseproxy.Upstream, len(pool))
	again := make(reverseproxy.UpstreamPool, len(pool))
	for i, up := range pool {
		block[i].Host, block[i].Dial, block[i].MaxRequests = up.Host, up.Dial, up.MaxRequests
		again[i] = &block[i]
	}
	if a != nil {
		for i, c := range a.current {
			if j := slices.Index(pool, c.upstreams[0]); j >= 0 && len(c.upstreams) <= len(pool)-j {
				a.current[i].upstreams = again[j : j+len(c.upstreams)]
			}
		}
	}
	return again
}

// Interface guard
var _ reverseproxy.Selector = (*policyWrapper)(nil)
