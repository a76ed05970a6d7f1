package picker

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// newCache returns the cache of a builder whose filter does not change.
func newCache(b *Builder, q Query, varies bool) *Cache {
	return &Cache{
		Builder: b, Query: q, Varies: varies,
		Version: func() uint64 { return 0 }, Built: func(*discovery.Snapshot, *Picker, bool) {},
		Charge: func(time.Duration) {},
	}
}

// TestCacheIsBounded has clients ask for each value that nodes have, which makes a
// picker of its own out of a large fleet.
func TestCacheIsBounded(t *testing.T) {
	nodes := plain(1000)
	for i := range nodes {
		nodes[i].Metadata["service"], nodes[i].Metadata["zone"] = "orders", fmt.Sprint("zone", i/2)
	}
	snapshot := snapshotOf(t, nodes...)
	b := newBuilder()
	b.Strategy = Owners(2)
	query := func(zone string) Query {
		return Query{ByService: true, Service: "orders", Prefer: []Criterion{{"zone", []string{zone}}}}
	}
	c := newCache(b, query("{zone}"), true)
	ask := func(zone string) {
		q := query(zone)
		if got := pick(c.Picker(snapshot, &q), nil, zone); len(got) != 2 {
			t.Fatalf("zone %s: picked %v", zone, got)
		}
	}
	ask("zone0")
	v := c.current.Load()
	for i := range maxPickerBytes/v.bytes + 5 {
		ask(fmt.Sprint("zone", i))
	}
	if len(v.pickers) > maxPickers || v.bytes > maxPickerBytes || v.bytes < maxPickerBytes/2 {
		t.Errorf("%d pickers of %d bytes are kept; want at most %d of %d", len(v.pickers), v.bytes, maxPickers, maxPickerBytes)
	}
	counted := 0
	for key, p := range v.pickers {
		counted += len(key) + p.size()
	}
	if counted != v.bytes {
		t.Errorf("the pickers take %d bytes, and %d are counted", counted, v.bytes)
	}
	ask("zone499")
	if q := query("zone499"); v.pickers[q.key()] == nil {
		t.Error("odd values shut out the next one")
	}

	// What no node has costs nothing, whatever a client makes up.
	before := len(v.pickers)
	for i := range 100 {
		ask(fmt.Sprint("made up ", i))
	}
	if len(v.pickers) > before+1 {
		t.Errorf("made-up values took %d pickers", len(v.pickers)-before)
	}
}

// TestMadeUpQueries has clients make up what they ask for: it gets no node, and takes
// no room.
func TestMadeUpQueries(t *testing.T) {
	snapshot := snapshotOf(t, node("a", "service", "orders", "version", "1"), node("b"))
	query := func(service, version string) Query {
		return Query{ByService: true, Service: service, Where: []Criterion{{"version", []string{version, "2"}}}}
	}
	c := newCache(newBuilder(), query("{service}", "{version}"), true)
	for i, test := range []struct {
		service, version string
		want             int
	}{{"orders", "1", 1}, {"orders", "made up", 0}, {"made up", "1", 0}, {"", "1", 0}, {"orders", "", 0}, {"orders", "2", 0}} {
		q := query(test.service, test.version)
		if got := pick(c.Picker(snapshot, &q), nil, ""); len(got) != test.want {
			t.Errorf("%q of version %q: picked %v, want %d", test.service, test.version, got, test.want)
		}
		if n := len(c.current.Load().pickers); n != 1 {
			t.Errorf("%d pickers after %d queries, want 1", n, i+1)
		}
	}
}

