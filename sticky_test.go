package caddydiscovery

import (
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/quic-go/quic-go/http3"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// A visitor is a client that keeps its cookies, as they are sent back in plain HTTP.
type visitor struct {
	t       *testing.T
	url     string
	cookies map[string]string
	set     []string // the newest lines Set-Cookie
	session string   // what the header Session said, see sessionHeader
	status  int
}

func newVisitor(t *testing.T, url string) *visitor {
	return &visitor{t: t, url: url, cookies: make(map[string]string)}
}

// sessionHeader shows what has become of the session.
const sessionHeader = "header_down Session {http.reverse_proxy.upstream.node.session}"

// visit returns which node has answered.
func (v *visitor) visit(path string, header ...string) string {
	v.t.Helper()
	req, err := http.NewRequest(http.MethodGet, v.url+path, nil)
	if err != nil {
		v.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	for name, value := range v.cookies {
		req.AddCookie(&http.Cookie{Name: name, Value: value})
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		v.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	v.set, v.session, v.status = resp.Header["Set-Cookie"], resp.Header.Get("Session"), resp.StatusCode
	for _, c := range resp.Cookies() {
		if v.cookies[c.Name] = c.Value; c.MaxAge < 0 {
			delete(v.cookies, c.Name)
		}
	}
	return string(body)
}

// stays fails the test unless some requests go to the node, without a new cookie.
func (v *visitor) stays(what, node string) {
	v.t.Helper()
	for range 10 {
		if got := v.visit(""); got != node || len(v.set) > 0 || v.session != sessionKept {
			v.t.Fatalf("%s: a request went to %q (session %s, cookies %q), want %q where its session is", what, got, v.session, v.set, node)
		}
	}
}

// at returns a visitor whose session is at the node.
func (v *visitor) at(node string) *visitor {
	v.t.Helper()
	for range 1000 {
		if n := newVisitor(v.t, v.url); n.visit("") == node {
			if n.session != sessionNew || len(n.set) != 1 {
				v.t.Fatalf("the first request has session %q and cookies %q, want a new session and one cookie", n.session, n.set)
			}
			return n
		}
	}
	v.t.Fatalf("no session came to %s", node)
	return nil
}

// services lists three services a, b and c, which serve and keep for themselves what
// troubledService does.
func services(t *testing.T, m *discoverytest.Memory, pairs ...string) {
	t.Helper()
	for _, id := range []string{"a", "b", "c"} {
		list(t, m, id, service(t, id).URL, pairs...)
	}
}

// leave has a node say that it leaves.
func leave(t *testing.T, m *discoverytest.Memory, id string) {
	t.Helper()
	n, err := discovery.ParseNode(m.Record(id))
	if err == nil {
		err = m.Open().Withdraw(t.Context(), n)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestSessionsStayUnderEveryPolicy(t *testing.T) {
	for _, test := range []struct{ options, rest string }{
		{"", ""},
		{"", "lb_policy round_robin"},
		{"", "lb_policy first"},
		{"", "lb_policy least_conn"},
		{"", "lb_policy least_load"},
		{"", "lb_policy random_choose 2"},
		{"pick 2", "lb_policy least_conn"},
		{"pick 1 hash {query.key}", "lb_policy first"},
		{"subset 1", ""},
		{"prefer zone eu\npick 1", ""},
		{"slow_start 1h", ""},
		{"", "fail_duration 1h\nunhealthy_request_count 100"},
		{"", "lb_retries 2"},
	} {
		t.Run(strings.NewReplacer("{", "", "}", "").Replace(test.options+" "+test.rest), func(t *testing.T) {
			name, m := newMemory(t)
			services(t, m)
			url := serveNodes(t, name, test.options+"\nsticky", test.rest+"\n"+sessionHeader)
			v := newVisitor(t, url)
			first := v.visit("")
			v.stays("at first", first)
			// What decides for others comes after it, and so do all other nodes.
			for _, other := range []string{"a", "b", "c"} {
				v := newVisitor(t, url)
				v.cookies[defaultStickyCookie] = picker.NewKeyring().Token(other)
				v.stays("with the cookie of "+other, other)
			}
		})
	}
}

// TestWhoKeepsSessions has a node become what it may, while a session is at it.
func TestWhoKeepsSessions(t *testing.T) {
	orders := []string{"service", "orders", "zone", "eu"}
	for _, test := range []struct {
		name  string
		pairs []string // with which a is listed anew; the first may be an endpoint
		keeps bool
		new   bool // it gets new sessions, too
	}{
		{"another address", orders, true, true},
		{"draining", append([]string{"state", "draining"}, orders...), true, false},
		{"weight 0", append([]string{"weight", "0"}, orders...), true, false},
		{"maintenance", append([]string{"state", "maintenance"}, orders...), false, false},
		{"gone", nil, false, false},
		{"another service", []string{"service", "bills", "zone", "eu"}, false, false},
		{"another zone", []string{"service", "orders", "zone", "us"}, false, false},
		{"another scheme", append([]string{"https://127.0.0.1:1"}, orders...), false, false},
		{"denied", append([]string{"http://169.254.169.254:80"}, orders...), false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			name, m := newMemory(t)
			for _, id := range []string{"a", "b", "c"} {
				list(t, m, id, service(t, id).URL, orders...)
			}
			url := serveNodes(t, name, "service orders\nwhere zone eu\nsticky", sessionHeader)
			v := newVisitor(t, url).at("a")
			before := runningSource(t).directory.Snapshot()
			switch pairs := test.pairs; {
			case pairs == nil:
				leave(t, m, "a")
			case len(pairs)%2 == 1:
				list(t, m, "a", pairs[0], pairs[1:]...)
			default:
				list(t, m, "a", service(t, "a").URL, pairs...)
			}
			<-before.Superseded()
			if test.keeps {
				v.stays(test.name, "a")
			} else {
				to := v.visit("")
				if to == "a" || v.session != sessionMoved || len(v.set) != 1 {
					t.Errorf("the session went to %q as %s with the cookies %q, want another node, moved, with another cookie", to, v.session, v.set)
				}
				v.stays("moved", to)
			}
			got := false
			for range 60 {
				got = newVisitor(t, url).visit("") == "a" || got
			}
			if got != test.new {
				t.Errorf("it got new sessions: %v, want %v", got, test.new)
			}
		})
	}
}

// TestSessionsOfNodesThatAllDrain has no node for new sessions.
func TestSessionsOfNodesThatAllDrain(t *testing.T) {
	name, m := newMemory(t)
	services(t, m)
	url := serveNodes(t, name, "sticky", sessionHeader)
	v := newVisitor(t, url).at("b")
	before := runningSource(t).directory.Snapshot()
	services(t, m, "state", "draining")
	<-before.Superseded()
	eventually(t, "nobody new is served", func() bool {
		n := newVisitor(t, url)
		n.visit("")
		return n.status == http.StatusServiceUnavailable && len(n.set) == 0
	})
	v.stays("while all drain", "b")
}

// TestFailedSessionsAreLookedUp has a node drain that is listed by name: where a request of
// its session has failed is asked anew, as of any other node.
func TestFailedSessionsAreLookedUp(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "http://localhost:8081", "state", "draining")
	list(t, m, "b", "http://10.0.0.1:80")
	u := source(t, "registry memory "+name)
	snapshot := u.directory.Snapshot()
	a, b := snapshot.Node("a"), snapshot.Node("b")
	p := u.pickers.Picker(snapshot, nil)
	var tried picker.AddressSet
	tried.Add(u.dial(b))
	for _, is := range []*session{nil, {}, {node: a}, {node: b}} {
		if got := u.failedAt(p, is, &tried); len(got) != 1 || got[0] != b {
			t.Errorf("asked anew: %v, want b", got)
		}
	}
	tried.Add(u.dial(a))
	if got := u.failedAt(p, &session{node: a}, &tried); len(got) != 2 || got[1] != a {
		t.Errorf("asked anew: %v, want b, and a where the session is", got)
	}
}

func TestUnhealthyNodesLoseTheirSessions(t *testing.T) {
	name, m := newMemory(t)
	var ill atomic.Bool
	a := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/healthz" && ill.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_, _ = io.WriteString(w, "a")
	}))
	t.Cleanup(a.Close)
	list(t, m, "a", a.URL)
	list(t, m, "b", service(t, "b").URL)
	url := serveNodes(t, name, "sticky\nhealth {\nuri /healthz\ninterval 20ms\n}", sessionHeader)
	v := newVisitor(t, url).at("a")
	v.stays("healthy", "a")
	ill.Store(true)
	eventually(t, "the session moves", func() bool { return v.visit("") == "b" })
	if v.session != sessionMoved || len(v.set) != 1 {
		t.Errorf("it is %s with the cookies %q, want it moved with a cookie", v.session, v.set)
	}
	ill.Store(false)
	v.stays("a is healthy again", "b")
}

