package caddydiscovery

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Admin is the module of Caddy's admin API that shows what this proxy knows of its
// registries, and why it does what it does:
//
//	GET /discovery/registries
//	GET /discovery/nodes    ?registry= ?service= ?state=
//	GET /discovery/journal  ?id= ?limit=
//
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
		{Pattern: "/discovery/registries", Handler: caddy.AdminHandlerFunc(serveRegistries)},
		{Pattern: "/discovery/nodes", Handler: caddy.AdminHandlerFunc(serveNodes)},
		{Pattern: "/discovery/journal", Handler: caddy.AdminHandlerFunc(serveJournal)},
	}
}

// registryView is a registry as the admin API shows it.
type registryView struct {
	Registry  string     `json:"registry"`
	Backend   string     `json:"backend"`
	Connected bool       `json:"connected"`
	Synced    bool       `json:"synced"`
	Nodes     int        `json:"nodes"`
	Revision  uint64     `json:"revision"`
	LastEvent *time.Time `json:"last_event"`
	LastError string     `json:"last_error"`
	StaleFor  float64    `json:"stale_for"`
	Restored  bool       `json:"restored"`
}

// nodeView is a node as the admin API shows it.
type nodeView struct {
	Registry  string            `json:"registry"`
	ID        string            `json:"id"`
	Endpoint  string            `json:"endpoint"`
	Address   string            `json:"address"`
	Service   string            `json:"service"`
	Load      float64           `json:"load"`
	Metadata  map[string]string `json:"metadata"`
	LeftOut   []string          `json:"left_out,omitempty"` // metadata keys without a string
	LastHeard time.Time         `json:"last_heard"`
	LeaseLeft float64           `json:"lease_left"`
	State     string            `json:"state"`
	Reason    string            `json:"reason"`
	Sources   []standingView    `json:"sources"`

	weight float64
}

// standingView is how a node stands with one source.
type standingView struct {
	Source   string `json:"source"`
	Eligible bool   `json:"eligible"`
	Reason   string `json:"reason"`
}

// changeView is an entry of the journal as the admin API shows it.
type changeView struct {
	Time     time.Time `json:"time"`
	Registry string    `json:"registry"`
	ID       string    `json:"id"`
	Type     string    `json:"type"`
	Reason   string    `json:"reason"`
}

// The states in which the admin API and the metrics show a node.
const (
	stateUnhealthy = "unhealthy"
	stateHeld      = "held"
	stateRestored  = "restored"
	stateRejected  = "rejected"
)

var nodeStates = []string{
	string(discovery.StateUp), string(discovery.StateDraining), string(discovery.StateMaintenance),
	stateUnhealthy, stateHeld, stateRestored, stateRejected,
}

// runningDirectories returns the directories that follow a registry, sorted by its
// name.
func runningDirectories() []*sharedDirectory {
	var running []*sharedDirectory
	directories.Range(func(_, v any) bool {
		if d := v.(*sharedDirectory); d.opened.Load() != 0 {
			running = append(running, d)
		}
		return true
	})
	slices.SortFunc(running, func(a, b *sharedDirectory) int {
		return cmp.Or(strings.Compare(a.name(), b.name()), slices.Compare(a.registry.key[:], b.registry.key[:]))
	})
	return running
}

// name returns the registry's name. It contains no secret.
func (d *sharedDirectory) name() string { return d.registry.conn.String() }

// view returns the directory as the admin API shows it.
func (d *sharedDirectory) view() registryView {
	s := d.Status()
	v := registryView{
		Registry:  d.name(),
		Backend:   d.backend,
		Connected: s.Connected,
		Synced:    s.Synced,
		Nodes:     s.Nodes,
		Revision:  s.Revision,
	}
	if !s.LastEvent.IsZero() {
		v.LastEvent = &s.LastEvent
	}
	if s.LastError != nil {
		v.LastError = s.LastError.Error()
	}
	if !s.Connected {
		v.StaleFor = seconds(time.Since(s.Since))
	}
	v.Restored = slices.ContainsFunc(d.Snapshot().Nodes(), func(e *discovery.Entry) bool {
		return e.State() == stateRestored
	})
	return v
}

// seconds is how JSON shows a duration: to the millisecond.
func seconds(d time.Duration) float64 { return float64(d.Milliseconds()) / 1000 }

// viewNode returns a node as the admin API shows it.
func viewNode(registry string, e *discovery.Entry, sources []namedSource) nodeView {
	n := &e.Node
	v := nodeView{
		Registry:  registry,
		ID:        n.ID,
		Endpoint:  n.Endpoint.String(),
		Address:   e.Address(),
		Service:   n.Service(),
		Load:      e.Load(),
		Metadata:  n.Metadata,
		LeftOut:   n.LeftOut,
		LastHeard: e.LastHeard(),
		weight:    e.Weight(),
		LeaseLeft: max(seconds(time.Until(e.LeaseEnd())), 0),
		Sources:   make([]standingView, len(sources)),
	}
	v.State, v.Reason = stateOf(e, sources)
	if err := e.Refused(); err != nil {
		v.Reason = strings.TrimPrefix(v.Reason+"; ", "; ") + "as it was last known, its newest record is rejected: " + err.Error()
	}
	if v.Metadata == nil {
		v.Metadata = map[string]string{}
	}
	for i, s := range sources {
		reason := s.standing(e)
		v.Sources[i] = standingView{Source: s.name, Eligible: reason == "", Reason: reason}
	}
	return v
}

