package natspubsub_test

import (
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

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
