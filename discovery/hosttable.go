package discovery

import (
	"cmp"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	// hostHold is for how long a host stays a service's after its last node has left: a
	// deployment that stops the old nodes first, or a machine that restarts, must not
	// lose it to whoever announces it by mistake. Who means to move a host says so by a
	// claim, which counts at once.
	hostHold = 10 * time.Minute
	// How long, and how many of them, hosts are remembered that have left.
	hostMemory     = 30 * 24 * time.Hour
	maxHostsLeft   = 20_000
	reasonNoRoom   = "the directory is full of hosts"
	maxHostNews    = 100 // of one snapshot, for journal and log
	ordinaryRoutes = 4   // what each node may have of hosts times paths, whatever others have
	// What all nodes together may have beyond that. A route that nobody shares takes half
	// a KiB.
	maxExcessRoutes = 200_000
)

// A hostTable decides which host is whose, and makes the Hosts of each snapshot. It is
// told of the entries that a snapshot shows, no more and no less, and costs what these
// announce. All its methods are for one goroutine, which also receives from the channel
// of wake.
type hostTable struct {
	live      func() bool            // the registry is being watched: that a node is away means something
	certified func(host string) bool // a certificate was allowed for it

	rules   *HostRules // nil: hosts are not looked at
	pending bool       // there is something to do, though no entry changed
	renewed bool       // everything is to be done anew
	shown   *Hosts

	nodes  map[string]*hostNode // by id, those that announce hosts
	hosts  map[string]*hostState
	free   timeQueue[hostState] // those for which others wait, by when they are free
	left   timeQueue[hostState] // those that have left, the one that did first at the head
	kept   timeQueue[hostState] // the same, those that are kept however many others there are
	excess int
	full   map[string]bool // ids of the nodes for whose hosts there is no room
	// Those without a node while the registry is away, or while hosts are not looked at:
	// whether these have left it will show after that.
	unclear map[string]bool

	wake *time.Timer // when the next host is free
	news []hostNews
}

// A hostNode is a node that announces hosts.
type hostNode struct {
	entry   *Entry
	hosts   []string // that the rules let it announce, and for which there is room
	paths   []string // without what stands for all below; one is "" for all paths
	excess  int
	refused uint64 // what was refused, as it was told, by its hash: it may be long
}

// A hostState is what is known of a host.
type hostState struct {
	name     string
	owner    string // the service whose it is
	owned    bool
	since    time.Time
	left     time.Time // when the last node of those left whose it is; zero: it is there
	services map[string]*hostService

	shared    bool
	freePlace int
	leftPlace int
	keptPlace int
}

// A hostService is a service that announces a host.
type hostService struct {
	nodes   []*hostNode // sorted by id
	entries []*Entry    // theirs, to be copied: a host may have most nodes of a fleet
	partial int         // how many of them do not serve all paths alike
	since   time.Time
	told    bool // that it does not get it
}

// hostNews is something that happened about hosts, for people to read.
type hostNews struct {
	entry  *Entry
	what   hostEvent
	reason string
}

// hostEvent is the line in the log of what happened.
type hostEvent string

const (
	hostsRefused hostEvent = "hosts of a node refused"
	hostMoved    hostEvent = "host is another service's now"
	hostConflict hostEvent = "two services announce one host" // which somebody has to mend
)

func newHostTable(live func() bool, certified func(host string) bool) *hostTable {
	byLeft := func(place func(*hostState) *int) timeQueue[hostState] {
		return timeQueue[hostState]{time: func(s *hostState) time.Duration { return time.Duration(s.left.UnixNano()) }, place: place}
	}
	return &hostTable{
		live: live, certified: certified,
		nodes: make(map[string]*hostNode), hosts: make(map[string]*hostState),
		full: make(map[string]bool), unclear: make(map[string]bool),
		free: byLeft(func(s *hostState) *int { return &s.freePlace }),
		left: byLeft(func(s *hostState) *int { return &s.leftPlace }),
		kept: byLeft(func(s *hostState) *int { return &s.keptPlace }),
		wake: stoppedTimer(),
	}
}

