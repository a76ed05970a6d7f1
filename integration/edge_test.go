package integration

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

var edgeFor = flag.Duration("streams", 0, "for how long at least the streams of TestEdge live, beside a hundred joins")

// edge is a Caddy whose sites are those that nodes announce, with certificates of its own
// authority.
type edge struct {
	*proxy
	port, data string
}

func edgeOptions(r registry, lines string) string {
	declared := strings.Replace(r.block("hosts *.apps.example.com\n"+lines), "registry ", "registry main ", 1)
	return "local_certs\nskip_install_trust\ndiscovery {\n" + declared + "\n}\non_demand_tls {\npermission discovery main\n}"
}

func edgeSites(port string) string {
	return `https://:` + port + ` {
		tls {
			on_demand
		}
		@served discovered main
		handle @served {
			reverse_proxy {
				dynamic discovery main {
					route
				}
			}
		}
		handle {
			respond "no such site" 404
		}
	}`
}

func startEdge(t *testing.T, r registry) *edge {
	t.Helper()
	e := &edge{port: freeport.String(t), data: t.TempDir()}
	e.proxy = startOn(t, e.data, edgeOptions(r, ""), edgeSites(e.port))
	return e
}

// dial opens a TLS connection for a host, whose certificate must be one of Caddy's own
// authority.
func (e *edge) dial(host string) (*tls.Conn, error) {
	root, err := os.ReadFile(filepath.Join(e.data, "caddy", "pki", "authorities", "local", "root.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(root)
	return tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", "127.0.0.1:"+e.port, &tls.Config{ServerName: host, RootCAs: roots})
}

// ask returns the body of an answer by HTTPS, on a connection of its own, or its status if
// it is not 200.
func (e *edge) ask(host string) (string, error) {
	resp, err := e.get(host, "/")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Sprint(resp.StatusCode), nil
	}
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

func (e *edge) get(host, path string) (*http.Response, error) {
	transport := &http.Transport{DisableKeepAlives: true, DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return e.dial(host) }}
	req, err := http.NewRequest(http.MethodGet, "https://"+host+path, nil)
	if err != nil {
		return nil, err
	}
	return transport.RoundTrip(req)
}

// socket opens a WebSocket through a host.
func (e *edge) socket(host string) (*websocket.Conn, error) {
	config, err := websocket.NewConfig("wss://"+host+"/socket", "https://"+host)
	if err != nil {
		return nil, err
	}
	conn, err := e.dial(host)
	if err != nil {
		return nil, err
	}
	return websocket.NewClient(config, conn)
}

// streams is a service with a WebSocket that says what it is told, and a download that
// goes on until the test says that it is over.
func streams(t *testing.T) (address string, over chan struct{}) {
	over = make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "streams") })
	mux.Handle("/socket", websocket.Server{Handler: func(c *websocket.Conn) { _, _ = io.Copy(c, c) }})
	mux.HandleFunc("/download", func(w http.ResponseWriter, _ *http.Request) {
		sum := sha256.New()
		for i := 0; ; i++ {
			select {
			case <-over:
				fmt.Fprintf(w, "\n%x", sum.Sum(nil))
				return
			case <-time.After(5 * time.Millisecond):
			}
			fmt.Fprintf(io.MultiWriter(w, sum), "%d\n", i)
			_ = http.NewResponseController(w).Flush()
		}
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return server.URL, over
}

// TestEdge has services join and leave with hosts of their own, each of which is asked by
// HTTPS as soon as it is there, while a WebSocket and a download through other ones go on,
// and the rules for hosts change by reloads.
func TestEdge(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		joins := 40
		if _, ok := r.(*kv); ok || *edgeFor > 0 {
			joins = 100
		}
		address, over := streams(t)
		s := newService(t, "shop")
		shop := "http://" + s.address
		r.put("streams", camel("streams", address, `"service":"streams","hosts":"chat.apps.example.com, files.apps.example.com"`))
		e := startEdge(t, r)
		eventually(t, "the service is served", func() bool { body, _ := e.ask("chat.apps.example.com"); return body == "streams" })
		ws, err := e.socket("chat.apps.example.com")
		if err != nil {
			t.Fatal(err)
		}
		defer ws.Close()
		download, err := e.get("files.apps.example.com", "/download") //nolint:bodyclose // closed below
		if err != nil {
			t.Fatal(err)
		}
		defer download.Body.Close()
		downloaded := make(chan error, 1)
		go func() { downloaded <- check(download.Body) }()

		var took []time.Duration
		pace := time.NewTicker(max(*edgeFor/time.Duration(joins), 1))
		defer pace.Stop()
		for i := range joins {
			<-pace.C
			host, id := fmt.Sprintf("shop%d.apps.example.com", i), fmt.Sprint("shop", i)
			began := time.Now()
			r.put(id, camel(id, shop, fmt.Sprintf(`"service":%q,"hosts":%q`, id, host)))
			eventually(t, host+" is served", func() bool { body, _ := e.ask(host); return body == "shop" })
			took = append(took, time.Since(began))
			if err := echo(ws, host); err != nil {
				t.Fatalf("the WebSocket after %d joins: %v", i+1, err)
			}
			if i%2 == 0 {
				r.remove(id)
			}
		}
		slices.Sort(took)
		t.Logf("registered → first answer by HTTPS: p50 %v, p99 %v", took[joins/2], took[joins*99/100])
		eventually(t, "the host of a service that left is nobody's", func() bool { body, _ := e.ask("shop0.apps.example.com"); return body == "404" })
		if body, err := e.ask("nobody.apps.example.com"); err == nil {
			t.Errorf("there is a certificate for a host that nobody announces: %s", body)
		}
		close(over)
		if err := <-downloaded; err != nil {
			t.Errorf("the download: %v", err)
		}
		if err := echo(ws, "still here"); err != nil {
			t.Errorf("the WebSocket: %v", err)
		}
		hostsByCommand(t, e)
	})
}

