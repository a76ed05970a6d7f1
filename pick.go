package caddydiscovery

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// Pick says how many nodes a request may go to. Caddy takes a global lock for
// each upstream that a source returns, so that the cost of a request grows with
// their number; a few candidates cost the same in a fleet of any size, and the
// selection policy decides among them. Two of them under the policy least_conn
// are the "power of two choices".
type Pick struct {
	// How many nodes are drawn for each request, each with a probability in
	// proportion to its weight. Required.
	Count int `json:"count,omitempty"`

	// A value of the request, such as {http.request.header.X-Tenant}. Requests
	// with the same value get the same nodes, in the same order, by consistent
	// hashing: when one of N nodes joins or leaves, about 1/N of the values move.
	// With the selection policy first a request goes to the first of them that is
	// available. A request for which this is empty gets nodes that are drawn.
	// Default: none, the nodes are drawn
	Hash string `json:"hash,omitempty"`
}

// maxPick bounds pick and, with it, what a single request may cost.
const maxPick = 1000

// check refuses what cannot work with the handler's selection policy.
func (p *Pick) check(policy reverseproxy.Selector) error {
	if p.Count < 1 || p.Count > maxPick {
		return fmt.Errorf("pick: invalid count %d, want 1 to %d", p.Count, maxPick)
	}
	if p.Hash != "" {
		if !strings.Contains(p.Hash, "{") {
			return fmt.Errorf("pick: hash %q is no placeholder, and all requests would go to the same nodes; want one such as {http.request.header.X-Tenant}", p.Hash)
		}
		return nil
	}
	switch policy.(type) {
	case *reverseproxy.IPHashSelection, *reverseproxy.ClientIPHashSelection, *reverseproxy.URIHashSelection,
		*reverseproxy.QueryHashSelection, *reverseproxy.HeaderHashSelection, *reverseproxy.CookieHashSelection:
		name := policy.(caddy.Module).CaddyModule().ID.Name()
		return fmt.Errorf("pick draws other nodes for each request, so that lb_policy %s could not keep a client on one of them; "+
			"want 'pick %d hash <placeholder>' with lb_policy first, or no pick", name, p.Count)
	}
	return nil
}

// key returns the value of the request that decides about its nodes, "" if there
// is none.
func (p *Pick) key(r *http.Request) string {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return ""
	}
	if name := strings.Trim(p.Hash, "{}"); len(name) == len(p.Hash)-2 && p.Hash[0] == '{' && !strings.ContainsAny(name, `{}\`) {
		value, _ := repl.GetString(name) // the usual case, a single placeholder
		return value
	}
	return repl.ReplaceAll(p.Hash, "")
}