// setRules has other rules count from the next snapshot on.
func (t *hostTable) setRules(r *HostRules) {
	if r != t.rules {
		t.rules, t.renewed, t.pending = r, true, true
	}
}

// remembers reports whether any host is known.
func (t *hostTable) remembers() bool { return t.rules != nil && len(t.hosts) > 0 }

// used reports whether hosts matter to anybody.
func (t *hostTable) used() bool { return t.rules != nil }

// apply takes in the entries that changed, nil for nodes that are gone, and returns the
// hosts of the snapshot that has these nodes.
func (t *hostTable) apply(changed map[string]*Entry, nodes []*Entry) *Hosts {
	t.pending = false
	if t.rules == nil && t.shown == nil {
		return nil
	}
	at, touched := time.Now(), make(map[string]*hostState)
	if t.renewed {
		t.renewed = false
		for _, id := range slices.Sorted(maps.Keys(t.nodes)) {
			t.drop(id, touched)
		}
		for _, s := range t.hosts {
			touched[s.name] = s
		}
		if t.rules != nil {
			for _, e := range nodes {
				t.enter(e, nil, at, touched)
			}
		}
	} else {
		for _, id := range slices.Sorted(maps.Keys(changed)) {
			t.change(id, changed[id], at, touched)
		}
	}
	t.fill(at, touched)
	for name := range t.unclear {
		touched[name] = t.hosts[name]
	}
	t.release(at, touched)
	for _, name := range slices.Sorted(maps.Keys(touched)) {
		t.decide(touched[name], at)
	}
	t.forget(at, touched)
	t.show(touched)
	t.arm(at)
	if t.rules == nil {
		t.shown = nil
	}
	return t.shown
}

// change takes in what became of one node.
func (t *hostTable) change(id string, e *Entry, at time.Time, touched map[string]*hostState) {
	n := t.nodes[id]
	switch {
	case n != nil && e != nil && sameHosts(&n.entry.Node, &e.Node):
		n.entry = e
		for _, name := range n.hosts {
			s := t.hosts[name]
			s.services[e.Node.Service()].put(n)
			touched[name] = s
		}
		return
	case n != nil:
		t.drop(id, touched)
	}
	if e != nil && t.rules != nil {
		t.enter(e, n, at, touched)
	}
}

// sameHosts reports whether two records of a node announce the same.
func sameHosts(a, b *Node) bool {
	return a.Metadata[KeyHosts] == b.Metadata[KeyHosts] && a.Metadata[KeyPaths] == b.Metadata[KeyPaths] && a.Service() == b.Service()
}

// enter takes in a node, which was another one before if that is given.
func (t *hostTable) enter(e *Entry, was *hostNode, at time.Time, touched map[string]*hostState) {
	if e.Node.Metadata[KeyHosts] == "" {
		return
	}
	said := readHosts(&e.Node)
	hosts, refused := said.allowed(t.rules, e.Node.Service())
	n := &hostNode{entry: e, hosts: hosts, paths: said.paths}
	t.nodes[e.Node.ID] = n
	if len(refused) > 0 {
		text := refusedText(refused)
		if n.refused = maphash.String(hostSeed, text); was == nil || was.refused != n.refused {
			t.tell(hostNews{e, hostsRefused, text})
		}
	}
	t.admit(n, at, touched)
}

// admit gives a node its hosts as far as there is room.
func (t *hostTable) admit(n *hostNode, at time.Time, touched map[string]*hostState) {
	id, paths := n.entry.Node.ID, len(n.paths)
	if paths == 0 {
		n.hosts = nil // all its paths were refused
	}
	n.excess = max(len(n.hosts)*paths-ordinaryRoutes, 0)
	if n.excess > 0 && t.excess+n.excess > maxExcessRoutes {
		if !t.full[id] {
			t.tell(hostNews{n.entry, hostsRefused, fmt.Sprintf("%d hosts with %d paths: %s", len(n.hosts), paths, reasonNoRoom)})
		}
		t.full[id] = true
		n.hosts, n.excess = slices.Clone(n.hosts[:min(len(n.hosts), ordinaryRoutes/paths)]), 0
	} else {
		delete(t.full, id)
	}
	t.excess += n.excess
	for _, name := range n.hosts {
		s := t.hosts[name]
		if s == nil {
			s = &hostState{name: name, services: make(map[string]*hostService, 1)}
			t.hosts[name] = s
		}
		service := n.entry.Node.Service()
		c := s.services[service]
		if c == nil {
			c = &hostService{since: at}
			s.services[service] = c
		}
		c.put(n)
		touched[name] = s
	}
}

