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

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

func init() { caddy.RegisterModule(eventRecorder{}) }

// recorded are the events that the recorders of all configs saw.
var recorded struct {
	sync.Mutex
	lines []string
	block chan struct{} // a recorder waits for it, where it is set
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
	block := recorded.block
	recorded.Unlock()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
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
	recorded.lines, recorded.block = nil, block
}

// eventConfig runs two sources of one directory, with a recorder of our events.
func eventConfig(t *testing.T, name, port, more string) {
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
	config = []byte(strings.Replace(string(config), `"apps":{`, `"apps":{"events":`+events+`,`, 1))
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestEvents(t *testing.T) {
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

	// Whatever configs come, each change is one event.
	for i := range 20 {
		id := fmt.Sprintf("n%02d", i)
		list(t, m, id, "http://10.0.0.3:80")
		want = append(want, "node_joined "+id)
		eventConfig(t, name, port, fmt.Sprintf("respond /%d 204", i))
	}
	expect("reloads repeat and lose nothing")
	m.Expire("a")
	expect("a node lapses", "node_left a y")
	m.Put("n00", []byte("nonsense"))
	m.Put("other", []byte("nonsense"))
	expect("a record becomes bad", "node_left n00")
	m.Break()
	expect("the registry is lost", "registry_disconnected")
	m.Restore()
	expect("the registry is back", "registry_connected")
}

// A handler that takes its time delays nothing but other events.
func TestEventsAreOffTheHotPath(t *testing.T) {
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

// What the health checks find is told like everything else.
func TestEventsOfHealth(t *testing.T) {
	resetEvents(t, nil)
	name, m := newMemory(t)
	var ill atomic.Bool
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if ill.Load() {
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
	ill.Store(true)
	eventually(t, "it is unhealthy", func() bool { return slices.Contains(eventsSoFar(), "node_unhealthy a") && state() == "unhealthy" })
	ill.Store(false)
	eventually(t, "it is healthy again", func() bool { return slices.Contains(eventsSoFar(), "node_healthy a") && state() == "up" })
	values := scrape(t)
	if values["health_checks_total passed"] == 0 || values["health_checks_total failed"] < 2 {
		t.Errorf("checks counted: %v passed, %v failed", values["health_checks_total passed"], values["health_checks_total failed"])
	}
	if values["changes_total ejected"] != 1 || values["changes_total restored"] != 1 {
		t.Errorf("counted %v ejected, %v restored", values["changes_total ejected"], values["changes_total restored"])
	}
}
