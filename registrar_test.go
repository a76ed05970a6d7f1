package caddydiscovery

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// record returns the node that stands in the registry, nil if there is none.
func record(t *testing.T, m *discoverytest.Memory, id string) *discovery.Node {
	t.Helper()
	data := m.Record(id)
	if data == nil {
		return nil
	}
	n, err := discovery.ParseNode(data)
	if err != nil {
		t.Fatalf("the record of %s: %v", id, err)
	}
	return &n
}

// registrarConfig is a Caddyfile with a registrar and one HTTP server.
func registrarConfig(registry, port, options string) string {
	return `{
		registrar {
			registry memory ` + registry + `
			` + options + `
		}
	}
	http://127.0.0.1:` + port + ` {
		respond ok
	}`
}

func TestRegistrarAnnouncesAndLeaves(t *testing.T) {
	name, m := newMemory(t)
	t.Setenv("ZONE", "eu-1")
	load(t, registrarConfig(name, freeport.String(t), `
		node_id edge-1
		endpoint https://edge.example.com
		metadata zone {env.ZONE}
		metadata {
			service edge
			version 7
		}
		heartbeat 50ms
		ttl 5s
		load {env.LOAD}
		drain 50ms`))
	t.Setenv("LOAD", "0.5")
	eventually(t, "the node is listed with its load", func() bool {
		n := record(t, m, "edge-1")
		return n != nil && n.Load == 0.5
	})
	n := record(t, m, "edge-1")
	if n.Endpoint.String() != "https://edge.example.com:443" {
		t.Errorf("endpoint %v", n.Endpoint)
	}
	for k, want := range map[string]string{"zone": "eu-1", "service": "edge", "version": "7", "role": "proxy", "lease": "5s"} {
		if got := n.Metadata[k]; got != want {
			t.Errorf("metadata %s is %q, want %q", k, got, want)
		}
	}
	writes := m.Writes()
	eventually(t, "it is renewed", func() bool { return m.Writes() > writes+2 })
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the node left", func() bool { return record(t, m, "edge-1") == nil })
}

// TestRegistrarLoadWithoutNumber has a placeholder that gives no number for a while:
// the node must not look idle.
func TestRegistrarLoadWithoutNumber(t *testing.T) {
	name, m := newMemory(t)
	t.Setenv("LOAD", "12.5")
	load(t, registrarConfig(name, freeport.String(t), `
		node_id edge-1
		endpoint https://edge.example.com
		heartbeat 20ms
		ttl 5s
		load {env.LOAD}
		drain 0s`))
	eventually(t, "the node is listed with its load", func() bool {
		n := record(t, m, "edge-1")
		return n != nil && n.Load == 12.5
	})
	for _, nonsense := range []string{"", "much", "NaN", "-1"} {
		t.Setenv("LOAD", nonsense)
		writes := m.Writes()
		eventually(t, "it is renewed", func() bool { return m.Writes() > writes+2 })
		if got := record(t, m, "edge-1").Load; got != 12.5 {
			t.Errorf("a load of %q was announced as %v", nonsense, got)
		}
	}
	t.Setenv("LOAD", "0")
	eventually(t, "a number counts again", func() bool { return record(t, m, "edge-1").Load == 0 })
}

func TestRegistrarSurvivesOutageAndWipe(t *testing.T) {
	name, m := newMemory(t)
	m.Break()
	load(t, registrarConfig(name, freeport.String(t), "node_id me\nendpoint http://10.0.0.1:80\nheartbeat 100ms\nttl 1s\ndrain 0s\n"))
	if record(t, m, "me") != nil {
		t.Error("listed in a registry that is away")
	}
	m.Restore()
	eventually(t, "the node is listed once the registry is there", func() bool { return record(t, m, "me") != nil })
	m.Wipe()
	eventually(t, "it is back after a wipe", func() bool { return record(t, m, "me") != nil })
}

func TestRegistrarHealthURL(t *testing.T) {
	name, m := newMemory(t)
	var status atomic.Int32
	status.Store(503)
	health := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(int(status.Load())) }))
	defer health.Close()
	load(t, registrarConfig(name, freeport.String(t), "node_id me\nendpoint http://10.0.0.1:80\nheartbeat 50ms\nttl 1s\ndrain 0s\nhealth_url "+health.URL))
	for _, step := range []struct {
		status int32
		listed bool
	}{{204, true}, {302, false}, {200, true}, {500, false}} {
		status.Store(step.status)
		eventually(t, fmt.Sprintf("health %d: listed is %v", step.status, step.listed), func() bool {
			return (record(t, m, "me") != nil) == step.listed
		})
	}
}

func TestRegistrarLeavesOthersAlone(t *testing.T) {
	name, m := newMemory(t)
	load(t, registrarConfig(name, freeport.String(t), "node_id me\nendpoint http://10.0.0.1:80\nheartbeat 1h\nttl 2h\ndrain 0s\n"))
	eventually(t, "the node is listed", func() bool { return record(t, m, "me") != nil })
	list(t, m, "me", "http://10.0.0.2:80", "instance", "somebody else")
	writes := m.Writes()
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the withdrawal was tried", func() bool { return m.Writes() > writes })
	if n := record(t, m, "me"); n == nil || n.Instance() != "somebody else" {
		t.Errorf("the record of another process became %v", n)
	}
}

func TestRegistrarRefuses(t *testing.T) {
	name, _ := newMemory(t)
	for options, want := range map[string]string{
		"endpoint http://10.0.0.1:80/path":      "a path is not accepted",
		"heartbeat 10s\nttl 5s":                 "want more than the heartbeat",
		"load high":                             "want system or a placeholder",
		"health_url ftp://x":                    "want http://host",
		"metadata zone {env.DISCOVERY_NOT_SET}": "metadata zone",
		"node_id a\nendpoint http://user@h:80":  "user info is not accepted",
		"node_id {env.DISCOVERY_NOT_SET}":       "DISCOVERY_NOT_SET",
		"heartbeat -1s":                         "invalid duration",
	} {
		err := validate(registrarConfig(name, "9", options))
		wantError(t, options, err, want)
	}
	twice := `{
		registrar {
			registry memory ` + name + `
			endpoint http://10.0.0.1:80
		}
		registrar {
			registry memory ` + name + `
			endpoint http://10.0.0.2:80
		}
	}`
	wantError(t, "one id twice", validate(twice), "want another node_id")
	noServer := `{
		registrar {
			registry memory ` + name + `
		}
	}`
	wantError(t, "no HTTP server", validate(noServer), "want the option endpoint")
}

// TestValidateDoesNotAnnounce holds that caddy validate writes nothing and opens
// no directory.
func TestValidateDoesNotAnnounce(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	err := validate(registrarConfig(name, port, "node_id me") + `
		http://127.0.0.1:` + port + `/x {
			reverse_proxy {
				dynamic discovery {
					registry memory ` + name + `
				}
			}
		}`)
	if err != nil {
		t.Fatal(err)
	}
	if m.Writes() != 0 || m.Watches() != 0 {
		t.Errorf("validating wrote %d records and opened %d watches", m.Writes(), m.Watches())
	}
}