// check reads a download of streams to its end.
func check(body io.Reader) error {
	all, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	lines, sum, found := strings.Cut(string(all), "\n\n")
	if !found || fmt.Sprintf("%x", sha256.Sum256([]byte(lines+"\n"))) != sum {
		return errors.New("something of it is missing")
	}
	return nil
}

func echo(ws *websocket.Conn, message string) error {
	if err := ws.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if err := websocket.Message.Send(ws, message); err != nil {
		return err
	}
	var back string
	if err := websocket.Message.Receive(ws, &back); err != nil {
		return err
	}
	if back != message {
		return fmt.Errorf("%q came back as %q", message, back)
	}
	return nil
}

// hostsByCommand asks for the hosts from a shell.
func hostsByCommand(t *testing.T, e *edge) {
	t.Helper()
	out, stderr, code := runCommand(t, nil, "hosts", "--address", e.admin)
	for _, want := range []string{"HOST ", "chat.apps.example.com", "streams", "/*", "allowed", "shop1.apps.example.com"} {
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("hosts: %d %s does not show %q:\n%s", code, stderr, want, out)
		}
	}
	if strings.Contains(out, "shop0.apps.example.com") {
		t.Errorf("hosts shows one without a node:\n%s", out)
	}
	out, stderr, code = runCommand(t, nil, "hosts", "--address", e.admin, "--json", "--all", "--service", "shop0")
	var hosts []struct {
		Host        string
		Left        *time.Time
		Certificate *struct{ Until *time.Time }
	}
	if err := json.Unmarshal([]byte(out), &hosts); err != nil || code != 0 || len(hosts) != 1 || hosts[0].Left == nil || hosts[0].Certificate == nil || hosts[0].Certificate.Until == nil {
		t.Errorf("hosts --json: %d %v %s%s", code, err, out, stderr)
	}
}

// TestEdgeReloads changes by reloads which hosts count, on one connection to the registry:
// streams of unchanged hosts end by the reload as Caddy ends them, and new requests never
// miss a host that counts before and after it.
func TestEdgeReloads(t *testing.T) {
	t.Parallel()
	r := newKV(t).(*kv)
	s := newService(t, "shop")
	r.put("a", camel("a", "http://"+s.address, `"service":"a","hosts":"a.apps.example.com"`))
	r.put("b", camel("b", "http://"+s.address, `"service":"b","hosts":"b.apps.example.com"`))
	e := startEdge(t, r)
	eventually(t, "both are served", func() bool {
		a, _ := e.ask("a.apps.example.com")
		b, _ := e.ask("b.apps.example.com")
		return a == "shop" && b == "shop"
	})
	clients := r.server.NumClients()
	for i, lines := range []string{"claim a b.apps.example.com", "claim b* b.apps.example.com"} {
		e.reload(edgeOptions(r, lines), edgeSites(e.port))
		want := []string{"404", "shop"}[i%2]
		eventually(t, "b is answered with "+want, func() bool { body, _ := e.ask("b.apps.example.com"); return body == want })
		if body, err := e.ask("a.apps.example.com"); body != "shop" && !closed(err) {
			t.Errorf("%q: a is answered with %q, %v", lines, body, err)
		}
	}
	if now := r.server.NumClients(); now != clients {
		t.Errorf("%d connections to the registry, there were %d", now, clients)
	}
	if n := strings.Count(e.log.String(), "listed the registry"); n != 1 {
		t.Errorf("the registry was listed %d times", n)
	}
}
