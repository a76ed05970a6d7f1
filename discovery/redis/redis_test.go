package redis

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// patience bounds every wait, far beyond what any takes.
const patience = 30 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// harness gives the conformance suite a server of its own.
type harness struct {
	config  Config
	stop    func()
	restart func()
}

func (h *harness) Open(t *testing.T) discovery.Registry {
	t.Helper()
	r, err := Open(h.config)
	if err != nil {
		t.Fatal(err)
	}
	if h.config.Layout == LayoutKeys {
		// The suite takes a Historian at its word, and this layout has no past.
		return struct {
			discovery.Registry
			discovery.Verifier
			discovery.Overrider
			discovery.Reader
		}{r, r, r, r}
	}
	return r
}

// Write replaces a member as the fleets in the wild do, in two steps.
func (h *harness) Write(t *testing.T, id, record string) {
	t.Helper()
	r, err := Open(h.config)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, client := context.Background(), r.client.commands
	if keys, ok := r.layout.(*keysLayout); ok {
		err = client.Set(ctx, keys.prefix+id, record, patience).Err()
	} else {
		set := r.client.config.Key
		for _, m := range client.ZRange(ctx, set, 0, -1).Val() {
			if n, _ := discovery.ParseNode([]byte(m)); n.ID == id {
				err = errors.Join(err, client.ZRem(ctx, set, m).Err())
			}
		}
		err = errors.Join(err, client.ZAdd(ctx, set, goredis.Z{Score: float64(time.Now().UnixMilli()), Member: record}).Err())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (h *harness) Break(*testing.T)   { h.stop() }
func (h *harness) Restore(*testing.T) { h.restart() }

// single is the harness of one server, which is the only one that is named.
type single struct {
	harness
	server *redistest.Server
}

func (h *single) Addr() string { return h.server.Addr() }

func (h *single) OpenVia(t *testing.T, address string) discovery.Registry {
	via := h.harness
	via.config.URLs = []string{strings.Replace(h.server.URL(), h.server.Addr(), address, 1)}
	return via.Open(t)
}

var (
	_ discoverytest.Distant = (*single)(nil)
	_ discoverytest.Scribe  = (*single)(nil)
)

// conform runs the suite against a single server.
func conform(t *testing.T, c Config, options func(t *testing.T, c *Config) []redistest.Option) {
	t.Helper()
	discoverytest.Run(t, func(t *testing.T) discoverytest.Harness {
		c := c
		var o []redistest.Option
		if options != nil {
			o = options(t, &c)
		}
		s := redistest.Start(t, o...)
		c.URLs = []string{s.URL()}
		return &single{harness{config: c, stop: s.Stop, restart: s.Restart}, s}
	})
}

func notify(flags string) func(*testing.T, *Config) []redistest.Option {
	return func(*testing.T, *Config) []redistest.Option { return []redistest.Option{redistest.Notify(flags)} }
}

// The conformance tests do not run in parallel with others: the suite looks for
// goroutines that were left.

func TestConformance(t *testing.T) {
	// The suite drains for 100 ms, which a poll must not miss.
	keys := Config{Layout: LayoutKeys, Poll: minPoll}
	for _, c := range []struct {
		name    string
		config  Config
		options func(*testing.T, *Config) []redistest.Option
	}{
		{"SortedSet", Config{}, nil},
		{"SortedSetNotificationsRESP2", Config{Protocol: 2, DB: 3, Name: "somebody"}, notify("Kz")},
		{"SortedSetMutualTLS", Config{Key: "fleet{tag}:nodes:"}, func(t *testing.T, c *Config) []redistest.Option {
			certs := certtest.New(t)
			c.TLSCA, c.TLSCert, c.TLSKey = certs.CA, certs.ClientCert, certs.ClientKey
			return []redistest.Option{redistest.TLS(certs, true), redistest.Password("p@ss:w/rd")}
		}},
		{"Keys", keys, nil},
		{"KeysNotifications", Config{Layout: LayoutKeys, Key: "odd[*]?:"}, notify("K$gx")},
	} {
		t.Run(c.name, func(t *testing.T) { conform(t, c.config, c.options) })
	}
}

// open opens a registry that is closed with the test.
func open(t testing.TB, c Config) *Registry {
	t.Helper()
	r, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// directory runs a directory of a registry until the test ends.
func directory(t testing.TB, w discovery.Watcher, o discovery.Options) *discovery.Directory {
	t.Helper()
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	o.Probe = discoverytest.Refuse
	d := discovery.NewDirectory(w, o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = d.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return d
}

func synced(t testing.TB, d *discovery.Directory) {
	t.Helper()
	select {
	case <-d.Synced():
	case <-time.After(patience):
		t.Fatalf("not synced: %+v", d.Status())
	}
}

// until waits for a snapshot.
func until(t testing.TB, d *discovery.Directory, what string, ok func(*discovery.Snapshot) bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		s := d.Snapshot()
		if ok(s) {
			return
		}
		select {
		case <-s.Superseded():
		case <-deadline:
			t.Fatalf("waited in vain for: %s; %d nodes, %+v", what, len(s.Nodes()), d.Status())
		}
	}
}

func has(id string) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return s.Node(id) != nil }
}

func lacks(id string) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return s.Node(id) == nil }
}

