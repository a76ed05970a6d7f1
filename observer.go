package caddydiscovery

import (
	"fmt"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// An observer stands between a handler and its selection policy, and sees what
// nothing else shows: Caddy's own state of each candidate, which the handler
// fills in after a source has returned it, and which candidate is chosen. Since
// the handler calls the policy in the goroutine of the request, all of it can be
// read without a race.
//
// It also decides what is left where the policy has nobody to choose: see choose.
//
// Where nobody needs what requests have been through, it does no more than that and
// looks for requests that go round.
type observer struct {
	reverseproxy.Selector

	handler *reverseproxy.Handler
	logger  *zap.Logger
	loops   rate.Sometimes // for the log

	key    string // of the course among the request's variables
	tracks bool   // what requests have been through is of interest
	hosts  bool   // the candidates' states are of interest
	nodes  bool   // the chosen node is asked for by a placeholder
}

var observers atomic.Uint64

// observe returns the observer of the handler's policy, in place from then on.
// The sources of one handler share it.
func observe(handler *reverseproxy.Handler, logger *zap.Logger) *observer {
	if handler.LoadBalancing == nil {
		handler.LoadBalancing = new(reverseproxy.LoadBalancing)
	}
	policy := handler.LoadBalancing.SelectionPolicy
	if o, ok := policy.(*observer); ok {
		return o
	}
	if policy == nil {
		policy = reverseproxy.RandomSelection{} // Caddy's own default
	}
	o := &observer{
		Selector: policy, handler: handler, logger: logger, loops: rate.Sometimes{Interval: time.Minute},
		key: fmt.Sprintf("discovery.course.%d", observers.Add(1)),
	}
	handler.LoadBalancing.SelectionPolicy = o
	return o
}

// policyOf returns the handler's selection policy itself, nil for the default.
func policyOf(handler *reverseproxy.Handler) reverseproxy.Selector {
	if handler.LoadBalancing == nil {
		return nil
	}
	if o, ok := handler.LoadBalancing.SelectionPolicy.(*observer); ok {
		return o.Selector
	}
	return handler.LoadBalancing.SelectionPolicy
}

// A course is what one request has been through at one handler. It belongs to the
// goroutine of the request.
type course struct {
	// request is the handler's copy of the request: the same one in all
	// attempts, and another one if the request comes to the handler again.
	request *http.Request
	tried   addressSet // where it was sent so far, all in vain
	batches []batch    // what the sources returned for the present attempt
	choice  *choice    // nil if nobody asks for it

	room struct { // for the usual case, to save allocations
		batches [1]batch
		entries [2]*discovery.Entry
	}
}

// batch is what one source returned for one attempt.
type batch struct {
	first *reverseproxy.Upstream
	nodes []*discovery.Entry // of the upstreams, in their order
}

// course returns what the request has been through, nil if it has no variables to
// keep that in: then it does not come from Caddy's server.
func (o *observer) course(r *http.Request) *course {
	vars, ok := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	if !ok {
		return nil
	}
	c, _ := vars[o.key].(*course)
	if c != nil && c.request == r {
		return c
	}
	c = &course{request: r}
	c.batches = c.room.batches[:0]
	vars[o.key] = c
	if o.nodes {
		c.choice = choiceOf(vars, r)
		c.choice.node = nil // that of an earlier handler
	}
	return c
}

// Select calls the policy, and notes what the handler found and the policy chose.
func (o *observer) Select(pool reverseproxy.UpstreamPool, r *http.Request, w http.ResponseWriter) *reverseproxy.Upstream {
	if n := hops(r.Header); n > maxHops {
		return o.refuseLoop(r, w, n)
	}
	var c *course
	if o.tracks {
		c = o.course(r)
	}
	if c == nil {
		chosen, _ := o.choose(pool, nil, r, w)
		return chosen
	}
	if o.hosts {
		c.each(pool, noteHost)
	}
	chosen, pool := o.choose(pool, c, r, w)
	if chosen != nil {
		// If the request comes back, it failed there.
		c.tried.add(chosen.Dial)
		if c.choice != nil {
			c.choice.node = nil // it may be none of the nodes
			c.each(pool, func(e *discovery.Entry, up *reverseproxy.Upstream) {
				if up == chosen {
					c.choice.node, c.choice.address = e, chosen.Dial
				}
			})
		}
	}
	c.batches = c.batches[:0]
	return chosen
}

// choose asks the policy, and returns what it chose and from which upstreams:
//
//   - Where no source has a node, from the handler's static upstreams. Caddy itself
//     falls back to them only if a source returns an error, which it logs for each
//     request, and never behind multi, which returns none.
//   - Where everybody has failed lately, from all of them, as if nobody had: a pool
//     of which everything fails is more likely judged wrongly than down, and a
//     request that is sent has a chance. Who is full stays out, and so does
//     everybody while the handler's circuit breaker is open.
func (o *observer) choose(pool reverseproxy.UpstreamPool, c *course, r *http.Request, w http.ResponseWriter) (*reverseproxy.Upstream, reverseproxy.UpstreamPool) {
	if len(pool) == 0 {
		pool = o.handler.Upstreams
		return o.ask(pool, c, r, w), pool
	}
	chosen := o.ask(pool, c, r, w)
	if chosen == nil && forgets(o.handler) && (o.handler.CB == nil || o.handler.CB.OK()) {
		pool = forgiven(pool, c)
		chosen = o.ask(pool, c, r, w)
	}
	return chosen, pool
}

func (o *observer) ask(pool reverseproxy.UpstreamPool, c *course, r *http.Request, w http.ResponseWriter) *reverseproxy.Upstream {
	if policy, ok := o.Selector.(*LeastLoad); ok && c != nil {
		return policy.choose(pool, c)
	}
	return o.Selector.Select(pool, r, w)
}

// forgets reports whether the handler leaves alone for some time what has failed.
func forgets(handler *reverseproxy.Handler) bool {
	hc := handler.HealthChecks
	return hc != nil && hc.Passive != nil && hc.Passive.FailDuration > 0
}

// forgiven returns the upstreams without the rules by which Caddy finds them
// failing. They stand for the same hosts, so that requests and failures count.
func forgiven(pool reverseproxy.UpstreamPool, c *course) reverseproxy.UpstreamPool {
	block := make([]reverseproxy.Upstream, len(pool))
	again := make(reverseproxy.UpstreamPool, len(pool))
	for i, up := range pool {
		block[i].Host, block[i].Dial, block[i].MaxRequests = up.Host, up.Dial, up.MaxRequests
		again[i] = &block[i]
	}
	if c != nil {
		for i, b := range c.batches {
			if j := slices.Index(pool, b.first); j >= 0 {
				c.batches[i].first = again[j]
			}
		}
	}
	return again
}

// each calls f with each candidate that is a node.
func (c *course) each(pool reverseproxy.UpstreamPool, f func(*discovery.Entry, *reverseproxy.Upstream)) {
	for _, b := range c.batches {
		start := slices.Index(pool, b.first)
		if start < 0 || len(pool) < start+len(b.nodes) {
			continue // another source of a multi has failed, or the handler fell back
		}
		for i, e := range b.nodes {
			f(e, pool[start+i])
		}
	}
}

// Interface guard
var _ reverseproxy.Selector = (*observer)(nil)
