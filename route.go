package caddydiscovery

import (
	"net/http"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// nobody is the picker of requests that no node is for.
var nobody = new(picker.Picker)

// routeOf returns the host that nodes announce for a request, and its longest path that
// fits; nil if there is none. The path is that of the request as it is when this is asked,
// hence after the rewrites before, as for Caddy's own matchers.
func routeOf(s *discovery.Snapshot, r *http.Request) (*discovery.Host, *discovery.Route) {
	host := s.Hosts().Find(discovery.RequestHost(r.Host))
	if host == nil {
		return nil, nil
	}
	return host, host.Route(r.URL.Path)
}

// routed returns the picker of a snapshot for a request that goes by its host and path, and
// asks for nodes by the query.
func (u *Upstreams) routed(s *discovery.Snapshot, r *http.Request, q *picker.Query) *picker.Picker {
	host, route := routeOf(s, r)
	switch {
	case route == nil:
		return nobody
	case q == nil:
		return u.routes.Picker(s, host, route)
	}
	q.ByRoute, q.Host, q.Route = true, host.Name, route
	return u.pickers.Picker(s, q)
}

// serves reports whether a node is for the host and path of a request, where the source
// goes by these.
func (u *Upstreams) serves(s *discovery.Snapshot, r *http.Request, e *discovery.Entry) bool {
	if !u.Route {
		return true
	}
	_, route := routeOf(s, r)
	return route != nil && route.Has(e.Node.ID)
}

// provisionRoutes has the source go by the hosts and paths that nodes announce.
func (u *Upstreams) provisionRoutes(ctx caddy.Context) (err error) {
	u.static.ByRoute = true
	u.routes.Builder, u.routes.Query, u.routes.Charge = &u.builder, u.pickers.Query, u.directory.Charge
	u.routes.Built = func(route *discovery.Route) { u.tellUnguarded(route.Nodes) }
	u.routes.State = func(s *discovery.Snapshot) picker.RouteState {
		state := picker.RouteState{Version: u.pickers.Version(), Registry: firstOf(u.directory.RegistryAddresses())}
		if g := u.builder.Group; g != nil {
			state.Proxies = firstOf(g.Proxies(s))
		}
		return state
	}
	u.hosts, err = newHostUser(ctx, u.directory)
	return err
}

// firstOf returns where the first of them is, which tells slices apart; nil if there is none.
func firstOf[T any](s []T) *T {
	if len(s) == 0 {
		return nil
	}
	return &s[0]
}