func count(n int) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return len(s.Nodes()) == n }
}

// eventually waits for what no snapshot tells.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func newNode(id string, pairs ...string) discovery.Node {
	endpoint, err := discovery.ParseEndpoint("http://10.0.0.7:5001")
	if err != nil {
		panic(err)
	}
	n := discovery.Node{ID: id, Endpoint: endpoint, Metadata: map[string]string{
		discovery.KeyService: "orders", discovery.KeyInstance: "instance-of-" + id,
	}}
	for i := 0; i < len(pairs); i += 2 {
		n.Metadata[pairs[i]] = pairs[i+1]
	}
	return n
}

func announce(t testing.TB, r discovery.Announcer, nodes ...discovery.Node) {
	t.Helper()
	for _, n := range nodes {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := r.Announce(ctx, n)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
	}
}

// announceUntil announces a node to a registry that may still be away.
func announceUntil(t testing.TB, r discovery.Announcer, n discovery.Node) {
	t.Helper()
	var err error
	defer func() {
		if t.Failed() {
			t.Log("the last error:", err)
		}
	}()
	eventually(t, "the registry takes the node", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		err = r.Announce(ctx, n)
		return err == nil
	})
}

// watchEvents runs a bare watch, and returns its events, after the listing.
func watchEvents(t testing.TB, r *Registry) (listed []discovery.Event, events chan discovery.Event, done chan error) {
	t.Helper()
	events, done = make(chan discovery.Event, 10_000), make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		done <- r.Watch(ctx, func(e discovery.Event) { events <- e })
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	for {
		e := next(t, events, done)
		if listed = append(listed, e); e.Type == discovery.Synced {
			return listed, events, done
		}
	}
}

func next(t testing.TB, events chan discovery.Event, done chan error) discovery.Event {
	t.Helper()
	select {
	case e := <-events:
		return e
	case err := <-done:
		t.Fatalf("the watch ended: %v", err)
	case <-time.After(patience):
		t.Fatal("no event")
	}
	panic("unreachable")
}

// sample returns a record as writers in the wild put it.
func sample(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile("../testdata/wire/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// now returns the server's time in ms, plus something.
func now(t testing.TB, c *goredis.Client, plus time.Duration) float64 {
	t.Helper()
	at, err := c.Time(context.Background()).Result()
	if err != nil {
		t.Fatal(err)
	}
	return float64(at.Add(plus).UnixMilli())
}

func add(t testing.TB, c *goredis.Client, record string, age time.Duration) {
	t.Helper()
	if err := c.ZAdd(context.Background(), DefaultKey, goredis.Z{Score: now(t, c, -age), Member: record}).Err(); err != nil {
		t.Fatal(err)
	}
}

func foreign(id string, seen int) string {
	return fmt.Sprintf(`{"nodeId":%q,"endpoint":"http://127.0.0.1:5001","lastSeen":"2025-10-10T12:00:00.%07dZ","load":0,"metadata":{"service":"orders"},"isOnline":true}`, id, seen)
}

func wantError(t testing.TB, err error, kinds ...error) {
	t.Helper()
	for _, kind := range kinds {
		if !errors.Is(err, kind) {
			t.Errorf("error %v, want one that wraps %q", err, kind)
		}
	}
}
