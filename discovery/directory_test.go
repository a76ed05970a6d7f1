package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// follow runs a directory until the test ends. Tests call it inside a bubble of
// testing/synctest, where a sleep costs nothing and times are exact.
func follow(t *testing.T, w discovery.Watcher, o discovery.Options) *discovery.Directory {
	t.Helper()
	d := discovery.NewDirectory(w, isolate(o))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		start := time.Now()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v, want the context's error", err)
		}
		if took := time.Since(start); took > 0 {
			t.Errorf("Run ended after %v, want at once", took)
		}
	})
	synctest.Wait()
	return d
}

// isolate keeps a directory from the real network, which would stop the clock of a
// bubble, and whose resolver bubbles may not share.
func isolate(o discovery.Options) discovery.Options {
	if o.Probe == nil {
		o.Probe = nobodyThere
	}
	if o.Lookup == nil {
		o.Lookup = noNames
	}
	return o
}

func nobodyThere(context.Context, string) error { return errors.New("connection refused") }

func noNames(context.Context, string) ([]netip.Addr, error) { return nil, errors.New("no such host") }

func newNode(id string, pairs ...string) discovery.Node {
	endpoint, err := discovery.ParseEndpoint("http://10.0.0.7:5001")
	if err != nil {
		panic(err)
	}
	n := discovery.Node{ID: id, Endpoint: endpoint, Metadata: map[string]string{discovery.KeyService: "orders"}}
	for i := 0; i < len(pairs); i += 2 {
		n.Metadata[pairs[i]] = pairs[i+1]
	}
	return n
}

func encode(n discovery.Node) []byte {
	b, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		panic(err)
	}
	return b
}

// write puts records of nodes into a registry, as they would themselves.
func write(m *discoverytest.Memory, nodes ...discovery.Node) {
	for _, n := range nodes {
		m.Put(n.ID, encode(n))
	}
}

func listed(d *discovery.Directory) string {
	var ids []string
	for _, e := range d.Snapshot().Nodes() {
		ids = append(ids, e.Node.ID)
	}
	return strings.Join(ids, " ")
}

func expect(t *testing.T, d *discovery.Directory, want, when string) {
	t.Helper()
	synctest.Wait()
	if got := listed(d); got != want {
		t.Fatalf("%s: nodes [%s], want [%s]", when, got, want)
	}
}

// reconnect waits until the registry is watched again.
func reconnect(t *testing.T, d *discovery.Directory) {
	t.Helper()
	for range 60_000 {
		synctest.Wait()
		if d.Status().Connected {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("the registry was not found again within a minute: %+v", d.Status())
}

// lapsesAt checks that a node is there until an instant, and gone at it.
func lapsesAt(t *testing.T, d *discovery.Directory, id string, at time.Time) {
	t.Helper()
	time.Sleep(time.Until(at) - time.Nanosecond)
	synctest.Wait()
	if d.Snapshot().Node(id) == nil {
		t.Fatalf("%s lapsed before its lease ran out", id)
	}
	time.Sleep(time.Nanosecond)
	synctest.Wait()
	if d.Snapshot().Node(id) != nil {
		t.Fatalf("%s did not lapse when its lease ran out; it ends in %v", id, time.Until(d.Snapshot().Node(id).LeaseEnd()))
	}
}

// scripted is a Watcher whose every word the test says itself.
type scripted struct {
	streams chan *stream
	watches atomic.Int64
}

// stream is one call of Watch.
type stream struct {
	emit func(discovery.Event)
	end  chan error
}

func newScripted() *scripted { return &scripted{streams: make(chan *stream)} }

func (w *scripted) Watch(ctx context.Context, emit func(discovery.Event)) error {
	w.watches.Add(1)
	s := &stream{emit, make(chan error)}
	select {
	case w.streams <- s:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-s.end:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *stream) put(key string, revision uint64, n discovery.Node) {
	s.emit(discovery.Event{Type: discovery.Put, ID: n.ID, Key: key, Node: n, Revision: revision})
}

func (s *stream) sync(l discovery.Listing) {
	s.emit(discovery.Event{Type: discovery.Synced, Listing: l})
}

// scriptedVerifier is a scripted Watcher that can be asked, and answers at first
// that all is well.
type scriptedVerifier struct {
	*scripted
	mu     sync.Mutex
	verify func(ctx context.Context) error
}

func newScriptedVerifier() *scriptedVerifier {
	w := &scriptedVerifier{scripted: newScripted()}
	w.answer(func(context.Context) error { return nil })
	return w
}

// answer sets what Verify does from now on.
func (w *scriptedVerifier) answer(verify func(ctx context.Context) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.verify = verify
}

func (w *scriptedVerifier) Verify(ctx context.Context) error {
	w.mu.Lock()
	verify := w.verify
	w.mu.Unlock()
	return verify(ctx)
}

func TestFirstListingIsPublishedWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		if s := d.Snapshot(); s.Synced || len(s.Nodes()) != 0 || s.Number != 0 {
			t.Fatalf("before the listing: %+v", s)
		}
		s := <-w.streams
		for i := range 1000 {
			s.put("", 0, newNode(fmt.Sprintf("n%03d", i)))
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := d.Snapshot(); got.Number != 0 || got.Synced {
			t.Fatalf("a part of the listing was published: %d nodes", len(got.Nodes()))
		}
		select {
		case <-d.Synced():
			t.Fatal("synced before the listing ended")
		default:
		}
		s.sync(discovery.Listing{})
		<-d.Synced()
		if got := d.Snapshot(); got.Number != 1 || !got.Synced || len(got.Nodes()) != 1000 || len(got.Service("orders")) != 1000 {
			t.Fatalf("after it: snapshot %d with %d nodes", got.Number, len(got.Nodes()))
		}
	})
}

func TestJoinUpdateLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		conn := m.Open()
		write(m, newNode("a"))
		d := follow(t, conn, discovery.Options{})
		expect(t, d, "a", "listed")
		write(m, newNode("b"))
		expect(t, d, "a b", "joined")
		before := d.Snapshot()
		write(m, newNode("a", discovery.KeyService, "pay", discovery.KeyState, "draining"))
		expect(t, d, "a b", "updated")
		if e := d.Snapshot().Node("a"); e.Node.Service() != "pay" || e.State() != discovery.StateDraining {
			t.Errorf("a is %+v", e.Node)
		}
		if len(d.Snapshot().Service("pay")) != 1 || len(d.Snapshot().Service("orders")) != 1 || len(before.Service("orders")) != 2 {
			t.Error("the services do not agree")
		}
		if err := conn.Withdraw(context.Background(), newNode("a")); err != nil {
			t.Fatal(err)
		}
		expect(t, d, "b", "left")
	})
}

func TestHeartbeatPublishesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		n := newNode("a")
		write(m, n)
		d := follow(t, m.Open(), discovery.Options{})
		snapshot := d.Snapshot()
		e := snapshot.Node("a")
		for i := range 100 {
			time.Sleep(10 * time.Second)
			n.Load = float64(i)
			write(m, n)
			synctest.Wait()
			if d.Snapshot() != snapshot {
				t.Fatal("a heartbeat published a snapshot")
			}
			if e.Load() != n.Load || time.Since(e.LastHeard()) != 0 || time.Until(e.LeaseEnd()) != discovery.DefaultTTL {
				t.Fatalf("after heartbeat %d: load %v, heard %v ago, lease ends in %v", i, e.Load(), time.Since(e.LastHeard()), time.Until(e.LeaseEnd()))
			}
		}
	})
}

func TestLapse(t *testing.T) {
	for _, test := range []struct {
		name  string
		ttl   time.Duration
		pairs []string
		lease time.Duration
	}{
		{"default", 0, nil, discovery.DefaultTTL},
		{"ttl of the directory", 7 * time.Second, nil, 7 * time.Second},
		{"lease of the record", 7 * time.Second, []string{discovery.KeyLease, "90s"}, 90 * time.Second},
		{"lease that is none", 7 * time.Second, []string{discovery.KeyLease, "soon"}, 7 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := discoverytest.NewMemory()
				d := follow(t, m.Open(), discovery.Options{TTL: test.ttl})
				write(m, newNode("a", test.pairs...))
				expect(t, d, "a", "joined")
				time.Sleep(test.lease / 2)
				write(m, newNode("a", test.pairs...))
				lapsesAt(t, d, "a", time.Now().Add(test.lease))
				write(m, newNode("a", test.pairs...))
				expect(t, d, "a", "heard again")
			})
		})
	}
}

func TestLapseInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{})
		start := time.Now()
		for _, lease := range []string{"9s", "3s", "7s", "1s", "5s"} {
			write(m, newNode("n"+lease, discovery.KeyLease, lease))
		}
		for _, lease := range []int{1, 3, 5, 7, 9} {
			lapsesAt(t, d, fmt.Sprintf("n%ds", lease), start.Add(time.Duration(lease)*time.Second))
		}
	})
}

// The queue is only brought in order when its head is due; a lease that an
// update changes must count all the same.
func TestLeaseChangedByUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{})
		write(m, newNode("a", discovery.KeyLease, "1h"), newNode("b", discovery.KeyLease, "2s"))
		time.Sleep(time.Second)
		write(m, newNode("a", discovery.KeyLease, "2s"), newNode("b", discovery.KeyLease, "1h"))
		changed := time.Now()
		lapsesAt(t, d, "a", changed.Add(2*time.Second))
		lapsesAt(t, d, "b", changed.Add(time.Hour))
	})
}

func TestAgeAtFirstListing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("fresh"), newNode("old"), newNode("overdue"), newNode("patient", discovery.KeyLease, "1h"))
		m.Age("old", 20*time.Second)
		m.Age("overdue", 30*time.Second)
		m.Age("patient", 30*time.Minute)
		start := time.Now()
		d := follow(t, m.Open(), discovery.Options{})
		expect(t, d, "fresh old patient", "listed")
		if ago := time.Since(d.Snapshot().Node("old").LastHeard()); ago != 20*time.Second {
			t.Errorf("old was heard %v ago, want 20s", ago)
		}
		lapsesAt(t, d, "old", start.Add(10*time.Second))
		write(m, newNode("overdue"))
		expect(t, d, "fresh overdue patient", "heard")
		lapsesAt(t, d, "fresh", start.Add(30*time.Second))
		lapsesAt(t, d, "patient", start.Add(30*time.Minute))
	})
}

// A registry's age may come from a writer's clock that runs ahead (a score in a
// sorted set). It must not lengthen a lease.
func TestNegativeAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.emit(discovery.Event{Type: discovery.Put, ID: "a", Node: newNode("a"), Age: -24 * time.Hour})
		s.sync(discovery.Listing{})
		expect(t, d, "a", "listed")
		lapsesAt(t, d, "a", time.Now().Add(discovery.DefaultTTL))
	})
}

// What an attempt to list said before it broke counts for nothing: the next one
// knows the ages anew, and what it lacks was never there.
func TestFirstListingInSeveralAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 1, newNode("dies"))
		s.put("", 2, newNode("goes"))
		s.emit(discovery.Event{Type: discovery.Rejected, ID: "bad", Err: discovery.ErrInvalid})
		s.end <- errors.New("broke")
		s = <-w.streams
		time.Sleep(time.Hour)
		s.emit(discovery.Event{Type: discovery.Put, ID: "dies", Node: newNode("dies"), Revision: 1, Age: time.Hour})
		s.put("", 3, newNode("new"))
		s.sync(discovery.Listing{Revision: 3})
		expect(t, d, "new", "listed")
		if r := d.Status().Rejections; len(r) != 0 {
			t.Errorf("rejections %v", r)
		}
	})
}

func TestOutageSuspendsLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b", discovery.KeyLease, "1s"))
		d := follow(t, m.Open(), discovery.Options{})
		heard := d.Snapshot().Node("a").LastHeard()
		time.Sleep(500 * time.Millisecond)
		snapshot := d.Snapshot()
		m.Break()
		for range 10 {
			time.Sleep(time.Hour)
			synctest.Wait()
			if d.Snapshot() != snapshot {
				t.Fatal("the view changed while the registry was away")
			}
		}
		m.Restore()
		reconnect(t, d)
		back := d.Status().Since
		expect(t, d, "a b", "back")
		if got := d.Snapshot().Node("a").LastHeard(); !got.Before(back.Add(-time.Hour)) {
			t.Errorf("that an old record is listed counts as hearing the node: %v after the first time", got.Sub(heard))
		}
		lapsesAt(t, d, "b", back.Add(time.Second))
		lapsesAt(t, d, "a", back.Add(discovery.DefaultTTL))
	})
}

