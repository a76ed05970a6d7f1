package picker

import (
	"fmt"
	"slices"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
)

// TestSubsetIsStable holds that a node which leaves costs a proxy at most one member of
// its subset.
func TestSubsetIsStable(t *testing.T) {
	const fleet, size = 300, 20
	b := newBuilder()
	b.Subset, b.ProxyID = size, "one"
	nodes := plain(fleet)
	members := func() []string { return pick(b.Build(snapshotOf(t, nodes...), &Query{}), nil, "") }
	before := members()
	if len(before) != size {
		t.Fatalf("the subset has %d members, want %d", len(before), size)
	}
	left := 0
	for len(nodes) > fleet/2 {
		nodes = nodes[1:]
		after := members()
		gone := 0
		for _, id := range before {
			if !slices.Contains(after, id) {
				gone++
			}
		}
		if len(after) != size || gone > 1 {
			t.Fatalf("one node left, %d of the subset's members changed and there are %d", gone, len(after))
		}
		left += gone
		before = after
	}
	if left == 0 {
		t.Error("half of the fleet left and no member of the subset did")
	}
}

// TestSubsetsAreEven holds that over many proxies each node is used as often as any
// other.
func TestSubsetsAreEven(t *testing.T) {
	const proxies, size = 2000, 20
	nodes := snapshotOf(t, plain(150)...).Nodes()
	counts, expected := make(map[string]int), make(map[string]float64)
	for _, e := range nodes {
		expected[e.Node.ID] = float64(proxies*size) / float64(len(nodes))
	}
	for p := range proxies {
		ranked := nearest(nodes, Hash(fmt.Sprint("proxy-", p)), 2*size)
		if len(ranked) != 2*size {
			t.Fatalf("%d nodes are ranked, want %d", len(ranked), 2*size)
		}
		for _, e := range ranked[:size] {
			counts[e.Node.ID]++
		}
	}
	chancetest.Check(t, "members of subsets", counts, expected)
}

// TestNearestIsExact holds the shortcut of nearest against a ranking of all.
func TestNearestIsExact(t *testing.T) {
	nodes := snapshotOf(t, plain(1000)...).Nodes()
	for p := range uint64(50) {
		all, first := nearest(nodes, mix(p), len(nodes)), nearest(nodes, mix(p), 30)
		if !slices.Equal(all[:30], first) {
			t.Fatalf("proxy %d: the first are %v, want %v", p, ids(first), ids(all[:30]))
		}
	}
}

// TestSubsetReplacesWhatFails holds that other nodes stand in for members of the
// subset that fail, as many as those, and that no others are used.
func TestSubsetReplacesWhatFails(t *testing.T) {
	snapshot := snapshotOf(t, plain(60)...)
	for _, strategy := range []Strategy{All{}, Draw(2), Turns(1), Turns(2), Leading(10)} {
		b := newBuilder()
		b.Subset, b.ProxyID, b.Strategy = 10, "p", strategy
		p := b.Build(snapshot, &Query{})
		used := func(tried *AddressSet) map[string]int {
			used := make(map[string]int)
			for range 500 {
				for _, id := range pick(p, tried, "") {
					used[id]++
				}
			}
			return used
		}
		usual := used(nil)
		if len(usual) != 10 {
			t.Fatalf("%T: %d nodes are used, want 10", strategy, len(usual))
		}
		var tried AddressSet
		var failed []string
		for id := range usual {
			if len(failed) < 4 {
				failed = append(failed, id)
				tried.Add(snapshot.Node(id).Address())
			}
		}
		now := used(&tried)
		if len(now) != 10 {
			t.Errorf("%T: %d nodes are used while 4 of the usual 10 fail, want 10", strategy, len(now))
		}
		for _, id := range failed {
			if now[id] > 0 {
				t.Errorf("%T: %s is used although the request failed there", strategy, id)
			}
		}
	}
}
