package natspubsub_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
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

// start starts a server without JetStream, which nothing here needs.
func start(t testing.TB, options ...natstest.Option) *natstest.Server {
	t.Helper()
	return natstest.Start(t, append([]natstest.Option{natstest.NoJetStream()}, options...)...)
}

// config names the server, and listens for as long as a test may wait: whatever
// does not wait for that comes earlier for sure.
func config(s *natstest.Server) natspubsub.Config {
	return natspubsub.Config{URLs: []string{s.URL()}, Listen: 2 * patience}
}

func open(t testing.TB, config natspubsub.Config) *natspubsub.Registry {
	t.Helper()
	r, err := natspubsub.Open(config)
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

func announce(t testing.TB, r *natspubsub.Registry, nodes ...discovery.Node) {
	t.Helper()
	for _, n := range nodes {
		if err := r.Announce(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
}

func withdraw(t testing.TB, r *natspubsub.Registry, n discovery.Node) {
	t.Helper()
	if err := r.Withdraw(t.Context(), n); err != nil {
		t.Fatal(err)
	}
}

func record(id string) string {
	return fmt.Sprintf(`{"nodeId":%q,"endpoint":"http://10.0.0.2:80","lastSeen":"2025-10-10T12:00:00Z","load":0}`, id)
}

// publish says something as any member of the fleet may.
func publish(t testing.TB, nc *nats.Conn, subject, data string) {
	t.Helper()
	if err := nc.Publish(subject, []byte(data)); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
}

// listen returns what is said on a subject from now on.
func listen(t testing.TB, nc *nats.Conn, subject string) *nats.Subscription {
	t.Helper()
	s, err := nc.SubscribeSync(subject)
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return s
}

func next(t testing.TB, s *nats.Subscription) *nats.Msg {
	t.Helper()
	m, err := s.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// A watcher is one call of Watch.
type watcher struct {
	t      testing.TB
	events chan discovery.Event
	result chan error
	cancel context.CancelFunc
}

func watch(t testing.TB, r discovery.Watcher) *watcher {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &watcher{t: t, events: make(chan discovery.Event), result: make(chan error, 1), cancel: cancel}
	go func() {
		defer close(w.result)
		w.result <- r.Watch(ctx, func(e discovery.Event) {
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
			if !e.Listing.Partial {
				w.t.Errorf("the listing is %+v, which promises too much", e.Listing)
			}
			return listed, e
		}
		listed = append(listed, e)
	}
}

// puts returns the next n records. Whether the listing ends before the last of
// them depends on how busy the machine is.
func (w *watcher) puts(n int) map[string]discovery.Node {
	w.t.Helper()
	nodes := make(map[string]discovery.Node)
	for range n {
		e := w.next()
		for e.Type == discovery.Synced {
			e = w.next()
		}
		if e.Type != discovery.Put {
			w.t.Fatalf("got %s of %q (%v), want a put", e.Type, e.ID, e.Err)
		}
		nodes[e.ID] = e.Node
	}
	return nodes
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

// A user may be kept from every inbox but his own, and is answered there all the
// same by nodes that know nothing of it.
func TestInboxPrefix(t *testing.T) {
	t.Parallel()
	fleet := natstest.Allow("catga.nodes.*", "_INBOX_proxy.>", "answers.proxy.>")
	s := natstest.Start(t, natstest.Users(
		natstest.User{Name: "node", Password: secret},
		natstest.User{Name: "proxy", Password: secret, Subscribe: fleet},
	))
	config := func(user, prefix string) natspubsub.Config {
		return natspubsub.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{User: user, Password: secret, InboxPrefix: prefix}, Listen: patience}
	}
	announce(t, open(t, config("node", "")), node(t, "a"))
	wantError(t, watch(t, open(t, config("proxy", ""))).broken(), discovery.ErrPermission, "_INBOX.")
	watch(t, open(t, config("proxy", "_INBOX_proxy"))).want(discovery.Put, "a")

	// Any other prefix is taken for an inbox by those who have it as well.
	announce(t, open(t, config("node", "answers.proxy")), node(t, "b"))
	watch(t, open(t, config("proxy", "answers.proxy"))).want(discovery.Put, "b")
}
