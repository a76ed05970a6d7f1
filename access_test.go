package caddydiscovery

import (
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	logtest "go.uber.org/zap/zaptest/observer"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// reasons returns why the source sends no requests to the listed nodes.
func reasons(u *Upstreams) map[string]string {
	found := make(map[string]string)
	for _, e := range u.directory.Snapshot().Nodes() {
		found[e.Node.ID], _ = u.standing(e)
	}
	return found
}

func TestAccess(t *testing.T) {
	for name, c := range map[string]struct {
		registry, options string
		endpoint, want    string
	}{
		"usual":                     {"10.0.0.1:4222", "", "http://10.0.0.7:80", ""},
		"loopback registry":         {"127.0.0.1:4222", "", "http://127.0.0.1:80", ""},
		"loopback registry by name": {"localhost:4222", "", "http://127.0.0.1:80", ""},
		"remote registry":           {"10.0.0.1:4222", "", "http://127.0.0.1:80", "denied: loopback"},
		"remote registry, lifted":   {"10.0.0.1:4222", "allow 127.0.0.0/8", "http://127.0.0.1:80", ""},
		"remote registry, a glob":   {"10.0.0.1:4222", "allow *", "http://localhost:80", "denied: loopback"},
		"allow":                     {"10.0.0.1:4222", "allow 10.0.0.0/8", "http://11.0.0.1:80", "denied: not in allow"},
		"allow in two lines":        {"10.0.0.1:4222", "allow 10.0.0.0/8\nallow 11.0.0.0/8", "http://11.0.0.1:80", ""},
		"deny":                      {"10.0.0.1:4222", "deny private_ranges", "http://10.0.0.1:80", "denied: by deny private_ranges"},
		"metadata":                  {"10.0.0.1:4222", "", "http://169.254.169.254", "denied: link-local"},
		"the registry":              {"10.0.0.1:4222", "", "http://10.0.0.1:4222", "denied: the registry itself"},
		"the registry by name":      {"localhost:4222", "", "http://127.0.0.1:4222", "denied: the registry itself"},
	} {
		t.Run(name, func(t *testing.T) {
			registry, m := newMemory(t)
			list(t, m, "a", c.endpoint)
			u := source(t, "registry memory "+registry+" {\naddress "+c.registry+"\n}\n"+c.options)
			eventually(t, "the verdict is "+c.want, func() bool { return reasons(u)["a"] == c.want })
			upstreams, err := u.GetUpstreams(httptest.NewRequest("GET", "/", nil))
			if err != nil || (len(upstreams) == 1) != (c.want == "") {
				t.Errorf("%d upstreams, %v", len(upstreams), err)
			}
		})
	}
}

// TestUnguardedLoopback holds that endpoints on loopback are told of once a registry
// where nothing but its address keeps others from it, and nobody named them.
func TestUnguardedLoopback(t *testing.T) {
	for name, c := range map[string]struct {
		registry, options, endpoint string
		told                        int
	}{
		"no login":        {"", "", "http://127.0.0.1:80", 1},
		"its service":     {"", "service orders", "http://127.0.0.1:80", 1},
		"a login":         {"login on", "", "http://127.0.0.1:80", 0},
		"allowed":         {"", "allow 127.0.0.0/8", "http://127.0.0.1:80", 0},
		"remote registry": {"address 10.0.0.1:4222", "allow 127.0.0.0/8", "http://127.0.0.1:80", 0},
		"remote node":     {"", "", "http://10.0.0.1:80", 0},
		"another service": {"", "service pay", "http://127.0.0.1:80", 0},
		"denied":          {"", "deny 127.0.0.0/8", "http://127.0.0.1:80", 0},
	} {
		t.Run(name, func(t *testing.T) {
			registry, m := newMemory(t)
			list(t, m, "a", c.endpoint, "service", "orders")
			core, logs := logtest.New(zap.DebugLevel)
			for i := range 3 { // as by other routes, and by reloads
				u := source(t, "registry memory "+registry+" {\n"+c.registry+"\n}\n"+c.options)
				u.logger = zap.New(core)
				for j := range 2 {
					id := fmt.Sprint("b", i, j)
					list(t, m, id, c.endpoint, "service", "orders")
					eventually(t, "the node is there", func() bool { return u.directory.Snapshot().Node(id) != nil })
					if _, err := u.GetUpstreams(request()); err != nil {
						t.Fatal(err)
					}
				}
			}
			told := logs.FilterMessageSnippet("allow 127.0.0.0/8 ::1 and the ranges of your other nodes")
			if told.Len() != c.told || logs.FilterMessageSnippet("loopback").Len() != c.told {
				t.Errorf("told %d times, want %d: %v", told.Len(), c.told, logs.All())
			}
		})
	}
}

// Over plain HTTP a host name is dialled by the address that was checked, over TLS
// by the name that its certificate must have.
func TestNamesAreDialledAsChecked(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+`
			}
		}
	}`)
	s := service(t, "a")
	list(t, m, "a", strings.Replace(s.URL, "127.0.0.1", "localhost", 1))
	eventually(t, "the name serves", func() bool { return fmt.Sprint(served(t, "http://127.0.0.1:"+port)) == "map[a:6]" })

	u := source(t, "registry memory "+name)
	dialled := func() string {
		upstreams, _ := u.GetUpstreams(httptest.NewRequest("GET", "/", nil))
		if len(upstreams) != 1 {
			return fmt.Sprint(reasons(u))
		}
		return upstreams[0].Dial
	}
	nodePort := s.URL[strings.LastIndex(s.URL, ":"):]
	eventually(t, "the name is resolved", func() bool { return dialled() == "127.0.0.1"+nodePort })
	again := func(do func()) string {
		do()
		u.pickers = picker.Cache{}
		u.provisionPickers()
		return dialled()
	}
	list(t, m, "a", "localhost"+nodePort)
	eventually(t, "the record names no scheme", func() bool { return u.directory.Snapshot().Node("a").Node.Endpoint.Scheme == "" })
	if got := again(func() { u.https = true }); got != "localhost"+nodePort {
		t.Errorf("over TLS: %s", got)
	}
	if got := again(func() { u.insecure = true }); got != "map[a:denied: name without verification of its certificate]" {
		t.Errorf("over TLS without verification: %s", got)
	}
	var err error
	if u.rules, err = discovery.NewRules(discovery.Access{Allow: []string{"localhost"}, Loopback: true}); err != nil {
		t.Fatal(err)
	}
	if got := again(func() {}); got != "localhost"+nodePort {
		t.Errorf("over TLS without verification, allowed: %s", got)
	}
}

func TestTransportIsMet(t *testing.T) {
	for _, c := range []struct {
		transport         any
		https, unverified bool
	}{
		{nil, false, false},
		{&reverseproxy.HTTPTransport{}, false, false},
		{&reverseproxy.HTTPTransport{TLS: &reverseproxy.TLSConfig{}}, true, false},
		{&reverseproxy.HTTPTransport{TLS: &reverseproxy.TLSConfig{InsecureSkipVerify: true}}, true, true},
	} {
		var u Upstreams
		u.inspectTransport(c.transport)
		if u.https != c.https || u.insecure != c.unverified {
			t.Errorf("%+v: TLS %v, unverified %v", c.transport, u.https, u.insecure)
		}
	}
}
