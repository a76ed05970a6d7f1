package filebackend

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-discovery/caddy-discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func adapt(source string) ([]byte, error) {
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(source), map[string]any{"filename": "Caddyfile"})
	return config, err
}

// TestCaddyfile holds that a URL and a block name the registry, in a source and in the
// registrar.
func TestCaddyfile(t *testing.T) {
	config, err := adapt(`{
	registrar file:///run/fleet/proxies.json {
		endpoint http://10.0.0.1:80
	}
}
http://:9 {
	reverse_proxy {
		dynamic discovery {
			registry file file:///run/fleet/nodes.json {
				poll 1s
				ttl 10s
				loss_guard off
			}
		}
	}
}`)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"registry":{"backend":"file","urls":["file:///run/fleet/proxies.json"]}`,
		`"registry":{"backend":"file","loss_guard":0,"poll":1000000000,"ttl":10000000000,"urls":["file:///run/fleet/nodes.json"]}`,
	} {
		if !strings.Contains(string(config), want) {
			t.Errorf("adapted to\n%s\nwant\n%s", config, want)
		}
	}
	var parsed *caddy.Config
	if err := json.Unmarshal(config, &parsed); err != nil {
		t.Fatal(err)
	}
	if err := caddy.Validate(parsed); err != nil {
		t.Error(err)
	}
}

func TestCaddyfileMistakes(t *testing.T) {
	for block, want := range map[string]string{
		"poll never":      "registry file: option poll: want a duration above 0 such as 200ms, at Caddyfile:5",
		"poll 1s\npoll 2": "registry file: option poll is given twice",
		"pole 1s":         `registry file: unknown option "pole", want one of loss_guard, poll, ttl, warm_start`,
		"ttl 0s":          "registry file: option ttl: invalid duration",
	} {
		_, err := adapt("http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery {\n\t\t\tregistry file file:///f {\n" + block + "\n\t\t\t}\n\t\t}\n\t}\n}")
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", block, err, want)
		}
	}
}

// TestOneURL holds that a registry is one file.
func TestOneURL(t *testing.T) {
	for _, urls := range [][]string{nil, {"file:///a", "file:///b"}, {"file:///a file:///b", ""}} {
		if err := (&File{URLs: urls}).Provision(caddy.Context{}); err == nil || !strings.Contains(err.Error(), "want one such as") {
			t.Errorf("%q: %v, want an error", urls, err)
		}
	}
}

// TestProxy holds that Caddy proxies to a node that a service lists in the file, and
// lists itself there until it ends.
func TestProxy(t *testing.T) {
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "orders")
	}))
	defer service.Close()
	h := harness{t.TempDir()}
	r := h.Open(t).(*Registry)
	if err := r.Announce(t.Context(), discovery.Node{
		ID: "orders-1", Endpoint: endpoint(t, service.URL), Metadata: map[string]string{"service": "orders"},
	}); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "caddy.sock")
	config, err := adapt(`{
	admin off
	persist_config off
	storage file_system ` + t.TempDir() + `
	registrar ` + h.url() + ` {
		node_id proxy
		endpoint http://10.0.0.1:80
		drain 0s
	}
}
http:// {
	bind unix/` + socket + `
	reverse_proxy {
		dynamic discovery ` + h.url() + ` {
			service orders
			allow 127.0.0.0/8
		}
	}
}`)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("XDG_DATA_HOME", t.TempDir())
	if err := caddy.Load(config, true); err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: unixTransport(socket)}
	resp, err := client.Get("http://caddy/")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || string(body) != "orders" {
		t.Errorf("answered %s with %q: %v", resp.Status, body, err)
	}
	_ = resp.Body.Close()
	client.CloseIdleConnections()
	listed := func() bool {
		n, err := r.Record(t.Context(), "proxy")
		if err != nil {
			t.Fatal(err)
		}
		return n.ID != ""
	}
	eventually(t, "the proxy lists itself", listed)
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the proxy has left", func() bool { return !listed() })
	if _, err := os.Stat(r.path); err != nil {
		t.Error(err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}
