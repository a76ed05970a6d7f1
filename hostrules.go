package caddydiscovery

import (
	"context"
	"reflect"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A hostUser is a part of a config for which the directory has to look at the hosts that
// nodes announce, by the rules that the config declares for the registry. While the users
// of two configs are there the newer one's rules count, so that a reload changes them
// without another connection, watch or listing.
type hostUser struct {
	directory *sharedDirectory
	rules     *discovery.HostRules

	// Guarded by the directory's mutex.
	options discovery.HostOptions
	whole   bool // with the sites of the config
}

// newHostUser returns a user that has yet to join.
func newHostUser(ctx caddy.Context, d *sharedDirectory) (*hostUser, error) {
	options, err := declaredHosts(ctx, d.registry.key)
	if err != nil {
		return nil, err
	}
	rules, err := discovery.NewHostRules(options)
	if err != nil {
		return nil, err
	}
	u := &hostUser{directory: d, rules: rules, options: options}
	// Which sites the config has is known when all of it is provisioned.
	return u, onEvent(ctx, "started", func() {
		options.Sites = sites(ctx)
		u.set(options)
	})
}

// join has the rules count, from when requests come or the config has started.
func (u *hostUser) join() {
	if u == nil {
		return
	}
	u.directory.mu.Lock()
	defer u.directory.mu.Unlock()
	if !slices.Contains(u.directory.hostUsers, u) {
		if !u.whole && u.directory.hostOptions != nil {
			u.options.Sites = u.directory.hostOptions.Sites // those of the config before, which are the same mostly
		}
		u.directory.hostUsers = append(u.directory.hostUsers, u)
		u.directory.applyHostRules()
	}
}

// seen reports whether a snapshot was made with the hosts looked at. Without a user there is
// nothing to see.
func (u *hostUser) seen(s *discovery.Snapshot) bool { return u == nil || s.Hosts() != nil }

// await returns a snapshot of a directory that is listed in which the hosts were looked at:
// the given one unless it followed its registry before anybody asked for hosts. Then the
// next one comes at once, and is awaited for hostsTimeout at most.
func (u *hostUser) await(ctx context.Context, s *discovery.Snapshot) *discovery.Snapshot {
	if !s.Synced || u.seen(s) {
		return s
	}
	ctx, cancel := context.WithTimeout(ctx, hostsTimeout)
	defer cancel()
	for !u.seen(s) && u.joined() {
		select {
		case <-s.Superseded():
		case <-ctx.Done():
			return s
		}
		s = u.directory.Snapshot()
	}
	return s
}

const hostsTimeout = 2 * time.Second

func (u *hostUser) joined() bool {
	u.directory.mu.Lock()
	defer u.directory.mu.Unlock()
	return slices.Contains(u.directory.hostUsers, u)
}

// set has other rules count for a user that joined, or will.
func (u *hostUser) set(options discovery.HostOptions) {
	u.directory.mu.Lock()
	defer u.directory.mu.Unlock()
	u.options, u.whole = options, true
	u.directory.applyHostRules()
}

// leave ends that the rules count, if it joined.
func (u *hostUser) leave() {
	if u == nil {
		return
	}
	u.directory.mu.Lock()
	defer u.directory.mu.Unlock()
	if i := slices.Index(u.directory.hostUsers, u); i >= 0 {
		u.directory.hostUsers = slices.Delete(u.directory.hostUsers, i, i+1)
		u.directory.applyHostRules()
	}
}

// applyHostRules gives the directory the rules of the newest user, nil without one. The
// caller holds mu. Equal rules are not given twice: all hosts would be looked at anew.
func (d *sharedDirectory) applyHostRules() {
	if len(d.hostUsers) == 0 {
		d.hostOptions = nil
		d.SetHostRules(nil)
		return
	}
	options := d.hostUsers[len(d.hostUsers)-1].options
	if d.hostOptions != nil && reflect.DeepEqual(*d.hostOptions, options) {
		return
	}
	rules, err := discovery.NewHostRules(options)
	if err != nil {
		return // it was accepted without the sites, and these are host names
	}
	d.hostOptions = &options
	d.SetHostRules(rules)
}

// sites returns the hosts that the sites of a config name, but for those that are for
// nodes: one of their routes proxies to what is announced. A handle block with hosts of its
// own counts as a site, also in a site that is for nodes: so is made what shares the
// certificate of a wildcard.
func sites(ctx caddy.Context) []string {
	app, err := ctx.AppIfConfigured("http")
	if err != nil {
		return nil // there is none, or it has failed and so does the config
	}
	named := make(map[string]bool) // whether a host is a site of the config's own
	for _, server := range app.(*caddyhttp.App).Servers {
		siteFinder{server.NamedRoutes, named}.find(server.Routes, false, maxInvocations)
	}
	var all []string
	for host, own := range named {
		if own {
			all = append(all, host)
		}
	}
	slices.Sort(all)
	return all
}

// maxInvocations is how deep named routes may invoke each other. One that invokes itself
// answers nothing, but can be loaded.
const maxInvocations = 4

// siteFinder finds the sites of a server.
type siteFinder struct {
	namedRoutes map[string]*caddyhttp.Route
	found       map[string]bool // whether a host is a site of the config's own
}

// find looks at routes that are those of a server, or inside of others.
func (f siteFinder) find(routes caddyhttp.RouteList, inside bool, invocations int) {
	for _, route := range routes {
		own := !f.announced(route, invocations)
		switch {
		case !inside:
			f.add(route.MatcherSets, own)
		case isBlock(route):
			f.add(slices.DeleteFunc(slices.Clone(route.MatcherSets), func(set caddyhttp.MatcherSet) bool {
				return own && len(set) > 1 // for a part of a host, such as a path; the rest may be for nodes
			}), own)
		}
		if own {
			continue
		}
		for _, handler := range route.Handlers {
			nested, left := f.inside(handler, invocations)
			f.find(nested, true, left)
		}
	}
}

// add takes up the hosts that a route is for.
func (f siteFinder) add(sets caddyhttp.MatcherSets, own bool) {
	placeholders := caddy.NewReplacer()
	for _, set := range sets {
		for _, host := range hostsOf(set) {
			if normal, err := discovery.ParseHost(placeholders.ReplaceKnown(host, "")); err == nil {
				was, found := f.found[normal]
				f.found[normal] = own && (was || !found)
			}
		}
	}
}

// announced reports whether a route is, in any part of it, for what nodes announce.
func (f siteFinder) announced(route caddyhttp.Route, invocations int) bool {
	return slices.ContainsFunc(route.Handlers, func(handler caddyhttp.MiddlewareHandler) bool {
		if h, ok := handler.(*reverseproxy.Handler); ok {
			w, ok := h.LoadBalancing.SelectionPolicy.(*policyWrapper)
			return ok && w.routes
		}
		nested, left := f.inside(handler, invocations)
		return slices.ContainsFunc(nested, func(r caddyhttp.Route) bool { return f.announced(r, left) })
	})
}

// inside returns the routes that a handler consists of, and how many invocations are left
// for them.
func (f siteFinder) inside(handler caddyhttp.MiddlewareHandler, invocations int) (caddyhttp.RouteList, int) {
	switch h := handler.(type) {
	case *caddyhttp.Subroute:
		return h.Routes, invocations
	case *caddyhttp.Invoke:
		if route := f.namedRoutes[h.Name]; route != nil && invocations > 0 {
			return caddyhttp.RouteList{*route}, invocations - 1
		}
	}
	return nil, 0
}

// isBlock reports whether a route is one of several of which a request takes the first that
// matches, as those of the directive handle are.
func isBlock(route caddyhttp.Route) bool {
	return route.Group != "" && slices.ContainsFunc(route.Handlers, func(handler caddyhttp.MiddlewareHandler) bool {
		_, ok := handler.(*caddyhttp.Subroute)
		return ok
	})
}

// hostsOf returns the hosts that a set of matchers names.
func hostsOf(set caddyhttp.MatcherSet) (hosts []string) {
	for _, m := range set {
		switch m := m.(type) {
		case *caddyhttp.MatchHost:
			hosts = append(hosts, *m...)
		case caddyhttp.MatchHost:
			hosts = append(hosts, m...)
		}
	}
	return hosts
}
