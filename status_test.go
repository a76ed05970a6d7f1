package caddydiscovery

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

func TestStatusPageIsForTheAllowedOnly(t *testing.T) {
	for _, c := range []struct {
		allow, remote string
		want          bool
	}{
		{"", "127.0.0.1:5000", true},
		{"", "[::1]:5000", true},
		{"", "[::ffff:127.0.0.1]:5000", true},
		{"", "10.0.0.1:5000", false},
		{"", "@", false},
		{"", "", false},
		{"10.0.0.0/8", "10.0.0.1:5000", true},
		{"10.0.0.0/8", "[::ffff:10.0.0.1]:5000", true},
		{"10.0.0.0/8", "11.0.0.1:5000", false},
		{"10.0.0.7", "10.0.0.7:5000", true},
		{"10.0.0.7", "10.0.0.8:5000", false},
		{"fd00::/8", "[fd12::1]:5000", true},
		{"fe80::/10", "[fe80::1%eth0]:5000", true},
		{"private_ranges", "192.168.1.1:5000", true},
		{"private_ranges", "8.8.8.8:5000", false},
	} {
		p := new(StatusPage)
		option := ""
		if c.allow != "" {
			option = "allow " + c.allow
		}
		if err := p.UnmarshalCaddyfile(caddyfile.NewTestDispenser("discovery_status {\n" + option + "\n}")); err != nil {
			t.Fatal(err)
		}
		provision(t, p)
		r := httptest.NewRequest(http.MethodGet, "http://localhost:80/status", nil)
		r.RemoteAddr = c.remote
		if err := p.mayLook(r); (err == nil) != c.want {
			t.Errorf("allow %q: %q may look: %v", c.allow, c.remote, err)
		}
	}
	for source, want := range map[string]string{
		"discovery_status {\nallow nonsense\n}":                       "invalid network \"nonsense\"",
		"discovery_status {\nallow\n}":                                "wrong number of arguments for option allow, want: allow <cidr|private_ranges...>",
		"discovery_status {\nmax_streams 0\n}":                        "want 1 to",
		"discovery_status {\nnonsense\n}":                             "want one of allow, max_streams",
		"discovery_status x":                                          "unexpected argument",
		"discovery_status {\nmax_streams 1\nmax_streams 2\n}":         "given twice",
		"discovery_status {\nallow 10.0.0.0/8\nallow fd00::/8 ::1\n}": "",
	} {
		err := new(StatusPage).UnmarshalCaddyfile(caddyfile.NewTestDispenser(source))
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", source, err, want)
		}
	}
	if err := tryProvision(t, &StatusPage{Allow: []string{"nonsense"}}); err == nil || !strings.Contains(err.Error(), "invalid network") {
		t.Errorf("a network that is none: %v", err)
	}
}

