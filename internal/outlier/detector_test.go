package outlier

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// A fleet is a registry in memory with a directory and a detector.
type fleet struct {
	*Detector
	t       *testing.T
	memory  *discoverytest.Memory
	dir     *discovery.Directory
	began   time.Time
	unfit   sync.Map     // by id: nodes that could not serve, ejected or not
	ejected atomic.Int32 // as counted
}

// inBubble runs a test with a fleet of so many nodes, n0 and so on.
func inBubble(t *testing.T, nodes int, o Options, test func(*testing.T, *fleet)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := &fleet{t: t, memory: discoverytest.NewMemory(), began: time.Now()}
		for i := range nodes {
			f.list(fmt.Sprint("n", i))
		}
		f.dir = discovery.NewDirectory(f.memory.Open(), discovery.Options{TTL: 24 * time.Hour})
		o.Errors, o.Eject, o.MaxEjected = cmp.Or(o.Errors, 1), cmp.Or(o.Eject, 30*time.Second), cmp.Or(o.MaxEjected, 50)
		o.Now = func() time.Duration { return time.Since(f.began) }
		o.Count = func(*discovery.Entry) { f.ejected.Add(1) }
		o.Logger = slog.New(slog.DiscardHandler)
		f.Detector = New(f.dir, o)
		cancel := f.Subscribe(func(e *discovery.Entry) bool { _, unfit := f.unfit.Load(e.Node.ID); return !unfit })
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() {
			if err := f.dir.Run(ctx); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
		running.Go(func() { f.Run(ctx) })
		<-f.dir.Synced()
		time.Sleep(time.Second)
		test(t, f)
		cancel()
		stop()
		running.Wait()
	})
}

func (f *fleet) list(id string, pairs ...string) {
	e, err := discovery.ParseEndpoint("10.0.0.1:" + fmt.Sprint(1000+len(id)*100+int(id[len(id)-1])))
	if err != nil {
		f.t.Fatal(err)
	}
	n := discovery.Node{ID: id, Endpoint: e, Metadata: map[string]string{}}
	for i := 0; i < len(pairs); i += 2 {
		n.Metadata[pairs[i]] = pairs[i+1]
	}
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		f.t.Fatal(err)
	}
	f.memory.Put(id, record)
}

// leave has a node say goodbye.
func (f *fleet) leave(id string) {
	registry := f.memory.Open()
	if err := registry.(interface {
		Withdraw(context.Context, discovery.Node) error
	}).Withdraw(f.t.Context(), f.node(id).Node); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fleet) node(id string) *discovery.Entry { return f.dir.Snapshot().Node(id) }

// fail has so many requests to a node fail, one after the other.
func (f *fleet) fail(id string, n int) {
	for range n {
		f.Failed(f.node(id), f.options.Now(), f.options.Now(), 500)
	}
}

func (f *fleet) succeed(id string, n int) {
	for range n {
		f.Succeeded(f.node(id), f.options.Now(), f.options.Now())
	}
}

// expect compares which nodes are ejected, by their ids and spaces.
func (f *fleet) expect(when, want string) {
	f.t.Helper()
	synctest.Wait()
	var got []string
	for _, e := range f.dir.Snapshot().Nodes() {
		if f.Ejected(e) {
			got = append(got, e.Node.ID)
		}
		if f.Ejected(e) != Any(e) {
			f.t.Errorf("%s: of %s the metrics would say %v", when, e.Node.ID, Any(e))
		}
	}
	if strings.Join(got, " ") != want {
		f.t.Errorf("%s: ejected %q, want %q", when, got, want)
	}
}

func TestErrorsInARow(t *testing.T) {
	inBubble(t, 4, Options{Errors: 3}, func(_ *testing.T, f *fleet) {
		f.fail("n0", 2)
		f.succeed("n0", 1)
		f.fail("n0", 2)
		f.expect("after two errors in a row, twice", "")
		f.fail("n0", 1)
		f.expect("after three", "n0")
		f.fail("n1", 2)
		f.fail("n2", 3)
		f.expect("with another one", "n0 n2")
		if n := f.ejected.Load(); n != 2 {
			t.Errorf("%d ejections counted, want 2", n)
		}
	})
}

