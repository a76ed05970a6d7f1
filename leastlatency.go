package caddydiscovery

import (
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/balance"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

const defaultLatencyDecay = caddy.Duration(10 * time.Second)

// LeastLatency is a policy that selects the available node from which an answer is to be
// expected soonest: by the time that it takes to the first byte of an answer, a peak
// exponentially weighted moving average, times the requests in flight to it over its weight,
// and one. Of nodes that are about as quick one is chosen by weight. In a fleet of more
// than four nodes it is the best of four that are drawn by weight.
//
// A node that becomes slow is believed slow at once, and quick again by and by. Responses
// of a status of 500 or above, broken ones and none at all count as slow, however soon they
// come. A node that has been left alone is tried again by a single request, and a new one
// gets one request at a time until it has answered five. What is known of a node is shared
// by all handlers of the process and outlives a reload; each proxy finds out for itself.
//
// It needs the upstream source "discovery". Upstreams of another source beside it count as
// quick as the average.
type LeastLatency struct {
	// The time constant by which the past is forgotten: a third of a slow answer is left
	// after it; after a third of it, where the node has had nothing to do. Default: 10s
	Decay caddy.Duration `json:"decay,omitempty"`

	chooser
}

// CaddyModule returns the Caddy module information.
func (*LeastLatency) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.reverse_proxy.selection_policies.least_latency",
		New: func() caddy.Module { return new(LeastLatency) },
	}
}

// UnmarshalCaddyfile sets up the policy from Caddyfile tokens. Syntax:
//
//	lb_policy least_latency {
//		decay <duration>
//	}
func (l *LeastLatency) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name
	if d.NextArg() {
		return d.Errf("lb_policy least_latency takes no arguments, have %q; want a block with 'decay <duration>', or nothing", d.Val())
	}
	return caddyblock.Block{What: "lb_policy least_latency", Options: caddyblock.Options{
		"decay": caddyblock.Duration(&l.Decay),
	}}.Parse(d)
}

// Provision refuses a handler without nodes.
func (l *LeastLatency) Provision(ctx caddy.Context) error {
	if err := caddyblock.CheckDuration("lb_policy least_latency: decay", l.Decay); err != nil {
		return err
	}
	if l.Decay == 0 {
		l.Decay = defaultLatencyDecay
	}
	return l.provision(ctx, "least_latency", "nodes that it can watch")
}

// Select selects the upstream from which an answer is to be expected soonest. Which nodes
// the upstreams are it learns from the attempts of the request, where the source has
// noted them.
func (l *LeastLatency) Select(pool reverseproxy.UpstreamPool, r *http.Request, _ http.ResponseWriter) *reverseproxy.Upstream {
	if up, known := only(pool); known {
		return up
	}
	a, _ := attemptsOf(r)
	now := traffic.Now()
	var room [balance.MostCandidates]balance.Candidate
	var ups [balance.MostCandidates]*reverseproxy.Upstream
	candidates, available := room[:0], ups[:0]
	sum, known := 0.0, 0
	for e, up := range a.each(pool) {
		if !up.Available() {
			continue
		}
		c := balance.Candidate{Cost: notKnown, InFlight: up.NumRequests(), Weight: 1, Odds: 1}
		if e != nil {
			c.Cost, _ = l.cost(e, now)
			c.Weight, c.Odds, c.New = l.weigh(e)
			if all := a.weightBehind(up); all > 0 {
				c.Odds = all
			}
			if c.Cost > 0 {
				sum += c.Cost
				known++
			}
		}
		candidates, available = append(candidates, c), append(available, up)
	}
	for i := range candidates {
		if candidates[i].Cost == notKnown {
			candidates[i].Cost = sum / float64(max(known, 1))
		}
	}
	if i := balance.Soonest(candidates, l.random); i >= 0 {
		return available[i]
	}
	return nil
}

// observer returns who is told of the attempts.
func (l *LeastLatency) observer() traffic.Observer {
	return latencyObserver{time.Duration(l.Decay)}
}

// cost returns what the policy knows of a node, and how many requests it has from this
// process.
func (l *LeastLatency) cost(e *discovery.Entry, now time.Duration) (cost float64, inFlight int) {
	p := peerOf(e)
	if host := p.hostOf(e); host != nil {
		inFlight = host.NumRequests()
	}
	return p.latency.Cost(now, time.Duration(l.Decay)), inFlight
}

func latencyOf(e *discovery.Entry) *balance.Latency { return &peerOf(e).latency }

// latencyObserver learns how long nodes take to begin an answer.
type latencyObserver struct{ decay time.Duration }

func (latencyObserver) Sent(x *traffic.Exchange) {
	if latencyOf(x.Node).Sent(x.SentAt); x.Uploads() {
		latencyOf(x.Node).Uploads()
	}
}

// Uploaded implements traffic.UploadObserver.
func (latencyObserver) Uploaded(x *traffic.Exchange, now time.Duration) {
	latencyOf(x.Node).Uploaded(now)
}

func (o latencyObserver) Answered(x *traffic.Exchange) {
	latencyOf(x.Node).Answered(x.AnsweredAt, x.Waited(), o.decay, isError(x))
}

func (o latencyObserver) Done(x *traffic.Exchange) {
	l := latencyOf(x.Node)
	switch took := x.Waited(); {
	case x.Status != 0:
		if x.Outcome == traffic.BrokeOff {
			l.BrokeOff()
		}
	case x.Outcome == traffic.Aborted:
		l.GivenUp(x.DoneAt, took)
	default:
		l.Answered(x.DoneAt, took, o.decay, true)
	}
}

// isError reports whether a response says that the node could not serve the request: by its
// status, or that of gRPC.
func isError(x *traffic.Exchange) bool {
	return x.Status >= http.StatusInternalServerError || x.Unavailable
}

// Interface guards
var (
	_ traffic.UploadObserver = latencyObserver{}
	_ caddy.Provisioner      = (*LeastLatency)(nil)
	_ caddyfile.Unmarshaler  = (*LeastLatency)(nil)
	_ learner                = (*LeastLatency)(nil)
)
