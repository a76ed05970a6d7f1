package picker

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
)

// pick returns the ids of the nodes for an attempt.
func pick(p *Picker, tried *AddressSet, key string) []string {
	if p.Empty() {
		return nil
	}
	return ids(p.Pick(tried, Choice{Strategy: p.builder.Strategy, Key: key}, nil))
}

func TestNodesAreDrawnByWeight(t *testing.T) {
	weights := map[string]float64{"a": 1, "b": 2, "c": 0.5, "d": 7, "e": 1}
	var nodes []discovery.Node
	sum := 0.0
	for id, w := range weights {
		nodes = append(nodes, node(id, discovery.KeyWeight, fmt.Sprint(w)))
		sum += w
	}
	const draws = 100_000
	pairs := make(map[string]float64)
	for i, w := range weights {
		for j, v := range weights {
			if i != j {
				pairs[i+j] = draws * w / sum * v / (sum - w)
			}
		}
	}
	b := newBuilder()
	b.Strategy = Draw(2)
	p := b.Build(snapshotOf(t, nodes...), &Query{})
	counts := make(map[string]int)
	for range draws {
		counts[strings.Join(pick(p, nil, ""), "")]++
	}
	chancetest.Check(t, "drawn by the table", counts, pairs)

	// What completes a draw must draw by the same odds.
	clear(counts)
	for range draws {
		counts[strings.Join(ids(p.tiers[0].drawRest(2, &attempt{builder: b}, nil)), "")]++
	}
	chancetest.Check(t, "drawn by a look at all", counts, pairs)
}

func TestAPickIsBoundedByTheFleet(t *testing.T) {
	b := newBuilder()
	b.Strategy = Draw(5)
	p := b.Build(snapshotOf(t, node("a", "weight", "1e9"), node("b", "weight", "1e-9"), node("c", "weight", "0")), &Query{})
	for range 100 {
		if got := fmt.Sprint(pick(p, nil, "")); got != "[a b]" {
			t.Fatalf("picked %s, want both nodes that have a weight", got)
		}
	}
}

func TestPreferredNodesComeFirst(t *testing.T) {
	zones := []Criterion{{"zone", []string{"eu-1", "eu-2"}}, {"version", []string{"2"}}}
	nodes := []discovery.Node{
		node("1-near-new", "zone", "eu-1", "version", "2"), node("2-near-old", "zone", "eu-2", "version", "1"),
		node("3-far-new", "zone", "us", "version", "2"), node("4-far-old", "zone", "us", "version", "1"),
	}
	p := newBuilder().Build(snapshotOf(t, nodes...), &Query{Prefer: zones})
	var tried AddressSet
	for _, n := range nodes {
		if got := pick(p, &tried, ""); len(got) != 1 || got[0] != n.ID {
			t.Errorf("picked %v, want %s", got, n.ID)
		}
		tried.Add(n.Endpoint.Address())
	}
	if got := pick(p, &tried, ""); len(got) != 1 || got[0] != nodes[0].ID {
		t.Errorf("picked %v when the request has failed everywhere, want the first tier as it is", got)
	}
}

// TestNoNodeCanServe holds that there are as many nodes as ever when the request has
// failed at all of them: Caddy may wait and try again.
func TestNoNodeCanServe(t *testing.T) {
	a, b := node("a", "zone", "eu"), node("b", "zone", "us")
	snapshot := snapshotOf(t, a, b)
	for what, set := range map[string]func(*Builder, *Query){
		"all":         func(*Builder, *Query) {},
		"prefer":      func(_ *Builder, q *Query) { q.Prefer = []Criterion{{"zone", []string{"eu"}}} },
		"pick":        func(b *Builder, _ *Query) { b.Strategy = Draw(1) },
		"subset":      func(b *Builder, _ *Query) { b.Subset = 1 },
		"turns":       func(b *Builder, _ *Query) { b.Strategy = Turns(2) },
		"leading":     func(b *Builder, _ *Query) { b.Strategy = Leading(2) },
		"subset pick": func(b *Builder, _ *Query) { b.Subset, b.Strategy = 1, Draw(1) },
		"pick hash":   func(b *Builder, _ *Query) { b.Strategy = Owners(1) },
	} {
		builder, q, key := newBuilder(), new(Query), ""
		set(builder, q)
		if builder.Strategy == Owners(1) {
			key = "x"
		}
		p := builder.Build(snapshot, q)
		var tried AddressSet
		before := pick(p, &tried, key)
		tried.Add(a.Endpoint.Address())
		tried.Add(b.Endpoint.Address())
		if got := pick(p, &tried, key); len(got) != len(before) {
			t.Errorf("%s: picked %v when all have failed, before it was %v", what, got, before)
		}
	}
}

// TestUnavailableNodesGiveWay has nodes that failed lately for other requests, and
// nodes that are full: the next tier comes first, then who failed, and nobody who is
// full as long as there is anybody else.
func TestUnavailableNodesGiveWay(t *testing.T) {
	near, far := node("near", "zone", "eu"), node("far", "zone", "us")
	snapshot := snapshotOf(t, near, far)
	for _, strategy := range []Strategy{All{}, Draw(1), Turns(1), Leading(1)} {
		for _, test := range []struct {
			failing, full, want string
		}{
			{"", "", "near"}, {"near", "", "far"}, {"", "near", "far"}, {"far", "near", "far"}, {"near far", "", "near"}, {"", "near far", "near"},
		} {
			b := newBuilder()
			b.Strategy = strategy
			b.Unavailable = func(e *discovery.Entry, lenient bool) bool {
				return strings.Contains(test.full, e.Node.ID) || !lenient && strings.Contains(test.failing, e.Node.ID)
			}
			p := b.Build(snapshot, &Query{Prefer: []Criterion{{"zone", []string{"eu"}}}})
			if got := strings.Join(pick(p, nil, ""), " "); got != test.want {
				t.Errorf("%T, failing %q, full %q: picked %q, want %q", strategy, test.failing, test.full, got, test.want)
			}
		}
	}
}

