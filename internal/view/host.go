package view

import (
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Host is a site that nodes announce, or have announced.
type Host struct {
	Registry  string         `json:"registry"`
	Host      string         `json:"host"`
	Services  []string       `json:"services"`
	Paths     []string       `json:"paths"` // the longest first
	Nodes     []string       `json:"nodes"`
	Since     time.Time      `json:"since"`
	Left      *time.Time     `json:"left"`
	Allowed   *Certificate   `json:"certificate"`
	Conflicts []HostConflict `json:"conflicts"`
}

// Certificate is since when one is allowed for a host, and until when: null for as long as
// nodes announce it.
type Certificate struct {
	Since time.Time  `json:"since"`
	Until *time.Time `json:"until"`
}

// HostConflict is a service that announces a host and does not get it.
type HostConflict struct {
	Service string     `json:"service"`
	Nodes   int        `json:"nodes"`
	Since   time.Time  `json:"since"`
	Until   *time.Time `json:"until"` // from when it is free for it, if the others stay away
}

// RefusedHost is a host or a path of a record that its node does not get.
type RefusedHost struct {
	Host   string `json:"host"`
	Reason string `json:"reason"`
}

// OfHost shows a host, for which a certificate is allowed since a time; zero: none is.
func OfHost(registry string, h *discovery.Host, since, until time.Time) Host {
	v := Host{
		Registry: registry, Host: h.Name, Services: h.Services, Since: h.Since, Left: optional(h.Left),
		Paths: make([]string, 0, len(h.Routes())), Nodes: make([]string, 0, len(h.Nodes())), Conflicts: make([]HostConflict, 0, len(h.Conflicts)),
	}
	for _, r := range h.Routes() {
		v.Paths = append(v.Paths, r.Path)
	}
	for _, e := range h.Nodes() {
		v.Nodes = append(v.Nodes, e.Node.ID)
	}
	if !since.IsZero() {
		v.Allowed = &Certificate{since, optional(until)}
	}
	for _, c := range h.Conflicts {
		v.Conflicts = append(v.Conflicts, HostConflict{c.Service, c.Nodes, c.Since, optional(c.Until)})
	}
	return v
}

func optional(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// AddHosts shows what a node announces, and what of it it does not get.
func (n *Node) AddHosts(h discovery.NodeHosts) {
	n.Hosts = h.Hosts
	for _, r := range h.Refused {
		n.RefusedHosts = append(n.RefusedHosts, RefusedHost{r.Text, r.Reason})
	}
}
