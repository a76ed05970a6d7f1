package discovery_test

import (
	"context"
	"errors"
	"net/netip"
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

// watchFunc is a Watcher that is a function.
type watchFunc func(ctx context.Context, emit func(discovery.Event)) error

func (f watchFunc) Watch(ctx context.Context, emit func(discovery.Event)) error { return f(ctx, emit) }

// lapsesUnlessHeard holds that of the nodes a and b of a registry that is back just now
// each has one lease to be heard again: a is heard, b is not.
func lapsesUnlessHeard(t *testing.T, d *discovery.Directory, m *discoverytest.Memory) {
	t.Helper()
	back := d.Status().Since
	time.Sleep(10 * time.Second)
	write(m, newNode("a"))
	lapsesAt(t, d, "b", back.Add(discovery.DefaultTTL))
	expect(t, d, "a", "a lease later")
}
