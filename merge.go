package caddydiscovery

import (
	"cmp"
	"math/rand/v2"
	"slices"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// A contender is an upstream where several sources return some, with what decides
// between it and the others: the fewest requests in flight, then the earliest arrival.
type contender struct {
	*reverseproxy.Upstream
	stands   bool // it stands in for a node of its source
	busyness float64
	time     float64 // see picker.Race
}

// compare puts first what the policy is to see first.
func (c contender) compare(other contender) int {
	if c.stands != other.stands {
		if c.stands {
			return 1
		}
		return -1
	}
	return cmp.Or(cmp.Compare(c.busyness, other.busyness), cmp.Compare(c.time, other.time))
}

// merge returns the upstreams of several sources in the order in which the handler's
// policy is to see them, for its choice to be as among all nodes of all sources; false if
// it is to see them as they are. An upstream that is no node counts as one of weight 1.
// Those that Caddy does not hold available are left out.
func (a *attempts) merge(pool reverseproxy.UpstreamPool) (reverseproxy.UpstreamPool, bool) {
	pool = a.withoutResorts(pool)
	decides, counts, turns := false, false, false
	for c, upstreams := range a.runs(pool) {
		if c == nil {
			continue
		}
		if c.race.Kept && upstreams[0].Available() { // the session of the request
			return upstreams[:1], true
		}
		decides = true
		counts = counts || c.race.Counts
		turns = turns || c.race.Turn.Had()
	}
	switch {
	case !decides:
		return pool, false
	case turns:
		return a.inTurn(pool)
	}
	var contenders []contender
	for c, upstreams := range a.runs(pool) {
		for i, up := range upstreams {
			if !up.Available() {
				continue
			}
			next := contender{Upstream: up}
			switch {
			case c == nil:
				if counts {
					next.busyness = float64(up.NumRequests())
				}
				next.time = rand.ExpFloat64()
			case i < len(c.race.Times):
				next.busyness, next.time = c.race.Busyness, c.race.Times[i]
			default:
				next.stands = true
			}
			contenders = append(contenders, next)
		}
	}
	slices.SortStableFunc(contenders, contender.compare)
	merged := make(reverseproxy.UpstreamPool, len(contenders))
	for i, c := range contenders {
		merged[i] = c.Upstream
	}
	return merged, true
}

// withoutResorts leaves out the nodes of sources that have none which can serve this
// request, if there is another upstream.
func (a *attempts) withoutResorts(pool reverseproxy.UpstreamPool) reverseproxy.UpstreamPool {
	if !slices.ContainsFunc(a.current, func(c candidates) bool { return c.race != nil && c.race.Resort }) {
		return pool
	}
	var others reverseproxy.UpstreamPool
	for _, up := range pool {
		if !slices.ContainsFunc(a.current, func(c candidates) bool { return c.race != nil && c.race.Resort && slices.Contains(c.upstreams, up) }) {
			others = append(others, up)
		}
	}
	if slices.ContainsFunc(others, (*reverseproxy.Upstream).Available) {
		return others
	}
	return pool
}

// forgetBut forgets what sources returned that is not in the pool: multi gives up what it
// has when the client goes away, and the handler falls back to static upstreams.
func (a *attempts) forgetBut(pool reverseproxy.UpstreamPool) {
	a.current = slices.DeleteFunc(a.current, func(c candidates) bool {
		gone := !slices.Contains(pool, c.upstreams[0])
		if gone && c.race != nil {
			c.race.Turn.PutBack()
		}
		return gone
	})
}

// runs yields the upstreams in their order: what a source of ours returned that says what
// decides, and between them those of others, one by one or more, without a source.
func (a *attempts) runs(pool reverseproxy.UpstreamPool) func(yield func(*candidates, []*reverseproxy.Upstream) bool) {
	return func(yield func(*candidates, []*reverseproxy.Upstream) bool) {
		for len(pool) > 0 {
			var from *candidates
			n := 1
			for i := range a.current {
				if c := &a.current[i]; c.race != nil && c.race.Decides() && c.upstreams[0] == pool[0] && len(c.upstreams) <= len(pool) {
					from, n = c, len(c.upstreams)
				}
			}
			if !yield(from, pool[:n]) {
				return
			}
			pool = pool[n:]
		}
	}
}

// inTurn returns the upstream whose turn it is, and then the others; false if it is
// nobody's turn: the policy is to see those that are left.
func (a *attempts) inTurn(pool reverseproxy.UpstreamPool) (reverseproxy.UpstreamPool, bool) {
	var shares []picker.Share
	var firsts []*reverseproxy.Upstream // of the shares
	var others, rest reverseproxy.UpstreamPool
	for c, upstreams := range a.runs(pool) {
		before := len(rest)
		rest = appendAvailable(rest, upstreams)
		available := rest[before:] // asked once, because it may change meanwhile
		if c == nil || !c.race.Turn.Had() {
			others = append(others, available...)
			continue
		}
		ready := len(available) > 0 && available[0] == upstreams[0]
		shares = append(shares, picker.Share{Source: c.source, Turn: &c.race.Turn, Ready: ready})
		firsts = append(firsts, upstreams[0])
	}
	if len(others) > 0 {
		shares = append(shares, picker.Share{Others: len(others), Ready: true})
	}
	next, other := picker.Next(shares)
	var first *reverseproxy.Upstream
	switch {
	case next < 0:
		return rest, false
	case next < len(firsts):
		first = firsts[next]
	default:
		first = others[other]
	}
	i := slices.Index(rest, first)
	rest[0], rest[i] = rest[i], rest[0]
	return rest, true
}

// putBack puts the turns of all nodes back but that of the chosen one.
func (a *attempts) putBack(selected *reverseproxy.Upstream) {
	for _, c := range a.current {
		if c.race != nil && c.upstreams[0] != selected {
			c.race.Turn.PutBack()
		}
	}
}

func appendAvailable(to reverseproxy.UpstreamPool, upstreams []*reverseproxy.Upstream) reverseproxy.UpstreamPool {
	for _, up := range upstreams {
		if up.Available() {
			to = append(to, up)
		}
	}
	return to
}
