package caddydiscovery

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddyserver/caddy/v2"
)

// sharedNode is a node that each test of this file announces.
const sharedNode = "node_id me\nendpoint http://10.0.0.1:80\nheartbeat 1h\nttl 2h\n"

// withTTL is a registrar with another option of the registry: a config that announces on
// a connection of its own.
func withTTL(registry, port, ttl string) string {
	return strings.Replace(registrarConfig(registry, port, sharedNode+"drain 50ms"),
		"registry memory "+registry, "registry memory "+registry+" {\nttl "+ttl+"\n}", 1)
}

// loadFailing loads a config that fails when all its apps have started, because its
// config loader does, at the URL: Caddy then does not stop them.
func loadFailing(t *testing.T, source, loader string) {
	t.Helper()
	config := strings.Replace(string(adapt(t, source)), "{",
		`{"admin":{"disabled":true,"config":{"persist":false,"load":{"module":"http","url":"`+loader+`"}}},`, 1)
	if err := caddy.Load([]byte(config), true); err == nil {
		t.Fatal("a config whose loader fails was loaded")
	}
}

// watchForGaps watches until the returned func is called, and fails the test if anybody
// could see the node drain, or go.
func watchForGaps(t *testing.T, m *discoverytest.Memory, id string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var watch sync.WaitGroup
	watch.Go(func() {
		_ = m.Open().Watch(ctx, func(e discovery.Event) {
			if e.ID == id && (e.Type != discovery.Put || e.Node.State() != discovery.StateUp) {
				t.Errorf("a reload told of %v, %q", e.Type, e.Node.State())
			}
		})
	})
	eventually(t, "it is watched", func() bool { return m.Watches() == 1 })
	return func() { cancel(); watch.Wait() }
}

// listed waits until the node stands in the registry, and returns its instance.
func listed(t *testing.T, m *discoverytest.Memory) string {
	t.Helper()
	eventually(t, "the node is listed", func() bool { return record(t, m, "me") != nil })
	return record(t, m, "me").Instance()
}

// TestRegistrarHandsOver changes an option of the registry with each of several
// reloads: nobody sees the node drain, or go, in between.
func TestRegistrarHandsOver(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	load(t, withTTL(name, port, "1m"))
	seen := map[string]bool{listed(t, m): true}
	stop := watchForGaps(t, m, "me")
	for i := range 6 {
		before := record(t, m, "me").Instance()
		load(t, withTTL(name, port, fmt.Sprint(i+2, "m")))
		eventually(t, "the new config has announced the node", func() bool { return record(t, m, "me").Instance() != before })
		seen[record(t, m, "me").Instance()] = true
	}
	announcements.leaving.Wait()
	if len(seen) != 7 {
		t.Errorf("seven configs announced %d times", len(seen))
	}

	// A config that cannot announce leaves the record to the one before, until that
	// would have lapsed.
	writes := m.Writes()
	m.Silence(true)
	load(t, withTTL(name, port, "1h"))
	m.Silence(false)
	eventually(t, "the next config has announced the node", func() bool { return m.Writes() > writes })
	announcements.leaving.Wait()
	stop()
	if n := record(t, m, "me"); n == nil || n.State() != discovery.StateUp {
		t.Errorf("the record is %+v", n)
	}
	// In the end it drains and goes, like any other.
	load(t, "http://127.0.0.1:"+port+" {\nrespond ok\n}")
	eventually(t, "the node left", func() bool { return record(t, m, "me") == nil })
}

// TestRegistrarHandsBack has a config with another option of the registry fail when
// it has started and announced the node: the config that goes on announces it again,
// without waiting for its heartbeat, and nobody sees the node drain, or go.
func TestRegistrarHandsBack(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	load(t, withTTL(name, port, "1m"))
	first := listed(t, m)
	stop := watchForGaps(t, m, "me")
	// The loader answers that it fails when the config has announced the node.
	overwritten := false
	loader := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for deadline := time.Now().Add(patience); !overwritten && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			n, err := discovery.ParseNode(m.Record("me"))
			overwritten = err == nil && n.Instance() != first
		}
		w.WriteHeader(http.StatusInternalServerError)
	}))
	defer loader.Close()
	loadFailing(t, withTTL(name, port, "2m"), loader.URL)
	loader.Close()
	if !overwritten {
		t.Fatal("the config that failed did not announce the node")
	}
	announcements.leaving.Wait()
	eventually(t, "the config before has announced the node again", func() bool {
		n := record(t, m, "me")
		return n != nil && n.Instance() == first
	})
	stop()
}

// TestReloadTouchesNoRecord holds that reloads with the same node write nothing, one
// with a changed node writes once, and one without it takes it out.
func TestReloadTouchesNoRecord(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	options := sharedNode + "drain 0s\n"
	load(t, registrarConfig(name, port, options))
	instance, writes := listed(t, m), m.Writes()
	for i := range 5 {
		load(t, registrarConfig(name, port, options)+fmt.Sprintf("\nhttp://127.0.0.1:%s/%d {\n}\n", port, i))
	}
	if record(t, m, "me").Instance() != instance || m.Writes() != writes {
		t.Errorf("reloads with the same node wrote %d records", m.Writes()-writes)
	}
	load(t, registrarConfig(name, port, options+"metadata version 2\n"))
	eventually(t, "the changed node is announced", func() bool { return record(t, m, "me").Metadata["version"] == "2" })
	if got := m.Writes() - writes; got != 1 || record(t, m, "me").Instance() != instance {
		t.Errorf("a changed node took %d writes, want 1 by the same instance", got)
	}
	load(t, "http://127.0.0.1:"+port+" {\nrespond ok\n}")
	eventually(t, "a reload without the registrar leaves", func() bool { return record(t, m, "me") == nil })
}