// TestQueryOutlivesASnapshot has a query find nothing in the snapshot before and a node
// in the next, as for a request that comes while that is taken up.
func TestQueryOutlivesASnapshot(t *testing.T) {
	before, now := snapshotOf(t, node("a", "zone", "1")), snapshotOf(t, node("a", "zone", "1"), node("b", "zone", "2"))
	now.Number = before.Number + 1
	q := Query{Where: []Criterion{{"zone", []string{"2"}}}, Prefer: []Criterion{{"zone", []string{"2", "1"}}}}
	c := newCache(newBuilder(), q, true)
	for _, test := range []struct {
		snapshot *discovery.Snapshot
		want     string
	}{{before, "[]"}, {now, "[b]"}} {
		if got := fmt.Sprint(ids(c.Picker(test.snapshot, &q).First())); got != test.want {
			t.Errorf("with snapshot %d the query gets %s, want %s", test.snapshot.Number, got, test.want)
		}
	}
}

// TestNoRequestWaitsForAnother has a picker be built: meanwhile others get the one
// before, and if that is empty they wait for the new one.
func TestNoRequestWaitsForAnother(t *testing.T) {
	empty, one := snapshotOf(t), snapshotOf(t, node("a"))
	two := snapshotOf(t, node("a"), node("b"))
	two.Number = one.Number + 1
	one.Number = empty.Number + 1
	two.Number = one.Number + 1
	for _, test := range []struct {
		before, now *discovery.Snapshot
		waits       bool
	}{{one, two, false}, {empty, one, true}} {
		b := newBuilder()
		c := newCache(b, Query{}, false)
		c.Picker(test.before, nil)
		entered, release := make(chan struct{}), make(chan struct{})
		var once sync.Once
		b.Denied = func(*discovery.Entry) Reason {
			once.Do(func() { close(entered); <-release })
			return ""
		}
		var builds, other sync.WaitGroup
		builds.Go(func() { c.Picker(test.now, nil) })
		<-entered
		got := make(chan int, 1)
		other.Go(func() { got <- len(c.Picker(test.now, nil).First()) })
		if test.waits {
			close(release)
			other.Wait()
		} else {
			other.Wait()
			close(release)
		}
		builds.Wait()
		want := len(test.before.Nodes())
		if test.waits {
			want = len(test.now.Nodes())
		}
		if n := <-got; n != want {
			t.Errorf("waits %v: another request got %d nodes, want %d", test.waits, n, want)
		}
	}
}

// TestCacheTellsWhenNodesCome holds that each turn from none to some and back is told
// once, and that a picker which waits for first checks is not empty yet.
func TestCacheTellsWhenNodesCome(t *testing.T) {
	var told []string
	b := newBuilder()
	c := newCache(b, Query{}, false)
	c.Built = func(_ *discovery.Snapshot, p *Picker, turned bool) {
		if turned {
			told = append(told, fmt.Sprint(len(p.First())))
		}
	}
	var version uint64
	c.Version = func() uint64 { return version }
	check, retry := Reason(""), time.Time{}
	b.Check = func(*discovery.Entry) Reason { return check }
	b.Unchecked = func(nodes []*discovery.Entry) ([]*discovery.Entry, time.Time) {
		if len(nodes) != 1 {
			t.Errorf("asked about %v, want the eligible node", ids(nodes))
		}
		return nil, retry
	}
	snapshot := snapshotOf(t, node("a"), node("drains", "state", "draining"))
	for _, step := range []struct {
		check Reason
		retry time.Time
		nodes int
	}{
		{NotChecked, time.Now().Add(time.Hour), 0}, {"", time.Time{}, 1}, {Unhealthy, time.Time{}, 0},
		{Unhealthy, time.Time{}, 0}, {"", time.Time{}, 1},
	} {
		check, retry = step.check, step.retry
		version++
		p := c.Picker(snapshot, nil)
		if len(p.First()) != step.nodes || p.Empty() != (step.nodes == 0) || !p.Retry().Equal(step.retry) {
			t.Errorf("%q: nodes %v, retry at %v", step.check, ids(p.First()), p.Retry())
		}
	}
	if got := fmt.Sprint(told); got != "[0 1]" {
		t.Errorf("told %s, want the end and the return of nodes", got)
	}
}
