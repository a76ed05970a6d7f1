package discovery

import (
	"hash/maphash"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"
)

// Hosts are the sites that the nodes of a snapshot serve, as far as the directory's
// [HostRules] let them: which host and which path is whose. It is immutable, and what its
// methods return is shared: read it only. A nil one has no hosts.
//
// A host belongs to one service, whose nodes share it, or, where a claim keeps it to
// several, to all these. Nodes without a service count as one. Without a claim it is the
// service's that this directory knew first, and stays so for ten minutes after the last
// node of it has left.
type Hosts struct {
	shards    [hostShards]map[string]*Host // by name; wildcards without their star
	rules     *HostRules
	listed    int
	conflicts int
}

// A change copies the shards that it touches, of which 10,000 hosts have 40 each.
const hostShards = 256

var hostSeed = maphash.MakeSeed()

func shardOf(key string) int { return int(maphash.String(hostSeed, key) % hostShards) }

// hostKey returns under which key a host is found: a wildcard under what follows its
// star, which is a part of each name for which it stands.
func hostKey(name string) string { return strings.TrimPrefix(name, "*") }

// A Host is a host that nodes serve, or have served.
type Host struct {
	// Name is the host's normal form; see [ParseHost].
	Name string
	// Services are whose it is, sorted: one, but where a claim keeps it to several.
	Services []string
	// Since is from when it was theirs.
	Since time.Time
	// Left is when its last node left; the zero time while it has one. It is remembered
	// for 30 days, if there are not too many.
	Left time.Time
	// Conflicts are the services that announce the host, too, and do not get it, sorted.
	Conflicts []HostConflict

	nodes  []*Entry // sorted by id
	routes []*Route // the longest path first
	byPath map[string]*Route
}

// A HostConflict is a service that announces a host of another one.
type HostConflict struct {
	Service string
	// Nodes is how many of its nodes do.
	Nodes int
	// Since is when the first of them did.
	Since time.Time
	// Until is from when the host is free for it, if nobody of the others comes back;
	// the zero time while they are there.
	Until time.Time
}

// A Route is a path of a host, and the nodes that serve it. It is the same one in the
// next snapshot if none of its nodes has changed.
type Route struct {
	// Path is in the form of [ParsePath]: [AllPaths], or one such as /api/*.
	Path string
	// Nodes are sorted by id.
	Nodes []*Entry
}

// Has reports whether the node with the id serves the route.
func (r *Route) Has(id string) bool {
	_, found := slices.BinarySearchFunc(r.Nodes, id, byID)
	return found
}

// Len returns how many hosts have nodes.
func (h *Hosts) Len() int {
	if h == nil {
		return 0
	}
	return h.listed
}

// Conflicts returns how many pairs there are of a host and a service that announces it
// and does not get it.
func (h *Hosts) Conflicts() int {
	if h == nil {
		return 0
	}
	return h.conflicts
}

// Find returns the host of a request, given in the form of [RequestHost]: the one that
// has nodes and this name, or else the wildcard that stands for it; nil if there is none.
func (h *Hosts) Find(name string) *Host {
	if h == nil || h.listed == 0 || name == "" || name[0] == '.' || name[0] == '*' {
		return nil
	}
	if host := h.of(name); host != nil && len(host.nodes) > 0 {
		return host
	}
	if i := strings.IndexByte(name, '.'); i > 0 {
		if host := h.of(name[i:]); host != nil && len(host.nodes) > 0 {
			return host
		}
	}
	return nil
}

func (h *Hosts) of(key string) *Host { return h.shards[shardOf(key)][key] }

// Known returns the host with exactly this name, in normal form, which may have left;
// nil if it is not remembered.
func (h *Hosts) Known(name string) *Host {
	if h == nil {
		return nil
	}
	return h.of(hostKey(name))
}

// All returns all hosts that are remembered, also those that have left, by name.
func (h *Hosts) All() iter.Seq[*Host] {
	var all []*Host
	if h != nil {
		for _, shard := range h.shards {
			all = slices.AppendSeq(all, maps.Values(shard))
		}
	}
	slices.SortFunc(all, func(a, b *Host) int { return strings.Compare(a.Name, b.Name) })
	return slices.Values(all)
}

// Nodes returns the nodes that serve the host, or paths of it, sorted by id.
func (h *Host) Nodes() []*Entry { return h.nodes }

// Routes returns the paths of the host that nodes serve, the longest first.
func (h *Host) Routes() []*Route { return h.routes }

// HasPath reports whether nodes serve a path of the host, which is in the form of
// [ParsePath].
func (h *Host) HasPath(path string) bool {
	return h.byPath[strings.TrimSuffix(path, AllPaths)] != nil
}

// Route returns the longest path of the host that a request's path fits; nil if none
// does.
func (h *Host) Route(path string) *Route {
	if len(h.routes) == 1 && h.routes[0].Path == AllPaths {
		return h.routes[0]
	}
	prefix := requestPath(path)
	if len(prefix) > maxHostPath { // what is longer fits by its beginning
		prefix = prefix[:strings.LastIndexByte(prefix[:maxHostPath+1], '/')+1]
	}
	for {
		prefix = strings.TrimSuffix(prefix, "/")
		if r := h.byPath[prefix]; r != nil || prefix == "" {
			return r
		}
		prefix = prefix[:strings.LastIndexByte(prefix, '/')+1]
	}
}

// NodeHosts is what a node announces.
type NodeHosts struct {
	// Hosts and Paths are what it serves, in normal form; no Paths means none, as no
	// Hosts does.
	Hosts, Paths []string
	// Refused is what was left out, at most 20.
	Refused []RefusedHost
}

// A RefusedHost is a host or a path of a record that its node does not get.
type RefusedHost struct {
	// Text is how the record has it, clipped.
	Text string
	// Reason says why.
	Reason string
}

// HostsOf returns what a node of the snapshot announces, and what of that it does not
// get. It reads the record anew, for people to look at.
func (s *Snapshot) HostsOf(e *Entry) NodeHosts {
	if s.hosts == nil || s.hosts.rules == nil {
		return NodeHosts{}
	}
	stated := readHosts(&e.Node)
	hosts, refused := stated.allowed(s.hosts.rules, e.Node.Service())
	n := NodeHosts{Paths: stated.shownPaths(), Refused: refused}
	for _, name := range hosts {
		if reason := s.hosts.withholds(name, e); reason != "" {
			n.Refused = append(n.Refused, RefusedHost{stated.written(name), reason})
		} else {
			n.Hosts = append(n.Hosts, name)
		}
	}
	n.Refused = n.Refused[:min(len(n.Refused), maxRefused)]
	return n
}

// withholds returns why a node does not get a host that the rules let it have.
func (h *Hosts) withholds(name string, e *Entry) string {
	host := h.Known(name)
	switch {
	case host == nil:
		return reasonNoRoom
	case !slices.Contains(host.Services, e.Node.Service()):
		return host.theirs()
	}
	if _, found := slices.BinarySearchFunc(host.nodes, e.Node.ID, byID); !found {
		return reasonNoRoom
	}
	return ""
}
