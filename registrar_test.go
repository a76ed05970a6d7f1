package caddydiscovery

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

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

func TestRegistrarDefaults(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	load(t, registrarConfig(name, port, ""))
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	id := defaultNodeID([]listener{{port: uint(number)}})
	eventually(t, "the node is listed under its default id", func() bool { return record(t, m, id) != nil })
	n := record(t, m, id)
	if got, want := n.Endpoint.String(), "http://127.0.0.1:"+port; got != want {
		t.Errorf("endpoint %s, want %s", got, want)
	}
	if n.Metadata["role"] != "proxy" || n.Metadata["lease"] != "30s" {
		t.Errorf("metadata %v", n.Metadata)
	}
}

// TestRegistrarWaitsForItsAddress has the machine's network come up after Caddy.
func TestRegistrarWaitsForItsAddress(t *testing.T) {
	name, m := newMemory(t)
	offline.Store(name, nil)
	defer offline.Delete(name)
	_, err := localAddress(t.Context(), (&memoryBackend{Name: name}).Addresses())
	wantError(t, "an address that does not resolve", err, "endpoint <url>")
	port := freeport.String(t)
	load(t, registrarConfig(name, port, "node_id me\ndrain 0s"))
	if n := record(t, m, "me"); n != nil {
		t.Errorf("announced a guess: %v", n)
	}
	offline.Delete(name)
	eventually(t, "the node is listed where it can be reached", func() bool {
		n := record(t, m, "me")
		return n != nil && n.Endpoint.String() == "http://127.0.0.1:"+port
	})
}

// TestRegistrarFollowsItsAddress has the machine get another address while Caddy
// runs: the record follows with a heartbeat, and stays as it is while there is none.
func TestRegistrarFollowsItsAddress(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	load(t, registrarConfig(name, port, "node_id me\nheartbeat 20ms\nttl 5s\ndrain 0s"))
	at := func(host string) func() bool {
		return func() bool {
			n := record(t, m, "me")
			return n != nil && n.Endpoint.String() == "http://"+net.JoinHostPort(host, port)
		}
	}
	eventually(t, "the node is listed", at("127.0.0.1"))
	instance := record(t, m, "me").Instance()
	offline.Store(name, nil)
	writes := m.Writes()
	eventually(t, "it is renewed without a network", func() bool { return m.Writes() > writes+5 })
	if !at("127.0.0.1")() {
		t.Errorf("without a network the record became %v", record(t, m, "me"))
	}
	other := otherAddress(t)
	moved.Store(name, net.JoinHostPort(other, "4222"))
	defer moved.Delete(name)
	offline.Delete(name)
	eventually(t, "the record has followed", at(other))
	if got := record(t, m, "me").Instance(); got != instance {
		t.Errorf("it is of instance %s, want %s", got, instance)
	}
}

// otherAddress returns an address of this machine, other than 127.0.0.1.
func otherAddress(t *testing.T) string {
	t.Helper()
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if n, ok := a.(*net.IPNet); ok && !n.IP.IsLinkLocalUnicast() && n.IP.String() != "127.0.0.1" {
			return n.IP.String()
		}
	}
	t.Fatal("this machine has no address but 127.0.0.1; want another one, such as ::1")
	return ""
}

// TestDefaultNodeID tells two Caddys apart that share a host and a data directory,
// and gives each the same name again when it is started again.
func TestDefaultNodeID(t *testing.T) {
	ids := make(map[string]string)
	for what, servers := range map[string][]listener{
		"no server":         nil,
		"everywhere":        {{"http", "", 8080}},
		"another port":      {{"http", "", 8081}},
		"one address":       {{"http", "10.0.0.1", 8080}},
		"another address":   {{"http", "10.0.0.2", 8080}},
		"an IPv6 address":   {{"http", "2001:db8::1", 8080}},
		"several, and last": {{"http", "", 8082}, {"http", "", 8080}},
	} {
		id := defaultNodeID(servers)
		if err := discovery.ValidateID(id); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if other, taken := ids[id]; taken {
			t.Errorf("%s and %s have the id %s", what, other, id)
		}
		ids[id] = what
		if again := defaultNodeID(servers); again != id {
			t.Errorf("%s: %s, and then %s", what, id, again)
		}
	}
	for _, unspecified := range []string{"0.0.0.0", "::"} {
		if a, b := defaultNodeID([]listener{{"http", unspecified, 8080}}), defaultNodeID([]listener{{"http", "", 8080}}); a != b {
			t.Errorf("%s is everywhere, and named %s, not %s", unspecified, a, b)
		}
	}

	// So it is for the proxies of a subset, which are provisioned before the app that
	// listens is.
	proxies := make(map[string]bool)
	for range 2 {
		name, _ := newMemory(t)
		port := freeport.String(t)
		load(t, "http://127.0.0.1:"+port+" {\nreverse_proxy {\ndynamic discovery {\nregistry memory "+name+"\nsubset 2\n}\n}\n}")
		id := runningSource(t).ProxyID
		if !strings.HasSuffix(id, "-"+port) {
			t.Errorf("the proxy that listens on port %s is %s", port, id)
		}
		proxies[id] = true
	}
	if len(proxies) != 2 {
		t.Errorf("two proxies are %v", proxies)
	}
}