func TestRateInAWindow(t *testing.T) {
	inBubble(t, 4, Options{Errors: 1000, Percent: 50, Requests: 20, Window: 8 * time.Second}, func(_ *testing.T, f *fleet) {
		mix := func(id string, n, of int) {
			for i := range of {
				if i >= of-n {
					f.fail(id, 1)
				} else {
					f.succeed(id, 1)
				}
			}
		}
		mix("n0", 9, 18)
		f.fail("n0", 1)
		f.expect("after 10 of 19, which are too few", "")
		mix("n1", 9, 20)
		f.expect("after 9 of 20", "")
		mix("n2", 10, 20)
		f.expect("after 10 of 20", "n2")
		time.Sleep(9 * time.Second)
		mix("n1", 1, 1)
		mix("n0", 9, 18)
		f.expect("when the earlier ones are out of the window", "n2")
	})
}

// TestEjectionsDouble has a node that fails whenever it is let in again, and behaves in
// the end.
func TestEjectionsDouble(t *testing.T) {
	inBubble(t, 4, Options{Eject: 10 * time.Second}, func(t *testing.T, f *fleet) {
		next := func(want time.Duration) {
			t.Helper()
			f.fail("n0", 1)
			f.expect("after an error", "n0")
			if got := time.Until(f.Of(f.node("n0")).Until); got != want {
				t.Errorf("ejected for %v, want %v", got, want)
			}
			time.Sleep(want - time.Millisecond)
			f.expect("before its time", "n0")
			time.Sleep(time.Millisecond)
			f.expect("when its time is over", "")
		}
		for _, want := range []time.Duration{10, 20, 40, 80, 100, 100} {
			next(want * time.Second)
		}
		// It takes as many periods of good behaviour as there were ejections.
		time.Sleep(20 * time.Second)
		next(100 * time.Second) // the seventh, of which two are forgiven
		time.Sleep(40 * time.Second)
		next(20 * time.Second)
		time.Sleep(20 * time.Second)
		next(10 * time.Second)
	})
}

func TestNobodyIsEjectedBeyondTheCap(t *testing.T) {
	for _, test := range []struct{ nodes, percent, want int }{
		{1, 50, 0}, {2, 50, 1}, {3, 50, 1}, {4, 50, 2}, {5, 50, 2}, {10, 50, 5}, {2, 10, 1}, {3, 10, 1}, {4, 10, 0}, {10, 10, 1}, {20, 10, 2}, {10, 100, 10},
	} {
		inBubble(t, test.nodes, Options{MaxEjected: test.percent, Errors: 5}, func(t *testing.T, f *fleet) {
			for range 30 {
				for i := range test.nodes {
					f.fail(fmt.Sprint("n", i), 1)
				}
				time.Sleep(100 * time.Millisecond)
			}
			if got := int(f.count.Load()); got != test.want {
				t.Errorf("%d of %d nodes are ejected with %d %%, want %d", got, test.nodes, test.percent, test.want)
			}
		})
	}
}

// TestTheCapShrinks has nodes leave, or become unfit, while others are ejected: those that
// are one too many come back, the longest ejected first.
func TestTheCapShrinks(t *testing.T) {
	inBubble(t, 8, Options{Eject: time.Hour}, func(_ *testing.T, f *fleet) {
		for i := range 4 {
			f.fail(fmt.Sprint("n", i), 1)
			time.Sleep(time.Second)
		}
		f.expect("of eight", "n0 n1 n2 n3")
		f.leave("n7")
		f.expect("of seven", "n1 n2 n3")
		f.unfit.Store("n6", true)
		f.unfit.Store("n5", true)
		time.Sleep(2 * reviewEvery)
		f.expect("of five that could serve", "n2 n3")
		f.leave("n3")
		f.expect("of four, one of the ejected being gone", "n2")
	})
}