func TestAbsentAfterOutage(t *testing.T) {
	for _, test := range []struct {
		name   string
		away   time.Duration
		change func(m *discoverytest.Memory)
		stays  bool
	}{
		// Before the outage, the nodes have not been heard for 8 seconds.
		{"long enough for the lease to run out", 23 * time.Second, func(*discoverytest.Memory) {}, true},
		{"long enough for the record to run out", 3 * time.Second, func(m *discoverytest.Memory) { m.Expiry = 10 * time.Second }, true},
		{"short", time.Second, func(*discoverytest.Memory) {}, false},
		{"longer than the lease", 40 * time.Second, func(*discoverytest.Memory) {}, true},
		{"longer than the registry keeps records", 12 * time.Second, func(m *discoverytest.Memory) { m.Expiry = 10 * time.Second }, true},
		{"shorter than the registry keeps records", 5 * time.Second, func(m *discoverytest.Memory) { m.Expiry = 20 * time.Second }, false},
		{"partial listing", time.Second, func(m *discoverytest.Memory) { m.Partial = true }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := discoverytest.NewMemory()
				test.change(m)
				write(m, newNode("gone"), newNode("returns"), newNode("stays"))
				d := follow(t, m.Open(), discovery.Options{})
				expect(t, d, "gone returns stays", "listed")
				time.Sleep(8 * time.Second)
				m.Break()
				m.Drop("gone")
				m.Drop("returns")
				time.Sleep(test.away)
				m.Restore()
				reconnect(t, d)
				if !test.stays {
					expect(t, d, "stays", "back")
					return
				}
				expect(t, d, "gone returns stays", "back")
				back := d.Status().Since
				time.Sleep(20 * time.Second)
				write(m, newNode("returns"), newNode("stays"))
				lapsesAt(t, d, "gone", back.Add(discovery.DefaultTTL))
				expect(t, d, "returns stays", "a lease later")
			})
		})
	}
}

func TestWiped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"))
		d := follow(t, m.Open(), discovery.Options{})
		time.Sleep(20 * time.Second)
		m.Wipe()
		reconnect(t, d)
		back := d.Status().Since
		expect(t, d, "a b", "wiped")
		time.Sleep(10 * time.Second)
		write(m, newNode("a"))
		lapsesAt(t, d, "b", back.Add(discovery.DefaultTTL))
		expect(t, d, "a", "a lease later")
	})
}

// A registry that was restored to an older state lists where nodes were then. A
// record that is overdue by the registry's own clock makes no node that was heard
// since move there.
func TestOlderStateMovesNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		now, then := newNode("a", "zone", "now"), newNode("a", "zone", "then")
		zone := func(want string) {
			t.Helper()
			synctest.Wait()
			n := d.Snapshot().Node("a")
			if n == nil || n.Node.Metadata["zone"] != want {
				t.Fatalf("a is %+v, want it in zone %q", n, want)
			}
		}
		s := <-w.streams
		s.put("", 8, now)
		s.sync(discovery.Listing{Epoch: "e", Revision: 8})
		zone("now")
		s.end <- discovery.ErrBroken
		s = <-w.streams
		s.emit(discovery.Event{Type: discovery.Put, ID: "a", Node: then, Revision: 3, Age: time.Hour})
		s.sync(discovery.Listing{Epoch: "e", Revision: 3})
		zone("now")
		// It has a lease to be heard, and then moves to where it says.
		back := d.Status().Since
		time.Sleep(10 * time.Second)
		s.put("", 4, then)
		zone("then")
		lapsesAt(t, d, "a", back.Add(10*time.Second+discovery.DefaultTTL))
	})
}

// A registry that fails over to an empty replica tends to break more than once.
// Each further listing lacks what the first one lacked, which proves no more.
func TestWipedAndBrokenAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"))
		d := follow(t, m.Open(), discovery.Options{})
		time.Sleep(20 * time.Second)
		m.Wipe()
		reconnect(t, d)
		for range 3 {
			time.Sleep(time.Second)
			m.Break()
			m.Restore()
			synctest.Wait()
			reconnect(t, d)
			expect(t, d, "a b", "broken again")
		}
		back := d.Status().Since
		write(m, newNode("a"))
		lapsesAt(t, d, "b", back.Add(discovery.DefaultTTL))
		// A node that was heard since is known to be listed: its absence counts.
		write(m, newNode("a"))
		synctest.Wait()
		m.Break()
		m.Drop("a")
		m.Restore()
		synctest.Wait()
		reconnect(t, d)
		expect(t, d, "", "dropped")
	})
}

func TestRevisionWentBackwards(t *testing.T) {
	for _, test := range []struct {
		name  string
		then  discovery.Listing
		stays bool
	}{
		{"it went on", discovery.Listing{Epoch: "e", Revision: 12}, false},
		{"nothing happened", discovery.Listing{Epoch: "e", Revision: 11}, false},
		{"it went backwards", discovery.Listing{Epoch: "e", Revision: 10}, true},
		{"another epoch", discovery.Listing{Epoch: "f", Revision: 12}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newScripted()
				d := follow(t, w, discovery.Options{})
				s := <-w.streams
				s.put("", 3, newNode("a"))
				s.sync(discovery.Listing{Epoch: "e", Revision: 7})
				s.put("", 11, newNode("b"))
				synctest.Wait()
				if r := d.Status().Revision; r != 11 {
					t.Errorf("revision %d, want 11", r)
				}
				s.end <- discovery.ErrBroken
				s = <-w.streams
				s.put("", 11, newNode("b"))
				s.sync(test.then)
				want := "b"
				if test.stays {
					want = "a b"
				}
				expect(t, d, want, "listed again")
				if r := d.Status().Revision; r != max(test.then.Revision, 11) {
					t.Errorf("revision %d after the listing", r)
				}
			})
		})
	}
}

// A revision that a listing claims is not taken back by an older event that was
// under way.
func TestRevisionOfListingHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 90, newNode("a"))
		s.sync(discovery.Listing{Epoch: "e", Revision: 100})
		s.put("", 95, newNode("b"))
		expect(t, d, "a b", "listed")
		if r := d.Status().Revision; r != 100 {
			t.Errorf("revision %d, want 100", r)
		}
	})
}

func TestExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"))
		d := follow(t, m.Open(), discovery.Options{})
		m.Expire("a")
		expect(t, d, "b", "expired")
	})
}

func TestMarkersInListing(t *testing.T) {
	for _, test := range []struct {
		marker discovery.EventType
		away   time.Duration
		stays  bool
	}{
		{discovery.Left, time.Second, false},
		{discovery.Left, time.Hour, false},
		{discovery.Expired, time.Second, false},
		{discovery.Expired, time.Hour, true},
	} {
		t.Run(fmt.Sprint(test.marker, " after ", test.away), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newScripted()
				d := follow(t, w, discovery.Options{})
				s := <-w.streams
				s.put("k", 1, newNode("a"))
				s.emit(discovery.Event{Type: test.marker, ID: "unknown", Key: "u", Revision: 2})
				s.sync(discovery.Listing{Revision: 2})
				expect(t, d, "a", "listed")
				s.end <- discovery.ErrBroken
				s = <-w.streams
				time.Sleep(test.away)
				s.emit(discovery.Event{Type: test.marker, ID: "a", Key: "k", Revision: 3})
				s.sync(discovery.Listing{Revision: 3})
				if !test.stays {
					expect(t, d, "", "listed again")
					return
				}
				expect(t, d, "a", "listed again")
				lapsesAt(t, d, "a", d.Status().Since.Add(discovery.DefaultTTL))
			})
		})
	}
}

// A registry that says nothing is not one whose nodes are dead.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"), newNode("dropped"))
		d := follow(t, m.Open(), discovery.Options{})
		m.Silence(true)
		m.Drop("dropped")
		time.Sleep(time.Hour)
		expect(t, d, "a b dropped", "silent for an hour")
		if status := d.Status(); status.Connected || status.Restarts != 1 || !errors.Is(status.LastError, discovery.ErrUnreachable) {
			t.Errorf("status %+v", status)
		}
		m.Silence(false)
		reconnect(t, d)
		back := d.Status().Since
		expect(t, d, "a b dropped", "back")
		time.Sleep(10 * time.Second)
		write(m, newNode("a"))
		lapsesAt(t, d, "b", back.Add(discovery.DefaultTTL))
		expect(t, d, "a", "a lease later")
	})
}

// The silence before a dead watch is noticed counts: records may have run out in
// it that their nodes could not renew.
func TestSilenceCountsAsOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScriptedVerifier()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 1, newNode("a"))
		s.put("", 2, newNode("b", discovery.KeyLease, "40s"))
		s.sync(discovery.Listing{Expiry: 20 * time.Second, Revision: 2})
		w.answer(func(context.Context) error { return errors.New("no answer") })
		s = <-w.streams // a's lease ran out and the watch was given up
		w.answer(func(context.Context) error { return nil })
		s.sync(discovery.Listing{Expiry: 20 * time.Second, Revision: 2})
		expect(t, d, "a b", "listed after 30 seconds of silence")
		lapsesAt(t, d, "a", d.Status().Since.Add(30*time.Second))
	})
}

func TestRemovalOfAnotherKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("a", 1, newNode("a"))
		s.sync(discovery.Listing{})
		s.put("node.a", 2, newNode("a")) // the same node, of a newer writer
		for _, marker := range []discovery.EventType{discovery.Left, discovery.Expired} {
			s.emit(discovery.Event{Type: marker, ID: "a", Key: "a", Revision: 3})
			s.emit(discovery.Event{Type: marker, ID: "a", Revision: 3})
			expect(t, d, "a", fmt.Sprint(marker, " of another key"))
		}
		s.emit(discovery.Event{Type: discovery.Rejected, ID: "a", Key: "a", Err: discovery.ErrInvalid})
		expect(t, d, "a", "rejected under another key")
		s.emit(discovery.Event{Type: discovery.Left, ID: "a", Key: "node.a", Revision: 4})
		expect(t, d, "", "left")
	})
}

func TestTwoKeysInListing(t *testing.T) {
	for _, newerFirst := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w := newScripted()
			d := follow(t, w, discovery.Options{})
			s := <-w.streams
			for range 2 { // the first listing, and one after an outage
				puts := []func(){
					func() { s.put("node.a", 20, newNode("a", "from", "newer")) },
					func() { s.put("a", 10, newNode("a", "from", "older")) },
				}
				if !newerFirst {
					slices.Reverse(puts)
				}
				for _, put := range puts {
					put()
				}
				s.sync(discovery.Listing{Revision: 20})
				synctest.Wait()
				if from := d.Snapshot().Node("a").Node.Metadata["from"]; from != "newer" {
					t.Errorf("newer first %v: the %s record counts", newerFirst, from)
				}
				s.emit(discovery.Event{Type: discovery.Left, ID: "a", Key: "a", Revision: 21})
				expect(t, d, "a", "the older key left")
				s.end <- discovery.ErrBroken
				s = <-w.streams
			}
		})
	}
}

func TestRejected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"))
		m.Put("bad", []byte(`{"nodeId":"bad","endpoint":"unix//x"}`))
		d := follow(t, m.Open(), discovery.Options{})
		expect(t, d, "a b", "listed")
		rejected := func(want, when string) {
			t.Helper()
			synctest.Wait()
			var ids []string
			for _, r := range d.Status().Rejections {
				ids = append(ids, r.ID)
				if !errors.Is(r.Err, discovery.ErrInvalid) || r.Time.IsZero() {
					t.Errorf("rejection %+v", r)
				}
			}
			if got := strings.Join(ids, " "); got != want {
				t.Fatalf("%s: rejected [%s], want [%s]", when, got, want)
			}
		}
		rejected("bad", "listed")
		m.Put("a", []byte(`{"nodeId":"a","endpoint":"h:1","load":-1}`))
		expect(t, d, "a b", "a cannot be read")
		rejected("a bad", "a cannot be read")
		m.Put("a", []byte(`{"nodeId":"a","endpoint":"http://h:1/path"}`))
		expect(t, d, "b", "a names what no record may")
		rejected("a bad", "a names what no record may")
		write(m, newNode("a"))
		expect(t, d, "a b", "a is good again")
		rejected("bad", "a is good again")
		m.Expire("bad")
		rejected("", "bad ran out")
		m.Put("bad", []byte(`{`))
		rejected("bad", "bad again")
		m.Break()
		m.Drop("bad")
		m.Restore()
		synctest.Wait()
		reconnect(t, d)
		rejected("", "it is not listed any more")
	})
}

