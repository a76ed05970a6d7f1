package caddydiscovery

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"
	logtest "go.uber.org/zap/zaptest/observer"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

func init() {
	caddy.RegisterModule(eventRecorder{})
	caddy.RegisterModule(strangeApp{})
}

// recorded are the events that the recorders of all configs saw.
var recorded struct {
	sync.Mutex
	lines    []string
	block    chan struct{} // a recorder waits for it, where it is set
	stubborn bool          // and does not heed its context then
	do       func(caddy.Event)
}

// eventRecorder is a handler of events that writes them down.
type eventRecorder struct {
	// Config says which one it belongs to.
	Config string `json:"config,omitempty"`
}

func (eventRecorder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.recorder", New: func() caddy.Module { return new(eventRecorder) }}
}

func (r *eventRecorder) Handle(ctx context.Context, e caddy.Event) error {
	recorded.Lock()
	line := e.Name()
	for _, k := range []string{"id", "metadata.zone"} {
		if v := e.Data[k]; v != nil {
			line += fmt.Sprint(" ", v)
		}
	}
	recorded.lines = append(recorded.lines, line)
	block, do, interrupted := recorded.block, recorded.do, ctx.Done()
	if recorded.stubborn {
		interrupted = nil
	}
	recorded.Unlock()
	if do != nil {
		do(e)
	}
	if block != nil {
		select {
		case <-block:
		case <-interrupted:
		}
	}
	return nil
}

func eventsSoFar() []string {
	recorded.Lock()
	defer recorded.Unlock()
	return slices.Clone(recorded.lines)
}

func resetEvents(t *testing.T, block chan struct{}) {
	t.Helper()
	recorded.Lock()
	defer recorded.Unlock()
	recorded.lines, recorded.block, recorded.stubborn, recorded.do = nil, block, false, nil
}

