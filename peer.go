package caddydiscovery

import (
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/balance"
)

// peer is what this process knows of a node by its own experience, as opposed to
// what the node's record says. All sources share it.
type peer struct {
	host    atomic.Pointer[knownHost]
	session lastSeen // when a session of the node was seen
	latency balance.Latency
	usage   balance.Usage
}

// lastSeen is when something was seen last, to a tenth of a second.
type lastSeen struct{ at atomic.Int64 } // since seenSince; 0: never

const seenStep = 100 * time.Millisecond

var seenSince = time.Now()

func (l *lastSeen) see() {
	// Most requests only read what they share with all others.
	if now, at := int64(time.Since(seenSince))+1, l.at.Load(); at == 0 || now-at >= int64(seenStep) {
		l.at.Store(now)
	}
}

// time returns when that was, the zero time for never.
func (l *lastSeen) time() time.Time {
	at := l.at.Load()
	if at == 0 {
		return time.Time{}
	}
	return seenSince.Add(time.Duration(at))
}

// knownHost is Caddy's own state of an address: how many requests are under way,
// and how many failed lately.
type knownHost struct {
	address string
	*reverseproxy.Host
}

func peerOf(e *discovery.Entry) *peer {
	return discovery.Attached[peer](e)
}

// hostOf returns Caddy's state of the node's address, nil as long as no handler
// has considered the node. Caddy keeps that state in a private map, and tells
// only by what it writes into an upstream: see policyWrapper.
func hostOf(e *discovery.Entry) *reverseproxy.Host { return peerOf(e).hostOf(e) }

// hostOf is the func of the same name for who has the peer already.
func (p *peer) hostOf(e *discovery.Entry) *reverseproxy.Host {
	if known := p.host.Load(); known != nil && e.DialledAt(known.address) {
		return known.Host
	}
	return nil
}

// inFlight returns how many requests the node has from this process.
func inFlight(e *discovery.Entry) int {
	if host := hostOf(e); host != nil {
		return host.NumRequests()
	}
	return 0
}

// noteHost remembers Caddy's state of the node's address. Caddy forgets an
// address that no handler considered for an hour and makes another state for it
// then, so that this is called with every upstream.
func noteHost(e *discovery.Entry, up *reverseproxy.Upstream) {
	if e == nil {
		return // the upstream is no node
	}
	p := peerOf(e)
	if known := p.host.Load(); known != nil && known.Host == up.Host && known.address == up.Dial {
		return
	}
	p.host.Store(&knownHost{address: up.Dial, Host: up.Host})
}

// passiveChecks are those of a handler, which take a node out of service for some time.
type passiveChecks struct {
	*reverseproxy.PassiveHealthChecks
}

// unavailable reports whether Caddy would not send the node a request now. To be lenient
// is to disregard how often it has failed.
func (c passiveChecks) unavailable(e *discovery.Entry, lenient bool) bool {
	host := hostOf(e)
	if host == nil {
		return false
	}
	// Caddy fills in the default of max_fails only after this source is
	// provisioned, and never changes it afterwards.
	return !lenient && host.Fails() >= max(c.MaxFails, 1) ||
		c.UnhealthyRequestCount > 0 && host.NumRequests() >= c.UnhealthyRequestCount
}
