package caddydiscovery

import (
	"fmt"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// A shortlist says which nodes a source returns for a request: those among which the
// handler's policy chooses as it would among all, because each one more costs Caddy a
// global lock.
type shortlist struct {
	strategy picker.Strategy
	// size is how many nodes there are at most; 0: any number.
	size int
	// shown is how many of them the policy is to choose among at first. The others are
	// for when it cannot take one of these. 0: all of them.
	shown int
	// weighs says that weights count, hence that a new node can start slowly.
	weighs bool
}

// loadCandidates is how many nodes least_load compares: with so many the best of them is
// among the least loaded eighth of a fleet, nearly always.
const loadCandidates = 8

// shortlistFor returns the shortlist for a policy. Where other sources are beside this
// one, a policy that draws or takes turns needs the nodes of all of them. With spare
// there is one node more than the policy needs, because Caddy may know of the first that
// it fails or is full before this source does.
func shortlistFor(policy reverseproxy.Selector, beside, spare bool) shortlist {
	more := 0
	if spare {
		more = 1
	}
	_, byLoad := policy.(*LeastLoad)
	all := shortlist{strategy: picker.All{}, weighs: byLoad}
	switch p := policy.(type) {
	case *reverseproxy.FirstSelection:
		return shortlist{strategy: picker.Leading(1 + more), size: 1 + more}
	case reverseproxy.RandomSelection, *reverseproxy.RandomSelection:
		if !beside {
			return shortlist{strategy: picker.Draw(1 + more), size: 1 + more, shown: 1, weighs: true}
		}
	case *reverseproxy.RandomChoiceSelection:
		if !beside {
			return shortlist{strategy: picker.Draw(p.Choose), size: p.Choose, weighs: true}
		}
	case *reverseproxy.RoundRobinSelection:
		if !beside {
			return shortlist{strategy: picker.Turns(1 + more), size: 1 + more, shown: 1, weighs: true}
		}
	case *LeastLoad:
		if !beside {
			return shortlist{strategy: picker.Sample(loadCandidates), size: loadCandidates, weighs: true}
		}
	}
	return all
}

// shortlist returns the shortlist of what was configured.
func (p *Pick) shortlist() shortlist {
	s := shortlist{strategy: picker.Draw(p.Count), size: p.Count, weighs: true}
	if p.Hash != "" {
		s.strategy = picker.Owners(p.Count)
	}
	return s
}

// checkSlowStart refuses what would have no effect.
func (s shortlist) checkSlowStart(policy reverseproxy.Selector, beside bool) error {
	name := "this policy"
	if m, ok := policy.(caddy.Module); ok {
		name = "lb_policy " + m.CaddyModule().ID.Name()
	}
	switch {
	case s.weighs:
		return nil
	case beside:
		return fmt.Errorf("slow_start under multi needs pick: %s chooses among the nodes of all sources, and knows no shares; want a line such as 'pick 2'", name)
	}
	return fmt.Errorf("slow_start has no effect under %s, which knows no shares; want another policy, such as random, round_robin or random_choose", name)
}
