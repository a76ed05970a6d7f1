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

// LeastLoad is a policy that gives each node a share of the requests in proportion to what
// it serves by its utilization, as gRFC A58 has it: of equal nodes one that reports a load
// of 0.1 gets several times as many as one that reports 0.9. Whatever the fleet's measure of
// load is, that comes to the same load everywhere. Half of what a node counts as serving is
// what it got from this proxy lately, and half what its weight is of all, so that nodes
// which report the same get shares by weight, and no node gets nothing. Where none reports a
// load the shares are the weights.
//
// Shares are computed once a second, rise slower than they fall, and are shares: what one
// report says moves some of the requests, and never all of them, however many proxies read
// it. Of two nodes that are drawn by their shares it is the one with fewer requests in flight
// from this proxy over its share. Responses of a status of 500 or above and none at all count
// as load.
//
// A node may report its load in its responses as well, between heartbeats, in the header
// (or trailer) endpoint-load-metrics of ORCA, as JSON or TEXT, or endpoint-load-metrics-bin:
// application_utilization, or else cpu_utilization. It is taken off the response.
//
// It needs the upstream source "discovery". Upstreams of another source beside it get the
// average share.
type LeastLoad struct {
	chooser
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
	return l.provision(ctx, "least_load", "nodes that report their load")
}

// Select selects one of the upstreams by their shares. Which nodes they are it learns from
// the attempts of the request, where the source has noted them.
func (l *LeastLoad) Select(pool reverseproxy.UpstreamPool, r *http.Request, _ http.ResponseWriter) *reverseproxy.Upstream {
	if up, known := only(pool); known {
		return up
	}
	a, _ := attemptsOf(r)
	now := traffic.Now()
	var roomMembers [balance.MostCandidates]balance.Member
	var roomOdds, roomShares [balance.MostCandidates]float64
	var roomOthers, roomNodes [balance.MostCandidates]*reverseproxy.Upstream
	members, odds, available, others := roomMembers[:0], roomOdds[:0], roomNodes[:0], roomOthers[:0]
	for e, up := range a.each(pool) {
		switch {
		case !up.Available():
		case e == nil:
			others = append(others, up)
		default:
			m := memberOf(e, now)
			weight, o, _ := l.weigh(e)
			// Where the nodes were drawn by weight it counts no more.
			members, odds, available = append(members, m), append(odds, o/weight), append(available, up)
		}
	}
	shares := balance.Shares(members, roomShares[:0])
	sum := 0.0
	for i := range shares {
		shares[i] *= odds[i]
		sum += shares[i]
	}
	for range others {
		shares = append(shares, sum/float64(max(len(available), 1)))
	}
	available = append(available, others...)
	if i := balance.LessBusy(shares, func(i int) int { return available[i].NumRequests() }, l.random); i >= 0 {
		return available[i]
	}
	return nil
}

// observer returns who is told of the attempts.
func (l *LeastLoad) observer() traffic.Observer { return loadObserver{} }

func usageOf(e *discovery.Entry) *balance.Usage { return &peerOf(e).usage }

// memberOf returns what counts of the node for its share.
func memberOf(e *discovery.Entry, now time.Duration) balance.Member {
	return usageOf(e).Member(now, e.Weight(), e.Load(), e.LastHeard())
}

// loadObserver learns what nodes serve, and the loads that they report in responses.
type loadObserver struct{}

func (loadObserver) Sent(*traffic.Exchange) {}

func (loadObserver) Answered(x *traffic.Exchange) {
	u := usageOf(x.Node)
	u.Served(x.AnsweredAt, isError(x))
	if load, ok := balance.TakeLoad(x.Response.Header); ok {
		u.Report(load)
	}
}

func (loadObserver) Done(x *traffic.Exchange) {
	switch {
	case x.Response == nil && x.Outcome != traffic.Aborted:
		usageOf(x.Node).Served(x.DoneAt, true)
	case x.Response != nil && len(x.Response.Trailer) > 0:
		if load, ok := balance.TakeLoad(x.Response.Trailer); ok {
			usageOf(x.Node).Report(load)
		}
	}
}

// Interface guards
var (
	_ caddy.Provisioner     = (*LeastLoad)(nil)
	_ caddyfile.Unmarshaler = (*LeastLoad)(nil)
	_ learner               = (*LeastLoad)(nil)
)