// eventConfig runs two sources of one directory, with a recorder of our events.
func eventConfig(t *testing.T, name, port, more string) {
	t.Helper()
	if err := caddy.Load(eventConfigJSON(t, name, port, more), true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
}

func eventConfigJSON(t *testing.T, name, port, more string) []byte {
	t.Helper()
	config := adapt(t, `{
		admin off
		persist_config off
	}
	http://127.0.0.1:`+port+` {
		`+more+`
		reverse_proxy /a {
			dynamic discovery {
				registry memory `+name+`
			}
		}
		reverse_proxy /b {
			dynamic discovery {
				registry memory `+name+`
			}
		}
	}`)
	// There is no handler of events in a plain Caddy to name in a Caddyfile.
	events := `{"subscriptions":[{"events":["node_joined","node_left","node_updated","node_unhealthy","node_healthy","registry_connected","registry_disconnected"],"handlers":[{"handler":"recorder"}]}]}`
	return []byte(strings.Replace(string(config), `"apps":{`, `"apps":{"events":`+events+`,`, 1))
}

// Each change is one event, whatever configs come meanwhile.
func TestEachChangeIsOneEvent(t *testing.T) {
	resetEvents(t, nil)
	name, m := newMemory(t)
	list(t, m, "old", "http://10.0.0.1:80")
	port := freeport.String(t)
	eventConfig(t, name, port, "")
	want := []string{"registry_connected"}
	expect := func(what string, more ...string) {
		t.Helper()
		want = append(want, more...)
		eventually(t, what, func() bool { return len(eventsSoFar()) >= len(want) })
		if got := eventsSoFar(); !slices.Equal(got, want) {
			t.Fatalf("%s: events %q, want %q", what, got, want)
		}
	}
	expect("the first listing is no news")
	list(t, m, "a", "http://10.0.0.2:80", "zone", "x")
	expect("a node joins", "node_joined a x")
	list(t, m, "a", "http://10.0.0.2:80", "zone", "x") // a heartbeat is no news
	list(t, m, "a", "http://10.0.0.2:80", "zone", "y")
	expect("a node changes", "node_updated a y")

	// Whatever configs come, each change is one event. The handlers of two configs run
	// beside each other while one takes over, so that these come in any order.
	before := len(want)
	for i := range 20 {
		id := fmt.Sprintf("n%02d", i)
		list(t, m, id, "http://10.0.0.3:80")
		want = append(want, "node_joined "+id)
		eventConfig(t, name, port, fmt.Sprintf("respond /%d 204", i))
	}
	eventually(t, "reloads lose nothing", func() bool { return len(eventsSoFar()) >= len(want) })
	joined := eventsSoFar()
	slices.Sort(joined[before:])
	if !slices.Equal(joined, want) {
		t.Fatalf("after reloads: events %q, want %q", joined, want)
	}
	want = eventsSoFar()
	m.Expire("a")
	expect("a node lapses", "node_left a y")
	m.Put("n01", []byte("nonsense")) // which costs it the update
	m.Put("n00", []byte(`{"nodeId":"n00","endpoint":"http://10.0.0.1/path"}`))
	m.Put("other", []byte("nonsense"))
	expect("a record rules itself out", "node_left n00")
	m.Break()
	expect("the registry is lost", "registry_disconnected")
	m.Restore()
	expect("the registry is back", "registry_connected")
}

// The newest owner emits, each change once; when it leaves the one before goes on.
func TestEventCursor(t *testing.T) {
	var c eventCursor
	if !c.join("old") || c.join("old") || !c.join("new") {
		t.Fatal("an owner joins once")
	}
	if missed, ok := c.advance("new", 3); missed != 2 || !ok {
		t.Errorf("the first change with number 3: %d missed, %v", missed, ok)
	}
	for owner, number := range map[string]uint64{"new": 3, "old": 4, "nobody": 4} {
		if _, ok := c.advance(owner, number); ok {
			t.Errorf("change %d became an event of %s", number, owner)
		}
	}
	_, emits, changed := c.position("old")
	if emits {
		t.Error("the old one emits beside the new one")
	}
	c.leave("new")
	<-changed
	if number, emits, _ := c.position("old"); number != 3 || !emits {
		t.Errorf("the old one goes on from %d, %v", number, emits)
	}
}

// A handler that takes its time delays nothing but other events.
func TestSlowEventHandlersDelayNothingElse(t *testing.T) {
	block := make(chan struct{})
	resetEvents(t, block)
	name, m := newMemory(t)
	a := service(t, "a")
	port := freeport.String(t)
	eventConfig(t, name, port, "")
	eventually(t, "the handler hangs", func() bool { return len(eventsSoFar()) == 1 })
	list(t, m, "a", a.URL)
	eventually(t, "the node serves", func() bool {
		status, body := get(t, "http://127.0.0.1:"+port+"/a")
		return status == http.StatusOK && body == "a"
	})
	if got := eventsSoFar(); len(got) != 1 {
		t.Errorf("events %v while a handler hangs", got)
	}
	close(block)
	eventually(t, "the event comes late", func() bool { return slices.Contains(eventsSoFar(), "node_joined a") })
}

// A handler may reload Caddy: the reload stops the config that called the handler,
// and does not wait for it.
func TestEventHandlersMayReload(t *testing.T) {
	resetEvents(t, nil)
	name, m := newMemory(t)
	port := freeport.String(t)
	reloaded := make(chan error, 16)
	recorded.Lock()
	recorded.do = func(e caddy.Event) {
		if e.Name() == "node_joined" {
			reloaded <- caddy.Load(eventConfigJSON(t, name, port, fmt.Sprintf("respond /%v 204", e.Data["id"])), true)
		}
	}
	recorded.Unlock()
	eventConfig(t, name, port, "")
	eventually(t, "it runs", func() bool { return len(eventsSoFar()) == 1 })
	for i := range 3 {
		list(t, m, fmt.Sprintf("n%d", i), "http://10.0.0.1:80")
	}
	for range 3 {
		select {
		case err := <-reloaded:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(patience):
			t.Fatal("the reload waits for the handler that waits for the reload")
		}
	}
	if want := []string{"registry_connected", "node_joined n0", "node_joined n1", "node_joined n2"}; !slices.Equal(eventsSoFar(), want) {
		t.Errorf("events %q, want %q", eventsSoFar(), want)
	}
}

// Handlers that never end stop neither reloads nor the exit, and only so many of
// them are left behind.
func TestEventHandlersThatNeverEnd(t *testing.T) {
	block := make(chan struct{})
	resetEvents(t, block)
	release := sync.OnceFunc(func() { close(block) })
	t.Cleanup(release)
	recorded.Lock()
	recorded.stubborn = true
	recorded.Unlock()
	name, m := newMemory(t)
	port := freeport.String(t)
	eventConfig(t, name, port, "")
	called := 1
	eventually(t, "the first handler hangs", func() bool { return len(eventsSoFar()) == called })
	for i := range 2 * maxLateHandlers {
		list(t, m, fmt.Sprintf("n%02d", i), "http://10.0.0.1:80")
		eventConfig(t, name, port, fmt.Sprintf("respond /%d 204", i))
		if called < maxLateHandlers {
			called++
			eventually(t, "the new config's handler is called", func() bool { return len(eventsSoFar()) == called })
		}
	}
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	lateHandlers.exit()
	// One may be called while the config before has not quite ended.
	if got := len(eventsSoFar()); got > maxLateHandlers+1 {
		t.Errorf("%d handlers were called and never ended, want %d", got, maxLateHandlers)
	}
	release()
	eventually(t, "none is left behind", func() bool { return lateCount() == 0 })
}

// A handler that heeds its context is interrupted, but not at once.
func TestEventHandlersAreInterrupted(t *testing.T) {
	block := make(chan struct{})
	defer close(block)
	resetEvents(t, block)
	name, _ := newMemory(t)
	eventConfig(t, name, freeport.String(t), "")
	eventually(t, "the handler hangs", func() bool { return len(eventsSoFar()) == 1 })
	began := time.Now()
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	lateHandlers.exit()
	if took := time.Since(began); took < handlerGrace {
		t.Errorf("the handler was interrupted after %v", took)
	}
	eventually(t, "none is left behind", func() bool { return lateCount() == 0 })
}

func lateCount() int {
	lateHandlers.mu.Lock()
	defer lateHandlers.mu.Unlock()
	return len(lateHandlers.late)
}

// What the health checks find is told like everything else.
func TestChangesOfHealthAreEvents(t *testing.T) {
	resetEvents(t, nil)
	name, m := newMemory(t)
	var unhealthy atomic.Bool
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if unhealthy.Load() {
			w.WriteHeader(http.StatusTeapot)
		}
	}))
	t.Cleanup(s.Close)
	list(t, m, "a", s.URL)
	eventConfig(t, name, freeport.String(t), `reverse_proxy /c {
		dynamic discovery {
			registry memory `+name+`
			health {
				uri /
				interval 10ms
			}
		}
	}`)
	state := func() string {
		for _, n := range getAdmin(t, "/discovery/nodes") {
			return fmt.Sprint(n["state"])
		}
		return ""
	}
	eventually(t, "it is healthy", func() bool { return state() == "up" })
	unhealthy.Store(true)
	eventually(t, "it is unhealthy", func() bool { return slices.Contains(eventsSoFar(), "node_unhealthy a") && state() == "unhealthy" })
	unhealthy.Store(false)
	eventually(t, "it is healthy again", func() bool { return slices.Contains(eventsSoFar(), "node_healthy a") && state() == "up" })
	values := scrape(t)
	if values["health_checks_total passed"] == 0 || values["health_checks_total failed"] < 2 {
		t.Errorf("checks counted: %v passed, %v failed", values["health_checks_total passed"], values["health_checks_total failed"])
	}
	if values["changes_total ejected"] != 1 || values["changes_total restored"] != 1 {
		t.Errorf("counted %v ejected, %v restored", values["changes_total ejected"], values["changes_total restored"])
	}
}

