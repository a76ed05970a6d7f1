package picker

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

var subsetTable = flag.String("subset-table", "", "have TestSimulatedFleets take all sizes, and put its section into this document")

// A simulation is a fleet with proxies that list themselves in one registry, and share
// the fleet by the snapshots of a directory of it.
type simulation struct {
	t         *testing.T
	random    *rand.Rand
	registry  *discoverytest.Memory
	directory *discovery.Directory
	subset    int
	query     Query
	nodes     []string
	proxies   map[string]*simulated

	outcome
}

type simulated struct {
	builder *Builder
	picker  *Picker
	members []string // sorted
}

// An outcome is what a simulation has come to at worst.
type outcome struct {
	idle         int       // nodes that nobody used
	fewest, most int       // proxies of a node
	byNode       int       // members of a proxy that were others after a node had come or gone
	byProxy      float64   // part of a proxy's members that were others after a proxy had come or gone
	parts        []float64 // that part, of each proxy each time
}

func newSimulation(t *testing.T, seed uint64, proxies, nodes, subset int) *simulation {
	s := &simulation{
		t: t, random: rand.New(rand.NewPCG(seed, uint64(nodes))), registry: discoverytest.NewMemory(), subset: subset,
		query: Query{ByService: true, Service: "orders"}, proxies: make(map[string]*simulated),
	}
	s.fewest = nodes
	for range nodes {
		s.putNode()
	}
	for range proxies {
		s.putProxy()
	}
	s.directory = follow(t, s.registry)
	s.share()
	return s
}

func (s *simulation) putNode() {
	id := fmt.Sprintf("orders-%x", s.random.Uint64())
	put(s.t, s.registry, node(id, discovery.KeyService, "orders", discovery.KeyLease, "24h"))
	s.nodes = append(s.nodes, id)
}

func (s *simulation) putProxy() {
	id := fmt.Sprintf("proxy-%x", s.random.Uint64())
	b := newBuilder()
	b.Subset, b.ProxyID, b.Group = s.subset, id, NewGroup("orders", id, s.subset)
	claims, _ := Claims([]*Group{b.Group})
	b.Group.Join()
	put(s.t, s.registry, node(id, discovery.KeyRole, discovery.RoleProxy, discovery.KeySubsets, claims, discovery.KeyLease, "24h"))
	s.proxies[id] = &simulated{builder: b}
}

func (s *simulation) withdraw(id string) {
	s.t.Helper()
	if err := s.registry.Open().Withdraw(s.t.Context(), discovery.Node{ID: id}); err != nil {
		s.t.Fatal(err)
	}
}

// expect waits for the snapshot in which there are as many nodes and proxies as there
// should be.
func (s *simulation) expect() *discovery.Snapshot {
	for {
		snapshot := s.directory.Snapshot()
		if len(snapshot.Nodes()) == len(s.nodes)+len(s.proxies) {
			return snapshot
		}
		<-snapshot.Superseded()
	}
}

// share has each proxy find its share of the newest snapshot, and notes how even that is.
func (s *simulation) share() {
	s.t.Helper()
	snapshot := s.expect()
	users := make(map[string]int, len(s.nodes))
	sum := 0
	for _, id := range slices.Sorted(maps.Keys(s.proxies)) {
		p := s.proxies[id]
		p.picker = p.builder.succeed(p.picker, snapshot, &s.query)
		if !p.picker.until.IsZero() { // as it would be shared out a moment later
			p.picker.tiers[0].shared = nil
			p.picker = p.builder.succeed(p.picker, snapshot, &s.query)
		}
		p.members = ids(p.picker.First())
		for _, member := range p.members {
			users[member]++
		}
		sum += len(p.members)
		if even := len(s.nodes) / len(s.proxies); len(p.members) < max(s.subset, even) || len(p.members) > max(s.subset, even+1) {
			s.t.Fatalf("%s has %d members, want %d, or %d to %d if that is more", id, len(p.members), s.subset, even, even+1)
		}
	}
	least, most := sum/len(s.nodes), (sum+len(s.nodes)-1)/len(s.nodes)
	for _, id := range s.nodes {
		n := users[id]
		s.fewest, s.most = min(s.fewest, n), max(s.most, n)
		if n == 0 {
			s.idle++
		}
		if n < least || n > most {
			s.t.Fatalf("%s is used by %d proxies, want %d to %d", id, n, least, most)
		}
	}
}

// changed returns how many members of each proxy that was there before are others.
func (s *simulation) changed(change func()) map[string]int {
	s.t.Helper()
	before := make(map[string][]string)
	for id, p := range s.proxies {
		before[id] = p.members
	}
	change()
	s.share()
	changed := make(map[string]int)
	for id, was := range before {
		if p := s.proxies[id]; p != nil {
			changed[id] = max(missing(was, p.members), missing(p.members, was))
		}
	}
	return changed
}

// missing counts what of a is not in b. Both are sorted.
func missing(a, b []string) int {
	n := 0
	for _, x := range a {
		if _, found := slices.BinarySearch(b, x); !found {
			n++
		}
	}
	return n
}