func TestServicesAreCountedByThemselves(t *testing.T) {
	inBubble(t, 0, Options{ByService: true}, func(_ *testing.T, f *fleet) {
		for i := range 4 {
			f.list(fmt.Sprint("a", i), discovery.KeyService, "a")
		}
		f.list("b0", discovery.KeyService, "b")
		synctest.Wait()
		for _, e := range f.dir.Snapshot().Nodes() {
			f.fail(e.Node.ID, 1)
		}
		f.expect("half of one service, none of the other's only node", "a0 a1")
	})
}

// TestAnotherProcessBeginsAnew has a node replaced while it is ejected.
func TestAnotherProcessBeginsAnew(t *testing.T) {
	inBubble(t, 0, Options{Errors: 2, Eject: time.Hour}, func(t *testing.T, f *fleet) {
		for i := range 4 {
			f.list(fmt.Sprint("n", i), discovery.KeyInstance, "first")
		}
		synctest.Wait()
		old := f.node("n0")
		f.fail("n0", 2)
		f.expect("after its errors", "n0")
		f.list("n0", discovery.KeyInstance, "first", "note", "x")
		f.expect("when its record says something else", "n0")
		f.list("n0", discovery.KeyInstance, "second")
		f.expect("when it is another process", "")
		for range 5 {
			f.Failed(old, 0, f.options.Now(), NoAnswer)
		}
		f.expect("when late answers of the old one fail", "")
		f.fail("n0", 1)
		f.expect("after its first error", "")
		f.fail("n0", 1)
		f.expect("after its second", "n0")
		f.leave("n0")
		f.expect("when it has left", "")
		if n := f.count.Load(); n != 0 {
			t.Errorf("%d nodes count as ejected", n)
		}
		f.list("n0", discovery.KeyInstance, "second")
		f.expect("when it is back", "")
	})
}

// TestLateAnswersSayNothing has requests that were sent before a node was let in again.
func TestLateAnswersSayNothing(t *testing.T) {
	inBubble(t, 4, Options{Errors: 2}, func(_ *testing.T, f *fleet) {
		before := f.options.Now()
		f.fail("n0", 2)
		for range 5 {
			f.Failed(f.node("n0"), before, f.options.Now(), NoAnswer)
		}
		time.Sleep(31 * time.Second)
		f.expect("when its time is over", "")
		for range 5 {
			f.Failed(f.node("n0"), before, f.options.Now(), NoAnswer)
		}
		f.expect("after answers to earlier requests", "")
		if back, ok := f.Back(f.node("n0")); !ok || back != time.Second {
			t.Errorf("back for %v, %v, want 1 s", back, ok)
		}
		if _, ok := f.Back(f.node("n1")); ok {
			t.Error("a node is back that was never ejected")
		}
		f.fail("n0", 2)
		f.expect("after later ones", "n0")
	})
}

func TestEjectionsAreTold(t *testing.T) {
	inBubble(t, 4, Options{Errors: 2}, func(t *testing.T, f *fleet) {
		version := f.Version()
		f.Failed(f.node("n0"), f.options.Now(), f.options.Now(), 503)
		f.Failed(f.node("n0"), f.options.Now(), f.options.Now(), NoConnection)
		if f.Version() == version {
			t.Error("the version is that of before")
		}
		version = f.Version()
		time.Sleep(31 * time.Second)
		if f.Version() == version {
			t.Error("the version is that of before the node was let in")
		}
		f.Failed(f.node("n0"), f.options.Now(), f.options.Now(), NoAnswer)
		f.Failed(f.node("n0"), f.options.Now(), f.options.Now(), BrokeOff)
		var lines []string
		for _, c := range f.dir.Journal().Newest(3, nil) {
			lines = append(lines, fmt.Sprintf("%s %s: %s %v", c.ID, c.Type, c.Reason, c.Entry != nil))
		}
		want := "n0 ejected: its requests fail: 2 errors in a row, the last one: an answer that broke off; ejected for 1m0s, 2 times in a row true\n" +
			"n0 restored: its ejection is over, after 30s true\n" +
			"n0 ejected: its requests fail: 2 errors in a row, the last one: no connection; ejected for 30s, for the first time true"
		if got := strings.Join(lines, "\n"); got != want {
			t.Errorf("the journal says\n%s\nwant\n%s", got, want)
		}
	})
}