// TestFailedConfigAnnouncesNothing holds that a config that fails to start lists no
// node and changes none, and that the next one is in force as if it had not been.
func TestFailedConfigAnnouncesNothing(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	options := sharedNode + "drain 0s\n"
	load(t, registrarConfig(name, port, options+"metadata version 2\n"))
	listed(t, m)
	busy := httptest.NewServer(http.NotFoundHandler())
	defer busy.Close()
	writes := m.Writes()
	if err := tryLoad(registrarConfig(name, port, options+"metadata version 3\n") +
		"\nhttp://" + busy.Listener.Addr().String() + " {\n}\n"); err == nil {
		t.Fatal("a config with a taken port was loaded")
	}
	if got := m.Writes() - writes; got != 0 || record(t, m, "me").Metadata["version"] != "2" {
		t.Errorf("a config that failed to start wrote %d records, and the node is %v", got, record(t, m, "me"))
	}
	loadFailing(t, registrarConfig(name, freeport.String(t), "node_id other\nendpoint http://10.0.0.1:80\ndrain 0s\n"), "http://127.0.0.1:1/")
	announcements.leaving.Wait()
	if n := record(t, m, "other"); n != nil {
		t.Errorf("a config that is not in force lists %v", n)
	}
	writes = m.Writes()
	load(t, registrarConfig(name, port, options+"metadata version 4\n"))
	eventually(t, "the next config is in force", func() bool { return record(t, m, "me").Metadata["version"] == "4" })
	if got := m.Writes() - writes; got != 1 {
		t.Errorf("a changed node took %d writes, want 1", got)
	}
}

// TestOwnRecord holds what an announcement may do to the record once another one
// announces the node in its place.
func TestOwnRecord(t *testing.T) {
	registry := func() (*discoverytest.Memory, *sharedRegistry) {
		m := discoverytest.NewMemory()
		return m, &sharedRegistry{conn: m.Open()}
	}
	standing := func(r *sharedRegistry) *announcement {
		a := &announcement{registry: r}
		a.stands.Store(true)
		return a
	}
	_, same := registry()
	elsewhere := &sharedRegistry{conn: named{same.conn, "elsewhere"}}
	for name, c := range map[string]struct {
		successors              []*announcement
		announces, goes, isRead bool
	}{
		"none":                           {nil, true, true, true},
		"one that is not announced yet":  {[]*announcement{{registry: same}}, false, true, false},
		"one that stands":                {[]*announcement{standing(same)}, false, false, false},
		"one that stands elsewhere":      {[]*announcement{standing(elsewhere)}, false, true, false},
		"one of two stands in this very": {[]*announcement{standing(elsewhere), standing(same)}, false, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			m, shared := registry()
			n := discovery.Node{ID: "me", Metadata: map[string]string{discovery.KeyInstance: "mine"}}
			n.Endpoint, _ = discovery.ParseEndpoint("http://10.0.0.1:80")
			taken := 0
			r := ownRecord{Registry: shared.conn, successors: func() []*announcement { return c.successors }, taken: func() { taken++ }}
			if err := r.Announce(t.Context(), n); err != nil || (m.Writes() == 1) != c.announces || (taken == 1) != c.announces {
				t.Errorf("announcing wrote %d times, and was told %d times: %v", m.Writes(), taken, err)
			}
			if err := shared.conn.Announce(t.Context(), n); err != nil {
				t.Fatal(err)
			}
			if got, err := r.Record(t.Context(), "me"); err != nil || (got.ID == "me") != c.isRead {
				t.Errorf("read %q: %v", got.ID, err)
			}
			if own, err := r.Drain(t.Context(), n); err != nil || own != c.goes {
				t.Errorf("drained it: %v, %v", own, err)
			}
			if err := r.Withdraw(t.Context(), n); err != nil || (m.Record("me") == nil) != c.goes {
				t.Errorf("withdrew it: %v, %v", m.Record("me") == nil, err)
			}
		})
	}
}

// named is a registry of another name.
type named struct {
	discovery.Registry
	name string
}

func (n named) String() string { return n.name }

// TestAnnouncesAs holds that no option of a node can change without being noticed, and
// that what leads to the registry, which another key stands for, is not looked at.
func TestAnnouncesAs(t *testing.T) {
	node := func() *ProxyNode {
		return &ProxyNode{Metadata: map[string]string{"a": "b"}, Drain: new(caddy.Duration(1)), servers: []listener{{"http", "h", 1}}}
	}
	if !node().announcesAs(node()) || node().announcesAs(nil) {
		t.Error("a node announces as no node, or not as itself")
	}
	other := node()
	other.RegistryRaw, other.backend = json.RawMessage("{}"), new(memoryBackend)
	if !node().announcesAs(other) {
		t.Error("another spelling of the registry is another node")
	}
	for field, change := range map[string]func(n *ProxyNode){
		"Endpoint":  func(n *ProxyNode) { n.Endpoint = "x" },
		"Metadata":  func(n *ProxyNode) { n.Metadata["a"] = "c" },
		"Heartbeat": func(n *ProxyNode) { n.Heartbeat = 1 },
		"TTL":       func(n *ProxyNode) { n.TTL = 1 },
		"Load":      func(n *ProxyNode) { n.Load = "x" },
		"HealthURL": func(n *ProxyNode) { n.HealthURL = "x" },
		"Drain":     func(n *ProxyNode) { *n.Drain = 2 },
		"servers":   func(n *ProxyNode) { n.servers[0].port = 2 },
	} {
		changed := node()
		change(changed)
		if node().announcesAs(changed) {
			t.Errorf("another %s is not noticed", field)
		}
	}
}