// put takes in a node, or its new entry.
func (c *hostService) put(n *hostNode) {
	i, found := slices.BinarySearchFunc(c.entries, n.entry.Node.ID, byID)
	if found {
		c.entries[i] = n.entry
		return
	}
	c.nodes, c.entries = slices.Insert(c.nodes, i, n), slices.Insert(c.entries, i, n.entry)
	c.partial += n.partial()
}

// remove takes a node out.
func (c *hostService) remove(n *hostNode) {
	if i, found := slices.BinarySearchFunc(c.entries, n.entry.Node.ID, byID); found {
		c.nodes, c.entries = slices.Delete(c.nodes, i, i+1), slices.Delete(c.entries, i, i+1)
		c.partial -= n.partial()
	}
}

// partial is 0 for a node that serves all paths alike, 1 for others.
func (n *hostNode) partial() int {
	if len(n.paths) == 1 && n.paths[0] == "" {
		return 0
	}
	return 1
}

// drop takes a node out.
func (t *hostTable) drop(id string, touched map[string]*hostState) {
	n := t.nodes[id]
	delete(t.nodes, id)
	delete(t.full, id)
	t.excess -= n.excess
	for _, name := range n.hosts {
		s := t.hosts[name]
		service := n.entry.Node.Service()
		c := s.services[service]
		c.remove(n)
		if len(c.nodes) == 0 {
			delete(s.services, service)
		}
		touched[name] = s
	}
}

// fill gives nodes their hosts for which there was no room, as far as there is some.
func (t *hostTable) fill(at time.Time, touched map[string]*hostState) {
	if len(t.full) == 0 || t.excess > maxExcessRoutes*9/10 {
		return // with some distance, or a node that comes and goes would have them all tried
	}
	for _, id := range slices.Sorted(maps.Keys(t.full)) {
		e := t.nodes[id].entry
		was := t.nodes[id]
		t.drop(id, touched)
		t.enter(e, was, at, touched)
		if t.full[id] {
			return
		}
	}
}

// release has hosts looked at that are free by now.
func (t *hostTable) release(at time.Time, touched map[string]*hostState) {
	if !t.live() {
		return
	}
	for s := t.free.first(); s != nil && at.Sub(s.left) >= hostHold; s = t.free.first() {
		t.free.remove(s)
		touched[s.name] = s
	}
}

// decide decides whose a host is.
func (t *hostTable) decide(s *hostState, at time.Time) {
	s.shared = t.rules != nil && t.rules.shared(s.name)
	delete(t.unclear, s.name)
	_, there := s.services[s.owner]
	switch {
	case s.owned && there:
		s.left = time.Time{}
	case len(s.services) == 0 && !s.owned:
		delete(t.hosts, s.name)
	case len(s.services) > 0 && (!s.owned || s.shared):
		t.give(s, at)
	case !t.live() || t.rules == nil:
		if s.left.IsZero() {
			t.unclear[s.name] = true
		}
	case s.left.IsZero():
		s.left = at
	case len(s.services) > 0 && at.Sub(s.left) >= hostHold:
		t.give(s, at)
	}
	t.tellConflicts(s)
	if s.left.IsZero() || len(s.services) == 0 {
		t.free.remove(s)
	} else {
		t.free.put(s)
	}
	if s.left.IsZero() || len(s.services) > 0 {
		t.left.remove(s)
		t.kept.remove(s)
	} else if !t.kept.has(s) {
		t.left.put(s)
	}
}

// give gives a host to the first by its name of the services that announce it.
func (t *hostTable) give(s *hostState, at time.Time) {
	first := slices.Min(slices.Collect(maps.Keys(s.services)))
	if s.owned && !s.shared {
		t.tell(hostNews{
			s.services[first].nodes[0].entry, hostMoved,
			fmt.Sprintf("host %s is this service's now; it was that of %s, which left %v ago", s.name, quoteService(s.owner), at.Sub(s.left).Round(time.Second)),
		})
	}
	if !s.owned || !s.shared || !s.left.IsZero() {
		s.since = at
	}
	s.owner, s.owned, s.left = first, true, time.Time{}
}