// TestVersionsArePaid has ejections in a row that cost much to be taken up.
func TestVersionsArePaid(t *testing.T) {
	inBubble(t, 10, Options{}, func(t *testing.T, f *fleet) {
		f.Charge(time.Millisecond)
		version := f.Version()
		for i := range 4 {
			f.fail(fmt.Sprint("n", i), 1)
		}
		if v := f.Version(); v != version+1 {
			t.Errorf("%d versions at once, want 1", v-version)
		}
		time.Sleep(20 * time.Millisecond)
		synctest.Wait()
		if v := f.Version(); v != version+2 {
			t.Errorf("%d versions after 20 ms, want 2", v-version)
		}
	})
}

// TestEndedDetectorsLeaveNothing has a detector follow another one, many times.
func TestEndedDetectorsLeaveNothing(t *testing.T) {
	inBubble(t, 4, Options{}, func(t *testing.T, f *fleet) {
		for range 10 {
			d := New(f.dir, f.options)
			d.Subscribe(func(*discovery.Entry) bool { return true })
			d.Failed(f.node("n0"), 0, f.options.Now(), NoAnswer)
			if !d.Ejected(f.node("n0")) {
				t.Fatal("the node is not ejected")
			}
			d.end()
			d.Failed(f.node("n1"), 0, f.options.Now(), NoAnswer)
			if d.Ejected(f.node("n0")) || d.Ejected(f.node("n1")) {
				t.Fatal("ejected by one that has ended")
			}
		}
		if n := len(*discovery.Attached[records](f.node("n0")).list.Load()); n > 1 {
			t.Errorf("%d records are left of 10 detectors, want that of the last", n)
		}
		f.expect("by the first", "")
	})
}

// TestManyAtOnce has the race detector look.
func TestManyAtOnce(t *testing.T) {
	inBubble(t, 6, Options{Errors: 3, Percent: 10, Requests: 5, Window: time.Second, Eject: time.Second}, func(_ *testing.T, f *fleet) {
		var group sync.WaitGroup
		for g := range 8 {
			group.Go(func() {
				for i := range 200 {
					e := f.node(fmt.Sprint("n", (g+i)%6))
					if i%3 == 0 {
						f.Succeeded(e, f.options.Now(), f.options.Now())
					} else {
						f.Failed(e, f.options.Now(), f.options.Now(), 500)
					}
					f.Of(e)
					time.Sleep(10 * time.Millisecond)
				}
			})
		}
		group.Wait()
		if n := f.count.Load(); n > 3 {
			f.t.Errorf("%d of 6 nodes are ejected, want 3 at most", n)
		}
	})
}

// BenchmarkSucceeded is what a request costs that is answered.
func BenchmarkSucceeded(b *testing.B) {
	for _, percent := range []int{0, 50} {
		b.Run(fmt.Sprint("rate=", percent), func(b *testing.B) {
			m := discoverytest.NewMemory()
			m.Put("a", []byte(`{"nodeId":"a","endpoint":"10.0.0.1:80"}`))
			dir := discovery.NewDirectory(m.Open(), discovery.Options{})
			ctx, stop := context.WithCancel(b.Context())
			var running sync.WaitGroup
			running.Go(func() { _ = dir.Run(ctx) })
			<-dir.Synced()
			began := time.Now()
			d := New(dir, Options{Errors: 5, Percent: percent, Requests: 20, Window: 30 * time.Second, Now: func() time.Duration { return time.Since(began) }})
			e := dir.Snapshot().Node("a")
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					d.Succeeded(e, 1, time.Second)
				}
			})
			stop()
			running.Wait()
		})
	}
}
