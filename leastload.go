package caddydiscovery

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

// LeastLoad is a policy that selects the available node that reports the least
// load. Whatever the fleet's measure of load is, a report is seconds old when it
// is used, and every proxy has the same one: so that they do not all send
// everything to the one idle node, the load is corrected by what this proxy itself
// has in flight to a node and has sent to it lately. A node of twice the weight takes
// twice as much of either before it counts as equally loaded. Among equals one is
// chosen at random. In a fleet of more than eight nodes it is the least loaded of eight
// that are drawn by weight, or of those of pick.
//
// It needs the upstream source "discovery". Upstreams of another source beside it
// count as loaded as much as the average.
type LeastLoad struct {
	random func() uint64
	weight func(*discovery.Entry) float64 // nil: candidates are drawn by it, and it counts no more
}

// CaddyModule returns the Caddy module information.
func (*LeastLoad) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.selection_policies.least_load",
		New: func() caddy.Module { return new(LeastLoad) },
	}
}

// UnmarshalCaddyfile sets up the policy from Caddyfile tokens. Syntax:
//
//	lb_policy least_load
func (*LeastLoad) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name
	if d.NextArg() {
		return d.Errf("lb_policy least_load takes no arguments, have %q", d.Val())
	}
	return caddyblock.Block{What: "lb_policy least_load", Options: caddyblock.Options{}}.Parse(d)
}

// Provision refuses a handler without reports.
func (l *LeastLoad) Provision(ctx caddy.Context) error {
	l.random = rand.Uint64
	type source struct {
		Source  string   `json:"source"`
		Sources []source `json:"sources"` // of multi
	}
	var reports func(s source) bool
	reports = func(s source) bool { return s.Source == "discovery" || slices.ContainsFunc(s.Sources, reports) }
	var configured source
	if handler := parentOf[*reverseproxy.Handler](ctx); handler != nil && handler.DynamicUpstreamsRaw != nil {
		if err := json.Unmarshal(handler.DynamicUpstreamsRaw, &configured); err != nil {
			return fmt.Errorf("reading the upstream source: %w", err)
		}
	}
	if !reports(configured) {
		return errors.New("lb_policy least_load needs nodes that report their load; want 'dynamic discovery' in the same reverse_proxy, or another policy such as least_conn")
	}
	return nil
}

// Select selects the upstream of the least score. Which nodes the upstreams are it
// learns from the attempts of the request, where the source has noted them.
func (l *LeastLoad) Select(pool reverseproxy.UpstreamPool, r *http.Request, _ http.ResponseWriter) *reverseproxy.Upstream {
	a, _ := attemptsOf(r)
	sum, known := 0.0, 0
	for e, up := range a.each(pool) {
		if e != nil && up.Available() {
			sum += e.Load()
			known++
		}
	}
	mean := sum / float64(max(known, 1))
	now := time.Since(windowsBegan)
	var best *reverseproxy.Upstream
	var bestNode *discovery.Entry
	var least float64
	ties := uint64(0)
	for e, up := range a.each(pool) {
		if !up.Available() {
			continue
		}
		load, recent := mean, 0.0
		if e != nil {
			load, recent = e.Load(), peerOf(e).recent.count(now)
		}
		s := score(load, mean, up.Host.NumRequests(), recent)
		if e != nil && l.weight != nil {
			s /= l.weight(e)
		}
		switch {
		case best == nil || s < least:
			ties = 1
		case s > least:
			continue
		default:
			if ties++; l.random()%ties != 0 {
				continue
			}
		}
		best, bestNode, least = up, e, s
	}
	if bestNode != nil {
		peerOf(bestNode).recent.add(now)
	}
	return best
}

// recentPerRequest is how many requests of the last seconds weigh as much as one
// that is in flight.
const recentPerRequest = 64

// score is by what candidates are compared: the load that a node reports,
// corrected by what this proxy knows better. The average is added to each load:
// else an idle node, whose load is 0, could have any number of requests in flight
// and still be the least loaded.
func score(load, mean float64, inFlight int, recent float64) float64 {
	relative := 1.0
	if mean > 0 {
		relative = load / mean
	}
	return (1 + relative) * (1 + float64(inFlight) + recent/recentPerRequest)
}

// window counts what happened in about the last ten seconds: in one step of ten
// seconds and in the one before it, of which as much counts as is not over yet.
type window struct {
	// state holds the number of the step, and the counts of the step before it
	// and of the step itself, in 24, 20 and 20 bits.
	state atomic.Uint64
}

const (
	windowStep = 10 * time.Second
	windowMost = 1<<20 - 1
)

var windowsBegan = time.Now()

// countsAt returns the counts of a state as of a later step.
func countsAt(state, step uint64) (before, current uint64) {
	switch then := state >> 40; {
	case then == step:
		return state >> 20 & windowMost, state & windowMost
	case then+1 == step:
		return state & windowMost, 0
	default:
		return 0, 0
	}
}

func (w *window) count(now time.Duration) float64 {
	before, current := countsAt(w.state.Load(), uint64(now/windowStep))
	return float64(current) + float64(before)*(1-float64(now%windowStep)/float64(windowStep))
}

func (w *window) add(now time.Duration) {
	step := uint64(now / windowStep)
	for {
		old := w.state.Load()
		before, current := countsAt(old, step)
		if w.state.CompareAndSwap(old, step<<40|before<<20|min(current+1, windowMost)) {
			return
		}
	}
}

// Interface guards
var (
	_ caddy.Provisioner     = (*LeastLoad)(nil)
	_ caddyfile.Unmarshaler = (*LeastLoad)(nil)
	_ reverseproxy.Selector = (*LeastLoad)(nil)
)
