package caddydiscovery

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/fcgi"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// speaksFastCGI is a service that answers FastCGI with its id, as long as it listens.
func speaksFastCGI(t *testing.T, id string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		_ = fcgi.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, id) }))
	})
	t.Cleanup(func() {
		_ = l.Close()
		serving.Wait()
	})
	return l
}

// TestFastCGINodesAreCheckedByConnections checks nodes that speak no HTTP by their connections.
func TestFastCGINodesAreCheckedByConnections(t *testing.T) {
	name, m := newMemory(t)
	a, b := speaksFastCGI(t, "a"), speaksFastCGI(t, "b")
	list(t, m, "a", a.Addr().String())
	list(t, m, "b", b.Addr().String())
	port := freeport.String(t)
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+`
				health {
					tcp
					interval 20ms
				}
			}
			transport fastcgi
			lb_policy round_robin
		}
	}`)
	url := "http://127.0.0.1:" + port
	eventually(t, "both serve", func() bool { return fmt.Sprint(served(t, url)) == "map[a:3 b:3]" })
	_ = b.Close()
	eventually(t, "the one that listens serves", func() bool { return fmt.Sprint(served(t, url)) == "map[a:6]" })
}

// TestChecksThatCannotWorkAreRefused refuses checks that would not show what requests will see.
func TestChecksThatCannotWorkAreRefused(t *testing.T) {
	for _, test := range []struct{ checks, rest, want string }{
		{"uri /healthz", "transport fastcgi", "want 'health { tcp }'"},
		{"", "transport fastcgi", "want 'health { tcp }'"},
		{"tcp", "transport fastcgi", ""},
		{"tcp", "", ""},
		{"tcp\nuri /healthz", "", "tcp asks nothing"},
		{"tcp\nstatus 200", "", "tcp asks nothing"},
		{"tcp\nheader X-Check yes", "", "tcp asks nothing"},
		{"tcp yes", "", "wrong number of arguments"},
		{"uri /", "transport http {\ntls\ntls_server_name {http.request.host}\n}", "depends on the request"},
		{"uri /", "transport http {\ntls\ntls_server_name {labels.1}.example.com\n}", "depends on the request"},
		{"uri /", "transport http {\ntls\ntls_server_name {http.reverse_proxy.upstream.host}\n}", ""},
		{"uri /", "transport http {\ntls\ntls_server_name {http.reverse_proxy.upstream.node.id}.example.com\n}", ""},
		{"tcp", "transport http {\ntls\ntls_server_name {http.request.host}\n}", ""},
		{"", "php_fastcgi", "want 'health { tcp }'"},
		{"tcp", "php_fastcgi", ""},
	} {
		memories.Store("checks", discoverytest.NewMemory())
		directive := "reverse_proxy"
		if test.rest == "php_fastcgi" {
			directive, test.rest = test.rest, ""
		}
		err := validate("http://127.0.0.1:1 {\n" + directive + " {\ndynamic discovery {\nregistry memory checks\nhealth {\n" + test.checks + "\n}\n}\n" + test.rest + "\n}\n}")
		memories.Delete("checks")
		switch {
		case test.want == "" && err != nil:
			t.Errorf("%q with %q is refused: %v", test.checks, test.rest, err)
		case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
			t.Errorf("%q with %q: %v, want an error that says %q", test.checks, test.rest, err, test.want)
		}
	}
}

// TestChecksShowTheServerNameOfRequests has a name for TLS that depends on the node.
func TestChecksShowTheServerNameOfRequests(t *testing.T) {
	name, m := newMemory(t)
	var mu sync.Mutex
	names := make(map[string]bool)
	node := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		names[r.URL.Path+" "+r.TLS.ServerName] = true
		mu.Unlock()
	}))
	node.StartTLS()
	t.Cleanup(node.Close)
	list(t, m, "orders-1", node.URL, "zone", "eu")
	port := freeport.String(t)
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+`
				health {
					uri /healthz
				}
			}
			transport http {
				tls_insecure_skip_verify
				tls_server_name {http.reverse_proxy.upstream.node.id}.{http.reverse_proxy.upstream.node.metadata.zone}.example.com
			}
		}
	}`)
	if status, _ := get(t, "http://127.0.0.1:"+port+"/x"); status != http.StatusOK {
		t.Fatalf("status %d, want the node", status)
	}
	mu.Lock()
	defer mu.Unlock()
	if got, want := fmt.Sprint(names), "map[/healthz orders-1.eu.example.com:true /x orders-1.eu.example.com:true]"; got != want {
		t.Errorf("the node was asked for as %s, want %s", got, want)
	}
}

// TestChecksDoNotWaitForRequests has a request under way at a node that may have one
// connection: the checks do not wait for it.
func TestChecksDoNotWaitForRequests(t *testing.T) {
	for _, test := range []struct {
		transport string
		start     func(*httptest.Server)
		proto     int
	}{
		{"", (*httptest.Server).Start, 1},
		{"versions 1.1", (*httptest.Server).Start, 1},
		{"tls_insecure_skip_verify", (*httptest.Server).StartTLS, 1},
		{"tls_insecure_skip_verify", func(s *httptest.Server) { s.EnableHTTP2 = true; s.StartTLS() }, 2},
		{"tls_insecure_skip_verify\ntls_server_name {http.reverse_proxy.upstream.node.id}", func(s *httptest.Server) { s.EnableHTTP2 = true; s.StartTLS() }, 2},
		{"versions h2c", func(s *httptest.Server) {
			s.Config.Protocols = new(http.Protocols)
			s.Config.Protocols.SetUnencryptedHTTP2(true)
			s.Start()
		}, 2},
	} {
		t.Run(strings.NewReplacer("{", "", "}", "").Replace(fmt.Sprint(test.transport, test.proto)), func(t *testing.T) {
			name, m := newMemory(t)
			entered, release := make(chan struct{}), make(chan struct{})
			checked := make(chan *http.Request, 100)
			node := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch r.URL.Path {
				case "/slow":
					entered <- struct{}{}
					<-release
				case "/healthz":
					select {
					case checked <- r:
					default:
					}
				}
			}))
			node.TLS = &tls.Config{}
			test.start(node)
			t.Cleanup(node.Close)
			list(t, m, "a", node.URL)
			port := freeport.String(t)
			load(t, "http://127.0.0.1:"+port+" {\nreverse_proxy {\ndynamic discovery {\nregistry memory "+name+
				"\nhealth {\nuri /healthz\ninterval 20ms\ntimeout 10s\n}\n}\ntransport http {\nmax_conns_per_host 1\n"+test.transport+"\n}\n}\n}")
			url := "http://127.0.0.1:" + port
			var slow sync.WaitGroup
			slow.Go(func() {
				if status, _ := get(t, url+"/slow"); status != http.StatusOK {
					t.Errorf("status %d of the request under way", status)
				}
			})
			<-entered
			for len(checked) > 0 {
				<-checked
			}
			for range 5 {
				select {
				case r := <-checked:
					if r.ProtoMajor != test.proto {
						t.Errorf("a check came by %s, want HTTP/%d", r.Proto, test.proto)
					}
				case <-time.After(patience):
					t.Error("no check came while a request was under way")
				}
				if t.Failed() {
					break
				}
			}
			close(release)
			slow.Wait()
		})
	}
}
