// Package view is the JSON in which the admin API, the status page and the commands
// show registries, nodes, and what becomes of them. Durations are in seconds.
package view

import (
	"cmp"
	"strings"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Registry is a registry, as it is watched right now.
type Registry struct {
	Registry  string     `json:"registry"`
	Name      string     `json:"name,omitempty"` // that a configuration gives it
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

// Node is a node, or a record that is rejected.
type Node struct {
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
	// How many requests a proxy has under way to the node, and when it saw a session of it
	// last: nil where nobody counts, or it saw none.
	InFlight    *int       `json:"in_flight,omitempty"`
	LastSession *time.Time `json:"last_session,omitempty"`
	State       string     `json:"state"`
	Reason      string     `json:"reason"`
	Sources     []Standing `json:"sources"`

	Hosts        []string      `json:"hosts,omitempty"`
	RefusedHosts []RefusedHost `json:"refused_hosts,omitempty"`

	Weight float64 `json:"-"`
}

// Standing is how a node stands with one source.
type Standing struct {
	Source   string `json:"source"`
	Eligible bool   `json:"eligible"`
	Reason   string `json:"reason"`
	// Until is when that ends by itself, where it does.
	Until *time.Time `json:"until,omitempty"`
}

// Change is an entry of a journal.
type Change struct {
	Time     time.Time `json:"time"`
	Registry string    `json:"registry"`
	ID       string    `json:"id"`
	Type     string    `json:"type"`
	Reason   string    `json:"reason"`
}

// A Source is what sends requests to nodes.
type Source struct {
	Name string
	// Standing returns why the source sends no request to a node, "" if it sends
	// some, and whether that is because it fails its health checks or its requests.
	Standing func(*discovery.Entry) (reason string, unhealthy bool)
	// Until returns when that ends by itself, the zero time if it does not. Nil: it never
	// does.
	Until func(*discovery.Entry) time.Time
}

// The states in which a node is shown beside those of package discovery.
const (
	StateUnhealthy = "unhealthy"
	StateRejected  = "rejected"
)

// States are all states in which a node is shown.
var States = []string{
	string(discovery.StateUp), string(discovery.StateDraining), string(discovery.StateMaintenance),
	StateUnhealthy, string(discovery.StateHeld), string(discovery.StateRestored), StateRejected,
}

// Seconds is how a duration is shown: to the millisecond.
func Seconds(d time.Duration) float64 { return float64(d.Milliseconds()) / 1000 }

// Duration is the inverse of Seconds.
func Duration(seconds float64) time.Duration {
	return time.Duration(seconds * float64(time.Second))
}

// OfRegistry shows a registry by the status of its directory.
func OfRegistry(name, backend string, s discovery.Status) Registry {
	v := Registry{
		Registry:  name,
		Backend:   backend,
		Connected: s.Connected,
		Synced:    s.Synced,
		Nodes:     s.Nodes,
		Revision:  s.Revision,
		Restored:  s.Restored > 0,
	}
	if !s.LastEvent.IsZero() {
		v.LastEvent = &s.LastEvent
	}
	if s.LastError != nil {
		v.LastError = s.LastError.Error()
	}
	if !s.Connected {
		v.StaleFor = Seconds(time.Since(s.Since))
	}
	return v
}

// OfNode shows a node, and how it stands with the sources of its registry.
func OfNode(registry string, e *discovery.Entry, sources []Source) Node {
	n := &e.Node
	v := Node{
		Registry:  registry,
		ID:        n.ID,
		Endpoint:  n.Endpoint.String(),
		Address:   e.Address(),
		Service:   n.Service(),
		Load:      e.Load(),
		Metadata:  n.Metadata,
		LeftOut:   n.LeftOut,
		Weight:    e.Weight(),
		LastHeard: e.LastHeard(),
		LeaseLeft: max(Seconds(time.Until(e.LeaseEnd())), 0),
		Sources:   make([]Standing, len(sources)),
	}
	v.State, v.Reason = StateOf(e, sources)
	if err := e.Refused(); err != nil {
		v.Reason = strings.TrimPrefix(v.Reason+"; ", "; ") + "as it was last known, its newest record is rejected: " + err.Error()
	}
	if v.Metadata == nil {
		v.Metadata = map[string]string{}
	}
	for i, s := range sources {
		reason, _ := s.Standing(e)
		v.Sources[i] = Standing{Source: s.Name, Eligible: reason == "", Reason: reason}
		if s.Until == nil || reason == "" {
			continue
		}
		if until := s.Until(e); !until.IsZero() {
			v.Sources[i].Until = &until
		}
	}
	return v
}

// StateOf returns the state of a node, and in words why it is in it, where there is
// more to say than the state does. Whether a node is healthy is a matter of each
// source: it is unhealthy if it is to any of them.
func StateOf(e *discovery.Entry, sources []Source) (state, reason string) {
	switch e.State() {
	case discovery.StateHeld:
		return string(discovery.StateHeld), "its lease ran out with that of many others, and it still accepts connections"
	case discovery.StateRestored:
		return string(discovery.StateRestored), "it is known from before the start, and has not been heard since"
	case discovery.StateUp:
		for _, s := range sources {
			if reason, unhealthy := s.Standing(e); unhealthy {
				return StateUnhealthy, reason
			}
		}
	}
	switch o := e.Override(); {
	case !o.IsZero():
		reason = "operator: " + o.String()
	case e.State() == discovery.StateUp && e.Weight() == 0:
		reason = "weight 0"
	}
	return string(e.State()), reason
}

// OfRejection shows a rejected record among the nodes.
func OfRejection(registry string, r discovery.Rejection) Node {
	return Node{
		Registry:  registry,
		ID:        cmp.Or(r.ID, r.Key),
		Metadata:  map[string]string{},
		LastHeard: r.Time,
		State:     StateRejected,
		Reason:    r.Err.Error(),
		Sources:   []Standing{},
	}
}

// OfChange shows an entry of a registry's journal.
func OfChange(registry string, c discovery.Change) Change {
	return Change{Time: c.Time, Registry: registry, ID: c.ID, Type: string(c.Type), Reason: c.Reason}
}

// AboutNode tells changes of nodes from changes of the registry.
func AboutNode(t discovery.ChangeType) bool {
	return t != discovery.ChangeConnected && t != discovery.ChangeDisconnected
}
