package caddydiscovery

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// unlikely reports whether the counts differ from what was expected by more than
// chance explains: Pearson's chi-square, beyond five standard deviations.
func unlikely(counts map[string]int, expected map[string]float64) (string, bool) {
	x, degrees := 0.0, float64(len(expected)-1)
	for k, e := range expected {
		d := float64(counts[k]) - e
		x += d * d / e
	}
	for k := range counts {
		if expected[k] == 0 {
			return fmt.Sprintf("%s came %d times and never should", k, counts[k]), true
		}
	}
	return fmt.Sprintf("chi-square %.1f with %.0f degrees of freedom: %v, want %v", x, degrees, counts, expected),
		x > degrees+5*math.Sqrt(2*degrees)
}

// seeded makes the draws of a source repeatable.
func seeded(u *Upstreams) *Upstreams {
	u.random = rand.New(rand.NewPCG(1, 2)).Uint64
	return u
}

// picked returns the ids of the nodes that a request gets, in order. Their
// addresses come from at.
func picked(t *testing.T, u *Upstreams, r *http.Request) []string {
	t.Helper()
	upstreams, err := u.GetUpstreams(r)
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]string, len(upstreams))
	for i, up := range upstreams {
		id, ok := nodeAt.Load(up.Dial)
		if !ok {
			t.Fatalf("picked %s, where no node is", up.Dial)
		}
		ids[i] = id.(string)
	}
	return ids
}

// listHosts lists nodes with weights.
func listHosts(t *testing.T, put func(id string, pairs ...string), weights map[string]float64) {
	t.Helper()
	for id, w := range weights {
		put(id, discovery.KeyWeight, fmt.Sprint(w))
	}
}

func TestPickDrawsByWeight(t *testing.T) {
	name, m := newMemory(t)
	weights := map[string]float64{"a": 1, "b": 2, "c": 0.5, "d": 7, "e": 1}
	listHosts(t, func(id string, pairs ...string) { list(t, m, id, "http://"+at(id), pairs...) }, weights)
	u := seeded(source(t, "registry memory "+name+"\npick 2"))

	sum := 0.0
	for _, w := range weights {
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
	r := request()
	counts := make(map[string]int)
	for range draws {
		counts[strings.Join(picked(t, u, r), "")]++
	}
	if report, bad := unlikely(counts, pairs); bad {
		t.Errorf("drawn by the table: %s", report)
	}

	// What completes a draw must draw by the same odds.
	tier := &tier{nodes: u.directory.Snapshot().Nodes()}
	clear(counts)
	for range draws {
		drawn := tier.drawRest(2, new(screen), u.random, nil)
		counts[drawn[0].Node.ID+drawn[1].Node.ID]++
	}
	if report, bad := unlikely(counts, pairs); bad {
		t.Errorf("drawn by a look at all: %s", report)
	}
}

func TestPickIsBoundedByTheFleet(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "http://"+at("a"), "weight", "1e9")
	list(t, m, "b", "http://"+at("b"), "weight", "1e-9")
	list(t, m, "c", "http://"+at("c"), "weight", "0")
	u := seeded(source(t, "registry memory "+name+"\npick 5"))
	for range 100 {
		if got := fmt.Sprint(picked(t, u, request())); got != "[a b]" {
			t.Fatalf("picked %s, want both nodes that have a weight", got)
		}
	}
}

func TestPickHash(t *testing.T) {
	name, m := newMemory(t)
	const nodes, keys = 100, 20_000
	for i := range nodes {
		id := fmt.Sprintf("n%03d", i)
		list(t, m, id, "http://"+at(id))
	}
	u := seeded(source(t, "registry memory "+name+"\npick 3 hash {test.key}"))
	r := request()
	repl := replacerOf(r)
	owners := func() [][]string {
		all := make([][]string, keys)
		for k := range all {
			repl.Set("test.key", fmt.Sprint("key-", k))
			all[k] = picked(t, u, r)
		}
		return all
	}
	settle := func(n int) {
		t.Helper()
		eventually(t, "the fleet is known", func() bool { return len(u.directory.Snapshot().Nodes()) == n })
	}
	before := owners()
	share := make(map[string]int)
	for _, o := range before {
		if len(o) != 3 || o[0] == o[1] || o[1] == o[2] || o[0] == o[2] {
			t.Fatalf("a key belongs to %v, want three nodes", o)
		}
		share[o[0]]++
	}
	for id, n := range share {
		if n < keys/nodes/2 || n > keys/nodes*2 {
			t.Errorf("%s owns %d of %d keys, want about %d", id, n, keys, keys/nodes)
		}
	}

	m.Expire("n050")
	settle(nodes - 1)
	after := owners()
	moved := 0
	for k := range after {
		if before[k][0] == "n050" {
			moved++
			if after[k][0] != before[k][1] {
				t.Fatalf("the owners of a key were %v and are %v without the first, want the second to come first", before[k], after[k])
			}
		} else if after[k][0] != before[k][0] {
			t.Fatalf("the owners of a key were %v and are %v without n050, want the same one", before[k], after[k])
		}
	}
	if moved > 2*keys/nodes {
		t.Errorf("%d of %d keys moved when 1 of %d nodes left, want about %d", moved, keys, nodes, keys/nodes)
	}

	list(t, m, "n050", "http://"+at("n050"), "weight", "2")
	settle(nodes)
	again := owners()
	moved = 0
	for k := range again {
		if again[k][0] != after[k][0] {
			moved++
			if again[k][0] != "n050" {
				t.Fatalf("the owners of a key were %v and are %v after n050 joined", after[k], again[k])
			}
		}
	}
	if want := 2 * keys / (nodes + 1); moved < want*2/3 || moved > want*3/2 {
		t.Errorf("a node of double weight took over %d of %d keys, want about %d", moved, keys, want)
	}

	// Without a value there is nothing to stick to.
	repl.Set("test.key", "")
	seen := make(map[string]bool)
	for range 1000 {
		seen[picked(t, u, r)[0]] = true
	}
	if len(seen) < nodes*9/10 {
		t.Errorf("1000 requests without a value went to %d of %d nodes", len(seen), nodes)
	}
}

