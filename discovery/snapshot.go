package discovery

import (
	"maps"
	"slices"
	"strings"
)

// A Snapshot is an immutable state of a directory. Everything that its methods
// return is shared: read it only.
type Snapshot struct {
	// Number counts the snapshots of one directory.
	Number uint64
	// Synced says whether the registry has been listed whole at least once.
	Synced bool

	nodes      []*Entry
	services   map[string][]*Entry
	sharing    []*Entry
	hosts      *Hosts // nil: nobody asked for them
	restored   int    // nodes in StateRestored
	superseded chan struct{}
}

// Nodes returns all nodes, sorted by id.
func (s *Snapshot) Nodes() []*Entry { return s.nodes }

// Service returns the nodes whose metadata names the service, sorted by id.
func (s *Snapshot) Service(name string) []*Entry { return s.services[name] }

// Hosts returns which host is whose, if the directory was asked to look at that by
// [Directory.SetHostRules]; nil, which has no hosts, before.
func (s *Snapshot) Hosts() *Hosts { return s.hosts }

// Sharing returns the nodes whose metadata has [KeySubsets], sorted by id: proxies that
// use a share of a fleet. Snapshots between which these did not change return the same
// slice.
func (s *Snapshot) Sharing() []*Entry { return s.sharing }

// shares reports whether an entry, which may be nil, belongs to Sharing.
func shares(e *Entry) bool {
	if e == nil {
		return false
	}
	_, shares := e.Node.Metadata[KeySubsets]
	return shares
}

// Node returns the node with the id, or nil.
func (s *Snapshot) Node(id string) *Entry {
	if i, found := slices.BinarySearchFunc(s.nodes, id, byID); found {
		return s.nodes[i]
	}
	return nil
}

func byID(e *Entry, id string) int { return strings.Compare(e.Node.ID, id) }

// Superseded returns a channel that is closed when there is a newer snapshot.
// To follow a directory: load its snapshot, use it, wait for this, load again.
func (s *Snapshot) Superseded() <-chan struct{} { return s.superseded }

// succeed returns the snapshot that follows s, in which the entry of each
// changed id is the given one, or gone where it is nil. It shares with s what
// did not change, and costs one pass over the nodes.
func (s *Snapshot) succeed(changed map[string]*Entry, synced bool) *Snapshot {
	next := &Snapshot{
		Number:     s.Number + 1,
		Synced:     synced,
		services:   s.services,
		restored:   s.restored,
		nodes:      s.nodes,
		superseded: make(chan struct{}),
	}
	ids := slices.Sorted(maps.Keys(changed))
	next.sharing = s.succeedSharing(changed, ids)
	if len(changed) == 0 {
		return next
	}
	next.nodes = merge(s.nodes, ids, func(id string) *Entry { return changed[id] })

	// What each service gains or loses, in order of id because ids is.
	touched := make(map[string][]string)
	for _, id := range ids {
		if e := changed[id]; e != nil {
			next.restored += e.restored()
			touched[e.Node.Service()] = append(touched[e.Node.Service()], id)
		}
		if old := s.Node(id); old != nil {
			next.restored -= old.restored()
			if e := changed[id]; e == nil || e.Node.Service() != old.Node.Service() {
				touched[old.Node.Service()] = append(touched[old.Node.Service()], id)
			}
		}
	}
	next.services = maps.Clone(s.services)
	if next.services == nil {
		next.services = make(map[string][]*Entry, len(touched))
	}
	for service, ids := range touched {
		members := merge(s.services[service], ids, func(id string) *Entry {
			if e := changed[id]; e != nil && e.Node.Service() == service {
				return e
			}
			return nil
		})
		if len(members) == 0 {
			delete(next.services, service)
		} else {
			next.services[service] = members
		}
	}
	return next
}

// succeedSharing returns what Sharing returns after these changes.
func (s *Snapshot) succeedSharing(changed map[string]*Entry, ids []string) []*Entry {
	var touched []string
	for _, id := range ids {
		if shares(changed[id]) || len(s.sharing) > 0 && shares(s.Node(id)) {
			touched = append(touched, id)
		}
	}
	if len(touched) == 0 {
		return s.sharing
	}
	return merge(s.sharing, touched, func(id string) *Entry {
		if e := changed[id]; shares(e) {
			return e
		}
		return nil
	})
}

// merge returns the sorted entries with those of the sorted ids replaced by what
// get returns, nil meaning none.
func merge(entries []*Entry, ids []string, get func(id string) *Entry) []*Entry {
	merged := make([]*Entry, 0, len(entries)+len(ids))
	for _, id := range ids {
		i, found := slices.BinarySearchFunc(entries, id, byID)
		merged = append(merged, entries[:i]...)
		if found {
			i++
		}
		entries = entries[i:]
		if e := get(id); e != nil {
			merged = append(merged, e)
		}
	}
	return slices.Clip(append(merged, entries...))
}