// run has nodes and proxies come and go, so often each.
func (s *simulation) run(times int) {
	s.t.Helper()
	for i := range 2 * times {
		changed := s.changed(func() {
			if i%2 == 0 {
				s.putNode()
				return
			}
			gone := s.random.IntN(len(s.nodes))
			s.withdraw(s.nodes[gone])
			s.nodes = slices.Delete(s.nodes, gone, gone+1)
		})
		for _, n := range changed {
			s.byNode = max(s.byNode, n)
		}
	}
	for i := range 2 * times {
		sizes := make(map[string]int)
		for id, p := range s.proxies {
			sizes[id] = len(p.members)
		}
		changed := s.changed(func() {
			if i%2 == 0 {
				s.putProxy()
				return
			}
			gone := slices.Sorted(maps.Keys(s.proxies))[s.random.IntN(len(s.proxies))]
			s.withdraw(gone)
			delete(s.proxies, gone)
		})
		for _, id := range slices.Sorted(maps.Keys(changed)) {
			part := float64(changed[id]) / float64(max(sizes[id], len(s.proxies[id].members)))
			s.byProxy = max(s.byProxy, part)
			s.parts = append(s.parts, part)
		}
	}
}

// TestSimulatedFleets has nodes and proxies come and go in fleets of all sizes. In each
// snapshot each node is used by as many proxies as any other or one more, and each proxy
// uses as many nodes as its subset says, or as it takes to use every node. What comes or
// goes changes little.
//
// With -subset-table it does so with large groups, too, and writes down what it finds.
func TestSimulatedFleets(t *testing.T) {
	type fleet struct{ proxies, nodes, subset int }
	var fleets []fleet
	times := 3
	if *subsetTable != "" {
		times = 5
	}
	for _, proxies := range []int{2, 3, 5, 8, 20, 100} {
		for _, nodes := range []int{10, 200, 1000, 10_000} {
			if *subsetTable == "" && proxies*proxies*nodes > 30_000 {
				continue // takes minutes
			}
			even := (nodes + proxies - 1) / proxies
			if even > 1 {
				fleets = append(fleets, fleet{proxies, nodes, even / 2})
			}
			fleets = append(fleets, fleet{proxies, nodes, even})
			if more := even + max(even/2, 1); more < nodes {
				fleets = append(fleets, fleet{proxies, nodes, more})
			}
		}
	}
	var table strings.Builder
	table.WriteString("| proxies | nodes | `subset` | nodes that nobody uses | proxies of a node | members that change with a node, at most | part that changes with a proxy: mean, most |\n|---|---|---|---|---|---|---|\n")
	for _, f := range fleets {
		t.Run(fmt.Sprintf("proxies=%d/nodes=%d/subset=%d", f.proxies, f.nodes, f.subset), func(t *testing.T) {
			if *subsetTable == "" {
				t.Parallel()
			}
			s := newSimulation(t, 1, f.proxies, f.nodes, f.subset)
			s.run(times)
			if s.idle > 0 {
				t.Errorf("%d times a node was used by nobody", s.idle)
			}
			if s.byNode > 2 {
				t.Errorf("a node has changed %d members of a subset, want at most 2", s.byNode)
			}
			mean := 0.0
			for _, part := range s.parts {
				mean += part / float64(len(s.parts))
			}
			// Of few members some are soon more than a third, and of two proxies' each a
			// third is what a third proxy needs.
			if limit := map[bool]float64{true: 0.4, false: 1. / 3}[f.proxies == 2]; f.nodes/f.proxies >= 20 && s.byProxy > limit {
				t.Errorf("a proxy has changed %.0f%% of another one's subset, want at most %.0f%%", 100*s.byProxy, 100*limit)
			}
			t.Logf("%+v mean %.2f most %.2f", f, mean, s.byProxy)
			if *subsetTable == "" {
				return // and the others run beside it
			}
			fmt.Fprintf(&table, "| %d | %d | %d | %d | %d to %d | %d | %.0f%%, %.0f%% |\n",
				f.proxies, f.nodes, f.subset, s.idle, s.fewest, s.most, s.byNode, 100*mean, 100*s.byProxy)
		})
	}
	if *subsetTable != "" {
		report(t, *subsetTable, table.String())
	}
}

// report puts the section of the table into a document, in the place of the last one.
func report(t *testing.T, file, table string) {
	const begin, end = "<!-- make bench-subsets: begin -->\n", "<!-- make bench-subsets: end -->\n"
	document, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, _ := strings.Cut(string(document), begin)
	_, tail, _ := strings.Cut(rest, end)
	text := head + begin + `## Proxies that share a fleet

` + "`make bench-subsets`" + `: nodes and proxies come and go, ten changes of each in each line, and every proxy finds its share of each
snapshot of a directory. By chance, as without the registrar, subsets of the nodes divided by the proxies leave a third of
the nodes idle. What changes is the larger one of the members that were not there before and of those that are not
there after; the part is of the larger subset. ` + "`BenchmarkAllotment`" + ` times how nodes are shared out, which happens
when nodes or proxies have changed.

` + table + end + tail
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