// gets reports whether a service that announces a host gets it.
func (s *hostState) gets(service string) bool { return s.shared || s.owned && service == s.owner }

func (t *hostTable) tellConflicts(s *hostState) {
	for service, c := range s.services {
		switch {
		case s.gets(service):
			c.told = false
		case !c.told:
			c.told = true
			t.tell(hostNews{c.nodes[0].entry, hostConflict, "host " + s.name + " refused: " + theirs(s.owner)})
		}
	}
}

// theirs says whose a host is that another service does not get.
func theirs(owner string) string {
	return "it is that of " + quoteService(owner) + ", which announced it first; a claim would say whose it is"
}

func quoteService(service string) string {
	if service == "" {
		return "the nodes without a service"
	}
	return fmt.Sprintf("service %q", Clip(service))
}

func (h *Host) theirs() string { return theirs(h.Services[0]) }

// refusedText says what was refused of a record, and why.
func refusedText(refused []RefusedHost) string {
	var parts []string
	for i, r := range refused {
		if i == 5 {
			parts = append(parts, "…")
			break
		}
		parts = append(parts, r.Text+" refused: "+r.Reason)
	}
	return strings.Join(parts, "; ")
}

func (t *hostTable) tell(n hostNews) {
	if len(t.news) < maxHostNews {
		t.news = append(t.news, n)
	}
}

// takeNews returns what has happened since it was called last.
func (t *hostTable) takeNews() []hostNews {
	news := t.news
	t.news = nil
	return news
}

// forget forgets hosts that have left long ago, and the first ones to do so where they
// are too many; not so those that may have a certificate, and wildcards, of which there
// are no more than the rules name: records that come and go with one made up name after
// the other cost nobody the renewal of his.
func (t *hostTable) forget(at time.Time, touched map[string]*hostState) {
	for len(t.left.items) > maxHostsLeft {
		s := t.left.first()
		t.left.remove(s)
		if t.certified(s.name) || strings.HasPrefix(s.name, wildcard) {
			t.kept.put(s)
		} else {
			delete(t.hosts, s.name)
			touched[s.name] = nil
		}
	}
	for _, q := range []*timeQueue[hostState]{&t.left, &t.kept} {
		for s := q.first(); s != nil && at.Sub(s.left) > hostMemory; s = q.first() {
			q.remove(s)
			delete(t.hosts, s.name)
			touched[s.name] = nil
		}
	}
}

// show makes the Hosts in which those that were touched are as they are now.
func (t *hostTable) show(touched map[string]*hostState) {
	next := &Hosts{rules: t.rules}
	if t.shown != nil {
		*next = *t.shown
		next.rules = t.rules
	}
	copied := make(map[int]bool, len(touched))
	for name, s := range touched {
		key := hostKey(name)
		i := shardOf(key)
		if !copied[i] {
			copied[i] = true
			next.shards[i] = maps.Clone(next.shards[i])
		}
		was := next.shards[i][key]
		if was != nil {
			next.listed -= min(len(was.nodes), 1)
			next.conflicts -= len(was.Conflicts)
		}
		if s == nil || !s.owned {
			delete(next.shards[i], key)
			continue
		}
		is := s.host(was)
		if next.shards[i] == nil {
			next.shards[i] = make(map[string]*Host)
		}
		next.shards[i][key] = is
		next.listed += min(len(is.nodes), 1)
		next.conflicts += len(is.Conflicts)
	}
	t.shown = next
}