// A record that cannot be read at all has a key and no id.
func TestRejectedWithoutID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("node.a", 1, newNode("a"))
		s.put("node.b", 2, newNode("b"))
		s.sync(discovery.Listing{})
		s.emit(discovery.Event{Type: discovery.Rejected, Key: "node.a", Revision: 3, Err: discovery.ErrInvalid})
		expect(t, d, "a b", "a cannot be read")
		if err := d.Snapshot().Node("a").Refused(); !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("a is in use with the record before, because %v", err)
		}
		s.emit(discovery.Event{Type: discovery.Rejected, Key: "node.a", Revision: 3, Err: discovery.Forbid(discovery.ErrInvalid)})
		expect(t, d, "b", "a is forbidden")
		if r := d.Status().Rejections; len(r) != 1 || r[0].Key != "node.a" {
			t.Errorf("rejections %+v", r)
		}
		s.put("node.a", 4, newNode("a"))
		expect(t, d, "a b", "a is good again")
		if r := d.Status().Rejections; len(r) != 0 {
			t.Errorf("rejections %+v", r)
		}
		// One record cannot be two nodes.
		s.put("node.a", 5, newNode("c"))
		expect(t, d, "b c", "another node took the key")
		s.emit(discovery.Event{Type: discovery.Left, ID: "a", Key: "node.a", Revision: 6})
		expect(t, d, "b", "the key is gone")
	})
}

// A third party's backend may forget a reason. It must not end the program.
func TestRejectedWithoutReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 1, newNode("a"))
		s.sync(discovery.Listing{})
		s.emit(discovery.Event{Type: discovery.Rejected, ID: "a"})
		expect(t, d, "a", "rejected")
		if r := d.Status().Rejections; len(r) != 1 || !errors.Is(r[0].Err, discovery.ErrInvalid) {
			t.Errorf("rejections %+v", r)
		}
	})
}

// A bad record that is written again and again is news once.
func TestRejectedAgainIsNoNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, logs := newLog(slog.LevelInfo)
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{Logger: log})
		for range 100 {
			m.Put("bad", []byte(`{`))
			time.Sleep(10 * time.Second)
		}
		if n := len(logs.containing("record rejected")); n != 1 {
			t.Errorf("%d lines about one bad record", n)
		}
		if r := d.Status().Rejections; len(r) != 1 {
			t.Errorf("rejections %+v", r)
		}
	})
}

func TestRejectionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.sync(discovery.Listing{})
		for i := range 5000 {
			s.emit(discovery.Event{Type: discovery.Rejected, ID: fmt.Sprintf("%04d", i), Err: discovery.ErrInvalid})
		}
		synctest.Wait()
		s.emit(discovery.Event{Type: discovery.Rejected, ID: "0000", Err: fmt.Errorf("%w: for another reason", discovery.ErrInvalid)})
		synctest.Wait()
		if r := d.Status().Rejections; len(r) != 1000 || !strings.Contains(r[0].Err.Error(), "another reason") || !slices.IsSortedFunc(r, func(a, b discovery.Rejection) int { return strings.Compare(a.ID, b.ID) }) {
			t.Errorf("%d rejections", len(r))
		}
	})
}

func TestMaxNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		n := newNode("")
		for i := range discovery.MaxNodes + 1 {
			n.ID = fmt.Sprintf("n%06d", i)
			s.put("", uint64(i), n)
		}
		s.sync(discovery.Listing{})
		synctest.Wait()
		if got := len(d.Snapshot().Nodes()); got != discovery.MaxNodes {
			t.Fatalf("%d nodes", got)
		}
		if r := d.Status().Rejections; len(r) != 1 || r[0].ID != n.ID || !strings.Contains(r[0].Err.Error(), "full with 100000 nodes") {
			t.Errorf("rejections %+v", r)
		}
		s.emit(discovery.Event{Type: discovery.Left, ID: "n000000"})
		s.put("", 0, n)
		synctest.Wait()
		if d.Snapshot().Node(n.ID) == nil || len(d.Status().Rejections) != 0 {
			t.Errorf("a node that left made no room: %+v", d.Status().Rejections)
		}
	})
}

func TestBeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 0, newNode("a"))
		s.sync(discovery.Listing{Partial: true})
		synctest.Wait()
		snapshot := d.Snapshot()
		time.Sleep(20 * time.Second)
		s.emit(discovery.Event{Type: discovery.Beat, ID: "a", Load: 0.5})
		s.emit(discovery.Event{Type: discovery.Beat, ID: "stranger", Load: 0.5})
		synctest.Wait()
		e := snapshot.Node("a")
		if d.Snapshot() != snapshot || e.Load() != 0.5 || time.Since(e.LastHeard()) != 0 {
			t.Errorf("after a beat: load %v, heard %v ago", e.Load(), time.Since(e.LastHeard()))
		}
		// A load that is none would draw all traffic to its node for ever.
		s.emit(discovery.Event{Type: discovery.Beat, ID: "a", Load: -1})
		synctest.Wait()
		if e.Load() != 0.5 {
			t.Errorf("load %v was believed", e.Load())
		}
		lapsesAt(t, d, "a", time.Now().Add(discovery.DefaultTTL))
	})
}

func TestSnapshotRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.sync(discovery.Listing{})
		synctest.Wait()
		time.Sleep(time.Minute)

		s.put("", 0, newNode("first", discovery.KeyLease, "1h"))
		expect(t, d, "first", "the first change after a quiet spell")
		time.Sleep(time.Minute)

		// 1000 changes a second, for 10 seconds. Any second counts, wherever it
		// begins.
		var published []time.Time
		last := d.Snapshot().Number
		for i := range 10_000 {
			id := fmt.Sprintf("n%03d", i%500)
			if i/500%2 == 0 {
				s.put("", 0, newNode(id))
			} else {
				s.emit(discovery.Event{Type: discovery.Left, ID: id})
			}
			synctest.Wait()
			if now := d.Snapshot().Number; now != last {
				published = append(published, time.Now())
				last = now
			}
			time.Sleep(time.Millisecond)
		}
		for i := range published {
			n := i
			for n < len(published) && published[n].Sub(published[i]) < time.Second {
				n++
			}
			if n-i > 20 {
				t.Fatalf("%d snapshots within a second", n-i)
			}
		}
		if len(published) < 100 {
			t.Errorf("only %d snapshots in 10 seconds of changes", len(published))
		}
		time.Sleep(time.Second)
		expect(t, d, "first", "in the end")

		// 10,000 joins at once.
		before := d.Snapshot().Number
		for i := range 10_000 {
			s.put("", 0, newNode(fmt.Sprintf("m%d", i)))
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n := d.Snapshot().Number - before; n > 50 || len(d.Snapshot().Nodes()) != 10_001 {
			t.Errorf("10,000 joins made %d snapshots and %d nodes", n, len(d.Snapshot().Nodes()))
		}
	})
}

func TestSuperseded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := discovery.NewDirectory(m.Open(), discovery.Options{})
		var numbers []uint64
		ctx, cancel := context.WithCancel(context.Background())
		var group sync.WaitGroup
		group.Go(func() {
			for {
				s := d.Snapshot()
				numbers = append(numbers, s.Number)
				select {
				case <-s.Superseded():
				case <-ctx.Done():
					return
				}
			}
		})
		synctest.Wait()
		group.Go(func() { _ = d.Run(ctx) })
		for _, id := range []string{"a", "b", "c"} {
			time.Sleep(time.Second)
			write(m, newNode(id))
		}
		synctest.Wait()
		cancel()
		group.Wait()
		if got := fmt.Sprint(numbers); got != "[0 1 2 3 4]" {
			t.Errorf("a follower saw the snapshots %s", got)
		}
	})
}

func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"))
		m.Break()
		start := time.Now()
		d := follow(t, m.Open(), discovery.Options{})
		s := d.Status()
		if s.Connected || s.Synced || s.Nodes != 0 || s.Restarts != 0 || !s.LastEvent.IsZero() ||
			!errors.Is(s.LastError, discovery.ErrUnreachable) || !s.Since.Equal(start) {
			t.Errorf("before the first listing: %+v", s)
		}
		m.Restore()
		reconnect(t, d)
		back := time.Now()
		s = d.Status()
		if !s.Connected || !s.Synced || s.Nodes != 2 || s.Revision != 2 || s.Restarts != 0 || s.Since.After(back) || time.Since(s.LastEvent) > time.Second {
			t.Errorf("after it: %+v", s)
		}
		time.Sleep(10 * time.Second)
		write(m, newNode("c"))
		synctest.Wait()
		s = d.Status()
		if s.Nodes != 3 || s.Revision != 3 || time.Since(s.LastEvent) != 0 {
			t.Errorf("after a join: %+v", s)
		}
		m.Break()
		synctest.Wait()
		s = d.Status()
		if s.Connected || !s.Synced || s.Nodes != 3 || s.Restarts != 1 || !errors.Is(s.LastError, discovery.ErrBroken) || time.Since(s.Since) != 0 {
			t.Errorf("after the watch broke: %+v", s)
		}
		m.Restore()
		reconnect(t, d)
		if s = d.Status(); !s.Connected || s.Restarts != 1 {
			t.Errorf("back: %+v", s)
		}
	})
}

// watchFunc is a Watcher that is a function.
type watchFunc func(ctx context.Context, emit func(discovery.Event)) error

func (f watchFunc) Watch(ctx context.Context, emit func(discovery.Event)) error { return f(ctx, emit) }

func TestRetry(t *testing.T) {
	synced := discovery.Event{Type: discovery.Synced}
	unreachable := fmt.Errorf("%w: nobody there", discovery.ErrUnreachable)
	for _, test := range []struct {
		name  string
		watch func(n int64, ctx context.Context, emit func(discovery.Event)) error
	}{
		{"never there", func(int64, context.Context, func(discovery.Event)) error { return unreachable }},
		{"broken right after every listing", func(_ int64, _ context.Context, emit func(discovery.Event)) error {
			emit(synced)
			return discovery.ErrBroken
		}},
		{"away after it worked for a day", func(n int64, _ context.Context, emit func(discovery.Event)) error {
			if n == 1 {
				emit(synced)
				time.Sleep(24 * time.Hour)
			}
			return unreachable
		}},
		{"no reason given", func(int64, context.Context, func(discovery.Event)) error { return nil }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var n, last atomic.Int64
				d := follow(t, watchFunc(func(ctx context.Context, emit func(discovery.Event)) error {
					last.Store(time.Now().UnixNano())
					return test.watch(n.Add(1), ctx, emit)
				}), discovery.Options{})
				if n.Load() == 1 && d.Snapshot().Synced {
					time.Sleep(24 * time.Hour) // the watch that worked
				}
				before := n.Load()
				time.Sleep(time.Hour)
				synctest.Wait()
				if calls := n.Load() - before; calls < 600 || calls > 2500 {
					t.Errorf("%d calls of Watch in an hour", calls)
				}
				if ago := time.Since(time.Unix(0, last.Load())); ago > 5*time.Second {
					t.Errorf("the last try was %v ago", ago)
				}
				if d.Status().LastError == nil {
					t.Error("no error in the status")
				}
			})
		})
	}
}

// A watch that broke after it worked is started again soon, every time.
func TestRetrySoonAfterSuccess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{})
		for range 20 {
			time.Sleep(time.Minute)
			m.Break()
			m.Restore()
			synctest.Wait()
			broke := time.Now()
			reconnect(t, d)
			if took := d.Status().Since.Sub(broke); took > 100*time.Millisecond {
				t.Errorf("watched again after %v", took)
			}
		}
	})
}

func TestWatchReturnsNil(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := follow(t, watchFunc(func(_ context.Context, emit func(discovery.Event)) error {
			emit(discovery.Event{Type: discovery.Put, ID: "a", Node: newNode("a")})
			emit(discovery.Event{Type: discovery.Synced})
			return nil
		}), discovery.Options{})
		expect(t, d, "a", "listed")
		if err := d.Status().LastError; !errors.Is(err, discovery.ErrBroken) {
			t.Errorf("status has %v, want ErrBroken", err)
		}
	})
}

