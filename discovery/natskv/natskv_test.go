package natskv_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestMain(m *testing.M) {
	if natstest.Child() {
		return
	}
	goleak.VerifyTestMain(m)
}

// patience is far more than anything here takes.
const patience = 30 * time.Second

// secret stands wherever a test puts a secret.
const secret = "s3cr3t-9f2c"

func open(t testing.TB, config natskv.Config) *natskv.Registry {
	t.Helper()
	r, err := natskv.Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// wantError fails the test unless err is the sentinel, says the words, and
// keeps the secret.
func wantError(t *testing.T, err, sentinel error, words ...string) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Fatalf("error is %v, want one that wraps %q", err, sentinel)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not say %q", err, word)
		}
	}
	if strings.Contains(err.Error(), secret) {
		t.Errorf("error %q shows the secret", err)
	}
}

func node(t testing.TB, id string, metadata ...string) discovery.Node {
	t.Helper()
	endpoint, err := discovery.ParseEndpoint("http://10.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	n := discovery.Node{ID: id, Endpoint: endpoint, Metadata: make(map[string]string)}
	for i := 0; i < len(metadata); i += 2 {
		n.Metadata[metadata[i]] = metadata[i+1]
	}
	return n
}

func announce(t *testing.T, r *natskv.Registry, n discovery.Node) {
	t.Helper()
	if err := r.Announce(t.Context(), n); err != nil {
		t.Fatal(err)
	}
}

func record(id string) string {
	return fmt.Sprintf(`{"nodeId":%q,"endpoint":"http://10.0.0.2:80","lastSeen":"2025-10-10T12:00:00Z","load":0}`, id)
}

func put(t *testing.T, kv jetstream.KeyValue, key, value string) uint64 {
	t.Helper()
	revision, err := kv.PutString(t.Context(), key, value)
	if err != nil {
		t.Fatal(err)
	}
	return revision
}

// A watcher is one call of Watch.
type watcher struct {
	t      *testing.T
	events chan discovery.Event
	result chan error
	cancel context.CancelFunc
}

func watch(t *testing.T, r discovery.Watcher) *watcher {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &watcher{t: t, events: make(chan discovery.Event), result: make(chan error, 1), cancel: cancel}
	go func() {
		defer close(w.result)
		first := true
		w.result <- r.Watch(ctx, func(e discovery.Event) {
			if first && e.Type == discovery.Overridden && len(e.Overrides) == 0 {
				return // every watch begins so
			}
			first = false
			select {
			case w.events <- e:
			case <-ctx.Done():
			}
		})
	}()
	t.Cleanup(w.stop)
	return w
}

// stop ends the watch and waits for that.
func (w *watcher) stop() {
	w.cancel()
	for range w.result {
	}
}

func (w *watcher) next() discovery.Event {
	w.t.Helper()
	select {
	case e := <-w.events:
		return e
	case err := <-w.result:
		w.t.Fatalf("the watch ended: %v", err)
	case <-time.After(patience):
		w.t.Fatalf("no event after %v", patience)
	}
	panic("not reached")
}

func (w *watcher) want(kind discovery.EventType, id string) discovery.Event {
	w.t.Helper()
	e := w.next()
	if e.Type != kind || e.ID != id {
		w.t.Fatalf("got %s of %q (%v), want %s of %q", e.Type, e.ID, e.Err, kind, id)
	}
	return e
}

// listing returns the events up to Synced, and that.
func (w *watcher) listing() ([]discovery.Event, discovery.Event) {
	w.t.Helper()
	var listed []discovery.Event
	for {
		e := w.next()
		if e.Type == discovery.Synced {
			return listed, e
		}
		listed = append(listed, e)
	}
}

// broken waits for the end of the watch, whatever is emitted until then.
func (w *watcher) broken() error {
	w.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case <-w.events:
		case err := <-w.result:
			return err
		case <-timeout:
			w.t.Fatalf("the watch has not ended after %v", patience)
		}
	}
}