// A page of another name reads nothing by a browser on this machine.
func TestStatusPageIsNotRebound(t *testing.T) {
	name, _ := newMemory(t)
	port := freeport.String(t)
	load(t, `http://:`+port+` {
		bind 127.0.0.1
		discovery_status /status
		discovery_status /allowed {
			allow 127.0.0.0/8
		}
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+`
			}
		}
	}`)
	for _, c := range []struct {
		host, origin string
		want         int
	}{
		{"127.0.0.1:" + port, "", 200},
		{"127.0.0.1", "", 200},
		{"127.8.9.1:" + port, "", 200},
		{"[::1]:" + port, "", 200},
		{"[::1]", "", 200},
		{"[::ffff:127.0.0.1]:" + port, "", 200},
		{"localhost:" + port, "", 200},
		{"LOCALHOST", "", 200},
		{"status.localhost:" + port, "", 200},
		{"localhost.", "", 200},
		{"rebound.attacker.example", "", 403},
		{"rebound.attacker.example:" + port, "", 403},
		{"localhost.attacker.example:" + port, "", 403},
		{"notlocalhost", "", 403},
		{"127.0.0.1.attacker.example", "", 403},
		{"10.0.0.1:" + port, "", 403},
		{"0.0.0.0:" + port, "", 403},
		{"127.0.0.1:" + port, "http://127.0.0.1:" + port, 200},
		{"localhost:" + port, "http://LocalHost:" + port, 200},
		{"127.0.0.1:" + port, "http://attacker.example", 403},
		{"127.0.0.1:" + port, "http://127.0.0.1:1", 403},
		{"127.0.0.1:" + port, "http://localhost:" + port, 403},
		{"127.0.0.1:" + port, "null", 403},
	} {
		for path, want := range map[string]int{"/status": c.want, "/allowed": 200} {
			req, err := http.NewRequest(http.MethodGet, "http://127.0.0.1:"+port+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = c.host
			if c.origin != "" {
				req.Header.Set("Origin", c.origin)
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if resp.StatusCode != want {
				t.Errorf("%s, Host %q, Origin %q: %s, want %d", path, c.host, c.origin, resp.Status, want)
			}
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

func provision(t *testing.T, p *StatusPage) {
	t.Helper()
	if err := tryProvision(t, p); err != nil {
		t.Fatal(err)
	}
}

func tryProvision(t *testing.T, p *StatusPage) error {
	t.Helper()
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(ctx)
	t.Cleanup(cancel)
	return p.Provision(ctx)
}

// sse reads server-sent events.
type sse struct {
	t    *testing.T
	body io.ReadCloser
	scan *bufio.Scanner
}

func openStream(t *testing.T, url string) *sse {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("%s: %s %s", url, resp.Status, resp.Header.Get("Content-Type"))
	}
	s := &sse{t, resp.Body, bufio.NewScanner(resp.Body)}
	s.scan.Buffer(nil, 64<<20)
	return s
}

// next returns the next event with the name.
func (s *sse) next(name string) string {
	s.t.Helper()
	watchdog := time.AfterFunc(patience, func() { s.body.Close() })
	defer watchdog.Stop()
	for found := false; s.scan.Scan(); {
		line := s.scan.Text()
		if line == "event: "+name {
			found = true
		}
		if data, ok := strings.CutPrefix(line, "data: "); ok && found {
			return data
		}
	}
	s.t.Fatalf("the stream ended before %q: %v", name, s.scan.Err())
	return ""
}

// statusSite serves the status page at what it returns, to two readers at a time, for
// the fleet of a registry in memory.
func statusSite(t *testing.T, registry string) (site, url string) {
	t.Helper()
	port := freeport.String(t)
	site = `http://127.0.0.1:` + port + ` {
		discovery_status /status {
			max_streams 2
		}
		reverse_proxy {
			dynamic discovery {
				registry memory ` + registry + ` {
					loss_guard off
				}
			}
		}
	}
	`
	load(t, site)
	waitSynced(t)
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	return site, "http://127.0.0.1:" + port + "/status"
}

func TestStatusPageLoadsNothingElse(t *testing.T) {
	name, _ := newMemory(t)
	_, url := statusSite(t, name)
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	page, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	policy := resp.Header.Get("Content-Security-Policy")
	if resp.StatusCode != http.StatusOK || !strings.Contains(policy, "default-src 'none'; script-src 'sha256-") || strings.Contains(policy, "unsafe") {
		t.Errorf("%s, policy %q", resp.Status, policy)
	}
	for _, part := range []string{"http://", "https://", "//cdn", "{{"} {
		if strings.Contains(string(page), part) {
			t.Errorf("the page contains %q", part)
		}
	}
	resp, err = http.Post(url, "text/plain", nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %s", resp.Status)
	}
}

func TestStatusPageFollowsTheFleet(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "http://10.0.0.1:80", "service", "orders")
	list(t, m, "<img src=x onerror=alert(1)>", "http://10.0.0.2:80", "service", "</script>")
	_, url := statusSite(t, name)
	s := openStream(t, url+"?stream")
	if r := s.next("registries"); !strings.Contains(r, `"registry":"memory"`) {
		t.Errorf("registries: %s", r)
	}
	if j := s.next("journal"); !strings.Contains(j, `"type":"seen"`) || !strings.Contains(j, `"type":"connected"`) {
		t.Errorf("journal: %s", j)
	}
	var nodes []statusNode
	if err := json.Unmarshal([]byte(s.next("nodes")), &nodes); err != nil || len(nodes) != 2 || nodes[1].ID != "a" || nodes[1].Weight != 1 || nodes[1].Lease != 30 {
		t.Errorf("nodes: %v %+v", err, nodes)
	}
	s.next("ready")
	list(t, m, "b", "http://10.0.0.3:80")
	if j := s.next("journal"); !strings.Contains(j, `"id":"b"`) {
		t.Errorf("journal: %s", j)
	}
	if n := s.next("nodes"); !strings.Contains(n, `"id":"b"`) || strings.Contains(n, `"id":"a"`) {
		t.Errorf("nodes: %s", n)
	}
	m.Expire("b")
	if g := s.next("gone"); g != `[{"r":0,"id":"b"}]` {
		t.Errorf("gone: %s", g)
	}
	m.Put("a", []byte("nonsense"))
	if r := s.next("rejected"); !strings.Contains(r, `"id":"a"`) || !strings.Contains(r, "want a JSON object") {
		t.Errorf("rejected: %s", r)
	}
	record, want := `{"nodeId":"c","endpoint":"http://10.0.0.4:80","load":%v}`, ""
	m.Put("c", fmt.Appendf(nil, record, 0.1))
	s.next("nodes")
	m.Put("c", fmt.Appendf(nil, record, 0.5))
	if want = s.next("liveness"); !strings.Contains(want, `"id":"c","load":0.5`) {
		t.Errorf("liveness: %s", want)
	}
}

// No more pages are kept up to date than are allowed, and a reload ends them all
// instead of waiting.
func TestStatusPagesAreBounded(t *testing.T) {
	name, m := newMemory(t)
	site, url := statusSite(t, name)
	first, second := openStream(t, url+"?stream"), openStream(t, url+"?stream")
	resp, err := http.Get(url + "?stream")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("the third stream: %s, headers %v", resp.Status, resp.Header)
	}
	reload(t, site+"# again", url)
	for _, s := range []*sse{first, second} {
		for s.scan.Scan() {
		}
	}
	eventually(t, "streams are free again", func() bool { return streams.Load() == 0 })
	third := openStream(t, url+"?stream")
	third.next("ready")
	third.body.Close()
	eventually(t, "a reader that goes is noticed", func() bool {
		list(t, m, "d", fmt.Sprintf("http://10.0.0.5:%d", time.Now().UnixNano()%1000+1))
		return streams.Load() == 0
	})
}

// The directive stands before reverse_proxy without a word about order.
func TestStatusPageOrder(t *testing.T) {
	config := string(adapt(t, "http://h {\nreverse_proxy 127.0.0.1:1\ndiscovery_status /status {\nallow private_ranges 1.2.3.4\n}\n}"))
	if strings.Index(config, "discovery_status") > strings.Index(config, "reverse_proxy") {
		t.Errorf("reverse_proxy comes first: %s", config)
	}
	if !strings.Contains(config, `{"allow":["192.168.0.0/16","172.16.0.0/12","10.0.0.0/8","127.0.0.1/8","fd00::/8","::1","1.2.3.4"],"handler":"discovery_status"}`) {
		t.Errorf("it became %s", config)
	}
}