// TestFailedAttemptsMoveNoSession has nodes that break the connection of some requests.
func TestFailedAttemptsMoveNoSession(t *testing.T) {
	name, m := newMemory(t)
	for _, id := range []string{"a", "b", "c"} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, id) {
				panic(http.ErrAbortHandler)
			}
			_, _ = io.WriteString(w, id)
		}))
		t.Cleanup(s.Close)
		list(t, m, id, s.URL)
	}
	url := serveNodes(t, name, "sticky", "lb_retries 5\n"+sessionHeader+"\nheader_up -Cookie")
	v := newVisitor(t, url).at("a")
	for range 5 {
		if to := v.visit("/a"); to == "a" || to == "" || len(v.set) > 0 || v.session != sessionKept {
			t.Fatalf("a request that fails at a went to %q as %s with the cookies %q, want another node, and nothing new", to, v.session, v.set)
		}
		v.stays("afterwards", "a")
	}
	// A new session is at the node that has answered.
	for range 20 {
		v := newVisitor(t, url)
		if to := v.visit("/ab"); to != "c" || v.session != sessionNew || len(v.set) != 1 {
			t.Fatalf("answered by %q as %s with the cookies %q, want c and one new cookie", to, v.session, v.set)
		}
		v.stays("the new session", "c")
	}
	// Nobody has answered.
	for _, v := range []*visitor{newVisitor(t, url), v} {
		if v.visit("/abc"); v.status != http.StatusBadGateway || len(v.set) > 0 {
			t.Errorf("status %d with the cookies %q where no node answers, want 502 and none", v.status, v.set)
		}
	}
	v.stays("at last", "a")
}