// strangeApp is a module of somebody else that emits events of its own.
type strangeApp struct{}

// strangeContext is the context of the strangeApp that was provisioned last.
var strangeContext caddy.Context

func (strangeApp) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "strange", New: func() caddy.Module { return new(strangeApp) }}
}

func (*strangeApp) Provision(ctx caddy.Context) error { strangeContext = ctx; return nil }
func (*strangeApp) Start() error                      { return nil }
func (*strangeApp) Stop() error                       { return nil }

// Events of another module that are called as Caddy's own are none of them, and
// Caddy's own count once, however often they come.
func TestEventsOfOtherModulesAreIgnored(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "http://10.0.0.1:80")
	port := freeport.String(t)
	config := adapt(t, `{
		admin off
		persist_config off
		registrar {
			registry memory `+name+`
			node_id proxy
			endpoint http://10.0.0.9:80
		}
	}
	http://127.0.0.1:`+port+` {
		discovery_status /status
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+`
			}
		}
	}`)
	config = []byte(strings.Replace(string(config), `"apps":{`, `"apps":{"strange":{},`, 1))
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
		announcements.leaving.Wait()
	})
	app, err := strangeContext.App("events")
	if err != nil {
		t.Fatal(err)
	}
	emit := func(ctx caddy.Context) {
		for _, name := range []string{"started", "stopping", "started", "stopping"} {
			app.(*caddyevents.App).Emit(ctx, name, nil)
		}
	}
	s := openStream(t, "http://127.0.0.1:"+port+"/status?stream")
	emit(strangeContext)
	s.next("ready")
	list(t, m, "b", "http://10.0.0.2:80")
	eventually(t, "the page is kept up to date", func() bool { return strings.Contains(s.next("journal"), `"id":"b"`) })

	// Whoever has no module of his own passes for Caddy, and still breaks nothing.
	nobody, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	emit(nobody)
	s.body.Close()
	http.DefaultClient.CloseIdleConnections()
}

// The first listing of a large fleet pushes nothing out of the journal that is an
// event.
func TestFirstListingOfALargeFleetHidesNoEvent(t *testing.T) {
	resetEvents(t, nil)
	name, m := newMemory(t)
	for i := range 5_000 {
		list(t, m, fmt.Sprintf("n%04d", i), "http://10.0.0.1:80")
	}
	eventConfig(t, name, freeport.String(t), "")
	eventually(t, "the registry is connected", func() bool { return slices.Contains(eventsSoFar(), "registry_connected") })
}

// That changes were missed is told only where it may have cost somebody an event.
func TestMissedEventsAreTold(t *testing.T) {
	for _, c := range []struct {
		events, want string
	}{
		{`{}`, ""},
		{`{"subscriptions":[{"events":["node_left"],"handlers":[{"handler":"recorder"}]}]}`, "too slow"},
		{`{"subscriptions":[{"events":["cert_obtained"],"handlers":[{"handler":"recorder"}]}]}`, ""},
	} {
		t.Run(c.events, func(t *testing.T) {
			resetEvents(t, nil)
			if err := caddy.Load([]byte(`{"admin":{"disabled":true},"apps":{"strange":{},"events":`+c.events+`}}`), true); err != nil {
				t.Fatal(err)
			}
			defer caddy.Stop() //nolint:errcheck // it always succeeds
			name, _ := newMemory(t)
			b := &memoryBackend{Name: name}
			if err := b.Provision(strangeContext); err != nil {
				t.Fatal(err)
			}
			d, err := acquireDirectory(b)
			if err != nil {
				t.Fatal(err)
			}
			defer d.release() //nolint:errcheck // the registry is in memory
			const changes = 10_000
			for range changes {
				d.Journal().Add(discovery.Change{Type: discovery.ChangeLeft, ID: "a"})
			}
			core, logs := logtest.New(zap.DebugLevel)
			m, err := emitEvents(strangeContext, d, zap.New(core))
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is through", func() bool {
				d.events.mu.Lock()
				defer d.events.mu.Unlock()
				return d.events.number == changes
			})
			m.stop()
			<-m.done
			told := ""
			for _, l := range logs.All() {
				told += l.Message
			}
			if (told == "") != (c.want == "") || !strings.Contains(told, c.want) {
				t.Errorf("it was told %q, want %q", told, c.want)
			}
		})
	}
}
