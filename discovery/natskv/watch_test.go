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
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestWatch(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, r)
	listed, synced := w.listing()
	if len(listed) != 0 || synced.Listing.Epoch == "" || synced.Listing.Expiry != 5*time.Minute || synced.Listing.Partial {
		t.Errorf("an empty bucket lists %v, then %+v", listed, synced.Listing)
	}

	announce(t, r, node(t, "a.b/c", "service", "orders"))
	e := w.want(discovery.Put, "a.b/c")
	if e.Key != "node.a=2Eb=2Fc" || e.Node.Service() != "orders" || e.Age != 0 || e.Revision != 1 {
		t.Errorf("got %+v", e)
	}
	kv := s.KeyValue("catga_nodes")
	put(t, kv, "bare", record("bare"))
	if e := w.want(discovery.Put, "bare"); e.Key != "bare" {
		t.Errorf("key of a bare id is %q", e.Key)
	}
	put(t, kv, "node.foreign.x", record("foreign.x"))
	w.want(discovery.Put, "foreign.x")

	put(t, kv, "node.bad", `{"nodeId":`)
	if e := w.want(discovery.Rejected, "bad"); e.Key != "node.bad" || !errors.Is(e.Err, discovery.ErrInvalid) {
		t.Errorf("got %+v", e)
	}
	put(t, kv, "node.one", record("two"))
	if e := w.want(discovery.Rejected, "one"); !strings.Contains(e.Err.Error(), "names another node") {
		t.Errorf("got %+v", e)
	}

	if err := kv.Delete(t.Context(), "bare"); err != nil {
		t.Fatal(err)
	}
	if e := w.want(discovery.Left, "bare"); e.Key != "bare" {
		t.Errorf("got %+v", e)
	}
	if err := kv.Purge(t.Context(), "node.foreign.x"); err != nil {
		t.Fatal(err)
	}
	w.want(discovery.Left, "foreign.x")
	put(t, kv, "node.bad", "")
	w.want(discovery.Left, "bad")

	// The next listing tells the same.
	next := watch(t, r)
	listed, again := next.listing()
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

	w.cancel()
	next.cancel()
	for _, w := range []*watcher{w, next} {
		if err := w.broken(); !errors.Is(err, context.Canceled) {
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
	w.listing()
	announce(t, r, node(t, "a"))
	w.want(discovery.Put, "a")
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
	w.want(discovery.Put, "a=2Eb")
	w.want(discovery.Synced, "")
	if err := kv.Delete(t.Context(), "node.a=2Eb"); err != nil {
		t.Fatal(err)
	}
	w.want(discovery.Left, "a=2Eb")
	put(t, kv, "node.a=2Eb", record("a.b"))
	w.want(discovery.Put, "a.b")
	if err := kv.Delete(t.Context(), "node.a=2Eb"); err != nil {
		t.Fatal(err)
	}
	w.want(discovery.Left, "a.b")
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
	a, b := w.want(discovery.Put, "a"), w.want(discovery.Put, "b")
	// Both are as old as the server says, whatever the clock here says.
	if got, want := a.Age-b.Age, stored[1].Sub(stored[0]); got != want || b.Age <= 0 {
		t.Errorf("ages are %v and %v, which differ by %v, want %v", a.Age, b.Age, got, want)
	}
}

// Every sample of a record in the wild, under both forms of key.
// How long a record took to come shows once the server's clock is known, and in
// what is not part of a listing.
func TestDelay(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	announce(t, r, node(t, "a"))
	w := watch(t, r)
	if listed, _ := w.listing(); listed[0].Delay != 0 {
		t.Errorf("a listed record has the delay %v", listed[0].Delay)
	}
	if err := r.Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	announce(t, r, node(t, "b"))
	e := w.want(discovery.Put, "b")
	if took := time.Since(began) + 100*time.Millisecond; e.Delay <= 0 || e.Delay > took {
		t.Errorf("delay %v, want one above 0 and up to %v", e.Delay, took)
	}
}

func TestWire(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../testdata/wire/*.json")
	if err != nil || len(files) < 10 {
		t.Fatalf("samples: %v, %v", files, err)
	}
	s := natstest.Start(t)
	kv := s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes"})
	w := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	w.listing()
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
			e := w.want(want, id)
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
	w.listing()
	announce(t, r, node(t, "a"))
	put := w.want(discovery.Put, "a")
	e := w.want(discovery.Expired, "a")
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
	w.listing()
	nc := s.Conn()
	for _, status := range []string{"100", "404", "408", "409", "503"} {
		m := nats.NewMsg("$KV.catga_nodes.node.evil" + status)
		m.Header.Set("Status", status)
		m.Header.Set("Description", "Consumer Deleted")
		if _, err := nc.RequestMsgWithContext(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		w.want(discovery.Left, "evil"+status)
	}
	announce(t, r, node(t, "good"))
	w.want(discovery.Put, "good")
	listed, _ := watch(t, r).listing()
	if len(listed) != 6 || listed[5].ID != "good" {
		t.Errorf("listed %v", listed)
	}
}

func TestBucketDeletedWhileWatching(t *testing.T) {
	t.Parallel()
	for name, recreate := range map[string]bool{"deleted": false, "recreated": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := natstest.Start(t)
			r := open(t, natskv.Config{URLs: []string{s.URL()}})
			w := watch(t, r)
			_, before := w.listing()
			announce(t, r, node(t, "a"))
			w.want(discovery.Put, "a")
			js := s.JetStream()
			if err := js.DeleteKeyValue(t.Context(), "catga_nodes"); err != nil {
				t.Fatal(err)
			}
			if recreate {
				if _, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "catga_nodes"}); err != nil {
					t.Fatal(err)
				}
			}
			wantError(t, w.broken(), discovery.ErrBroken, "catga_nodes")

			listed, after := watch(t, r).listing()
			if len(listed) != 0 || after.Listing.Epoch == before.Listing.Epoch {
				t.Errorf("the new bucket lists %v, %+v, after %+v", listed, after.Listing, before.Listing)
			}
			// A wiped bucket takes announcements again.
			announce(t, r, node(t, "a"))
		})
	}
}

func TestServerRestart(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, r)
	w.listing()
	for _, id := range []string{"a", "b", "c"} {
		if err := r.Announce(t.Context(), node(t, id)); err != nil {
			t.Fatal(err)
		}
		w.want(discovery.Put, id)
	}
	s.Stop()
	wantError(t, w.broken(), discovery.ErrBroken)
	wantError(t, watch(t, r).broken(), discovery.ErrUnreachable, s.Addr())
	wantError(t, r.Announce(t.Context(), node(t, "a")), discovery.ErrUnreachable)
	s.Restart()
	listed, _ := watch(t, r).listing()
	if len(listed) != 3 {
		t.Errorf("listed %d records after the restart, want 3", len(listed))
	}
}

// The consumer is gone and the connection is not: as when the server that had
// it left the cluster.
func TestConsumerDeleted(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	w := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	w.listing()
	stream, err := s.JetStream().Stream(t.Context(), "KV_catga_nodes")
	if err != nil {
		t.Fatal(err)
	}
	for name := range stream.ConsumerNames(t.Context()).Name() {
		if err := stream.DeleteConsumer(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	// The server says so itself, or there is nobody any more to ask for more.
	wantError(t, w.broken(), discovery.ErrBroken, "consumer")
}

func TestCloseEndsWatch(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, r)
	w.listing()
	r.Close()
	wantError(t, w.broken(), discovery.ErrBroken, "closed")
	wantError(t, r.Announce(t.Context(), node(t, "a")), discovery.ErrUnreachable, "closed")
}

// What was to be listed may be gone before it is sent; the listing ends all the
// same.
func TestListingShrinks(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	kv := s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", Storage: jetstream.MemoryStorage})
	fill(t, s, 5000)
	w := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	w.next()
	stream, err := s.JetStream().Stream(t.Context(), "KV_catga_nodes")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	listed, _ := w.listing()
	if len(listed) >= 4999 {
		t.Errorf("listed all %d records: nothing was purged in time", len(listed)+1)
	}
	put(t, kv, "node.late", record("late"))
	w.want(discovery.Put, "late")
}

func TestVerify(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken, "there is none")
	w := watch(t, r)
	w.listing()
	if err := r.Verify(t.Context()); err != nil {
		t.Errorf("of an empty bucket: %v", err)
	}

	// Nobody takes the event, so it is not emitted yet.
	announce(t, r, node(t, "a"))
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken, "not got")
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := r.Verify(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a short context: %v", err)
	}
	result := make(chan error)
	go func() { result <- r.Verify(t.Context()) }()
	w.want(discovery.Put, "a")
	if err := <-result; err != nil {
		t.Errorf("once it was emitted: %v", err)
	}

	s.Stop()
	if err := r.Verify(t.Context()); err == nil {
		t.Error("a stopped server verifies")
	}
	wantError(t, w.broken(), discovery.ErrBroken)
}

// A bucket may hold more than the watch is about.
func TestVerifyStreamWithOtherSubjects(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	js := s.JetStream()
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: "KV_catga_nodes", Subjects: []string{"$KV.catga_nodes.>", "other.>"}, MaxMsgsPerSubject: 1,
	}); err != nil {
		t.Fatal(err)
	}
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, r)
	w.listing()
	if _, err := js.Publish(t.Context(), "other.x", nil); err != nil {
		t.Fatal(err)
	}
	if err := r.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	announce(t, r, node(t, "a"))
	w.want(discovery.Put, "a")
}

func TestWatchEndsWithContextBeforeItBegins(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := open(t, natskv.Config{URLs: []string{s.URL()}}).Watch(ctx, func(discovery.Event) { t.Error("an event") })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Watch returned %v", err)
	}
}

// A connection that dies without a word ends the watch, and is not waited for
// where there is another server.
func TestSilence(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	proxy := natstest.NewProxy(t, s.Addr())
	r := open(t, natskv.Config{URLs: []string{"nats://" + proxy.Addr()}})
	w := watch(t, r)
	w.listing()
	proxy.Freeze()
	err := w.broken()
	wantError(t, err, discovery.ErrBroken, proxy.Addr())
	wantError(t, err, discovery.ErrUnreachable)
	wantError(t, watch(t, r).broken(), discovery.ErrUnreachable, proxy.Addr())
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken)
	proxy.Thaw()
	announce(t, r, node(t, "a"))
	watch(t, r).want(discovery.Put, "a")
}

// Ending a watch is part of every exit of a proxy, which may take no more than a
// second beyond the drain, and most of that is the registrar's.
func TestSilenceDoesNotHoldUpTheEnd(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	proxy := natstest.NewProxy(t, s.Addr())
	w := watch(t, open(t, natskv.Config{URLs: []string{"nats://" + proxy.Addr()}}))
	w.listing()
	proxy.Freeze()
	defer proxy.Thaw()
	began := time.Now()
	w.stop()
	if took := time.Since(began); took > 450*time.Millisecond {
		t.Errorf("a watch of a registry that is silent took %v to end, want hardly more than 100ms", took)
	}
}

// The server that has the consumer dies, and it is not the one that we are
// connected to: nothing tells us but the missing heartbeats.
func TestServerOfConsumerDies(t *testing.T) {
	t.Parallel()
	servers := natstest.StartCluster(t, 3)
	r := open(t, natskv.Config{URLs: []string{servers[0].URL()}, Replicas: 3})
	// A cluster that has just lost or gained a member is not sure of itself.
	settled := func(id string) {
		t.Helper()
		deadline := time.Now().Add(patience)
		for {
			err := r.Announce(t.Context(), node(t, id))
			if err == nil {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
	settled("a")
	js := servers[0].JetStream()
	host := func() string {
		stream, err := js.Stream(t.Context(), "KV_catga_nodes")
		if err != nil {
			t.Fatal(err)
		}
		for info := range stream.ListConsumers(t.Context()).Info() {
			return info.Cluster.Leader
		}
		return ""
	}
	for range 100 { // where a consumer goes is drawn
		w := watch(t, r)
		w.want(discovery.Put, "a")
		w.want(discovery.Synced, "")
		name := host()
		if name == servers[0].Name() || name == "" {
			w.stop()
			continue
		}
		for _, s := range servers {
			if s.Name() == name {
				s.Stop()
			}
		}
		wantError(t, w.broken(), discovery.ErrBroken)
		settled("b")
		listed, _ := watch(t, r).listing()
		if len(listed) != 2 {
			t.Errorf("listed %v, want a and b", listed)
		}
		return
	}
	t.Fatal("no consumer went to another server than ours")
}

// What a process leaves behind on the server when connections break, or when it
// reloads over and over, goes away.
func TestNoConsumersLeftBehind(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	admin := s.JetStream()
	r := open(t, natskv.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{Name: "ours"}})
	announce(t, r, node(t, "a"))
	if err := r.SetOverride(t.Context(), "a", discovery.Override{State: discovery.StateDraining}); err != nil {
		t.Fatal(err)
	}
	consumers := func() (n int) {
		t.Helper()
		for _, name := range []string{"KV_catga_nodes", "KV_catga_nodes_overrides"} {
			stream, err := admin.Stream(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			n += stream.CachedInfo().State.Consumers
		}
		return n
	}
	for range 10 { // a reload
		w := watch(t, r)
		for w.next().Type != discovery.Overridden {
		}
		w.stop()
	}
	if n := consumers(); n != 0 {
		t.Errorf("%d consumers are left of watches that were ended", n)
	}
	for range 10 { // a connection that breaks
		w := watch(t, r)
		for w.next().Type != discovery.Overridden {
		}
		connections, err := s.Server().Connz(nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range connections.Conns {
			if c.Name == "ours" {
				_ = s.Server().DisconnectClientByID(c.Cid) // it may have gone
			}
		}
		wantError(t, w.broken(), discovery.ErrBroken)
	}
	if n := consumers(); n == 0 || n > 20 {
		t.Errorf("%d consumers are left of watches that broke, want those that the server has not removed yet", n)
	}
	deadline := time.Now().Add(patience)
	for consumers() > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("%d consumers are left behind", consumers())
		}
		time.Sleep(10 * time.Millisecond)
	}
}