// follow checks that Run ends at once, goleak and the bubble that nothing is
// left. This leads it into the states in which it may have to.
func TestRunEnds(t *testing.T) {
	for _, test := range []struct {
		name string
		lead func(t *testing.T)
	}{
		{"while the registry is away", func(t *testing.T) {
			m := discoverytest.NewMemory()
			m.Break()
			follow(t, m.Open(), discovery.Options{})
		}},
		{"during the listing", func(t *testing.T) {
			w := newScripted()
			follow(t, w, discovery.Options{})
			s := <-w.streams
			s.put("", 0, newNode("a"))
		}},
		{"while events flood in", func(t *testing.T) {
			follow(t, watchFunc(func(ctx context.Context, emit func(discovery.Event)) error {
				emit(discovery.Event{Type: discovery.Synced})
				for {
					emit(discovery.Event{Type: discovery.Put, ID: "a", Node: newNode("a")})
					select {
					case <-ctx.Done():
						return ctx.Err()
					case <-time.After(time.Microsecond):
					}
				}
			}), discovery.Options{})
			time.Sleep(time.Millisecond)
		}},
		{"while a publication waits", func(t *testing.T) {
			m := discoverytest.NewMemory()
			follow(t, m.Open(), discovery.Options{})
			for i := range 10 {
				write(m, newNode(fmt.Sprint(i)))
				synctest.Wait()
			}
		}},
		{"during a verification", func(t *testing.T) {
			m := discoverytest.NewMemory()
			write(m, newNode("a"))
			follow(t, m.Open(), discovery.Options{})
			m.Silence(true)
			time.Sleep(discovery.DefaultTTL + 500*time.Millisecond)
		}},
		{"while silent", func(t *testing.T) {
			m := discoverytest.NewMemory()
			write(m, newNode("a"))
			follow(t, m.Open(), discovery.Options{})
			m.Silence(true)
			time.Sleep(time.Hour)
		}},
	} {
		t.Run(test.name, func(t *testing.T) { synctest.Test(t, test.lead) })
	}
}

// A watch may be inside emit, with nobody to hear it, when all ends.
func TestRunEndsWhileEmitBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		slow, logs := newLog(slog.LevelInfo)
		logs.before = func(message string) {
			if message == "node joined" {
				<-gate
			}
		}
		d := discovery.NewDirectory(watchFunc(func(ctx context.Context, emit func(discovery.Event)) error {
			emit(discovery.Event{Type: discovery.Synced})
			for i := 0; ctx.Err() == nil; i++ {
				emit(discovery.Event{Type: discovery.Put, ID: fmt.Sprint(i), Node: newNode(fmt.Sprint(i))})
			}
			return ctx.Err()
		}), discovery.Options{Logger: slow, Probe: nobodyThere})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- d.Run(ctx) }()
		synctest.Wait() // the channel is full, and Run is held up
		cancel()
		synctest.Wait()
		close(gate)
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
}

// That the context ended is neither the registry's fault nor news.
func TestShutdownIsNoOutage(t *testing.T) {
	for range 20 { // a select takes either of two cases
		synctest.Test(t, func(t *testing.T) {
			busy, logs := newLog(slog.LevelInfo)
			ctx, cancel := context.WithCancel(context.Background())
			logs.before = func(message string) {
				if message == "node joined" {
					cancel()
					time.Sleep(time.Second) // by then the watch has ended
				}
			}
			m := discoverytest.NewMemory()
			d := discovery.NewDirectory(m.Open(), discovery.Options{Logger: busy})
			done := make(chan error, 1)
			go func() { done <- d.Run(ctx) }()
			synctest.Wait()
			write(m, newNode("a"))
			<-done
			if s := d.Status(); s.Restarts != 0 || s.LastError != nil {
				t.Errorf("status %+v", s)
			}
			if warnings := logs.warnings(); len(warnings) != 0 {
				t.Errorf("warned: %v", warnings)
			}
		})
	}
}

// What was emitted before a verification succeeded is heard before anybody is
// buried.
func TestVerdictComesAfterEvents(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			w := newScriptedVerifier()
			var s *stream
			w.answer(func(context.Context) error {
				// The heartbeat was late, and it is what the verification finds.
				s.put("", 0, newNode("a"))
				return nil
			})
			d := follow(t, w, discovery.Options{})
			s = <-w.streams
			s.put("", 0, newNode("a"))
			s.sync(discovery.Listing{})
			synctest.Wait()
			snapshot := d.Snapshot()
			time.Sleep(10 * discovery.DefaultTTL)
			synctest.Wait()
			if d.Snapshot() != snapshot {
				t.Fatal("a node lapsed that had been heard")
			}
		})
	}
}

// A lease that ran out while the verification was under way was not what it was
// asked about.
func TestVerdictIsOfWhenItBegan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScriptedVerifier()
		asked := 0
		w.answer(func(context.Context) error {
			asked++
			time.Sleep(500 * time.Millisecond)
			return nil
		})
		d := follow(t, w, discovery.Options{})
		start := time.Now()
		s := <-w.streams
		s.put("", 0, newNode("a", discovery.KeyLease, "10s"))
		s.put("", 0, newNode("b", discovery.KeyLease, "10300ms"))
		s.sync(discovery.Listing{})
		lapsesAt(t, d, "a", start.Add(10500*time.Millisecond))
		lapsesAt(t, d, "b", start.Add(11000*time.Millisecond))
		if asked != 2 {
			t.Errorf("asked %d times, want 2", asked)
		}
	})
}

// A verification may outlive the watch that it asked about.
func TestVerdictOfAnotherWatch(t *testing.T) {
	for _, verdict := range []error{nil, errors.New("no answer")} {
		t.Run(fmt.Sprint(verdict), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newScriptedVerifier()
				answer := make(chan error)
				w.answer(func(context.Context) error { return <-answer })
				d := follow(t, w, discovery.Options{})
				s := <-w.streams
				s.put("", 1, newNode("a"))
				s.sync(discovery.Listing{})
				time.Sleep(discovery.DefaultTTL)
				synctest.Wait()
				s.end <- discovery.ErrBroken
				s = <-w.streams
				s.put("", 1, newNode("a"))
				s.sync(discovery.Listing{})
				synctest.Wait()
				back := time.Now()
				answer <- verdict
				expect(t, d, "a", "the verdict came too late")
				if status := d.Status(); !status.Connected || status.Restarts != 1 {
					t.Errorf("status %+v", status)
				}
				w.answer(func(context.Context) error { return nil })
				lapsesAt(t, d, "a", back.Add(discovery.DefaultTTL))
			})
		})
	}
}

