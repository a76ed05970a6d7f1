package caddydiscovery

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/fcgi"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// tell is a node that says in its answer what reached it, with all that a response can
// have: headers in advance, a body that is streamed, trailers that are announced and such
// that are not.
func tell(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Early") != "" {
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(http.StatusEarlyHints)
	}
	body, err := io.ReadAll(r.Body)
	name := ""
	if r.TLS != nil {
		name = r.TLS.ServerName
	}
	w.Header().Set("Trailer", "Announced")
	_, _ = fmt.Fprintf(w, "HTTP/%d host %s name %q body %q %v", r.ProtoMajor, r.Host, name, body, err)
	_ = http.NewResponseController(w).Flush()
	_, _ = io.WriteString(w, " end")
	w.Header().Set("Announced", "1")
	w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
}

// nodeWith runs a node, and returns its endpoint.
func nodeWith(start func(*httptest.Server)) func(t *testing.T) string {
	return func(t *testing.T) string {
		s := httptest.NewUnstartedServer(http.HandlerFunc(tell))
		s.TLS = new(tls.Config)
		start(s)
		t.Cleanup(s.Close)
		return s.URL
	}
}

// proxied is a listener of connections that begin with a line of the PROXY protocol, and
// keeps the lines.
type proxied struct {
	net.Listener
	lines *atomic.Pointer[string]
}

func (p proxied) Accept() (net.Conn, error) {
	conn, err := p.Listener.Accept()
	if err != nil {
		return nil, err
	}
	r := bufio.NewReader(conn)
	line, err := r.ReadString('\n')
	if err != nil {
		line = err.Error()
	}
	p.lines.Store(&line)
	return readFrom{conn, r}, nil
}

type readFrom struct {
	net.Conn
	r io.Reader
}

func (c readFrom) Read(p []byte) (int, error) { return c.r.Read(p) }

// TestWatchedTransports holds that nothing is different about a handler whose traffic is
// watched, over whichever transport: neither for the node nor for the client.
func TestWatchedTransports(t *testing.T) {
	start := nodeWith((*httptest.Server).Start)
	startTLS := nodeWith((*httptest.Server).StartTLS)
	startHTTP2 := nodeWith(func(s *httptest.Server) { s.EnableHTTP2 = true; s.StartTLS() })
	var line atomic.Pointer[string]
	for name, test := range map[string]struct {
		node      func(t *testing.T) string
		transport string
		sites     func(port string) string
		proto     string
	}{
		"default": {node: start, proto: "HTTP/1"},
		"http":    {node: start, transport: "transport http", proto: "HTTP/1"},
		"buffers": {node: start, transport: "request_buffers 1MB\nresponse_buffers 1MB", proto: "HTTP/1"},
		"tls":     {node: startTLS, transport: "transport http {\ntls_insecure_skip_verify\n}", proto: "HTTP/1"},
		"http 2":  {node: startHTTP2, transport: "transport http {\ntls_insecure_skip_verify\n}", proto: "HTTP/2"},
		"name of the node": {node: startHTTP2, proto: "HTTP/2",
			transport: "transport http {\ntls_insecure_skip_verify\ntls_server_name {http.reverse_proxy.upstream.node.id}.example.com\n}"},
		"h2c": {transport: "transport http {\nversions h2c\n}", proto: "HTTP/2", node: nodeWith(func(s *httptest.Server) {
			s.Config.Protocols = new(http.Protocols)
			s.Config.Protocols.SetUnencryptedHTTP2(true)
			s.Start()
		})},
		"proxy protocol": {transport: "transport http {\nproxy_protocol v1\n}", proto: "HTTP/1", node: nodeWith(func(s *httptest.Server) {
			s.Listener = proxied{s.Listener, &line}
			s.Start()
		})},
		"fastcgi": {transport: "transport fastcgi {\nroot /\n}", proto: "HTTP/1", node: func(t *testing.T) string {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			go func() {
				_ = fcgi.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					r.Header.Del("Early") // there is no such thing in FastCGI
					tell(w, r)
				}))
			}()
			return "http://" + l.Addr().String()
		}},
		"http 3": {transport: "transport http {\nversions 3\ntls_insecure_skip_verify\n}", proto: "HTTP/3",
			sites: func(port string) string {
				return "https://127.0.0.1:" + port + " {\ntls internal\nrespond \"HTTP/{http.request.proto} host {http.request.hostport} body {http.request.body}\"\n}"
			}},
	} {
		t.Run(name, func(t *testing.T) {
			var node, sites string
			if test.sites != nil {
				port := freeport.String(t)
				node, sites = "https://127.0.0.1:"+port, test.sites(port)
			} else {
				node = test.node(t)
			}
			registry, m := newMemory(t)
			list(t, m, "a", node, "service", t.Name())
			w := new(witness)
			witnesses.Store(t.Name(), w)
			t.Cleanup(func() { witnesses.Delete(t.Name()) })
			answers := make(map[string]string)
			for _, source := range []string{"discovery", "watched"} {
				port := freeport.String(t) // a reload may close a connection that it had just accepted
				load(t, "{\nskip_install_trust\nauto_https disable_redirects\n}\n"+sites+"\nhttp://127.0.0.1:"+port+" {\nreverse_proxy {\ndynamic "+source+
					" {\nregistry memory "+registry+"\nservice "+t.Name()+"\nallow 127.0.0.1\n}\n"+test.transport+"\n}\n}")
				answers[source] = strings.ReplaceAll(ask(t, "http://127.0.0.1:"+port), port, "port")
			}
			if answers["watched"] != answers["discovery"] || !strings.Contains(answers["watched"], test.proto) || !strings.Contains(answers["watched"], "some body") {
				t.Errorf("watched:\n%s\nunwatched:\n%s\nwant the same, over %s", answers["watched"], answers["discovery"], test.proto)
			}
			w.saw(t, "a sent 0", "a answered 200", "a done 0")
			if name == "proxy protocol" && (line.Load() == nil || !strings.HasPrefix(*line.Load(), "PROXY TCP4 127.0.0.1 ")) {
				t.Errorf("the connection began with %q", *line.Load())
			}
		})
	}
}

