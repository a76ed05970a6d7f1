package natspubsub_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// Every sample of what writers in the wild say, where they say it, in its exact
// form.
func TestWire(t *testing.T) {
	t.Parallel()
	sample := func(name string) string {
		data, err := os.ReadFile(filepath.Join("../testdata/wire", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	s := start(t)
	nc := s.Conn()
	w := watch(t, open(t, config(s)))
	w.listing()

	publish(t, nc, "catga.nodes.join", sample("camel-full.json"))
	e := w.want(discovery.Put, "orders-1")
	if e.Node.Endpoint.String() != "http://127.0.0.1:5001" || e.Node.Load != 0.35 || e.Node.Service() != "orders" || e.Age != 0 || e.Key != "" {
		t.Errorf("got %+v", e)
	}
	publish(t, nc, "catga.nodes.heartbeat", sample("heartbeat-camel.json"))
	if e := w.want(discovery.Beat, "orders-1"); e.Load != 0.42 {
		t.Errorf("got %+v", e)
	}
	publish(t, nc, "catga.nodes.leave", sample("leave.json"))
	w.want(discovery.Left, "orders-1")

	files, err := filepath.Glob("../testdata/wire/*.json")
	if err != nil || len(files) < 10 {
		t.Fatalf("samples: %v, %v", files, err)
	}
	for _, file := range files {
		name := filepath.Base(file)
		data := sample(name)
		want, id := discovery.Put, ""
		switch {
		case strings.HasPrefix(name, "camel-"), strings.HasPrefix(name, "pascal-"):
			_, after, _ := strings.Cut(strings.ToLower(data), `"nodeid":"`)
			id, _, _ = strings.Cut(after, `"`)
		case name == "lenient-scalars.json":
			id = "42"
		case name == "lenient-byte-order-mark.json":
			id = "43"
		case strings.HasPrefix(name, "invalid-"):
			want, id = discovery.Rejected, "x"
			if name == "invalid-truncated.json" || name == "invalid-empty-id.json" {
				id = ""
			}
		default:
			continue // no records
		}
		for _, subject := range []string{"catga.nodes.join", "catga.nodes.heartbeat"} {
			publish(t, nc, subject, data)
			if e := w.want(want, id); (want == discovery.Put) != (e.Err == nil) || e.Err != nil && !errors.Is(e.Err, discovery.ErrInvalid) {
				t.Errorf("%s as %s: %+v", name, subject, e)
			}
		}
	}
}

func TestHeartbeats(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	w := watch(t, open(t, config(s)))
	w.listing()
	for _, test := range []struct {
		data string
		want discovery.Event
	}{
		{record("a"), discovery.Event{Type: discovery.Put, ID: "a"}},
		{`{"nodeId":"a","load":0.5}`, discovery.Event{Type: discovery.Beat, ID: "a", Load: 0.5}},
		{`{"NODEID":"a","LOAD":1E-05}`, discovery.Event{Type: discovery.Beat, ID: "a", Load: 1e-05}},
		{`{"nodeId":"a","endpoint":null,"load":2}`, discovery.Event{Type: discovery.Beat, ID: "a", Load: 2}},
		{`{"nodeId":"a","load":-1}`, discovery.Event{Type: discovery.Beat, ID: "a", Load: -1}}, // a Directory takes no notice of it
		{`{"nodeId":"a"}`, discovery.Event{Type: discovery.Beat, ID: "a", Load: math.NaN()}},
		{`{"nodeId":"a","load":null}`, discovery.Event{Type: discovery.Beat, ID: "a", Load: math.NaN()}},
		{`{"nodeId":"a","load":"NaN"}`, discovery.Event{Type: discovery.Beat, ID: "a", Load: math.NaN()}},
		{`{"nodeId":"a","endpoint":"","load":0}`, discovery.Event{Type: discovery.Rejected, ID: "a"}},
		{`{"nodeId":"a","endpoint":7,"load":0}`, discovery.Event{Type: discovery.Rejected, ID: "a"}},
		{`{"nodeId":"","load":0}`, discovery.Event{Type: discovery.Rejected}},
		{`{"nodeId":"a\n","load":0}`, discovery.Event{Type: discovery.Rejected}},
		{"{\"nodeId\":\"\xff\",\"load\":0}", discovery.Event{Type: discovery.Rejected}},
		{`{"nodeId":1,"load":0}`, discovery.Event{Type: discovery.Beat, ID: "1"}},
		{`{"nodeId":{},"load":0}`, discovery.Event{Type: discovery.Rejected}},
		{`{"load":0}`, discovery.Event{Type: discovery.Rejected}},
		{`{"nodeId":"a","load":0`, discovery.Event{Type: discovery.Rejected}},
		{`null`, discovery.Event{Type: discovery.Rejected}},
		{`[]`, discovery.Event{Type: discovery.Rejected}},
		{``, discovery.Event{Type: discovery.Rejected}},
		{`{"nodeId":"a","load":0,"x":"` + strings.Repeat("x", discovery.MaxRecord) + `"}`, discovery.Event{Type: discovery.Rejected}},
	} {
		data, want := test.data, test.want
		publish(t, nc, "catga.nodes.heartbeat", data)
		e := w.next()
		if e.Type == discovery.Rejected && !errors.Is(e.Err, discovery.ErrInvalid) {
			t.Errorf("%.60s: %v", data, e.Err)
		}
		if same := e.Load == want.Load || math.IsNaN(e.Load) && math.IsNaN(want.Load); e.Type != want.Type || e.ID != want.ID || !same {
			t.Errorf("%.60s: got %s of %q with load %v, want %s of %q with %v", data, e.Type, e.ID, e.Load, want.Type, want.ID, want.Load)
		}
	}
}

func TestLeave(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	w := watch(t, open(t, config(s)))
	w.listing()
	for _, data := range []string{
		`{"NodeId":"a"}`, `{"nodeId":"a"}`, `{"NODEID":"a","Timestamp":1}`,
		// Nothing is known of the id here, but a Directory may know it.
		`{"NodeId":"a","instance":"1"}`,
	} {
		publish(t, nc, "catga.nodes.leave", data)
		w.want(discovery.Left, "a")
	}
	for _, data := range []string{``, `null`, `[]`, `{}`, `{"NodeId":""}`, `{"NodeId":1}`, `{"NodeId":"a","instance":1}`, "{\"NodeId\":\"\xff\"}", `{"NodeId":"a`} {
		publish(t, nc, "catga.nodes.leave", data)
		// Without an id: it must not cost a node.
		if e := w.want(discovery.Rejected, ""); !errors.Is(e.Err, discovery.ErrInvalid) {
			t.Errorf("%s: %v", data, e.Err)
		}
	}
}

// A goodbye counts if it comes from whoever the record is.
func TestLeaveOfAnotherInstance(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	old, young := open(t, config(s)), open(t, config(s))
	w := watch(t, open(t, config(s)))
	w.listing()

	announce(t, old, node(t, "a", "instance", "1"))
	w.want(discovery.Put, "a")
	announce(t, young, node(t, "a", "instance", "2"))
	w.want(discovery.Put, "a")
	withdraw(t, old, node(t, "a", "instance", "1"))
	// The same process through another connection, as after a reload.
	withdraw(t, open(t, config(s)), node(t, "a", "instance", "2"))
	w.want(discovery.Left, "a") // the only one

	// A process of ours gives way to one that knows no instances, and back.
	announce(t, young, node(t, "a", "instance", "3"))
	w.want(discovery.Put, "a")
	publish(t, nc, "catga.nodes.join", record("a"))
	w.want(discovery.Put, "a")
	withdraw(t, young, node(t, "a", "instance", "3"))
	publish(t, nc, "catga.nodes.leave", `{"NodeId":"a"}`)
	w.want(discovery.Left, "a")
	announce(t, young, node(t, "a", "instance", "4"))
	w.want(discovery.Put, "a")
	publish(t, nc, "catga.nodes.leave", `{"NodeId":"a"}`)
	w.want(discovery.Left, "a")
	announce(t, young, node(t, "end"))
	w.want(discovery.Put, "end")
}

// The load of a node that is heard before anybody tells where it is.
func TestHeartbeatBeforeJoin(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	d := discovery.NewDirectory(open(t, config(s)), discovery.Options{Probe: discoverytest.Refuse})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	}()
	<-d.Synced()

	w := watch(t, open(t, config(s)))
	w.listing()
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"a","load":0.25}`)
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"a","load":0.75}`)
	w.want(discovery.Beat, "a")
	w.want(discovery.Beat, "a")
	publish(t, nc, "catga.nodes.join", record("a"))
	w.want(discovery.Put, "a")
	if e := w.want(discovery.Beat, "a"); e.Load != 0.75 {
		t.Errorf("kept aside was %+v", e)
	}
	// Once: what came after the join is as it comes.
	publish(t, nc, "catga.nodes.join", record("a"))
	w.want(discovery.Put, "a")
	publish(t, nc, "catga.nodes.join", record("a"))
	w.want(discovery.Put, "a")
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"a","load":0.5}`)
	w.want(discovery.Beat, "a")

	deadline := time.After(patience)
	for {
		snapshot := d.Snapshot()
		if e := snapshot.Node("a"); e != nil {
			for e.Load() != 0.5 {
				select {
				case <-time.After(time.Millisecond):
				case <-deadline:
					t.Fatalf("its load is %v, want 0.5", e.Load())
				}
			}
			break
		}
		select {
		case <-snapshot.Superseded():
		case <-deadline:
			t.Fatal("the node is not there")
		}
	}

	// A goodbye ends what was kept aside, and so does time.
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"b","load":0.5}`)
	w.want(discovery.Beat, "b")
	publish(t, nc, "catga.nodes.leave", `{"NodeId":"b"}`)
	w.want(discovery.Left, "b")
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"c","load":0.5}`)
	w.want(discovery.Beat, "c")
	<-time.After(discovery.MinLease)
	for _, id := range []string{"b", "c"} {
		publish(t, nc, "catga.nodes.join",
			fmt.Sprintf(`{"nodeId":%q,"endpoint":"http://10.0.0.2:80","metadata":{"lease":%q}}`, id, discovery.MinLease))
		w.want(discovery.Put, id)
	}
	publish(t, nc, "catga.nodes.join", record("end"))
	w.want(discovery.Put, "end")
}

// Nobody is there who would answer, and the server says so: there is nothing to
// wait for. What is said later is emitted when it is said.
func TestFirstSyncWithoutResponders(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	// A fleet that does not answer, and other listeners, make no difference.
	listen(t, nc, "catga.nodes.join")
	watch(t, open(t, config(s))).listing()
	w := watch(t, open(t, config(s))) // listens for longer than the test waits
	if listed, _ := w.listing(); len(listed) != 0 {
		t.Errorf("listed %v", listed)
	}
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"a","load":0.5}`)
	w.want(discovery.Beat, "a")
	publish(t, nc, "catga.nodes.join", record("a"))
	w.want(discovery.Put, "a")
}

