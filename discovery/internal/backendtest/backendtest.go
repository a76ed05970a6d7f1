// Package backendtest holds what the tests of several backends share: a watch that is
// read event by event, errors that must say what they should, and nodes.
package backendtest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Patience is far more than anything takes in the tests.
const Patience = 30 * time.Second

// Secret stands wherever a test puts a secret.
const Secret = "s3cr3t-9f2c"

// WantError fails the test unless err is the sentinel, says the words, and
// keeps the secret.
func WantError(t testing.TB, err, sentinel error, words ...string) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Fatalf("error is %v, want one that wraps %q", err, sentinel)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not say %q", err, word)
		}
	}
	if strings.Contains(err.Error(), Secret) {
		t.Errorf("error %q shows the secret", err)
	}
}

// Node returns a node with metadata, of keys and values.
func Node(t testing.TB, id string, metadata ...string) discovery.Node {
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

// Record returns the record of a node as a writer of other make writes it.
func Record(id string) string {
	return fmt.Sprintf(`{"nodeId":%q,"endpoint":"http://10.0.0.2:80","lastSeen":"2025-10-10T12:00:00Z","load":0}`, id)
}

// Announce announces nodes.
func Announce(t testing.TB, r discovery.Announcer, nodes ...discovery.Node) {
	t.Helper()
	for _, n := range nodes {
		if err := r.Announce(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
}

// Withdraw withdraws a node.
func Withdraw(t testing.TB, r discovery.Announcer, n discovery.Node) {
	t.Helper()
	if err := r.Withdraw(t.Context(), n); err != nil {
		t.Fatal(err)
	}
}

// Await waits until done reports true.
func Await(t testing.TB, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// A Watcher is one call of Watch. It ends with the test.
type Watcher struct {
	// Events are what is emitted: emit blocks until it is received.
	Events chan discovery.Event
	// Result is what Watch has returned; then it is closed.
	Result chan error
	// Cancel ends the context of Watch.
	Cancel context.CancelFunc

	t testing.TB
}

// Watch calls Watch.
func Watch(t testing.TB, r discovery.Watcher) *Watcher {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &Watcher{t: t, Events: make(chan discovery.Event), Result: make(chan error, 1), Cancel: cancel}
	go func() {
		defer close(w.Result)
		first := true
		w.Result <- r.Watch(ctx, func(e discovery.Event) {
			if first && e.Type == discovery.Overridden && len(e.Overrides) == 0 {
				return // every watch of a registry that keeps overrides begins so
			}
			first = false
			select {
			case w.Events <- e:
			case <-ctx.Done():
			}
		})
	}()
	t.Cleanup(w.Stop)
	return w
}

// Stop ends the watch and waits for that.
func (w *Watcher) Stop() {
	w.Cancel()
	for range w.Result {
	}
}

// Next returns the next event.
func (w *Watcher) Next() discovery.Event {
	w.t.Helper()
	select {
	case e := <-w.Events:
		return e
	case err := <-w.Result:
		w.t.Fatalf("the watch ended: %v", err)
	case <-time.After(Patience):
		w.t.Fatalf("no event after %v", Patience)
	}
	panic("not reached")
}

// Want returns the next event, which must be of this kind and node.
func (w *Watcher) Want(kind discovery.EventType, id string) discovery.Event {
	w.t.Helper()
	e := w.Next()
	if e.Type != kind || e.ID != id {
		w.t.Fatalf("got %s of %q (%v), want %s of %q", e.Type, e.ID, e.Err, kind, id)
	}
	return e
}

// Listing returns the events up to Synced, and that.
func (w *Watcher) Listing() ([]discovery.Event, discovery.Event) {
	w.t.Helper()
	var listed []discovery.Event
	for {
		e := w.Next()
		if e.Type == discovery.Synced {
			return listed, e
		}
		listed = append(listed, e)
	}
}

// Broken waits for the end of the watch, whatever is emitted until then, and returns
// its error.
func (w *Watcher) Broken() error {
	w.t.Helper()
	timeout := time.After(Patience)
	for {
		select {
		case <-w.Events:
		case err := <-w.Result:
			return err
		case <-timeout:
			w.t.Fatalf("the watch has not ended after %v", Patience)
		}
	}
}

// WantVerified fails the test unless a registry verifies what was emitted, and nothing
// that was not, of a watch whose listing is over. other announces a node.
func WantVerified(t *testing.T, r discovery.Verifier, w *Watcher, other discovery.Announcer) {
	t.Helper()
	if err := r.Verify(t.Context()); err != nil {
		t.Errorf("where nothing was written: %v", err)
	}
	// Nobody takes the event, so it is not emitted yet.
	Announce(t, other, Node(t, "a"))
	WantError(t, r.Verify(t.Context()), discovery.ErrBroken, "not got")
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := r.Verify(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a short context: %v", err)
	}
	result := make(chan error)
	go func() { result <- r.Verify(t.Context()) }()
	w.Want(discovery.Put, "a")
	if err := <-result; err != nil {
		t.Errorf("once it was emitted: %v", err)
	}
}

// BenchmarkPropagation measures from the call of Announce to the event at another
// registry.
func BenchmarkPropagation(b *testing.B, from discovery.Announcer, to discovery.Watcher) {
	b.Helper()
	w := Watch(b, to)
	w.Listing()
	n := Node(b, "orders-1", "service", "orders")
	for b.Loop() {
		Announce(b, from, n)
		<-w.Events
	}
	w.Stop()
}
