package caddydiscovery

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// patience bounds every wait, far beyond what anything needs.
const patience = 20 * time.Second

// adapt turns a Caddyfile into JSON.
func adapt(t *testing.T, source string) []byte {
	t.Helper()
	config, err := tryAdapt(source)
	if err != nil {
		t.Fatalf("adapting: %v", err)
	}
	return config
}

func tryAdapt(source string) ([]byte, error) {
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(source), map[string]any{"filename": "Caddyfile"})
	return config, err
}

// load runs a Caddyfile until the test ends or another one is loaded.
func load(t *testing.T, source string) {
	t.Helper()
	if err := tryLoad(source); err != nil {
		t.Fatalf("loading: %v", err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Errorf("stopping: %v", err)
		}
		announcements.leaving.Wait()
	})
}

func tryLoad(source string) error {
	config, err := tryAdapt("{\nadmin off\npersist_config off\n}\n" + source)
	if strings.HasPrefix(strings.TrimSpace(source), "{") {
		// It has global options of its own: put ours among them.
		config, err = tryAdapt(strings.Replace(source, "{", "{\nadmin off\npersist_config off\n", 1))
	}
	if err != nil {
		return err
	}
	return caddy.Load(config, true)
}

// validate provisions a Caddyfile without running it, as caddy validate does.
func validate(source string) error {
	config, err := tryAdapt(source)
	if err != nil {
		return err
	}
	var parsed *caddy.Config
	if err := json.Unmarshal(config, &parsed); err != nil {
		return err
	}
	return caddy.Validate(parsed)
}

// service is a sample service that answers with its id.
func service(t *testing.T, id string) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, id) }))
	t.Cleanup(s.Close)
	return s
}

// at is an address for a node at which nobody listens, always the same one. nodeAt
// has the node of each.
func at(id string) string {
	sum := sha256.Sum256([]byte(id))
	address := fmt.Sprintf("127.%d.%d.%d:80", sum[0], sum[1], sum[2])
	nodeAt.Store(address, id)
	return address
}

var nodeAt sync.Map

// list puts a node into a registry in memory, as a writer in the wild would.
func list(t testing.TB, m *discoverytest.Memory, id, endpoint string, pairs ...string) {
	t.Helper()
	e, err := discovery.ParseEndpoint(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	n := discovery.Node{ID: id, Endpoint: e, Metadata: map[string]string{}}
	for i := 0; i < len(pairs); i += 2 {
		n.Metadata[pairs[i]] = pairs[i+1]
	}
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	m.Put(id, record)
}

// serveNodes loads a site with a source of the nodes of a memory registry, which has the
// options, and with the rest of its handler. It returns the URL.
func serveNodes(t *testing.T, registry, options, rest string) string {
	t.Helper()
	url := "http://127.0.0.1:" + freeport.String(t)
	load(t, url+" {\nreverse_proxy {\ndynamic discovery {\nregistry memory "+registry+"\n"+options+"\n}\n"+rest+"\n}\n}")
	return url
}

// get returns the status and body of a request.
func get(t *testing.T, url string, header ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// source provisions a source by itself, outside of a server, and waits until its
// directory is synced. What else its handler has is given as pairs of a JSON name
// and a value.
func source(tb testing.TB, options string, pairs ...any) *Upstreams {
	tb.Helper()
	u := new(Upstreams)
	if err := u.UnmarshalCaddyfile(caddyfile.NewTestDispenser("discovery {\n" + options + "\n}")); err != nil {
		tb.Fatal(err)
	}
	config := map[string]any{"dynamic_upstreams": caddyconfig.JSONModuleObject(u, "source", "discovery", nil)}
	for i := 0; i < len(pairs); i += 2 {
		config[pairs[i].(string)] = pairs[i+1]
	}
	u = provisionHandler(tb, config).DynamicUpstreams.(*Upstreams)
	u.directory.start()
	<-u.directory.Synced()
	return u
}

// provisionHandler provisions a handler by itself, outside of a server.
func provisionHandler(tb testing.TB, config map[string]any) *reverseproxy.Handler {
	tb.Helper()
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(ctx)
	tb.Cleanup(cancel) // cleans up what is loaded below
	handler, err := ctx.LoadModuleByID("http.handlers.reverse_proxy", caddyconfig.JSON(config, nil))
	if err != nil {
		tb.Fatal(err)
	}
	return handler.(*reverseproxy.Handler)
}

// runningSource returns the source of the config that runs, which has one.
func runningSource(tb testing.TB) *Upstreams {
	tb.Helper()
	var running []member
	for _, d := range runningDirectories() {
		running = append(running, d.joined()...)
	}
	if len(running) != 1 {
		tb.Fatalf("%d sources run, want 1", len(running))
	}
	return running[0].(*Upstreams)
}

// host does to upstreams what Caddy's handler does with those that a source
// returns, as far as it can be done from here.
func host(pool []*reverseproxy.Upstream) {
	for _, up := range pool {
		h, _ := hosts.LoadOrStore(up.Dial, new(reverseproxy.Host))
		up.Host = h.(*reverseproxy.Host)
	}
}

var hosts sync.Map // address → *reverseproxy.Host