// TestResponsesThatAreThrownAwaySetNoCookie has a node whose responses are tried again.
func TestResponsesThatAreThrownAwaySetNoCookie(t *testing.T) {
	name, m := newMemory(t)
	for _, id := range []string{"a", "b"} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if id == "a" || r.URL.Path == "/ill" {
				w.WriteHeader(http.StatusTeapot)
			}
			_, _ = io.WriteString(w, id)
		}))
		t.Cleanup(s.Close)
		list(t, m, id, s.URL)
	}
	url := serveNodes(t, name, "sticky", "lb_policy first\nlb_retries 3\nlb_retry_match `{rp.status_code} == 418`\n"+sessionHeader)
	v := newVisitor(t, url)
	if to := v.visit(""); to != "b" || len(v.set) != 1 || v.session != sessionNew {
		t.Errorf("answered by %q as %s with the cookies %q, want b and one new cookie", to, v.session, v.set)
	}
	v.stays("afterwards", "b")
	v = newVisitor(t, url)
	if v.visit("/ill"); v.status != http.StatusTeapot && v.status < 500 || len(v.set) > 0 {
		t.Errorf("status %d with the cookies %q where all is thrown away, want an error and no cookie", v.status, v.set)
	}
}

// TestFullNodesKeepTheirSessions has a node that takes one request at a time.
func TestFullNodesKeepTheirSessions(t *testing.T) {
	name, m := newMemory(t)
	began, end := make(chan struct{}), make(chan struct{})
	list(t, m, "a", troubledService(t, "a", began, end))
	list(t, m, "b", troubledService(t, "b", began, end))
	url := serveNodes(t, name, "sticky", "unhealthy_request_count 1\nfail_duration 1h\n"+sessionHeader)
	v := newVisitor(t, url).at("a")
	done := make(chan struct{})
	go func() {
		defer close(done)
		other := &visitor{t: t, url: url, cookies: maps.Clone(v.cookies)}
		other.visit("/slow")
	}()
	<-began
	for range 10 {
		if to := v.visit(""); to != "b" || len(v.set) > 0 || v.session != sessionKept {
			t.Errorf("while a is full a request went to %q as %s with the cookies %q, want b and no cookie", to, v.session, v.set)
		}
	}
	close(end)
	<-done
	eventually(t, "a takes its session again", func() bool { return v.visit("") == "a" })
	// One that counts as failing for an hour keeps it, too.
	if v.visit("/poison"); v.status != http.StatusBadGateway || len(v.set) > 0 {
		t.Fatalf("status %d, cookies %q", v.status, v.set)
	}
	if to := v.visit(""); to != "b" || len(v.set) > 0 || v.session != sessionKept {
		t.Errorf("while a fails a request went to %q as %s with the cookies %q, want b and no cookie", to, v.session, v.set)
	}
}

