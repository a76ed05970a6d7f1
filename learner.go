package caddydiscovery

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

// A learner is a policy of ours, which goes by what becomes of the requests.
type learner interface {
	reverseproxy.Selector
	observer() traffic.Observer
	weighBy(share func(*discovery.Entry) float64)
}

// learnerOf returns the learner that a policy is, or falls back to; nil if there is none.
// Of a fallback it is a copy with the same options.
func learnerOf(policy reverseproxy.Selector) learner {
	for policy != nil {
		if l, ok := policy.(learner); ok {
			return l
		}
		policy = fallbackOf(policy)
	}
	return nil
}

// learn has the policy told of the attempts, if it goes by them.
func (u *Upstreams) learn(ctx caddy.Context, w *policyWrapper) error {
	l := learnerOf(w.Selector)
	if l == nil {
		return nil
	}
	if latency, ok := l.(*LeastLatency); ok {
		u.builder.Cost = latency.cost
	}
	return u.observe(ctx, l.observer())
}

// A chooser has what our policies need to choose among upstreams.
type chooser struct {
	random func() uint64
	share  func(*discovery.Entry) float64 // see weighBy
}

// provision refuses a handler whose source has no nodes.
func (c *chooser) provision(ctx caddy.Context, name, needs string) error {
	c.random = rand.Uint64
	type source struct {
		Source  string   `json:"source"`
		Sources []source `json:"sources"` // of multi
	}
	var hasNodes func(s source) bool
	hasNodes = func(s source) bool { return s.Source == "discovery" || slices.ContainsFunc(s.Sources, hasNodes) }
	var configured source
	if handler := parentOf[*reverseproxy.Handler](ctx); handler != nil && handler.DynamicUpstreamsRaw != nil {
		if err := json.Unmarshal(handler.DynamicUpstreamsRaw, &configured); err != nil {
			return fmt.Errorf("reading the upstream source: %w", err)
		}
	}
	if !hasNodes(configured) {
		return fmt.Errorf("lb_policy %s needs %s; want 'dynamic discovery' in the same reverse_proxy, or another policy such as least_conn", name, needs)
	}
	return nil
}

// weighBy has weights decide among nodes that are as good, and takes the func that returns
// what part of its share a node gets. Where it is not called, nodes were drawn by weight.
func (c *chooser) weighBy(share func(*discovery.Entry) float64) { c.share = share }

// weigh returns the weight of a node, its odds among nodes that are as good, and whether
// it has not come to its full share yet.
func (c *chooser) weigh(e *discovery.Entry) (weight, odds float64, isNew bool) {
	if c.share == nil {
		return e.Weight(), 1, false
	}
	share := c.share(e)
	return e.Weight() * share, e.Weight() * share, share < 1
}

// weightBehind returns what all nodes weigh for which an upstream stands that a source
// under multi has chosen of them; 0 if it is none such.
func (a *attempts) weightBehind(up *reverseproxy.Upstream) float64 {
	if a != nil {
		for _, c := range a.current {
			if c.race != nil && c.upstreams[0] == up {
				return c.race.Weight
			}
		}
	}
	return 0
}

// only returns the upstream of a pool that is no choice, nil if that is not available.
func only(pool reverseproxy.UpstreamPool) (up *reverseproxy.Upstream, known bool) {
	switch {
	case len(pool) > 1:
		return nil, false
	case len(pool) == 1 && pool[0].Available():
		return pool[0], true
	}
	return nil, true
}

// notKnown stands for what is not known of an upstream that is no node.
const notKnown = -1
