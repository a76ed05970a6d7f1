package discovery

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// hostModel says what a hostTable is to show, made anew from all nodes each time. It knows
// nothing of how the table finds it.
type hostModel struct {
	rules *HostRules
	owner map[string]string
	left  map[string]time.Time
}

// show returns the routes of each host in words, and how many services do not get theirs.
func (m *hostModel) show(entries map[string]*Entry) (routes map[string]string, conflicts int) {
	services := make(map[string]map[string]bool)      // by host
	nodes := make(map[string]map[string][]*Entry)     // by host and path
	announce := func(name, prefix string, e *Entry) { // without regard to whose it is
		if services[name] == nil {
			services[name], nodes[name] = make(map[string]bool), make(map[string][]*Entry)
		}
		services[name][e.Node.Service()] = true
		nodes[name][prefix] = append(nodes[name][prefix], e)
	}
	for _, id := range slices.Sorted(maps.Keys(entries)) {
		e := entries[id]
		said := readHosts(&e.Node)
		names, _ := said.allowed(m.rules, e.Node.Service())
		for _, name := range names {
			for _, prefix := range said.paths {
				announce(name, prefix, e)
			}
		}
	}
	for name := range m.owner {
		if len(services[name]) == 0 && m.left[name].IsZero() {
			m.left[name] = time.Now()
		}
	}
	routes = make(map[string]string)
	for name, announcing := range services {
		first := slices.Min(slices.Collect(maps.Keys(announcing)))
		shared := m.rules.shared(name)
		owner, owned := m.owner[name]
		switch {
		case owned && announcing[owner]:
			delete(m.left, name)
		case !owned || shared || !m.left[name].IsZero() && time.Since(m.left[name]) >= hostHold:
			m.owner[name] = first
			delete(m.left, name)
		case m.left[name].IsZero():
			m.left[name] = time.Now()
		}
		has := func(e *Entry) bool { return shared || e.Node.Service() == m.owner[name] }
		for service := range announcing {
			if !shared && service != m.owner[name] {
				conflicts++
			}
		}
		var words []string
		for prefix, all := range nodes[name] {
			var ids []string
			for _, e := range all {
				if has(e) {
					ids = append(ids, e.Node.ID)
				}
			}
			if len(ids) > 0 {
				words = append(words, prefix+AllPaths+"="+strings.Join(ids, ","))
			}
		}
		if len(words) > 0 {
			slices.Sort(words)
			routes[name] = strings.Join(words, " ")
		}
	}
	return routes, conflicts
}

// shown returns the same of what the table shows.
func shown(t *testing.T, h *Hosts, entries map[string]*Entry) map[string]string {
	t.Helper()
	routes := make(map[string]string)
	for host := range h.All() {
		var words []string
		for _, r := range host.Routes() {
			var ids []string
			for _, e := range r.Nodes {
				if entries[e.Node.ID] != e {
					t.Errorf("%s has an entry of %s that is not the newest", host.Name, e.Node.ID)
				}
				ids = append(ids, e.Node.ID)
			}
			words = append(words, r.Path+"="+strings.Join(ids, ","))
		}
		if len(words) > 0 {
			slices.Sort(words)
			routes[host.Name] = strings.Join(words, " ")
		}
		if !host.Left.IsZero() != (len(host.Nodes()) == 0) {
			t.Errorf("%s left at %v and has %d nodes", host.Name, host.Left, len(host.Nodes()))
		}
	}
	if len(routes) != h.Len() {
		t.Errorf("it says it has %d hosts, and has %d", h.Len(), len(routes))
	}
	return routes
}