// ask sends a body of unknown length, and returns all that comes back.
func ask(t *testing.T, url string) string {
	t.Helper()
	var early []string
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
		early = append(early, fmt.Sprint(code, header["Link"]))
		return nil
	}})
	req, _ := http.NewRequestWithContext(ctx, http.MethodPost, url, io.MultiReader(strings.NewReader("some"), strings.NewReader(" body")))
	req.Header.Set("Early", "1")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	var header bytes.Buffer
	resp.Header.Del("Date")
	_ = resp.Header.Write(&header)
	_ = resp.Trailer.Write(&header)
	return fmt.Sprintf("early %q\n%s\n%s\n%s %v", early, resp.Status, header.String(), body, err)
}

// TestBodiesAreSentAgain has a body that Caddy keeps reach the second node whole, though
// the first one has read it.
func TestBodiesAreSentAgain(t *testing.T) {
	failing := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		panic(http.ErrAbortHandler)
	}))
	t.Cleanup(failing.Close)
	site, w := watch(t, "lb_policy first\nlb_retries 1\nlb_retry_match {\nmethod POST\n}\nrequest_buffers 1MB", failing.URL, nodeWith((*httptest.Server).Start)(t))
	if got := ask(t, site); !strings.Contains(got, "some body") {
		t.Errorf("answered %s", got)
	}
	w.saw(t, "a sent 0", "a done 2", "b sent 1", "b answered 200", "b done 0")
}

// TestWatchedReloadClosesIdleConnections reloads a handler with Caddy's default transport,
// which is made for it here, and one that names it.
func TestWatchedReloadClosesIdleConnections(t *testing.T) {
	for _, transport := range []string{"", "transport http"} {
		t.Run(cmp.Or(transport, "default"), func(t *testing.T) {
			node, open := countingNode(t)
			site, _ := watch(t, transport, node)
			get(t, site)
			if open.Load() != 1 {
				t.Fatalf("%d connections, want 1", open.Load())
			}
			load(t, site+" {\nrespond 204\n}")
			eventually(t, "the connection is closed", func() bool { return open.Load() == 0 })
		})
	}
}

// TestOtherRequestsAreNotWatched has those out that are not of the source: to static
// upstreams beside the nodes, those of another handler before and after, and Caddy's own
// health checks.
func TestOtherRequestsAreNotWatched(t *testing.T) {
	checked := make(chan struct{}, 1)
	static := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/healthz" {
			select {
			case checked <- struct{}{}:
			default:
			}
		}
		_, _ = io.WriteString(w, "static")
	}))
	t.Cleanup(static.Close)
	to := strings.TrimPrefix(static.URL, "http://")
	w := new(witness)
	witnesses.Store(t.Name(), w)
	t.Cleanup(func() { witnesses.Delete(t.Name()) })
	registry, m := newMemory(t)
	node := service(t, "a")
	list(t, m, "a", node.URL, "service", t.Name())
	site := "http://127.0.0.1:" + freeport.String(t)
	source := "dynamic watched {\nregistry memory " + registry + " {\nloss_guard off\n}\nservice " + t.Name() + "\n}"
	load(t, site+" {\nforward_auth "+to+" {\nuri /\n}\nreverse_proxy "+to+" {\nhealth_uri /healthz\nhealth_interval 5ms\n"+source+
		"\n@not status 404\nhandle_response @not {\nreverse_proxy "+to+"\n}\n}\n}")
	<-checked
	if _, body := get(t, site); body != "a" {
		t.Fatalf("answered %q, want the node", body)
	}
	w.saw(t, "a sent 0", "a answered 200", "a done 0")
	m.Expire("a")
	eventually(t, "the node is gone", func() bool { _, body := get(t, site); return body == "static" })
	w.mu.Lock()
	defer w.mu.Unlock()
	if slices.ContainsFunc(w.events, func(e string) bool { return !strings.HasPrefix(e, "a ") }) || w.flying != 0 {
		t.Errorf("saw %q, %d in flight", w.events, w.flying)
	}
}
