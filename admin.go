package caddydiscovery

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

// Admin is the module of Caddy's admin API that shows what this proxy knows of its
// registries, and why it does what it does:
//
//	GET /discovery/registries
//	GET /discovery/nodes    ?registry= ?service= ?state= ?id=
//	GET /discovery/hosts    ?registry= ?service= ?host=
//	GET /discovery/journal  ?id= ?limit=
//	GET /discovery/sd       ?registry= ?service=
//
// The last is an HTTP service discovery for Prometheus.
// A registry is that of its URL, or of the name that the configuration gives it.
// It shows all registries that a running config watches. Durations are in seconds.
type Admin struct{}

// CaddyModule returns the Caddy module information.
func (Admin) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.discovery",
		New: func() caddy.Module { return new(Admin) },
	}
}

// Routes returns the endpoints.
func (Admin) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{
		{Pattern: "/discovery/registries", Handler: onGet(showRegistries)},
		{Pattern: "/discovery/nodes", Handler: onGet(showNodes)},
		{Pattern: "/discovery/hosts", Handler: onGet(showHosts)},
		{Pattern: "/discovery/journal", Handler: onGet(showJournal)},
		{Pattern: "/discovery/sd", Handler: onGet(showTargets)},
	}
}

// onGet returns a handler that answers GET with a JSON array, of which show adds the
// elements, or nothing before it returns an error.
func onGet(show func(a *view.Array, query url.Values) error) caddy.AdminHandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) error {
		if r.Method != http.MethodGet {
			return caddy.APIError{HTTPStatus: http.StatusMethodNotAllowed, Err: errors.New("method not allowed")}
		}
		a := view.NewArray(w)
		w.Header().Set("Content-Type", "application/json")
		if err := show(a, r.URL.Query()); err != nil {
			return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: err}
		}
		a.End()
		return nil
	}
}

// view returns the directory as the admin API shows it.
func (d *sharedDirectory) view() view.Registry {
	v := view.OfRegistry(d.name(), d.backend, d.Status())
	v.Name = declaredName(d.registry.key)
	return v
}

func showRegistries(a *view.Array, _ url.Values) error {
	for _, d := range runningDirectories() {
		a.Add(d.view())
	}
	return nil
}

func showNodes(a *view.Array, query url.Values) error {
	registry, service, state := query.Get("registry"), query.Get("service"), query.Get("state")
	id, anybody := query.Get("id"), !query.Has("id")
	if state != "" && !slices.Contains(view.States, state) {
		return fmt.Errorf("state: unknown state %q, want one of %s", state, strings.Join(view.States, ", "))
	}
	requests, uncounted := requestsInFlight()
	for _, d := range runningDirectories() {
		if !d.called(registry) {
			continue
		}
		name, snapshot := d.name(), d.Snapshot()
		nodes := snapshot.Nodes()
		if service != "" {
			nodes = snapshot.Service(service)
		}
		sources := d.namedSources()
		for _, e := range nodes {
			if !anybody && e.Node.ID != id {
				continue
			}
			v := view.OfNode(name, e, sources)
			if uncounted == nil { // it is as long as Caddy is as we know it
				v.InFlight = new(toNode(e, requests))
			}
			if seen := peerOf(e).session.time(); !seen.IsZero() {
				v.LastSession = &seen
			}
			if state == "" || v.State == state {
				v.AddHosts(snapshot.HostsOf(e))
				a.Add(v)
			}
		}
		if service == "" && (state == "" || state == view.StateRejected) {
			for _, r := range d.Status().Rejections {
				if v := view.OfRejection(name, r); anybody || v.ID == id {
					a.Add(v)
				}
			}
		}
	}
	return nil
}

// called reports whether somebody who asks for a registry by that name means this one;
// "" means all.
func (d *sharedDirectory) called(registry string) bool {
	return registry == "" || registry == d.name() || registry == declaredName(d.registry.key)
}

func showHosts(a *view.Array, query url.Values) error {
	registry, service, name := query.Get("registry"), query.Get("service"), query.Get("host")
	if name != "" {
		var err error
		if name, err = discovery.ParseHost(name); err != nil {
			return fmt.Errorf("host: %w", err)
		}
	}
	for _, d := range runningDirectories() {
		if !d.called(registry) {
			continue
		}
		for h := range d.Snapshot().Hosts().All() {
			if name != "" && h.Name != name || service != "" && !slices.Contains(h.Services, service) {
				continue
			}
			a.Add(d.hostView(h))
		}
	}
	return nil
}

// hostView returns a host as the admin API shows it.
func (d *sharedDirectory) hostView(h *discovery.Host) view.Host {
	since, until := d.certificate(h)
	return view.OfHost(d.name(), h, since, until)
}

func showTargets(a *view.Array, query url.Values) error {
	registry, service := query.Get("registry"), query.Get("service")
	for _, d := range runningDirectories() {
		if !d.called(registry) {
			continue
		}
		nodes := d.Snapshot().Nodes()
		if service != "" {
			nodes = d.Snapshot().Service(service)
		}
		name := d.name()
		for _, e := range nodes {
			a.Add(view.OfTarget(name, e))
		}
	}
	return nil
}

// defaultJournalLimit is how many changes the journal shows unless it is asked for
// more.
const defaultJournalLimit = 1000

func showJournal(a *view.Array, query url.Values) error {
	limit := defaultJournalLimit
	if s := query.Get("limit"); s != "" {
		var err error
		if limit, err = strconv.Atoi(s); err != nil || limit < 1 {
			return fmt.Errorf("limit: invalid number %q, want 1 or more", s)
		}
	}
	id, anybody := query.Get("id"), !query.Has("id")
	for _, c := range newestChanges(runningDirectories(), limit, func(_ *sharedDirectory, c *discovery.Change) bool {
		return view.AboutNode(c.Type) && (anybody || c.ID == id)
	}) {
		a.Add(c)
	}
	return nil
}

// newestChanges returns the newest of what became of the nodes of the directories,
// newest first, as far as it matches.
func newestChanges(directories []*sharedDirectory, limit int, match func(*sharedDirectory, *discovery.Change) bool) []view.Change {
	changes := []view.Change{}
	for _, d := range directories {
		for _, c := range d.Journal().Newest(limit, func(c *discovery.Change) bool { return match(d, c) }) {
			changes = append(changes, view.OfChange(d.name(), c))
		}
	}
	slices.SortStableFunc(changes, func(a, b view.Change) int { return b.Time.Compare(a.Time) })
	return changes[:min(limit, len(changes))]
}

// Interface guards
var (
	_ caddy.AdminRouter = (*Admin)(nil)
)
