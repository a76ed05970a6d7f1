package natspubsub_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
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
	if _, synced := w.Listing(); !synced.Listing.Partial {
		t.Errorf("the listing is %+v, which promises too much", synced.Listing)
	}

	publish(t, nc, "catga.nodes.join", sample("camel-full.json"))
	e := w.Want(discovery.Put, "orders-1")
	if e.Node.Endpoint.String() != "http://127.0.0.1:5001" || e.Node.Load != 0.35 || e.Node.Service() != "orders" || e.Age != 0 || e.Key != "" {
		t.Errorf("got %+v", e)
	}
	publish(t, nc, "catga.nodes.heartbeat", sample("heartbeat-camel.json"))
	if e := w.Want(discovery.Beat, "orders-1"); e.Load != 0.42 {
		t.Errorf("got %+v", e)
	}
	publish(t, nc, "catga.nodes.leave", sample("leave.json"))
	w.Want(discovery.Left, "orders-1")

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
			if e := w.Want(want, id); (want == discovery.Put) != (e.Err == nil) || e.Err != nil && !errors.Is(e.Err, discovery.ErrInvalid) {
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
	w.Listing()
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
		e := w.Next()
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
	w.Listing()
	for _, data := range []string{
		`{"NodeId":"a"}`, `{"nodeId":"a"}`, `{"NODEID":"a","Timestamp":1}`,
		// Nothing is known of the id here, but a Directory may know it.
		`{"NodeId":"a","instance":"1"}`,
	} {
		publish(t, nc, "catga.nodes.leave", data)
		w.Want(discovery.Left, "a")
	}
	for _, data := range []string{``, `null`, `[]`, `{}`, `{"NodeId":""}`, `{"NodeId":1}`, `{"NodeId":"a","instance":1}`, "{\"NodeId\":\"\xff\"}", `{"NodeId":"a`} {
		publish(t, nc, "catga.nodes.leave", data)
		// Without an id: it must not cost a node.
		if e := w.Want(discovery.Rejected, ""); !errors.Is(e.Err, discovery.ErrInvalid) {
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
	w.Listing()

	announce(t, old, node(t, "a", "instance", "1"))
	w.Want(discovery.Put, "a")
	announce(t, young, node(t, "a", "instance", "2"))
	w.Want(discovery.Put, "a")
	withdraw(t, old, node(t, "a", "instance", "1"))
	// The same process through another connection, as after a reload.
	withdraw(t, open(t, config(s)), node(t, "a", "instance", "2"))
	w.Want(discovery.Left, "a") // the only one

	// A process of ours gives way to one that knows no instances, and back.
	announce(t, young, node(t, "a", "instance", "3"))
	w.Want(discovery.Put, "a")
	publish(t, nc, "catga.nodes.join", record("a"))
	w.Want(discovery.Put, "a")
	withdraw(t, young, node(t, "a", "instance", "3"))
	publish(t, nc, "catga.nodes.leave", `{"NodeId":"a"}`)
	w.Want(discovery.Left, "a")
	announce(t, young, node(t, "a", "instance", "4"))
	w.Want(discovery.Put, "a")
	publish(t, nc, "catga.nodes.leave", `{"NodeId":"a"}`)
	w.Want(discovery.Left, "a")
	announce(t, young, node(t, "end"))
	w.Want(discovery.Put, "end")
}

// The load of a node that is heard before anybody tells where it is.
func TestHeartbeatBeforeJoin(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	d := discovery.NewDirectory(open(t, config(s)), discovery.Options{Probe: discoverytest.RefuseConnection})
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
	w.Listing()
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"a","load":0.25}`)
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"a","load":0.75}`)
	w.Want(discovery.Beat, "a")
	w.Want(discovery.Beat, "a")
	publish(t, nc, "catga.nodes.join", record("a"))
	w.Want(discovery.Put, "a")
	if e := w.Want(discovery.Beat, "a"); e.Load != 0.75 {
		t.Errorf("kept aside was %+v", e)
	}
	// Once: what came after the join is as it comes.
	publish(t, nc, "catga.nodes.join", record("a"))
	w.Want(discovery.Put, "a")
	publish(t, nc, "catga.nodes.join", record("a"))
	w.Want(discovery.Put, "a")
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"a","load":0.5}`)
	w.Want(discovery.Beat, "a")

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
	w.Want(discovery.Beat, "b")
	publish(t, nc, "catga.nodes.leave", `{"NodeId":"b"}`)
	w.Want(discovery.Left, "b")
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"c","load":0.5}`)
	w.Want(discovery.Beat, "c")
	<-time.After(discovery.MinLease)
	for _, id := range []string{"b", "c"} {
		publish(t, nc, "catga.nodes.join",
			fmt.Sprintf(`{"nodeId":%q,"endpoint":"http://10.0.0.2:80","metadata":{"lease":%q}}`, id, discovery.MinLease))
		w.Want(discovery.Put, id)
	}
	publish(t, nc, "catga.nodes.join", record("end"))
	w.Want(discovery.Put, "end")
}

// TestHeartbeatsWithoutEndpoint has a node that joins once and from then on tells its
// load only, as .NET writers do: it comes back after a pause, and a directory that
// starts anew knows it from before.
func TestHeartbeatsWithoutEndpoint(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	c := config(s)
	var accepts atomic.Bool
	o := discovery.Options{
		Probe: func(context.Context, string) error {
			if !accepts.Load() {
				return syscall.ECONNREFUSED
			}
			return nil
		},
		WarmStart: discovery.WarmStart{Path: filepath.Join(t.TempDir(), "nodes.json"), Registry: "test"},
	}
	run := func() (d *discovery.Directory, stop func()) {
		d = discovery.NewDirectory(open(t, c), o)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); _ = d.Run(ctx) }()
		select {
		case <-d.Synced():
		case <-time.After(patience):
			t.Fatal("not synced")
		}
		return d, func() { cancel(); <-done }
	}
	until := func(d *discovery.Directory, what string, ok func(*discovery.Entry) bool) {
		t.Helper()
		deadline := time.After(patience)
		for snapshot := d.Snapshot(); !ok(snapshot.Node("a")); snapshot = d.Snapshot() {
			select {
			case <-snapshot.Superseded():
			case <-deadline:
				t.Fatalf("waited in vain for: %s", what)
			}
		}
	}
	serves := func(e *discovery.Entry) bool { return e != nil && e.State() == discovery.StateUp }
	gone := func(e *discovery.Entry) bool { return e == nil }
	beat := func() {
		publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"a","load":0.4,"timestamp":"2025-10-10T12:00:10Z"}`)
	}

	d, stop := run()
	publish(t, nc, "catga.nodes.join", fmt.Sprintf(`{"NodeId":"a","Endpoint":%q,"LastSeen":"2025-10-10T12:00:00Z","Load":0,"Metadata":{"lease":"500ms"}}`, "http://10.0.0.2:80"))
	until(d, "it joins", serves)
	until(d, "its lease runs out", gone)
	beat()
	until(d, "it is heard again", serves)
	stop()

	accepts.Store(true)
	d, stop = run()
	until(d, "it is known from before", func(e *discovery.Entry) bool { return e != nil && e.State() == discovery.StateRestored })
	beat()
	until(d, "it is heard after the restart", serves)
	accepts.Store(false)
	until(d, "its lease runs out again", gone)
	beat()
	until(d, "it is heard once more", serves)
	stop()
}