// Somebody could answer and does not: the listing lasts for one heartbeat.
func TestFirstSyncWithoutAnswers(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	queries := listen(t, nc, "catga.nodes.query")
	c := config(s)
	c.Listen = 2 * time.Second
	r := open(t, c)
	began := time.Now()
	w := watch(t, r)
	if m := next(t, queries); m.Reply == "" || len(m.Data) != 0 {
		t.Errorf("the query is %+v", m)
	}
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken)
	publish(t, nc, "catga.nodes.join", record("joins"))
	publish(t, nc, "catga.nodes.heartbeat", record("beats"))
	w.want(discovery.Put, "joins")
	w.want(discovery.Put, "beats")
	w.want(discovery.Synced, "")
	if took := time.Since(began); took < c.Listen {
		t.Errorf("synced after %v, want not before %v", took, c.Listen)
	}
	if err := r.Verify(t.Context()); err != nil {
		t.Error(err)
	}
}

// The listing ends although answers never do.
func TestFirstSyncWithEndlessAnswers(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	queries := listen(t, nc, "catga.nodes.query")
	c := config(s)
	c.Listen = 500 * time.Millisecond
	w := watch(t, open(t, c))
	reply := next(t, queries).Reply
	stop := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
				_ = nc.Publish(reply, []byte(record("a")))
			}
		}
	})
	defer group.Wait()
	defer close(stop)
	w.listing()
}