// TestNodesBeyondTheirCapacityGiveWay has nodes that name how many requests they take.
func TestNodesBeyondTheirCapacityGiveWay(t *testing.T) {
	near, far := node("near", "zone", "eu", discovery.KeyCapacity, "3"), node("far", "zone", "us")
	beside := node("beside", "zone", "eu", discovery.KeyCapacity, "1")
	snapshot := snapshotOf(t, near, far, beside)
	for _, strategy := range []Strategy{All{}, Draw(1), Turns(1), Leading(1), LeastBusy(1), Ranked(1), Owners(1), Soonest(1), Shares(1)} {
		for _, test := range []struct {
			near, beside int // requests in flight
			want         string
		}{
			{2, 1, "near"}, {3, 0, "beside"}, {3, 1, "far"}, {9, 9, "far"},
		} {
			b := newBuilder()
			b.Strategy = strategy
			b.InFlight = func(e *discovery.Entry) int {
				return map[string]int{"near": test.near, "beside": test.beside, "far": 9}[e.Node.ID]
			}
			p := b.Build(snapshot, &Query{Prefer: []Criterion{{"zone", []string{"eu"}}}})
			for range 20 {
				got := pick(p, nil, "key")
				if _, all := strategy.(All); all && test.want != "far" {
					got = slices.DeleteFunc(got, func(id string) bool { return id != test.want }) // its policy passes over who is full
				}
				if strings.Join(got, " ") != test.want {
					t.Errorf("%T with %d and %d in flight: picked %q, want %q", strategy, test.near, test.beside, got, test.want)
					break
				}
			}
		}
	}
}

// TestNewNodesStartSlowly holds the share of a new node at several points of its ramp
// against what it should be.
func TestNewNodesStartSlowly(t *testing.T) {
	m := discoverytest.NewMemory()
	put(t, m, node("a"))
	put(t, m, node("b"))
	d := follow(t, m)
	const draws = 20_000
	for _, strategy := range []Strategy{Draw(1), Owners(1)} {
		b := newBuilder()
		b.Strategy, b.SlowStart = strategy, time.Hour
		_, hashed := strategy.(Owners)
		// As if so much of the ramp were over.
		count := func(joined time.Time, part float64) map[string]int {
			p, counts, key := b.Build(d.Snapshot(), &Query{}), make(map[string]int), ""
			for i := range draws {
				if part > 0 {
					b.SlowStart = time.Duration(float64(time.Since(joined)) / part)
				}
				if hashed {
					key = fmt.Sprint(i)
				}
				counts[pick(p, nil, key)[0]]++
			}
			return counts
		}
		if !hashed {
			chancetest.Check(t, "nodes of the first listing", count(time.Time{}, 0), map[string]float64{"a": draws / 2, "b": draws / 2})
			put(t, m, node("new", "weight", "2"))
			for d.Snapshot().Node("new") == nil {
				<-d.Snapshot().Superseded()
			}
		}
		joined, previous := d.Snapshot().Node("new").Joined(), 0
		for _, part := range []float64{0, 0.25, 0.5, 0.75, 1} {
			weight := 2 * (rampStart + (1-rampStart)*part)
			counts := count(joined, part)
			if !hashed {
				chancetest.Check(t, fmt.Sprint("after ", part, " of the ramp"), counts, map[string]float64{
					"a": draws / (2 + weight), "b": draws / (2 + weight), "new": draws * weight / (2 + weight),
				})
			}
			if counts["new"] <= previous {
				t.Errorf("hashed %v: the new node gets %d of %d after %v of the ramp, and got %d before", hashed, counts["new"], draws, part, previous)
			}
			previous = counts["new"]
		}
	}
}

// TestPickingAllocatesNothing holds what requests in their multitude rely on.
func TestPickingAllocatesNothing(t *testing.T) {
	snapshot := snapshotOf(t, plain(100)...)
	for what, set := range map[string]func(*Builder){
		"all":        func(*Builder) {},
		"pick":       func(b *Builder) { b.Strategy = Draw(2) },
		"slow start": func(b *Builder) { b.Strategy, b.SlowStart = Draw(2), time.Hour },
		"hashed":     func(b *Builder) { b.Strategy = Owners(2) },
		"turns":      func(b *Builder) { b.Strategy = Turns(2) },
		"leading":    func(b *Builder) { b.Strategy = Leading(2) },
		"unavailable": func(b *Builder) {
			b.Strategy, b.Unavailable = Draw(2), func(*discovery.Entry, bool) bool { return false }
		},
		"subset": func(b *Builder) { b.Strategy, b.Subset = Draw(2), 50 },
	} {
		b := newBuilder()
		set(b)
		p, into, key := b.Build(snapshot, &Query{}), make([]*discovery.Entry, 0, 2), ""
		if b.Strategy == Owners(2) {
			key = "x"
		}
		choice := Choice{Strategy: b.Strategy, Key: key}
		var got []*discovery.Entry
		if n := testing.AllocsPerRun(100, func() { got = p.Pick(nil, choice, into) }); n > 0 {
			t.Errorf("%s: %v allocations", what, n)
		}
		if len(got) < 2 || slices.Contains(got, nil) {
			t.Errorf("%s: picked %v", what, ids(got))
		}
	}
}
