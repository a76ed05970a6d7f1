package caddydiscovery

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

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

func TestAdminPortIsDenied(t *testing.T) {
	for name, c := range map[string]struct {
		admin *caddy.AdminConfig
		want  string
	}{
		"default":  {nil, "[2019]"},
		"set":      {&caddy.AdminConfig{Listen: "127.0.0.1:3456"}, "[3456]"},
		"remote":   {&caddy.AdminConfig{Listen: ":1", Remote: &caddy.RemoteAdmin{}}, "[1 2021]"},
		"remote 2": {&caddy.AdminConfig{Remote: &caddy.RemoteAdmin{Listen: ":5"}}, "[2019 5]"},
		"unix":     {&caddy.AdminConfig{Listen: "unix//run/caddy.sock"}, "[]"},
		"off":      {&caddy.AdminConfig{Disabled: true}, "[]"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: c.admin})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := caddy.NewContext(ctx)
			defer cancel()
			if got := fmt.Sprint(adminPorts(ctx)); got != c.want {
				t.Errorf("ports %s, want %s", got, c.want)
			}
		})
	}
}

func TestOwnSockets(t *testing.T) {
	for listen, want := range map[string]string{
		":80":                    "[[::]:80]",
		"10.0.0.1:80-81":         "[10.0.0.1:80 10.0.0.1:81]",
		"[::1]:80":               "[[::1]:80]",
		"udp/0.0.0.0:80":         "[0.0.0.0:80]",
		"localhost:80":           "[127.0.0.1:80 [::1]:80]",
		"proxy-a.example.com:80": "[]", // another proxy may be at the other addresses
		"eth0:80":                "[]",
		"unix//run/caddy.sock":   "[]",
	} {
		app := &caddyhttp.App{Servers: map[string]*caddyhttp.Server{"a": {Listen: []string{listen}}, "null": nil}}
		var sockets []netip.AddrPort
		for _, a := range listenAddresses(app) {
			sockets = append(sockets, socketsOf(a)...)
		}
		if got := fmt.Sprint(sockets); got != want {
			t.Errorf("%s: %s, want %s", listen, got, want)
		}
	}
}

// boxedServer stands for the server in the box, which the plugin does not import.
type boxedServer struct {
	Loopback bool `json:"loopback,omitempty"`
}

func init() { caddy.RegisterModule(boxedServer{}) }

func (boxedServer) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "nats_server", New: func() caddy.Module { return new(boxedServer) }}
}
func (boxedServer) Start() error         { return nil }
func (boxedServer) Stop() error          { return nil }
func (s boxedServer) LoopbackOnly() bool { return s.Loopback }

func TestLoopbackOnly(t *testing.T) {
	for name, c := range map[string]struct {
		apps      string
		addresses []string
		want      bool
	}{
		"loopback":                {"", []string{"127.0.0.1:1", "[::1]:1", "localhost:1", "LOCALHOST.:1", "[::ffff:127.0.0.1]:1"}, true},
		"one elsewhere":           {"", []string{"127.0.0.1:1", "10.0.0.1:1"}, false},
		"a name":                  {"", []string{"nats:1"}, false},
		"nothing known":           {"", nil, false},
		"unreadable":              {"", []string{"127.0.0.1"}, false},
		"server on loopback":      {`{"loopback": true}`, []string{"127.0.0.1:1"}, true},
		"server everywhere":       {`{}`, []string{"127.0.0.1:1"}, false},
		"server, registry remote": {`{"loopback": true}`, []string{"10.0.0.1:1"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			config := &caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}}
			if c.apps != "" {
				config.AppsRaw = caddy.ModuleMap{"nats_server": []byte(c.apps)}
			}
			ctx, err := caddy.ProvisionContext(config)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := caddy.NewContext(ctx)
			defer cancel()
			if got, err := onlyOnLoopback(ctx, c.addresses); got != c.want || err != nil {
				t.Errorf("%v, %v, want %v", got, err, c.want)
			}
		})
	}
}