func TestSessionCookies(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "the-id-of-a-node", service(t, "a").URL)
	for _, test := range []struct {
		options string
		header  []string
		want    string
	}{
		{"sticky", nil, defaultStickyCookie + "=TOKEN; Path=/; HttpOnly; SameSite=Lax"},
		{"sticky sid", nil, "sid=TOKEN; Path=/; HttpOnly; SameSite=Lax"},
		{"sticky sid {$NOTHING:secret} {\nmax_age 8h\n}", nil, "sid=TOKEN; Path=/; Max-Age=28800; HttpOnly; SameSite=Lax"},
		{"sticky", []string{"X-Forwarded-Proto", "https"}, defaultStickyCookie + "=TOKEN; Path=/; HttpOnly; SameSite=Lax"},
		{"sticky TRUSTED", []string{"X-Forwarded-Proto", "https"}, "TRUSTED=TOKEN; Path=/; HttpOnly; Secure; SameSite=Lax"},
		{"sticky TRUSTED", []string{"X-Forwarded-Proto", "http"}, "TRUSTED=TOKEN; Path=/; HttpOnly; SameSite=Lax"},
	} {
		t.Run(test.options+fmt.Sprint(test.header), func(t *testing.T) {
			rest := "header_down -Set-Cookie"
			if strings.Contains(test.options, "TRUSTED") {
				rest += "\ntrusted_proxies 127.0.0.1"
			}
			url := serveNodes(t, name, test.options, rest)
			v := newVisitor(t, url)
			v.visit("", test.header...)
			if len(v.set) != 1 {
				t.Fatalf("the cookies are %q, want one", v.set)
			}
			_, rest, _ = strings.Cut(v.set[0], "=")
			token, _, _ := strings.Cut(rest, ";")
			if got := strings.Replace(v.set[0], token, "TOKEN", 1); got != test.want {
				t.Errorf("the cookie is %q, want %q", got, test.want)
			}
			if len(token) != picker.TokenLength || strings.Contains(token, "id") && strings.Contains(token, "node") {
				t.Errorf("the token is %q", token)
			}
		})
	}
}

