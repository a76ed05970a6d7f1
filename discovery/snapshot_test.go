package discovery

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func testEntry(id, service string) *Entry {
	n := Node{ID: id}
	if service != "" {
		n.Metadata = map[string]string{KeyService: service}
	}
	return newEntry(n, DefaultTTL, new(liveness))
}

// TestSucceed holds a long random history of changes against the model that is
// plainly right: a map of entries, sorted and filtered anew each time.
func TestSucceed(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 1))
			model := map[string]*Entry{}
			snapshot := &Snapshot{superseded: make(chan struct{})}
			services := []string{"", "orders", "pay", "users"}
			type kept struct {
				snapshot *Snapshot
				nodes    []*Entry
			}
			var old []kept
			for range 200 {
				changed := map[string]*Entry{}
				for range random.IntN(12) {
					id := fmt.Sprintf("n%02d", random.IntN(40))
					if random.IntN(3) == 0 {
						changed[id] = nil // whether it is there or not
					} else {
						changed[id] = testEntry(id, services[random.IntN(len(services))])
						if random.IntN(3) == 0 {
							changed[id].Node = changed[id].Node.with(KeySubsets, "x")
						}
					}
				}
				next := snapshot.succeed(changed, true)
				for id, e := range changed {
					if e == nil {
						delete(model, id)
					} else {
						model[id] = e
					}
				}
				if next.Number != snapshot.Number+1 || !next.Synced || next.superseded == snapshot.superseded {
					t.Fatalf("snapshot %d follows %d", next.Number, snapshot.Number)
				}
				checkSnapshot(t, next, model)
				old = append(old, kept{next, slices.Clone(next.Nodes())})
				snapshot = next
			}
			for _, k := range old {
				now := map[string]*Entry{}
				for _, e := range k.nodes {
					now[e.Node.ID] = e
				}
				checkSnapshot(t, k.snapshot, now)
			}
		})
	}
}

func checkSnapshot(t *testing.T, s *Snapshot, model map[string]*Entry) {
	t.Helper()
	var want, sharing []*Entry
	services := map[string][]*Entry{}
	for _, id := range slices.Sorted(maps.Keys(model)) {
		e := model[id]
		want = append(want, e)
		if e.Node.Metadata[KeySubsets] != "" {
			sharing = append(sharing, e)
		}
		services[e.Node.Service()] = append(services[e.Node.Service()], e)
		if s.Node(id) != e {
			t.Fatalf("snapshot %d: Node(%q) is %v", s.Number, id, s.Node(id))
		}
	}
	if !slices.Equal(s.Nodes(), want) {
		t.Fatalf("snapshot %d: %d nodes, want %d", s.Number, len(s.Nodes()), len(want))
	}
	if !slices.Equal(s.Sharing(), sharing) {
		t.Fatalf("snapshot %d: %d nodes are sharing, want %d", s.Number, len(s.Sharing()), len(sharing))
	}
	if !maps.EqualFunc(s.services, services, slices.Equal[[]*Entry]) {
		t.Fatalf("snapshot %d: services %v, want %v", s.Number, s.services, services)
	}
	for _, id := range []string{"", "absent", "zzz", "n00x"} {
		if model[id] == nil && s.Node(id) != nil {
			t.Fatalf("snapshot %d has a node %q", s.Number, id)
		}
	}
	if s.Service("absent") != nil {
		t.Fatalf("snapshot %d has a service that nobody serves", s.Number)
	}
}

// A reader that appends to what a snapshot returned must not write into what
// another reader sees.
func TestSnapshotIsClipped(t *testing.T) {
	b := testEntry("b", "x")
	b.Node = b.Node.with(KeySubsets, "x")
	s := (&Snapshot{}).succeed(map[string]*Entry{"a": testEntry("a", "x"), "b": b}, true)
	s = s.succeed(map[string]*Entry{"a": nil}, true)
	for _, entries := range [][]*Entry{s.Nodes(), s.Service("x"), s.Sharing()} {
		if cap(entries) != len(entries) {
			t.Errorf("%d entries with room for %d", len(entries), cap(entries))
		}
	}
}

func TestEntry(t *testing.T) {
	for _, test := range []struct {
		state, weight string
		serves        bool
	}{
		{"", "", true},
		{"up", "0.1", true},
		{"up", "0", false},
		{"draining", "1", false},
		{"maintenance", "1", false},
	} {
		e := newEntry(Node{Metadata: map[string]string{KeyState: test.state, KeyWeight: test.weight}}, time.Second, new(liveness))
		if e.Serves() != test.serves {
			t.Errorf("state %q and weight %q: serves is %v", test.state, test.weight, e.Serves())
		}
	}
	v := new(liveness)
	at := now()
	v.heard.Store(int64(at))
	v.renewed.Store(int64(at + time.Second))
	e := newEntry(Node{}, 5*time.Second, v)
	if got := e.LeaseEnd().Sub(e.LastHeard()); got != 6*time.Second {
		t.Errorf("the lease ends %v after the node was heard, want 6s", got)
	}
	if ago := time.Since(e.LastHeard()); ago < 0 || ago > time.Minute {
		t.Errorf("heard %v ago", ago)
	}
}
