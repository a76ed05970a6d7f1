package natskv_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/backendtest"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestWatch(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, r)
	listed, synced := w.Listing()
	if len(listed) != 0 || synced.Listing.Epoch == "" || synced.Listing.Expiry != 5*time.Minute || synced.Listing.Partial {
		t.Errorf("an empty bucket lists %v, then %+v", listed, synced.Listing)
	}

	announce(t, r, node(t, "a.b/c", "service", "orders"))
	e := w.Want(discovery.Put, "a.b/c")
	if e.Key != "node.a=2Eb=2Fc" || e.Node.Service() != "orders" || e.Age != 0 || e.Revision != 1 {
		t.Errorf("got %+v", e)
	}
	kv := s.KeyValue("catga_nodes")
	put(t, kv, "bare", record("bare"))
	if e := w.Want(discovery.Put, "bare"); e.Key != "bare" {
		t.Errorf("key of a bare id is %q", e.Key)
	}
	put(t, kv, "node.foreign.x", record("foreign.x"))
	w.Want(discovery.Put, "foreign.x")

	put(t, kv, "node.bad", `{"nodeId":`)
	if e := w.Want(discovery.Rejected, "bad"); e.Key != "node.bad" || !errors.Is(e.Err, discovery.ErrInvalid) {
		t.Errorf("got %+v", e)
	}
	put(t, kv, "node.one", record("two"))
	if e := w.Want(discovery.Rejected, "one"); !strings.Contains(e.Err.Error(), "names another node") {
		t.Errorf("got %+v", e)
	}

	if err := kv.Delete(t.Context(), "bare"); err != nil {
		t.Fatal(err)
	}
	if e := w.Want(discovery.Left, "bare"); e.Key != "bare" {
		t.Errorf("got %+v", e)
	}
	if err := kv.Purge(t.Context(), "node.foreign.x"); err != nil {
		t.Fatal(err)
	}
	w.Want(discovery.Left, "foreign.x")
	put(t, kv, "node.bad", "")
	w.Want(discovery.Left, "bad")

	// The next listing tells the same.
	next := watch(t, r)
	listed, again := next.Listing()
	kinds := make(map[string]discovery.EventType)
	for _, e := range listed {
		kinds[e.ID] = e.Type
	}
	for id, want := range map[string]discovery.EventType{
		"a.b/c": discovery.Put, "bare": discovery.Left, "foreign.x": discovery.Left,
		"bad": discovery.Left, "one": discovery.Rejected,
	} {
		if kinds[id] != want {
			t.Errorf("listed %q as %s, want %s", id, kinds[id], want)
		}
	}
	if len(listed) != 5 {
		t.Errorf("listed %d records, want 5", len(listed))
	}
	if again.Listing.Epoch != synced.Listing.Epoch || again.Listing.Revision != 8 {
		t.Errorf("the second listing is %+v", again.Listing)
	}
	if n := s.NumClients(); n != 2 { // and that of kv
		t.Errorf("%d connections, want 2", n)
	}

	w.Cancel()
	next.Cancel()
	for _, w := range []*backendtest.Watcher{w, next} {
		if err := w.Broken(); !errors.Is(err, context.Canceled) {
			t.Errorf("the watch ended with %v", err)
		}
	}
	stream, err := s.JetStream().Stream(t.Context(), "KV_catga_nodes")
	if err != nil {
		t.Fatal(err)
	}
	if n := stream.CachedInfo().State.Consumers; n != 0 {
		t.Errorf("%d consumers are left", n)
	}
}

func TestOneConnection(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, r)
	w.Listing()
	announce(t, r, node(t, "a"))
	w.Want(discovery.Put, "a")
	if err := r.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := r.History(t.Context(), "a", 0); err != nil {
		t.Error(err)
	}
	if n := s.NumClients(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// A key of a foreign writer may be read in two ways; its removal means the node
// that stood there.
func TestRemovalOfForeignKey(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	kv := s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes"})
	put(t, kv, "node.a=2Eb", record("a=2Eb"))
	w := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	w.Want(discovery.Put, "a=2Eb")
	w.Want(discovery.Synced, "")
	if err := kv.Delete(t.Context(), "node.a=2Eb"); err != nil {
		t.Fatal(err)
	}
	w.Want(discovery.Left, "a=2Eb")
	put(t, kv, "node.a=2Eb", record("a.b"))
	w.Want(discovery.Put, "a.b")
	if err := kv.Delete(t.Context(), "node.a=2Eb"); err != nil {
		t.Fatal(err)
	}
	w.Want(discovery.Left, "a.b")
}

func TestAge(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	kv := s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes"})
	put(t, kv, "node.a", record("a"))
	put(t, kv, "node.b", record("b"))
	var stored []time.Time
	for _, key := range []string{"node.a", "node.b"} {
		entry, err := kv.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, entry.Created())
	}
	w := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	a, b := w.Want(discovery.Put, "a"), w.Want(discovery.Put, "b")
	// Both are as old as the server says, whatever the clock here says.
	if got, want := a.Age-b.Age, stored[1].Sub(stored[0]); got != want || b.Age <= 0 {
		t.Errorf("ages are %v and %v, which differ by %v, want %v", a.Age, b.Age, got, want)
	}
}