// host returns how the host is shown.
func (s *hostState) host(was *Host) *Host {
	h := &Host{Name: s.name, Since: s.since, Left: s.left}
	var theirs []*hostService
	for _, service := range slices.Sorted(maps.Keys(s.services)) {
		c := s.services[service]
		if s.gets(service) {
			h.Services = append(h.Services, service)
			theirs = append(theirs, c)
			continue
		}
		conflict := HostConflict{Service: service, Nodes: len(c.nodes), Since: c.since}
		if !s.left.IsZero() {
			conflict.Until = s.left.Add(hostHold)
		}
		h.Conflicts = append(h.Conflicts, conflict)
	}
	if len(h.Services) == 0 {
		h.Services = []string{s.owner}
	}
	h.nodes, h.byPath = mergeNodes(theirs), make(map[string]*Route, 1)
	for prefix, entries := range nodesByPath(theirs, h.nodes) {
		r := &Route{Path: prefix + AllPaths, Nodes: entries}
		if was != nil {
			if old := was.byPath[prefix]; old != nil && slices.Equal(old.Nodes, entries) {
				r = old
			}
		}
		h.byPath[prefix] = r
		h.routes = append(h.routes, r)
	}
	slices.SortFunc(h.routes, func(a, b *Route) int {
		return cmp.Or(len(b.Path)-len(a.Path), strings.Compare(a.Path, b.Path))
	})
	return h
}

// mergeNodes returns the nodes of services that have a host, sorted by id.
func mergeNodes(services []*hostService) []*Entry {
	var all []*Entry
	for _, c := range services {
		all = append(all, c.entries...)
	}
	if len(services) > 1 {
		slices.SortFunc(all, func(a, b *Entry) int { return strings.Compare(a.Node.ID, b.Node.ID) })
	}
	return all
}

// nodesByPath returns the nodes of each path, sorted by id, given all of them.
func nodesByPath(services []*hostService, all []*Entry) map[string][]*Entry {
	partial := 0
	for _, c := range services {
		partial += c.partial
	}
	switch {
	case len(all) == 0:
		return nil
	case partial == 0:
		return map[string][]*Entry{"": all}
	}
	byPath := make(map[string][]*Entry)
	for _, c := range services {
		for _, n := range c.nodes {
			for _, prefix := range n.paths {
				byPath[prefix] = append(byPath[prefix], n.entry)
			}
		}
	}
	if len(services) > 1 {
		for _, entries := range byPath {
			slices.SortFunc(entries, func(a, b *Entry) int { return strings.Compare(a.Node.ID, b.Node.ID) })
		}
	}
	return byPath
}

// arm sets the timer to when the next host is free.
func (t *hostTable) arm(at time.Time) {
	s := t.free.first()
	if s == nil {
		t.wake.Stop()
		return
	}
	t.wake.Reset(s.wait(at))
}

// wait returns when to look whether a host is free: by the wall clock, which may be set
// meanwhile, so that it is not long.
func (s *hostState) wait(at time.Time) time.Duration {
	return min(max(s.left.Add(hostHold).Sub(at), time.Second), time.Minute)
}

// woken has the hosts decided that are free by now.
func (t *hostTable) woken() {
	at := time.Now()
	if s := t.free.first(); s != nil && t.live() && at.Sub(s.left) >= hostHold {
		t.pending = true
	} else if s != nil {
		t.wake.Reset(s.wait(at))
	}
}

// settle has those decided that were unclear: the registry was listed.
func (t *hostTable) settle() { t.pending = t.pending || len(t.unclear) > 0 }

// remember takes up whose hosts were known to be before the start, unless it is known
// from before that.
func (t *hostTable) remember(hosts []savedHost) {
	for _, h := range hosts {
		s := t.hosts[h.Host]
		if s == nil {
			s = &hostState{name: h.Host, services: make(map[string]*hostService, 1)}
			t.hosts[h.Host] = s
		} else if !s.since.After(h.Since) {
			continue
		}
		s.owner, s.owned, s.since, s.left = h.Service, true, h.Since, h.Left
		t.unclear[h.Host] = true
		t.pending = true
	}
}

// all returns what is to be remembered, sorted by name.
func (t *hostTable) all() []savedHost {
	hosts := make([]savedHost, 0, len(t.hosts))
	for _, name := range slices.Sorted(maps.Keys(t.hosts)) {
		if s := t.hosts[name]; s.owned {
			hosts = append(hosts, savedHost{Host: name, Service: s.owner, Since: s.since.UTC(), Left: s.left.UTC()})
		}
	}
	return hosts
}