// TestRegistrarHandsOver changes an option of the registry with each of several
// reloads, so that each config announces on a connection of its own: nobody sees
// the node drain, or go, in between.
func TestRegistrarHandsOver(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	config := func(ttl string) string {
		return strings.Replace(registrarConfig(name, port, "node_id me\nendpoint http://10.0.0.1:80\nheartbeat 1h\nttl 2h\ndrain 50ms"),
			"registry memory "+name, "registry memory "+name+" {\nttl "+ttl+"\n}", 1)
	}
	load(t, config("1m"))
	eventually(t, "the node is listed", func() bool { return record(t, m, "me") != nil })
	ctx, cancel := context.WithCancel(t.Context())
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		_ = m.Open().Watch(ctx, func(e discovery.Event) {
			if e.ID == "me" && (e.Type != discovery.Put || e.Node.State() != discovery.StateUp) {
				t.Errorf("a reload told of %v, %q", e.Type, e.Node.State())
			}
		})
	}()
	eventually(t, "it is watched", func() bool { return m.Watches() == 1 })
	seen := map[string]bool{record(t, m, "me").Instance(): true}
	for i := range 6 {
		before := record(t, m, "me").Instance()
		load(t, config(fmt.Sprint(i+2, "m")))
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
	load(t, config("1h"))
	m.Silence(false)
	eventually(t, "the next config has announced the node", func() bool { return m.Writes() > writes })
	announcements.leaving.Wait()
	cancel()
	<-watched
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
	config := func(ttl string) string {
		return strings.Replace(registrarConfig(name, port, "node_id me\nendpoint http://10.0.0.1:80\nheartbeat 1h\nttl 2h\ndrain 50ms"),
			"registry memory "+name, "registry memory "+name+" {\nttl "+ttl+"\n}", 1)
	}
	load(t, config("1m"))
	eventually(t, "the node is listed", func() bool { return record(t, m, "me") != nil })
	first := record(t, m, "me").Instance()
	ctx, cancel := context.WithCancel(t.Context())
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		_ = m.Open().Watch(ctx, func(e discovery.Event) {
			if e.ID == "me" && (e.Type != discovery.Put || e.Node.State() != discovery.StateUp) {
				t.Errorf("a reload told of %v, %q", e.Type, e.Node.State())
			}
		})
	}()
	eventually(t, "it is watched", func() bool { return m.Watches() == 1 })
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
	unfinished, err := tryAdapt(config("2m"))
	if err != nil {
		t.Fatal(err)
	}
	unfinished = []byte(strings.Replace(string(unfinished), "{",
		`{"admin":{"disabled":true,"config":{"persist":false,"load":{"module":"http","url":"`+loader.URL+`"}}},`, 1))
	if err := caddy.Load(unfinished, true); err == nil {
		t.Fatal("a config whose loader fails was loaded")
	}
	loader.Close()
	if !overwritten {
		t.Fatal("the config that failed did not announce the node")
	}
	announcements.leaving.Wait()
	eventually(t, "the config before has announced the node again", func() bool {
		n := record(t, m, "me")
		return n != nil && n.Instance() == first
	})
	cancel()
	<-watched
}

func TestRegistrarAcrossReloads(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	options := "node_id me\nendpoint http://10.0.0.1:80\nheartbeat 1h\nttl 2h\ndrain 0s\n"
	load(t, registrarConfig(name, port, options))
	eventually(t, "the node is listed", func() bool { return record(t, m, "me") != nil })
	instance, writes := record(t, m, "me").Instance(), m.Writes()

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

	// A config that fails to start gives way to the one that runs.
	busy := httptest.NewServer(http.NotFoundHandler())
	defer busy.Close()
	writes = m.Writes()
	broken := registrarConfig(name, port, options+"metadata version 3\n") +
		"\nhttp://" + busy.Listener.Addr().String() + " {\n}\n"
	if err := tryLoad(broken); err == nil {
		t.Fatal("a config with a taken port was loaded")
	}
	if got := m.Writes() - writes; got != 0 || record(t, m, "me").Metadata["version"] != "2" {
		t.Errorf("a config that failed to start wrote %d records, and the node is %v", got, record(t, m, "me"))
	}
	// Nor does one whose config loader fails when all apps have started, which
	// Caddy then does not stop.
	unfinished, err := tryAdapt(registrarConfig(name, freeport.String(t), "node_id other\nendpoint http://10.0.0.1:80\ndrain 0s\n"))
	if err != nil {
		t.Fatal(err)
	}
	unfinished = []byte(strings.Replace(string(unfinished), "{",
		`{"admin":{"disabled":true,"config":{"persist":false,"load":{"module":"http","url":"http://127.0.0.1:1/"}}},`, 1))
	if err := caddy.Load(unfinished, true); err == nil {
		t.Fatal("a config whose loader fails was loaded")
	}
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

	load(t, `http://127.0.0.1:`+port+` {
		respond ok
	}`)
	eventually(t, "a reload without the registrar leaves", func() bool { return record(t, m, "me") == nil })
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

func TestRegistrarJSON(t *testing.T) {
	config := adapt(t, `{
		registrar nats://10.0.0.5:4222
		registrar {
			registry nats_kv nats://10.0.0.6:4222 {
				bucket edges
			}
			node_id b
		}
	}`)
	var got struct {
		Apps struct {
			Registrar struct{ Nodes []map[string]any }
		}
	}
	if err := json.Unmarshal(config, &got); err != nil {
		t.Fatal(err)
	}
	if n := got.Apps.Registrar.Nodes; len(n) != 2 || n[1]["node_id"] != "b" {
		t.Errorf("two registrars became %v", n)
	}
}
