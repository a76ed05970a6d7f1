package discovery

import (
	"fmt"
	"testing"
)

// benchmarkHosts returns the table of so many nodes in groups, each of which has a host.
func benchmarkHosts(b *testing.B, nodes, hosts int) (*hostTable, []*Entry) {
	b.Helper()
	rules, err := NewHostRules(HostOptions{Names: []string{"*.example.com"}})
	if err != nil {
		b.Fatal(err)
	}
	t := newHostTable(func() bool { return true }, func(string) bool { return false })
	t.setRules(rules)
	changed := make(map[string]*Entry, nodes)
	entries := make([]*Entry, nodes)
	for i := range nodes {
		e := tableNode(fmt.Sprintf("n%05d", i), "10.0.0.1:80", fmt.Sprint("s", i%hosts), 0).entry
		e.Node.Metadata[KeyHosts] = fmt.Sprintf("h%05d.example.com", i%hosts)
		entries[i], changed[e.Node.ID] = e, e
	}
	if h := t.apply(changed, entries); h.Len() != hosts {
		b.Fatalf("%d hosts, want %d", h.Len(), hosts)
	}
	return t, entries
}

// BenchmarkHostChange is what a snapshot costs beyond one without hosts in which one node
// has changed.
func BenchmarkHostChange(b *testing.B) {
	for _, size := range [][2]int{{10, 10}, {1000, 1000}, {10_000, 10_000}, {20_000, 10_000}, {10_000, 1}} {
		b.Run(fmt.Sprintf("nodes=%d/hosts=%d", size[0], size[1]), func(b *testing.B) {
			t, entries := benchmarkHosts(b, size[0], size[1])
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				next := *entries[i%len(entries)]
				t.apply(map[string]*Entry{next.Node.ID: &next}, nil)
			}
		})
	}
}

// BenchmarkHostListing is what the hosts of a first listing cost.
func BenchmarkHostListing(b *testing.B) {
	for b.Loop() {
		benchmarkHosts(b, 20_000, 10_000)
	}
}

// BenchmarkHostFind is what a request costs that is looked up by its host and path.
func BenchmarkHostFind(b *testing.B) {
	t, _ := benchmarkHosts(b, 20_000, 10_000)
	for name, host := range map[string]string{"exact": "h04711.example.com", "exact, with a port": "h04711.example.com:8443", "none": "nobody.example.com", "as it is written": "H04711.Example.com"} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if h := t.shown.Find(RequestHost(host)); h != nil && h.Route("/some/path") == nil {
					b.Fatal("no route")
				}
			}
		})
	}
}