// Whatever happens, in whatever order, the table shows what it would if it were made anew,
// and forgets what it need not know.
func TestHostTableAgainstModel(t *testing.T) {
	rules := func(o HostOptions) *HostRules {
		r, err := NewHostRules(o)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	choices := []*HostRules{
		rules(HostOptions{}),
		rules(HostOptions{Names: []string{"*.example.com", "h1.example.org"}}),
		rules(HostOptions{Names: []string{"*.example.com"}, Claims: []HostClaim{{"s1", []string{"h1.example.com", "h2.example.com"}}, {"s*", []string{"h3.example.com"}}}}),
		rules(HostOptions{Claims: []HostClaim{{"*", []string{"*.example.com"}}}, Sites: []string{"h4.example.com"}}),
	}
	for seed := range uint64(40) {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 7))
			pick := func(words ...string) string { return words[random.IntN(len(words))] }
			table := newHostTable(func() bool { return true }, func(string) bool { return false })
			defer table.wake.Stop()
			model := &hostModel{rules: choices[0], owner: make(map[string]string), left: make(map[string]time.Time)}
			table.setRules(model.rules)
			entries := make(map[string]*Entry)
			for step := range 300 {
				changed := make(map[string]*Entry)
				for range random.IntN(4) {
					id := fmt.Sprint("n", random.IntN(12))
					if random.IntN(3) == 0 {
						changed[id] = nil
						delete(entries, id)
						continue
					}
					var hosts []string
					for range random.IntN(4) {
						hosts = append(hosts, pick("h1", "h2", "h3", "h4", "*")+pick(".example.com", ".example.com", ".example.org"))
					}
					e := tableNode(id, "10.0.0.1:80", pick("s1", "s2", "t", ""), 0).entry
					e.Node.Metadata[KeyHosts] = strings.Join(hosts, " ")
					e.Node.Metadata[KeyPaths] = pick("", "", "/a", "/a /b/*", "bad")
					if was := entries[id]; was != nil && random.IntN(2) == 0 {
						next := *was // what it announces is the same
						e = &next
					}
					entries[id], changed[id] = e, e
				}
				switch random.IntN(10) {
				case 0:
					model.rules = choices[random.IntN(len(choices))]
					table.setRules(model.rules)
				case 1, 2:
					time.Sleep(hostHold / 2)
				case 3:
					time.Sleep(hostHold)
				}
				nodes := slices.SortedFunc(maps.Values(entries), func(a, b *Entry) int { return strings.Compare(a.Node.ID, b.Node.ID) })
				got := table.apply(changed, nodes)
				want, conflicts := model.show(entries)
				if is := shown(t, got, entries); !maps.Equal(is, want) || got.Conflicts() != conflicts {
					t.Fatalf("seed %d, step %d: it shows %d conflicts and\n%v\nwant %d and\n%v", seed, step, got.Conflicts(), is, conflicts, want)
				}
			}
			// When all have left nothing is kept but the memory of their hosts.
			gone := make(map[string]*Entry)
			for id := range entries {
				gone[id] = nil
			}
			h := table.apply(gone, nil)
			if h.Len() != 0 || h.Conflicts() != 0 || len(table.nodes) != 0 || table.excess != 0 || len(table.free.items) != 0 {
				t.Errorf("seed %d: all have left, and there are %d hosts, %d conflicts, %d nodes", seed, h.Len(), h.Conflicts(), len(table.nodes))
			}
			time.Sleep(hostMemory + time.Minute)
			if h = table.apply(nil, nil); len(table.hosts) != 0 || len(slices.Collect(h.All())) != 0 {
				t.Errorf("seed %d: %d hosts are remembered for too long", seed, len(table.hosts))
			}
		})
	}
}

// Records that come and go with one name after the other cost nobody the memory of a host
// that may have a certificate.
func TestHostTableForgetsMadeUpHosts(t *testing.T) {
	table := newHostTable(func() bool { return true }, func(host string) bool { return host == "shop.example.com" })
	rules, err := NewHostRules(HostOptions{Names: []string{"*.example.com"}})
	if err != nil {
		t.Fatal(err)
	}
	table.setRules(rules)
	table.apply(nil, nil)
	visit := func(id string, hosts ...string) {
		e := tableNode(id, "10.0.0.1:80", "s", 0).entry
		e.Node.Metadata[KeyHosts] = strings.Join(hosts, " ")
		table.apply(map[string]*Entry{id: e}, nil)
		table.apply(map[string]*Entry{id: nil}, nil)
	}
	visit("first", "shop.example.com", "*.example.com", "forgotten.example.com")
	for i := 0; i < maxHostsLeft+2*MaxHosts; i += MaxHosts {
		var hosts []string
		for j := range MaxHosts {
			hosts = append(hosts, fmt.Sprintf("h%d.example.com", i+j))
		}
		visit("bad", hosts...)
	}
	for name, want := range map[string]bool{"shop.example.com": true, "*.example.com": true, "forgotten.example.com": false} {
		if got := table.shown.Known(name) != nil; got != want {
			t.Errorf("%s is remembered: %v, want %v", name, got, want)
		}
	}
	if n := len(table.hosts); n > maxHostsLeft+2 {
		t.Errorf("%d hosts are remembered, want %d at most", n, maxHostsLeft+2)
	}
}

// While nobody could say that a node is gone its host does not count as left.
func TestHostTableSettlesWhatWasUnclear(t *testing.T) {
	live := true
	table := newHostTable(func() bool { return live }, func(string) bool { return false })
	rules, err := NewHostRules(HostOptions{})
	if err != nil {
		t.Fatal(err)
	}
	table.setRules(rules)
	table.apply(nil, nil)
	e := tableNode("n", "10.0.0.1:80", "s", 0).entry
	e.Node.Metadata[KeyHosts] = "shop.example.com"
	table.apply(map[string]*Entry{"n": e}, nil)

	live = false
	h := table.apply(map[string]*Entry{"n": nil}, nil).Known("shop.example.com")
	if len(h.Nodes()) != 0 || !h.Left.IsZero() {
		t.Errorf("while it is unclear the host has %d nodes and left at %v", len(h.Nodes()), h.Left)
	}
	if table.settle(); !table.pending {
		t.Error("the end of a listing does not have it decided")
	}
	live = true
	if h = table.apply(nil, nil).Known("shop.example.com"); h.Left.IsZero() {
		t.Error("the host has not left when that is clear")
	}
	if table.settle(); table.pending {
		t.Error("each listing makes a snapshot")
	}
}

// A certificate that is asked for with each handshake does not have the list saved each time.
func TestCertificatesAreSavedOnceADay(t *testing.T) {
	c := newCertificates()
	saved := func(name string, at time.Time) bool {
		c.allow(name, false, CertificatePolicy{}, at)
		select {
		case <-c.changed:
			return true
		default:
			return false
		}
	}
	at := time.Now()
	for i, want := range []bool{true, false, false, true, false} {
		if got := saved("a.example.com", at.Add(time.Duration(i)*8*time.Hour)); got != want {
			t.Errorf("after %d hours it is saved: %v, want %v", i*8, got, want)
		}
	}
}