// TestSecretsAreRotated loads one config after the other, as the proxies of a fleet do.
func TestSecretsAreRotated(t *testing.T) {
	name, m := newMemory(t)
	services(t, m)
	file := t.TempDir() + "/secret"
	if err := os.WriteFile(file, []byte("old\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("STICKY_SECRET", "new")
	serve := func(secrets ...string) string {
		return serveNodes(t, name, "sticky {\nsecret "+strings.Join(secrets, "\nsecret ")+"\n}", sessionHeader)
	}
	old, new := "{file."+file+"}", "{env.STICKY_SECRET}"
	url := serve(old)
	v := newVisitor(t, url).at("a")
	first := v.cookies[defaultStickyCookie]
	v.url = serve("old")
	v.stays("after a reload with the same secret", "a")
	v.url = serve(old, new) // every proxy has to know the new secret before one of them uses it
	v.stays("a secret more", "a")
	v.url = serve(new, old)
	if to := v.visit(""); to != "a" || v.session != sessionKept || len(v.set) != 1 || v.cookies[defaultStickyCookie] == first {
		t.Fatalf("with the new secret it went to %q as %s with the cookies %q, want the same node and a renewed cookie", to, v.session, v.set)
	}
	v.stays("renewed", "a")
	v.url = serve(new)
	v.stays("without the old secret", "a")
	v.cookies[defaultStickyCookie] = first
	if v.visit(""); v.session != sessionNew || len(v.set) != 1 {
		t.Errorf("a cookie of a secret that is no more is %s with the cookies %q, want a new session", v.session, v.set)
	}
}

func TestSecretsThatAreMissing(t *testing.T) {
	name, _ := newMemory(t)
	for _, secret := range []string{"{env.NO_SUCH_VARIABLE}", "{file./no/such/file}", "{nonsense.x}"} {
		err := validate("http://127.0.0.1:1 {\nreverse_proxy {\ndynamic discovery {\nregistry memory " + name + "\nsticky {\nsecret " + secret + "\n}\n}\n}\n}")
		if err == nil || !strings.Contains(err.Error(), "sticky: secret 1") {
			t.Errorf("with the secret %s: %v", secret, err)
		}
	}
}

func TestMadeUpCookies(t *testing.T) {
	name, m := newMemory(t)
	services(t, m)
	url := serveNodes(t, name, "sticky {\nsecret s\n}", sessionHeader)
	v := newVisitor(t, url).at("a")
	mine := v.cookies[defaultStickyCookie]
	for _, cookie := range []string{
		"", "x", mine + "A", mine[1:], "A" + mine[1:], mine[:len(mine)-1] + "-", strings.Repeat("A", picker.TokenLength), strings.Repeat("=", picker.TokenLength),
		strings.Repeat("x", 9000), picker.NewKeyring().Token("a"), picker.NewKeyring("S").Token("a"), "a", strings.ToLower(mine),
	} {
		v := newVisitor(t, url)
		v.visit("", "Cookie", defaultStickyCookie+"="+cookie)
		if v.status != http.StatusOK || v.session != sessionNew || len(v.set) != 1 {
			t.Errorf("the cookie %.40q: status %d, session %s, cookies %q, want a new session", cookie, v.status, v.session, v.set)
		}
	}
	// Beside others of its name it is found, and looked for no further than it pays.
	for n, kept := range map[int]bool{1: true, maxStickyCookies - 1: true, maxStickyCookies: false, 200: false} {
		v := newVisitor(t, url)
		v.visit("", "Cookie", strings.Repeat(defaultStickyCookie+"="+strings.Repeat("A", picker.TokenLength)+"; ", n)+defaultStickyCookie+"=\""+mine+"\"")
		if (v.session == sessionKept) != kept {
			t.Errorf("behind %d made-up cookies the session is %s", n, v.session)
		}
	}
}

func TestLostSessionsCanBeRefused(t *testing.T) {
	name, m := newMemory(t)
	services(t, m)
	url := serveNodes(t, name, "sticky {\nlost 410\nsecret s\n}", "lb_retries 3\nfail_duration 1h\n"+sessionHeader)
	v := newVisitor(t, url).at("a")
	before := runningSource(t).directory.Snapshot()
	leave(t, m, "a")
	<-before.Superseded()
	if v.visit(""); v.status != http.StatusGone || len(v.set) != 1 || len(v.cookies) != 0 {
		t.Fatalf("status %d with the cookies %q, want 410 and the cookie taken back", v.status, v.set)
	}
	if v.visit(""); v.status != http.StatusOK || v.session != sessionNew || len(v.set) != 1 {
		t.Errorf("then status %d, session %s and cookies %q, want a new session", v.status, v.session, v.set)
	}
	// What nobody has made is no session.
	if v.visit("", "Cookie", defaultStickyCookie+"="+strings.Repeat("A", picker.TokenLength)); v.status != http.StatusOK {
		t.Errorf("status %d with a made-up cookie", v.status)
	}
}

// TestLostSessionsUnderEveryTransport has the status given whatever the nodes speak.
func TestLostSessionsUnderEveryTransport(t *testing.T) {
	for _, transport := range []string{"http", "fastcgi {\nroot /\n}"} {
		name, m := newMemory(t)
		services(t, m)
		url := serveNodes(t, name, "sticky {\nlost 503\n}", "lb_retries 3\ntransport "+transport)
		for _, body := range []string{"", "x"} {
			req, err := http.NewRequest(http.MethodPost, url, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			req.AddCookie(&http.Cookie{Name: defaultStickyCookie, Value: picker.NewKeyring().Token("gone")})
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if set := resp.Header["Set-Cookie"]; resp.StatusCode != http.StatusServiceUnavailable || len(set) != 1 || !strings.Contains(set[0], "Max-Age=0") {
				t.Errorf("%s: status %d with the cookies %q, want 503 and the cookie taken back", transport, resp.StatusCode, set)
			}
		}
	}
}

func TestHashingPoliciesAndSticky(t *testing.T) {
	name, _ := newMemory(t)
	for _, policy := range []string{"ip_hash", "client_ip_hash", "uri_hash", "query key", "header X-Key", "cookie"} {
		err := validate("http://127.0.0.1:1 {\nreverse_proxy {\ndynamic discovery {\nregistry memory " + name + "\nsticky\n}\nlb_policy " + policy + "\n}\n}")
		word, _, _ := strings.Cut(policy, " ")
		if err == nil || !strings.Contains(err.Error(), "lb_policy "+word) || !strings.Contains(err.Error(), "least_conn") {
			t.Errorf("lb_policy %s: %v", policy, err)
		}
	}
}

// TestSessionsOfSeveralSources has two sources under multi, of which one or both keep
// sessions, with one name of their cookies or two.
func TestSessionsOfSeveralSources(t *testing.T) {
	for _, test := range []struct{ first, second string }{
		{"sticky", ""},
		{"", "sticky"},
		{"sticky", "sticky"},
		{"sticky {\nsecret one\n}", "sticky {\nsecret two\n}"},
		{"sticky one", "sticky two"},
	} {
		t.Run(test.first+" "+test.second, func(t *testing.T) {
			name, m := newMemory(t)
			for _, id := range []string{"a1", "a2", "b1", "b2"} {
				list(t, m, id, service(t, id).URL, "service", id[:1])
			}
			url := "http://127.0.0.1:" + freeport.String(t)
			block := func(service, options string) string {
				return "dynamic discovery {\nregistry memory " + name + "\nservice " + service + "\n" + options + "\n}\n"
			}
			load(t, url+" {\nreverse_proxy {\ndynamic multi {\n"+strings.ReplaceAll(block("a", test.first)+block("b", test.second), "dynamic ", "")+"}\n"+sessionHeader+"\n}\n}")
			visited := make(map[string]bool)
			for range 60 {
				v := newVisitor(t, url)
				to := v.visit("")
				visited[to] = true
				if sticky := map[byte]string{'a': test.first, 'b': test.second}[to[0]] != ""; !sticky {
					if len(v.set) > 0 || v.session != "" {
						t.Fatalf("%s set the cookies %q as %s, and its source keeps no sessions", to, v.set, v.session)
					}
					continue
				}
				if v.session != sessionNew || len(v.set) != 1 {
					t.Fatalf("%s: session %s, cookies %q, want a new one", to, v.session, v.set)
				}
				v.stays("with a session", to)
			}
			if len(visited) != 4 {
				t.Errorf("only %v got new sessions", visited)
			}
		})
	}
}

// TestSessionsOfAProxyThatKnowsNothingYet has a proxy without a listing, which must not
// take nodes for gone.
func TestSessionsOfAProxyThatKnowsNothingYet(t *testing.T) {
	is := func(snapshot *discovery.Snapshot, cookie string) *session {
		s := &Sticky{Cookie: "c", keyring: picker.NewKeyring("s")}
		s.tokens = &sessionTokens{Tokens: picker.NewTokens(s.keyring)}
		return s.of(snapshot, http.Header{"Cookie": {"c=" + cookie}}, func(*discovery.Entry) bool { return true })
	}
	token := picker.NewKeyring("s").Token("a")
	if s := is(new(discovery.Snapshot), token); !s.elsewhere || s.lost {
		t.Errorf("before the listing it is %+v, want it elsewhere", s)
	}
	if s := is(&discovery.Snapshot{Synced: true}, token); s.elsewhere || !s.lost {
		t.Errorf("after the listing it is %+v, want it lost", s)
	}
	if s := is(new(discovery.Snapshot), "x"); s.elsewhere || s.lost {
		t.Errorf("a made-up one is %+v, want none", s)
	}
}

// TestSessionsOverEveryHTTP has a client come over TLS, in each version of HTTP.
func TestSessionsOverEveryHTTP(t *testing.T) {
	name, m := newMemory(t)
	services(t, m)
	port := freeport.String(t)
	load(t, "{\nauto_https disable_redirects\nskip_install_trust\n}\nhttps://127.0.0.1:"+port+" {\ntls internal\nreverse_proxy {\ndynamic discovery {\nregistry memory "+name+"\nsticky\n}\n"+sessionHeader+"\n}\n}")
	insecure := &tls.Config{InsecureSkipVerify: true}
	eventually(t, "the site has its certificate", func() bool {
		c, err := tls.Dial("tcp", "127.0.0.1:"+port, insecure)
		if err != nil {
			return false
		}
		return c.Close() == nil
	})
	only := func(set func(*http.Protocols, bool)) *http.Transport {
		p := new(http.Protocols)
		set(p, true)
		return &http.Transport{TLSClientConfig: insecure.Clone(), Protocols: p}
	}
	h1, h2, h3 := only((*http.Protocols).SetHTTP1), only((*http.Protocols).SetHTTP2), &http3.Transport{TLSClientConfig: insecure.Clone()}
	defer h1.CloseIdleConnections()
	defer h2.CloseIdleConnections()
	defer h3.Close()
	for proto, transport := range map[string]http.RoundTripper{"HTTP/1.1": h1, "HTTP/2.0": h2, "HTTP/3.0": h3} {
		cookie, node := "", ""
		for i := range 10 {
			req, err := http.NewRequest(http.MethodGet, "https://127.0.0.1:"+port, nil)
			if err != nil {
				t.Fatal(err)
			}
			// HTTP/2 and HTTP/3 may send each cookie as a field of its own.
			req.Header["Cookie"] = []string{"theme=dark", cookie}
			resp, err := transport.RoundTrip(req)
			if err != nil {
				t.Fatalf("%s: %v", proto, err)
			}
			body, err := io.ReadAll(resp.Body)
			if _ = resp.Body.Close(); err != nil || resp.Proto != proto {
				t.Fatalf("%s: %s, %v", proto, resp.Proto, err)
			}
			set := resp.Header["Set-Cookie"]
			if i > 0 {
				if string(body) != node || len(set) > 0 || resp.Header.Get("Session") != sessionKept {
					t.Errorf("%s: it went to %s with the cookies %q, want %s", proto, body, set, node)
				}
				continue
			}
			if len(set) != 1 || !strings.Contains(set[0], "; Secure") {
				t.Fatalf("%s: the cookies are %q, want one that is Secure", proto, set)
			}
			cookie, _, _ = strings.Cut(set[0], ";")
			node = string(body)
		}
	}
}

// TestFullNodesThatOnlyCaddyKnowsOf has a node filled by another handler, which tells this
// source nothing. Under multi the other source has no node.
func TestFullNodesThatOnlyCaddyKnowsOf(t *testing.T) {
	for _, multi := range []bool{false, true} {
		t.Run(fmt.Sprint("multi=", multi), func(t *testing.T) {
			name, m := newMemory(t)
			began, end := make(chan struct{}), make(chan struct{})
			list(t, m, "a", troubledService(t, "a", began, end), "service", "a")
			list(t, m, "b", service(t, "b").URL, "service", "b")
			url, other := "http://127.0.0.1:"+freeport.String(t), "http://127.0.0.1:"+freeport.String(t)
			source := "discovery {\nregistry memory " + name + "\n"
			sources := "dynamic " + source + "sticky\n}\n"
			if multi {
				sources = "dynamic multi {\n" + source + "sticky\n}\n" + source + "service nobody\n}\n}\n"
			}
			load(t, url+" {\nreverse_proxy {\n"+sources+"unhealthy_request_count 1\n"+sessionHeader+"\n}\n}\n"+
				other+" {\nreverse_proxy {\ndynamic "+source+"service a\n}\n}\n}")
			done := make(chan struct{})
			go func() {
				defer close(done)
				get(t, other+"/slow")
			}()
			<-began
			v := newVisitor(t, url)
			v.cookies[defaultStickyCookie] = picker.NewKeyring().Token("a")
			if to := v.visit(""); to != "b" || len(v.set) > 0 || v.session != sessionKept {
				t.Errorf("a request went to %q (%d) as %s with the cookies %q, want b and no cookie", to, v.status, v.session, v.set)
			}
			close(end)
			<-done
			eventually(t, "the node takes its session again", func() bool { return v.visit("") == "a" && v.session == sessionKept })
		})
	}
}