// Answers end the listing; who has nothing to say, says that.
func TestFirstSyncWithAnswers(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	announce(t, r, node(t, "a"), node(t, "b"))
	listed, _ := watch(t, open(t, config(s))).listing()
	if len(listed) != 2 || listed[0].ID != "a" || listed[1].ID != "b" {
		t.Errorf("listed %v", listed)
	}
	withdraw(t, r, node(t, "a"))
	withdraw(t, r, node(t, "b"))
	if listed, _ := watch(t, open(t, config(s))).listing(); len(listed) != 0 {
		t.Errorf("after they left: %v", listed)
	}
}

// A proxy that starts late learns the whole fleet at once.
func TestLateListener(t *testing.T) {
	const n = 200
	s := start(t)
	var group sync.WaitGroup
	for i := range n {
		r := open(t, config(s))
		group.Go(func() {
			if err := r.Announce(t.Context(), node(t, fmt.Sprintf("orders-%03d", i))); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	began := time.Now()
	seen := watch(t, open(t, config(s))).puts(n)
	took := time.Since(began)
	if len(seen) != n {
		t.Errorf("learnt of %d nodes, want %d", len(seen), n)
	}
	t.Logf("%d registries answered within %v", n, took)
}

func TestOneConnection(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	announce(t, r, node(t, "a"))
	before := s.Server().NumSubscriptions()
	w := watch(t, r)
	w.listing()
	if err := r.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	withdraw(t, r, node(t, "a"))
	w.want(discovery.Left, "a")
	if n := s.NumClients(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
	w.cancel()
	if err := w.broken(); !errors.Is(err, context.Canceled) {
		t.Errorf("the watch ended with %v", err)
	}
	announce(t, r, node(t, "b")) // and so the server has done what the watch asked last
	if n := s.Server().NumSubscriptions(); n != before {
		t.Errorf("the watch left %d subscriptions behind", n-before)
	}
}

func TestServerRestart(t *testing.T) {
	t.Parallel()
	s := start(t)
	r, other := open(t, config(s)), open(t, config(s))
	w := watch(t, r)
	w.listing()
	announce(t, r, node(t, "ours"))
	w.want(discovery.Put, "ours")
	announce(t, other, node(t, "theirs"))
	w.want(discovery.Put, "theirs")
	s.Stop()
	wantError(t, w.broken(), discovery.ErrBroken, "catga.nodes")
	wantError(t, watch(t, r).broken(), discovery.ErrUnreachable, s.Addr())
	wantError(t, r.Announce(t.Context(), node(t, "ours")), discovery.ErrUnreachable)
	s.Restart()
	// The new connection answers for what was announced on the old one. Others
	// are back when they announce.
	w = watch(t, r)
	listed, _ := w.listing()
	if len(listed) != 1 || listed[0].ID != "ours" {
		t.Errorf("listed %v", listed)
	}
	said := listen(t, s.Conn(), "catga.nodes.*")
	for _, r := range []*natspubsub.Registry{r, other} {
		announce(t, r, node(t, "x"))
		w.want(discovery.Put, "x")
		if m := next(t, said); m.Subject != "catga.nodes.join" {
			t.Errorf("the first word on a new connection is %s", m.Subject)
		}
	}
	seen := watch(t, open(t, config(s))).puts(4) // x twice
	for _, id := range []string{"ours", "theirs", "x"} {
		if _, found := seen[id]; !found {
			t.Errorf("listed %v, want %s too", seen, id)
		}
	}
}

// A server that takes away the right to listen ends the subscriptions, and leaves
// the connection as it is.
func TestRightToListenRevoked(t *testing.T) {
	t.Parallel()
	users := func(permissions string) string {
		return "authorization { users: [{user: u, password: " + secret + ", permissions: " + permissions + "}] }"
	}
	p := natstest.StartProcess(t, users("{}"))
	r := open(t, natspubsub.Config{
		URLs: []string{p.URL()}, Conn: natsconn.Options{User: "u", Password: secret}, Listen: 2 * patience,
	})
	w := watch(t, r)
	w.listing()
	announce(t, r, node(t, "a"))
	w.want(discovery.Put, "a")
	p.Reload(users(`{subscribe: {deny: "catga.nodes.>"}}`))
	err := w.broken()
	wantError(t, err, discovery.ErrBroken)
	wantError(t, watch(t, r).broken(), discovery.ErrPermission)
	p.Reload(users("{}"))
	deadline := time.Now().Add(patience)
	for {
		// The next watch begins on a connection that has the right again.
		if err := r.Announce(t.Context(), node(t, "a")); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	w = watch(t, r)
	w.listing()
	announce(t, r, node(t, "b"))
	w.want(discovery.Put, "b")
}

func TestCloseEndsWatch(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	announce(t, r, node(t, "a"))
	w := watch(t, r)
	w.listing()
	for range 2 {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	wantError(t, w.broken(), discovery.ErrBroken, "closed")
	wantError(t, r.Announce(t.Context(), node(t, "a")), discovery.ErrUnreachable, "closed")
}

func TestWatchEndsWithContextBeforeItBegins(t *testing.T) {
	t.Parallel()
	s := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := open(t, config(s)).Watch(ctx, func(discovery.Event) { t.Error("an event") })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Watch returned %v", err)
	}
	if n := s.NumClients(); n != 0 {
		t.Errorf("%d connections for nothing", n)
	}
}

func TestVerify(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken, "there is none")
	w := watch(t, r)
	w.listing()
	if err := r.Verify(t.Context()); err != nil {
		t.Errorf("of an empty fleet: %v", err)
	}

	// Nobody takes the event, so it is not emitted yet.
	announce(t, open(t, config(s)), node(t, "a"))
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken, "not got")
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
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
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken, "there is none")
}

// A connection that dies without a word ends the watch, is not verified, and is
// not waited for for ever.
func TestSilence(t *testing.T) {
	t.Parallel()
	s := start(t)
	proxy := natstest.NewProxy(t, s.Addr())
	r := open(t, natspubsub.Config{URLs: []string{"nats+pubsub://" + proxy.Addr()}})
	w := watch(t, r)
	w.listing()
	proxy.Freeze()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	wantError(t, r.Verify(ctx), discovery.ErrUnreachable, proxy.Addr())
	// Whoever tries to announce finds out what Verify cannot.
	wantError(t, r.Announce(t.Context(), node(t, "a")), discovery.ErrUnreachable, proxy.Addr())
	wantError(t, w.broken(), discovery.ErrBroken, proxy.Addr())
	wantError(t, watch(t, r).broken(), discovery.ErrUnreachable, proxy.Addr())
	proxy.Thaw()
	announce(t, r, node(t, "a"))
	watch(t, r).want(discovery.Put, "a")
}

// Thousands of heartbeats at once, of both kinds, and not one is lost.
func TestStormOfHeartbeats(t *testing.T) {
	const nodes, beats = 1000, 5
	s := start(t)
	w := watch(t, open(t, config(s)))
	w.listing()
	var group sync.WaitGroup
	for range 4 {
		nc := s.Conn()
		group.Go(func() {
			for range beats {
				for i := range nodes {
					data := fmt.Sprintf(`{"nodeId":"orders-%d","load":0.5,"timestamp":"2025-10-10T12:00:10.7654321Z"}`, i)
					if i%2 == 0 {
						data = record(fmt.Sprintf("orders-%d", i))
					}
					if err := nc.Publish("catga.nodes.heartbeat", []byte(data)); err != nil {
						t.Error(err)
					}
				}
			}
			if err := nc.Flush(); err != nil {
				t.Error(err)
			}
		})
	}
	for range 4 * beats * nodes {
		if e := w.next(); e.Type == discovery.Rejected {
			t.Fatal(e.Err)
		}
	}
	group.Wait()
}

// One process that announces thousands answers for all of them.
func TestManyAnswersOfOne(t *testing.T) {
	const n = 10_000
	s := start(t)
	r := open(t, config(s))
	announceMany(t, r, n)
	if seen := watch(t, open(t, config(s))).puts(n); len(seen) != n {
		t.Errorf("learnt of %d nodes, want %d", len(seen), n)
	}
}

// What was dropped is not papered over.
func TestSlowListener(t *testing.T) {
	s := start(t)
	nc := s.Conn()
	r := open(t, config(s))
	w := watch(t, r)
	w.listing()
	const more = 1<<17 + 100
	for range more {
		if err := nc.Publish("catga.nodes.heartbeat", []byte(`{"nodeId":"a"}`)); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	// What has arrived is known once the connection of the listener answers.
	if err := r.Announce(t.Context(), node(t, "end")); err != nil {
		t.Fatal(err)
	}
	for received := 0; ; received++ {
		select {
		case e := <-w.events:
			if e.Type == discovery.Put {
				t.Fatal("nothing was dropped")
			}
		case err := <-w.result:
			wantError(t, err, discovery.ErrBroken, "dropped", "catga.nodes.")
			if received < 1<<17 {
				t.Errorf("only %d messages came before the end", received)
			}
			return
		case <-time.After(patience):
			t.Fatal("the watch goes on")
		}
	}
}

// One writer floods the fleet with large messages while nobody takes them: what
// waits is bounded, others are heard, and then the watch begins anew.
func TestFlood(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	w := watch(t, open(t, config(s)))
	w.listing()
	const large, size = 3000, 60 << 10
	flood := []byte(`{"nodeId":"flood","x":"` + strings.Repeat("x", size) + `"}`)
	for i := range large {
		if err := nc.Publish("catga.nodes.heartbeat", flood); err != nil {
			t.Fatal(err)
		}
		if i%100 == 0 {
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			await(t, "the server has sent what it has", func() bool { return sent(t, s, 0) })
		}
	}
	publish(t, nc, "catga.nodes.heartbeat", record("good"))
	await(t, "the server has sent everything", func() bool { return sent(t, s, large) })
	flooded, good := 0, false
	for timeout := time.After(patience); ; {
		select {
		case e := <-w.events:
			if e.ID == "good" {
				good = true
			} else {
				flooded++
			}
			continue
		case err := <-w.result:
			wantError(t, err, discovery.ErrBroken, "dropped")
		case <-timeout:
			t.Error("the watch goes on although messages were dropped")
		}
		break
	}
	if !good || flooded > large/2 {
		t.Errorf("%d of %d large messages were kept, and the small one behind them: %v", flooded, large, good)
	}
}

// sent reports whether the server has sent so many messages, and all that it has.
func sent(t *testing.T, s *natstest.Server, most int) bool {
	t.Helper()
	connections, err := s.Server().Connz(nil)
	if err != nil {
		t.Fatal(err)
	}
	messages := 0
	for _, c := range connections.Conns {
		if c.Pending > 0 {
			return false
		}
		messages += int(c.OutMsgs)
	}
	return messages >= most
}

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}