// TestRingIsExact holds the ring against the definition.
func TestRingIsExact(t *testing.T) {
	name, m := newMemory(t)
	for i := range 37 {
		list(t, m, fmt.Sprint("n", i), "http://"+at(fmt.Sprint("n", i)), "weight", fmt.Sprint(i%5+1))
	}
	u := source(t, "registry memory "+name)
	ring := newRing(u.directory.Snapshot().Nodes(), nil)
	for i := 1; i < len(ring.points); i++ {
		if ring.points[i-1] > ring.points[i] {
			t.Fatalf("points %d and %d are out of order", i-1, i)
		}
	}
	for k := range 100_000 {
		key := hash(fmt.Sprint(k))
		i := ring.find(key)
		if i < len(ring.points) && ring.points[i]>>32 < key>>32 || i > 0 && ring.points[i-1]>>32 >= key>>32 {
			t.Fatalf("key %x is found at %d", key, i)
		}
	}
}

// TestRingIsDerived holds rings that are derived from those before them against
// rings that are built.
func TestRingIsDerived(t *testing.T) {
	name, m := newMemory(t)
	id := func(i int) string { return fmt.Sprint("n", i) }
	const ids = 200
	weights := make([]int, ids) // 0: not listed
	random := rand.New(rand.NewPCG(1, 2))
	set := func(i int) {
		if weights[i] = random.IntN(4); weights[i] == 0 {
			m.Expire(id(i))
			return
		}
		list(t, m, id(i), "http://"+at(id(i)), "weight", fmt.Sprint(weights[i]))
	}
	for i := range ids {
		set(i)
	}
	u := source(t, "registry memory "+name)
	derived, last := 0, (*ring)(nil)
	for round := range 30 {
		// Nothing, a little, or too much changes.
		for range []int{0, 1, 5, ids}[round%4] {
			set(random.IntN(ids))
		}
		eventually(t, "the snapshot is the fleet", func() bool {
			for i, weight := range weights {
				if e := u.directory.Snapshot().Node(id(i)); (e == nil) != (weight == 0) || e != nil && e.Weight() != float64(weight) {
					return false
				}
			}
			return true
		})
		nodes := u.directory.Snapshot().Nodes()
		want, got := newRing(nodes, nil), emptyRing(nodes)
		if last == nil || !got.derive(last) {
			last = want
			continue
		}
		derived++
		if !slices.Equal(got.points, want.points) || !slices.Equal(got.starts, want.starts) || got.shift != want.shift {
			t.Fatalf("round %d: the derived ring of %d nodes is another", round, len(nodes))
		}
		last = got
	}
	if derived < 15 {
		t.Errorf("%d rings were derived, want about 22", derived)
	}
}