// The watch may end by itself while it is being given up.
func TestGivenUpWhileEnding(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			w := newScriptedVerifier()
			var s *stream
			w.answer(func(context.Context) error {
				s.end <- errors.New("ended by itself")
				return errors.New("no answer")
			})
			d := follow(t, w, discovery.Options{})
			s = <-w.streams
			s.put("", 1, newNode("a"))
			s.sync(discovery.Listing{})
			time.Sleep(discovery.DefaultTTL)
			synctest.Wait()
			s = <-w.streams
			s.put("", 1, newNode("a"))
			s.sync(discovery.Listing{})
			expect(t, d, "a", "back")
			if status := d.Status(); status.Restarts != 1 || !status.Connected {
				t.Errorf("status %+v", status)
			}
			w.answer(func(context.Context) error { return nil })
			lapsesAt(t, d, "a", d.Status().Since.Add(discovery.DefaultTTL))
		})
	}
}

// What a watch still says after it was given up is not heard.
func TestGivenUpIsNotHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stop := make(chan struct{})
		calls := 0
		w := newScriptedVerifier()
		w.answer(func(context.Context) error { return errors.New("no answer") })
		watcher := struct {
			watchFunc
			discovery.Verifier
		}{func(ctx context.Context, emit func(discovery.Event)) error {
			calls++
			emit(discovery.Event{Type: discovery.Put, ID: "a", Node: newNode("a")})
			emit(discovery.Event{Type: discovery.Synced})
			<-ctx.Done()
			emit(discovery.Event{Type: discovery.Left, ID: "a"})
			<-stop // a watch that is slow to end
			return ctx.Err()
		}, w}
		d := follow(t, watcher, discovery.Options{})
		time.Sleep(2 * discovery.DefaultTTL)
		expect(t, d, "a", "given up")
		if calls != 1 {
			t.Errorf("%d watches at once", calls)
		}
		close(stop)
		reconnect(t, d)
	})
}

// TestWorstDays runs a fleet through random misfortune of its registry. Nodes
// that go on announcing themselves are in use throughout, and once all is well
// again the view equals the registry.
func TestWorstDays(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				random := rand.New(rand.NewPCG(seed, 2))
				m := discoverytest.NewMemory()
				conn := m.Open()
				var faithful []discovery.Node
				for i := range 5 {
					faithful = append(faithful, newNode(fmt.Sprint("faithful-", i)))
				}
				broken, silent := false, false
				m.Expiry = 20 * time.Second
				written := time.Now()
				// beat is what the faithful do every 10 seconds, if they can.
				beat := func() {
					if !broken && !silent {
						write(m, faithful...)
						written = time.Now()
					}
				}
				beat()
				d := follow(t, conn, discovery.Options{})
				next := time.Now()
				// When the registry is back it takes a registrar up to its longest
				// retry to notice, and after a wipe up to a heartbeat.
				soon := func() {
					if at := time.Now().Add(time.Duration(random.Int64N(int64(5 * time.Second)))); at.Before(next) {
						next = at
					}
				}
				for range 400 {
					fickle := newNode(fmt.Sprint("fickle-", random.IntN(8)))
					switch random.IntN(14) {
					case 0, 1, 2:
						if !broken && !silent {
							write(m, fickle)
						}
					case 3:
						if !broken && !silent {
							_ = conn.Withdraw(context.Background(), fickle)
						}
					case 4:
						if !broken && !silent {
							m.Expire(fickle.ID)
						}
					case 5:
						m.Drop(fickle.ID)
					case 6:
						if !broken && !silent {
							m.Put(fickle.ID, []byte("{"))
						}
					case 7:
						m.Break()
						broken = true
					case 8, 9:
						if time.Since(written) >= m.Expiry {
							for _, n := range faithful {
								m.Drop(n.ID)
							}
						}
						m.Restore()
						broken = false
						soon()
					case 10:
						m.Silence(true)
						silent = true
					case 11, 12:
						// Short silences may have met each of its attempts. One whose
						// lease the next could outlast is heard before it is judged.
						if silent && !broken && time.Since(written)+5*time.Second >= discovery.DefaultTTL {
							silent = false
							beat()
						}
						m.Silence(false)
						silent = false
						soon()
					case 13:
						m.Wipe()
					}
					for until := time.Now().Add(time.Duration(random.ExpFloat64() * float64(5*time.Second))); time.Now().Before(until); {
						time.Sleep(min(time.Until(until), max(time.Until(next), time.Millisecond)))
						if !time.Now().Before(next) {
							next = time.Now().Add(10 * time.Second)
							beat()
						}
						synctest.Wait()
						for _, n := range faithful {
							if d.Snapshot().Node(n.ID) == nil {
								t.Fatalf("%s announces itself and is not in use: [%s], broken %v, silent %v", n.ID, listed(d), broken, silent)
							}
						}
					}
				}
				m.Restore()
				m.Silence(false)
				for range 12 {
					write(m, faithful...)
					time.Sleep(10 * time.Second)
				}
				reconnect(t, d)
				expect(t, d, "faithful-0 faithful-1 faithful-2 faithful-3 faithful-4", "when all is well again")
			})
		})
	}
}

// A goodbye of one instance does not concern the record of another, though a watch
// that has begun anew does not know it yet.
func TestLeftOfAnotherInstance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 0, newNode("a", discovery.KeyInstance, "2"))
		s.sync(discovery.Listing{})
		for _, test := range []struct {
			instance string
			stays    bool
		}{{"1", true}, {"2", false}, {"", false}} {
			s.put("", 0, newNode("a", discovery.KeyInstance, "2"))
			s.emit(discovery.Event{Type: discovery.Left, ID: "a", Instance: test.instance})
			time.Sleep(coalesced)
			synctest.Wait()
			if stays := d.Snapshot().Node("a") != nil; stays != test.stays {
				t.Errorf("after the goodbye of %q instance 2 stays: %v", test.instance, stays)
			}
		}
	})
}
