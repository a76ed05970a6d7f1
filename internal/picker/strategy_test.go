package picker

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
)

// runs returns how often each node is picked in so many attempts, and the longest run
// of one and the same.
func runs(p *Picker, n int) (counts map[string]int, longest int) {
	counts = make(map[string]int)
	last, run := "", 0
	for range n {
		id := pick(p, nil, "")[0]
		counts[id]++
		if id != last {
			last, run = id, 0
		}
		run++
		longest = max(longest, run)
	}
	return counts, longest
}

func TestEqualNodesHaveOneTurnInARound(t *testing.T) {
	for _, n := range []int{1, 2, 3, 10, 1000} {
		b := newBuilder()
		b.Strategy = Turns(1)
		p := b.Build(snapshotOf(t, plain(n)...), &Query{})
		for round := range 3 {
			if counts, _ := runs(p, n); len(counts) != n {
				t.Errorf("round %d: %d of %d nodes had a turn", round, len(counts), n)
			}
		}
	}
}

// TestTurnsGoByWeightAndSmoothly holds the turns of each node against its share, after
// any number of turns and not just in the end.
func TestTurnsGoByWeightAndSmoothly(t *testing.T) {
	for _, test := range []struct {
		weights []float64
		run     int // at most so many turns of one node one after the other
	}{
		{[]float64{3, 1}, 3},
		{[]float64{5, 1, 1}, 6},
		{[]float64{2, 1, 1}, 2},
		{[]float64{7, 1, 1, 1, 1, 1, 1}, 3},
		{[]float64{0.1, 0.2, 0.3, 0.4}, 2},
		{[]float64{1e9, 1}, 4000},
		{[]float64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 1},
	} {
		var nodes []discovery.Node
		sum := 0.0
		for i, w := range test.weights {
			nodes = append(nodes, node(fmt.Sprintf("n%05d", i), discovery.KeyWeight, fmt.Sprint(w)))
			sum += w
		}
		b := newBuilder()
		b.Strategy = Turns(1)
		p := b.Build(snapshotOf(t, nodes...), &Query{})
		const turns = 4000
		counts := make(map[string]int)
		for k := range turns {
			counts[pick(p, nil, "")[0]]++
			for i, w := range test.weights {
				due := w / sum * float64(k+1)
				if has := float64(counts[nodes[i].ID]); has < due-4 || has > due+4 {
					t.Fatalf("weights %v: node %d had %v of %d turns, want about %.1f", test.weights, i, has, k+1, due)
				}
			}
		}
		if _, run := runs(p, turns); run > test.run {
			t.Errorf("weights %v: %d turns of one node one after the other, want at most %d", test.weights, run, test.run)
		}
	}
}

// TestARotationGoesOnThroughChanges has nodes join and leave while others take turns:
// those that stay have one in each round all the same.
func TestARotationGoesOnThroughChanges(t *testing.T) {
	m := discoverytest.NewMemory()
	for _, n := range plain(20) {
		put(t, m, n)
	}
	d := follow(t, m)
	b := newBuilder()
	b.Strategy = Turns(1)
	c := newCache(b, Query{}, false)
	last := make(map[string]int) // when each had its last turn
	turn := 0
	for change := range 50 {
		for range 7 {
			id := pick(c.Picker(d.Snapshot(), nil), nil, "")[0]
			if before, ok := last[id]; ok && strings.HasPrefix(id, "n") && (turn-before < 18 || turn-before > 30) {
				t.Fatalf("%s had two turns %d apart, with 20 to 25 nodes", id, turn-before)
			}
			last[id] = turn
			turn++
		}
		before := d.Snapshot()
		if id := fmt.Sprintf("m%02d", (change*7)%10); d.Snapshot().Node(id) == nil && len(d.Snapshot().Nodes()) < 25 {
			put(t, m, node(id))
		} else {
			m.Expire(before.Nodes()[0].Node.ID)
		}
		<-before.Superseded()
	}
}

// TestTurnsPassOverWhoCannotServe holds that it is not the next one that takes what a
// node cannot: the others still have one turn each.
func TestTurnsPassOverWhoCannotServe(t *testing.T) {
	b := newBuilder()
	b.Strategy = Turns(1)
	b.Unavailable = func(e *discovery.Entry, _ bool) bool { return e.Node.ID == "n00003" || e.Node.ID == "n00004" }
	p := b.Build(snapshotOf(t, plain(10)...), &Query{})
	counts, _ := runs(p, 80)
	for id, n := range counts {
		if n != 10 {
			t.Errorf("%s had %d turns, want 10", id, n)
		}
	}
	if len(counts) != 8 {
		t.Errorf("%d nodes had turns, want 8", len(counts))
	}
}

// TestTurnsOfNewNodesAreShared holds that what a new node yields goes to all others.
func TestTurnsOfNewNodesAreShared(t *testing.T) {
	m := discoverytest.NewMemory()
	for _, n := range plain(9) {
		put(t, m, n)
	}
	d := follow(t, m)
	put(t, m, node("n00004-new"))
	for d.Snapshot().Node("n00004-new") == nil {
		<-d.Snapshot().Superseded()
	}
	b := newBuilder()
	b.Strategy, b.SlowStart = Turns(1), 1000*time.Hour
	p := b.Build(d.Snapshot(), &Query{})
	const turns = 9100
	counts, _ := runs(p, turns)
	expected := map[string]float64{"n00004-new": turns * rampStart / 9.1}
	for _, n := range plain(9) {
		expected[n.ID] = turns / 9.1
	}
	chancetest.Check(t, "turns", counts, expected)
}

// TestStandInsAreDrawn holds that beside the one whose turn it is comes any other.
func TestStandInsAreDrawn(t *testing.T) {
	b := newBuilder()
	b.Strategy = Turns(2)
	p := b.Build(snapshotOf(t, plain(5)...), &Query{})
	first, second := make(map[string]int), make(map[string]int)
	expected := make(map[string]float64)
	const turns = 10_000
	for range turns {
		got := pick(p, nil, "")
		if len(got) != 2 || got[0] == got[1] {
			t.Fatalf("picked %v, want two nodes", got)
		}
		first[got[0]]++
		second[got[1]]++
	}
	for id, n := range first {
		expected[id] = turns / 5
		if n != turns/5 {
			t.Errorf("%s had %d turns, want %d", id, n, turns/5)
		}
	}
	chancetest.Check(t, "stood in", second, expected)
}

func TestTheFirstThatCanServeLead(t *testing.T) {
	b := newBuilder()
	b.Strategy = Leading(2)
	unavailable := ""
	b.Unavailable = func(e *discovery.Entry, _ bool) bool { return strings.Contains(unavailable, e.Node.ID) }
	p := b.Build(snapshotOf(t, plain(4)...), &Query{})
	var tried AddressSet
	for _, test := range []struct{ unavailable, want string }{
		{"", "[n00000 n00001]"}, {"n00000", "[n00001 n00002]"}, {"n00001", "[n00000 n00002]"}, {"n00000 n00001 n00002", "[n00003]"},
	} {
		unavailable = test.unavailable
		if got := fmt.Sprint(pick(p, nil, "")); got != test.want {
			t.Errorf("unavailable %q: picked %s, want %s", unavailable, got, test.want)
		}
	}
	unavailable = ""
	tried.Add(node("n00000").Endpoint.Address())
	if got := fmt.Sprint(pick(p, &tried, "")); got != "[n00001 n00002]" {
		t.Errorf("after a failure: picked %s, want the next two", got)
	}
}