func TestSubset(t *testing.T) {
	name, m := newMemory(t)
	const nodes, size = 300, 20
	for i := range nodes {
		id := fmt.Sprintf("n%03d", i)
		list(t, m, id, "http://"+at(id))
	}
	u := source(t, "registry memory "+name+"\nsubset "+fmt.Sprint(size)+"\nproxy_id one")
	members := func() map[string]bool {
		set := make(map[string]bool)
		for _, id := range picked(t, u, request()) {
			set[id] = true
		}
		return set
	}
	before := members()
	if len(before) != size {
		t.Fatalf("the subset has %d members, want %d", len(before), size)
	}
	left := 0
	for i := range nodes / 2 {
		m.Expire(fmt.Sprintf("n%03d", i))
		eventually(t, "the node left", func() bool { return len(u.directory.Snapshot().Nodes()) == nodes-i-1 })
		after := members()
		gone := 0
		for id := range before {
			if !after[id] {
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

	// Over many proxies each node is used as often as any other.
	snapshot := u.directory.Snapshot().Nodes()
	const proxies = 2000
	counts, expected := make(map[string]int), make(map[string]float64)
	for _, e := range snapshot {
		expected[e.Node.ID] = float64(proxies*size) / float64(len(snapshot))
	}
	for p := range proxies {
		ranked := nearest(snapshot, hash(fmt.Sprint("proxy-", p)), 2*size)
		if len(ranked) != 2*size {
			t.Fatalf("%d nodes are ranked, want %d", len(ranked), 2*size)
		}
		for _, e := range ranked[:size] {
			counts[e.Node.ID]++
		}
	}
	if report, bad := unlikely(counts, expected); bad {
		t.Errorf("members over %d proxies: %s", proxies, report)
	}
}

// TestNearestIsExact holds the shortcut of nearest against a ranking of all.
func TestNearestIsExact(t *testing.T) {
	name, m := newMemory(t)
	fill(t, m, 1000, nil)
	u := source(t, "registry memory "+name)
	nodes := u.directory.Snapshot().Nodes()
	for p := range uint64(50) {
		all, first := nearest(nodes, mix(p), len(nodes)), nearest(nodes, mix(p), 30)
		for i := range first {
			if all[i] != first[i] {
				t.Fatalf("proxy %d: %s has rank %d, want %s", p, first[i].Node.ID, i, all[i].Node.ID)
			}
		}
	}
}

// TestSlowStart holds the share of a new node at several points of its ramp against
// what it should be.
func TestSlowStart(t *testing.T) {
	for _, hashed := range []bool{false, true} {
		name, m := newMemory(t)
		list(t, m, "a", at("a"))
		list(t, m, "b", at("b"))
		options := "pick 1"
		if hashed {
			options = "pick 1 hash {test.key}"
		}
		u := seeded(source(t, "registry memory "+name+"\n"+options+"\nslow_start 1h"))
		r := request()
		const draws = 20_000
		share := func(i int) string {
			replacerOf(r).Set("test.key", fmt.Sprint(i))
			return picked(t, u, r)[0]
		}
		counts := make(map[string]int)
		for i := range draws {
			counts[share(i)]++
		}
		if report, bad := unlikely(counts, map[string]float64{"a": draws / 2, "b": draws / 2}); bad && !hashed {
			t.Errorf("nodes of the first listing: %s", report)
		}

		list(t, m, "new", at("new"), "weight", "2")
		eventually(t, "the node joined", func() bool { return u.directory.Snapshot().Node("new") != nil })
		joined := u.directory.Snapshot().Node("new").Joined()
		previous := 0
		for _, part := range []float64{0, 0.25, 0.5, 0.75, 1} {
			// As if so much of the ramp were over, give or take what a test takes.
			ramp := max(time.Hour, time.Since(joined))
			if part > 0 {
				ramp = time.Duration(float64(time.Since(joined)) / part)
			}
			weight := 2 * (rampStart + (1-rampStart)*part)
			clear(counts)
			s := &screen{ramp: ramp}
			tier := u.pool(u.directory.Snapshot(), r).tiers[0]
			for i := range draws {
				s.ramp = ramp
				if part > 0 {
					s.ramp = time.Duration(float64(time.Since(joined)) / part)
				}
				replacerOf(r).Set("test.key", fmt.Sprint(i))
				counts[u.chooseFrom(tier, s, r, nil)[0].Node.ID]++
			}
			if !hashed {
				expected := map[string]float64{
					"a": draws / (2 + weight), "b": draws / (2 + weight), "new": draws * weight / (2 + weight),
				}
				if report, bad := unlikely(counts, expected); bad {
					t.Errorf("after %v of the ramp: %s", part, report)
				}
			}
			if counts["new"] <= previous {
				t.Errorf("hashed %v: the new node gets %d of %d after %v of the ramp, and got %d before", hashed, counts["new"], draws, part, previous)
			}
			previous = counts["new"]
		}
	}
}

// TestOverrides holds that what an operator says reaches the requests.
func TestOverrides(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", at("a"))
	list(t, m, "b", at("b"), "weight", "2")
	u := seeded(source(t, "registry memory "+name+"\npick 1"))
	operator := m.Open().(discovery.Overrider)
	tenth := 0.1
	for _, step := range []struct {
		override discovery.Override
		want     map[string]float64
	}{
		{discovery.Override{State: discovery.StateDraining}, map[string]float64{"a": 11_000}},
		{discovery.Override{Weight: &tenth}, map[string]float64{"a": 10_000 / 1.2 * 1.1, "b": 2_000 / 1.2 * 1.1}},
		{discovery.Override{Weight: new(float64)}, map[string]float64{"a": 11_000}},
	} {
		if err := operator.SetOverride(t.Context(), "b", step.override); err != nil {
			t.Fatal(err)
		}
		eventually(t, step.override.String(), func() bool {
			return u.directory.Snapshot().Node("b").Override().String() == step.override.String()
		})
		counts := make(map[string]int)
		for range 11_000 {
			counts[picked(t, u, request())[0]]++
		}
		if report, bad := unlikely(counts, step.want); bad {
			t.Errorf("%v: %s", step.override, report)
		}
	}
}
