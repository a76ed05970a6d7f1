package picker

import (
	"net/netip"
	"sync"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Routes keeps a picker for each route that requests have asked for. One is made when the
// first request needs it, and stays over all snapshots in which the nodes of its route do
// not change: a join costs the routes of the node that joined. Its fields are not changed
// once it is in use; then it may be used by many goroutines.
type Routes struct {
	Builder *Builder
	// Query is what every request asks for.
	Query Query
	// State is what a picker depends on beside the nodes of its route: when it is another
	// one, the picker is made anew.
	State func(*discovery.Snapshot) RouteState
	// Charge is told how long it took to make a picker.
	Charge func(took time.Duration)
	// Built is called after one was made, without a lock.
	Built func(route *discovery.Route)

	pickers sync.Map // *discovery.Route → *routePicker

	build  sync.Mutex                    // held while a picker is built; guards what follows
	routes map[hostPath]*discovery.Route // those that have a picker
	swept  int                           // how many there were after the last sweep
	bytes  int                           // of all pickers, about
}

// RouteState stands for what a picker depends on beside the nodes of its route. It is
// compared: what it points to has a place in memory of its own after each change.
type RouteState struct {
	// Version counts the changes of the health checks and the like.
	Version uint64
	// Registry is where the registry itself is.
	Registry *netip.AddrPort
	// Proxies share the nodes; nil: this one is alone.
	Proxies *Proxy
}

// hostPath names a route over all its successors.
type hostPath struct{ host, path string }

type routePicker struct {
	*Picker
	state RouteState
}

func (p *routePicker) current(state RouteState) bool {
	return p != nil && p.state == state && !p.expired()
}

// Picker returns the picker of a route of a host.
func (r *Routes) Picker(s *discovery.Snapshot, host *discovery.Host, route *discovery.Route) *Picker {
	state := r.State(s)
	if p := r.of(route); p.current(state) {
		return p.Picker
	}
	p, made := r.renewOnce(s, host, route, state)
	if made {
		r.Built(route)
	}
	return p
}

// renewOnce makes the picker of a route, unless that has happened meanwhile.
func (r *Routes) renewOnce(s *discovery.Snapshot, host *discovery.Host, route *discovery.Route, state RouteState) (p *Picker, made bool) {
	r.build.Lock()
	defer r.build.Unlock()
	if p := r.of(route); p.current(state) {
		return p.Picker, false
	}
	defer func(began time.Time) { r.Charge(time.Since(began)) }(time.Now())
	return r.renew(s, host, route, state), true
}

func (r *Routes) of(route *discovery.Route) *routePicker {
	if p, ok := r.pickers.Load(route); ok {
		return p.(*routePicker)
	}
	return nil
}

// routePickerBytes is about what a picker takes beside its nodes and what is derived from
// them.
const routePickerBytes = 768

// renew makes the picker of a route. The caller holds build.
func (r *Routes) renew(s *discovery.Snapshot, host *discovery.Host, route *discovery.Route, state RouteState) *Picker {
	q := r.Query
	q.ByRoute, q.Host, q.Route = true, host.Name, route
	name := hostPath{host.Name, route.Path}
	var last *Picker
	if before, found := r.routes[name]; found {
		last = r.of(before).Picker
		r.drop(name)
	}
	p := r.Builder.succeed(last, s, &q)
	p.inherit(last)
	p.prepare()
	p.bytes = routePickerBytes + len(name.host) + len(name.path) + p.size()
	for other := range r.routes {
		if r.bytes+p.bytes <= maxPickerBytes {
			break
		}
		r.drop(other)
	}
	if r.routes == nil {
		r.routes = make(map[hostPath]*discovery.Route)
	}
	r.routes[name] = route
	r.pickers.Store(route, &routePicker{p, state})
	r.bytes += p.bytes
	if len(r.routes) >= 2*r.swept+leastSweep {
		r.sweep(s.Hosts())
	}
	return p
}

// leastSweep is how many pickers may be of routes that are gone, whatever there is.
const leastSweep = 128

// sweep lets go of the pickers of routes that are not there any more. It is called when as
// many have been made as there were after the last time, so that it costs each of them the
// same, whether there are ten or a hundred thousand.
func (r *Routes) sweep(hosts *discovery.Hosts) {
	for name := range r.routes {
		if host := hosts.Known(name.host); host == nil || !host.HasPath(name.path) {
			r.drop(name)
		}
	}
	r.swept = len(r.routes)
}

// drop lets go of a picker. The caller holds build.
func (r *Routes) drop(name hostPath) {
	route := r.routes[name]
	r.bytes -= r.of(route).bytes
	r.pickers.Delete(route)
	delete(r.routes, name)
}
