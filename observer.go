package caddydiscovery

import (
	"fmt"
	"net/http"
	"slices"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// An observer stands between a handler and its selection policy, and sees what
// nothing else shows: Caddy's own state of each candidate, which the handler
// fills in after a source has returned it, and which candidate is chosen. Since
// the handler calls the policy in the goroutine of the request, all of it can be
// read without a race.
//
// Handlers that need none of this are left as they are.
type observer struct {
	reverseproxy.Selector

	key   string // of the course among the request's variables
	hosts bool   // the candidates' states are of interest
	nodes bool   // the chosen node is asked for by a placeholder
}

var observers atomic.Uint64

// observe returns the observer of the handler's policy, in place from then on.
// The sources of one handler share it.
func observe(handler *reverseproxy.Handler) *observer {
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
	o := &observer{Selector: policy, key: fmt.Sprintf("discovery.course.%d", observers.Add(1))}
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
	tried   []string // where it was sent so far, all in vain
	batches []batch  // what the sources returned for the present attempt
	choice  *choice  // nil if nobody asks for it

	room struct { // for the usual case, to save allocations
		tried   [2]string
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
	c.tried, c.batches = c.room.tried[:0], c.room.batches[:0]
	vars[o.key] = c
	if o.nodes {
		c.choice = choiceOf(vars, r)
	}
	return c
}

// Select calls the policy, and notes what the handler found and the policy chose.
func (o *observer) Select(pool reverseproxy.UpstreamPool, r *http.Request, w http.ResponseWriter) *reverseproxy.Upstream {
	c := o.course(r)
	if c == nil {
		return o.Selector.Select(pool, r, w)
	}
	if o.hosts {
		c.each(pool, noteHost)
	}
	var chosen *reverseproxy.Upstream
	if policy, ok := o.Selector.(*LeastLoad); ok {
		chosen = policy.choose(pool, c)
	} else {
		chosen = o.Selector.Select(pool, r, w)
	}
	if chosen != nil {
		// If the request comes back, it failed there.
		c.tried = append(c.tried, chosen.Dial)
		if c.choice != nil {
			c.choice.node = nil // it may be none of the nodes
			c.each(pool, func(e *discovery.Entry, up *reverseproxy.Upstream) {
				if up == chosen {
					c.choice.node = e
				}
			})
		}
	}
	c.batches = c.batches[:0]
	return chosen
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