// How long a record took to come shows once the server's clock is known, and in
// what is not part of a listing.
func TestDelay(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	announce(t, r, node(t, "a"))
	w := watch(t, r)
	if listed, _ := w.Listing(); listed[0].Delay != 0 {
		t.Errorf("a listed record has the delay %v", listed[0].Delay)
	}
	if err := r.Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	announce(t, r, node(t, "b"))
	e := w.Want(discovery.Put, "b")
	if took := time.Since(began) + 100*time.Millisecond; e.Delay <= 0 || e.Delay > took {
		t.Errorf("delay %v, want one above 0 and up to %v", e.Delay, took)
	}
}

// Every sample of a record in the wild is read, under both forms of key.
func TestWire(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../testdata/wire/*.json")
	if err != nil || len(files) < 10 {
		t.Fatalf("samples: %v, %v", files, err)
	}
	s := natstest.Start(t)
	kv := s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes"})
	w := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	w.Listing()
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name := filepath.Base(file)
		want, id := discovery.Put, ""
		switch {
		case strings.HasPrefix(name, "camel-"), strings.HasPrefix(name, "pascal-"):
			_, after, _ := strings.Cut(strings.ToLower(string(data)), `"nodeid":"`)
			id, _, _ = strings.Cut(after, `"`)
		case name == "lenient-scalars.json":
			id = "42"
		case name == "lenient-byte-order-mark.json":
			id = "43"
		default: // invalid, or no record of a node
			want, id = discovery.Rejected, "x"
		}
		for _, key := range []string{"node." + id, id} {
			put(t, kv, key, string(data))
			e := w.Want(want, id)
			if e.Key != key || (want == discovery.Put) != (e.Err == nil) {
				t.Errorf("%s under %q: %+v", name, key, e)
			}
		}
	}
}

func TestExpired(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}, BucketTTL: time.Second})
	w := watch(t, r)
	w.Listing()
	announce(t, r, node(t, "a"))
	put := w.Want(discovery.Put, "a")
	e := w.Want(discovery.Expired, "a")
	if e.Key != put.Key || e.Revision <= put.Revision {
		t.Errorf("got %+v", e)
	}
}

// Whoever may write may also store headers that look like the server's own
// words. They cost one node, not the watch.
func TestHostileHeaders(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, r)
	w.Listing()
	nc := s.Conn()
	for _, status := range []string{"100", "404", "408", "409", "503"} {
		m := nats.NewMsg("$KV.catga_nodes.node.evil" + status)
		m.Header.Set("Status", status)
		m.Header.Set("Description", "Consumer Deleted")
		if _, err := nc.RequestMsgWithContext(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		w.Want(discovery.Left, "evil"+status)
	}
	announce(t, r, node(t, "good"))
	w.Want(discovery.Put, "good")
	listed, _ := watch(t, r).Listing()
	if len(listed) != 6 || listed[5].ID != "good" {
		t.Errorf("listed %v", listed)
	}
}

// What was to be listed may be gone before it is sent; the listing ends all the
// same.
func TestListingShrinks(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	kv := s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", Storage: jetstream.MemoryStorage})
	fill(t, s, 5000)
	w := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	w.Next()
	stream, err := s.JetStream().Stream(t.Context(), "KV_catga_nodes")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	listed, _ := w.Listing()
	if len(listed) >= 4999 {
		t.Errorf("listed all %d records: nothing was purged in time", len(listed)+1)
	}
	put(t, kv, "node.late", record("late"))
	w.Want(discovery.Put, "late")
}