// stateOf returns a node's state, and in words why it is in it, where there is
// more to say than the state does. Whether a node is healthy is a matter of each
// source: it is unhealthy if it is to any of them.
func stateOf(e *discovery.Entry, sources []namedSource) (state, reason string) {
	switch state := e.State(); {
	case state == stateHeld:
		return stateHeld, "its lease ran out with that of many others, and it still accepts connections"
	case state == stateRestored:
		return stateRestored, "it is known from before the start, and has not been heard since"
	case state != discovery.StateUp:
		return string(state), operatorReason(e)
	}
	for _, s := range sources {
		if reason := s.standing(e); strings.HasPrefix(reason, stateUnhealthy) {
			return stateUnhealthy, reason
		}
	}
	reason = operatorReason(e)
	if reason == "" && e.Weight() == 0 {
		reason = "weight 0"
	}
	return string(discovery.StateUp), reason
}

// operatorReason says what an operator has decided about a node, "" if nothing.
func operatorReason(e *discovery.Entry) string {
	if o := e.Override(); !o.IsZero() {
		return "operator: " + o.String()
	}
	return ""
}

// viewRejection returns a rejected record as the admin API shows it, among the
// nodes.
func viewRejection(registry string, r discovery.Rejection) nodeView {
	return nodeView{
		Registry:  registry,
		ID:        cmp.Or(r.ID, r.Key),
		Metadata:  map[string]string{},
		LastHeard: r.Time,
		State:     stateRejected,
		Reason:    r.Err.Error(),
		Sources:   []standingView{},
	}
}

func viewChange(registry string, c discovery.Change) changeView {
	return changeView{Time: c.Time, Registry: registry, ID: c.ID, Type: string(c.Type), Reason: c.Reason}
}

func serveRegistries(w http.ResponseWriter, r *http.Request) error {
	if err := onlyGet(r); err != nil {
		return err
	}
	a := newArray(w)
	for _, d := range runningDirectories() {
		a.add(d.view())
	}
	return a.end()
}

func serveNodes(w http.ResponseWriter, r *http.Request) error {
	if err := onlyGet(r); err != nil {
		return err
	}
	query := r.URL.Query()
	registry, service, state := query.Get("registry"), query.Get("service"), query.Get("state")
	if state != "" && !slices.Contains(nodeStates, state) {
		return badRequest("state: unknown state %q, want one of %s", state, strings.Join(nodeStates, ", "))
	}
	a := newArray(w)
	sources := sourcesOf()
	for _, d := range runningDirectories() {
		name := d.name()
		if registry != "" && registry != name {
			continue
		}
		nodes := d.Snapshot().Nodes()
		if service != "" {
			nodes = d.Snapshot().Service(service)
		}
		for _, e := range nodes {
			if v := viewNode(name, e, sources[d]); state == "" || v.State == state {
				a.add(v)
			}
		}
		if service == "" && (state == "" || state == stateRejected) {
			for _, r := range d.Status().Rejections {
				a.add(viewRejection(name, r))
			}
		}
	}
	return a.end()
}

// defaultJournalLimit is how many changes the journal shows unless it is asked for
// more.
const defaultJournalLimit = 1000

func serveJournal(w http.ResponseWriter, r *http.Request) error {
	if err := onlyGet(r); err != nil {
		return err
	}
	query := r.URL.Query()
	limit := defaultJournalLimit
	if s := query.Get("limit"); s != "" {
		var err error
		if limit, err = strconv.Atoi(s); err != nil || limit < 1 {
			return badRequest("limit: invalid number %q, want 1 or more", s)
		}
	}
	// The newest of each directory, merged.
	id, anybody := query.Get("id"), !query.Has("id")
	type change struct {
		registry string
		discovery.Change
	}
	var changes []change
	for _, d := range runningDirectories() {
		name := d.name()
		for _, c := range d.Journal().Newest(limit, func(c *discovery.Change) bool {
			return aboutNode(c.Type) && (anybody || c.ID == id)
		}) {
			changes = append(changes, change{name, c})
		}
	}
	slices.SortStableFunc(changes, func(a, b change) int { return b.Time.Compare(a.Time) })
	a := newArray(w)
	for _, c := range changes[:min(limit, len(changes))] {
		a.add(viewChange(c.registry, c.Change))
	}
	return a.end()
}

// aboutNode tells changes of nodes from changes of the registry.
func aboutNode(t discovery.ChangeType) bool {
	return t != discovery.ChangeConnected && t != discovery.ChangeDisconnected
}

func onlyGet(r *http.Request) error {
	if r.Method != http.MethodGet {
		return caddy.APIError{
			HTTPStatus: http.StatusMethodNotAllowed,
			Err:        fmt.Errorf("method not allowed"),
		}
	}
	return nil
}

func badRequest(format string, args ...any) error {
	return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: fmt.Errorf(format, args...)}
}

// array writes a JSON array element by element: a large fleet is never one string.
type array struct {
	w       *bufio.Writer
	encoder *json.Encoder
	any     bool
	err     error
}

func newArray(w io.Writer) *array {
	if w, ok := w.(http.ResponseWriter); ok {
		w.Header().Set("Content-Type", "application/json")
	}
	b := bufio.NewWriterSize(w, 64<<10)
	return &array{w: b, encoder: json.NewEncoder(b)}
}

func (a *array) add(v any) {
	if a.err != nil {
		return
	}
	separator := byte('[')
	if a.any {
		separator = ','
	}
	a.any = true
	if a.err = a.w.WriteByte(separator); a.err == nil {
		a.err = a.encoder.Encode(v)
	}
}

// end completes the array. What fails once something was written is the client's
// connection, and nobody is there to be told.
func (a *array) end() error {
	if !a.any {
		_ = a.w.WriteByte('[')
	}
	_, _ = a.w.WriteString("]\n")
	_ = a.w.Flush()
	return nil
}

// Interface guards
var (
	_ caddy.AdminRouter = (*Admin)(nil)
)
