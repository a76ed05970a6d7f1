package caddydiscovery

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

func init() { caddy.RegisterModule(new(watchedSource)) }

// watchedSource is the source discovery with an observer, whatever its options.
type watchedSource struct{ Upstreams }

func (*watchedSource) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.reverse_proxy.upstreams.watched", New: func() caddy.Module { return new(watchedSource) }}
}

func (s *watchedSource) Provision(ctx caddy.Context) error {
	if err := s.Upstreams.Provision(ctx); err != nil {
		return err
	}
	o, ok := witnesses.Load(s.Service)
	if !ok {
		return errors.New("no observer for " + s.Service)
	}
	if several, ok := o.(observers); ok {
		for _, o := range several {
			if err := s.observe(ctx, o); err != nil {
				return err
			}
		}
		return nil
	}
	return s.observe(ctx, o.(traffic.Observer))
}

// witnesses are the observers of the running tests, by service.
var witnesses sync.Map

// witness is an observer that remembers.
type witness struct {
	mu     sync.Mutex
	flying int
	events []string
}

func (w *witness) note(flying int, format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.flying += flying
	w.events = append(w.events, fmt.Sprintf(format, args...))
}

func (w *witness) Sent(x *traffic.Exchange) {
	w.note(1, "%s sent %d", x.Node.Node.ID, x.Retry)
}

func (w *witness) Answered(x *traffic.Exchange) {
	x.Response.Header.Del("For-The-Observer")
	w.note(0, "%s answered %d", x.Node.Node.ID, x.Status)
}

func (w *witness) Done(x *traffic.Exchange) {
	if x.SentAt > x.DoneAt || x.AnsweredAt > x.DoneAt || x.Status != 0 && x.SentAt > x.AnsweredAt {
		w.note(0, "times that go backwards: %v %v %v", x.SentAt, x.AnsweredAt, x.DoneAt)
	}
	w.note(-1, "%s done %d", x.Node.Node.ID, x.Outcome)
}

// saw waits until the witness has seen all this, and makes it forget.
func (w *witness) saw(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	deadline := time.Now().Add(patience)
	for len(got) < len(want) && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
		w.mu.Lock()
		got = w.events
		w.mu.Unlock()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if fmt.Sprint(w.events) != fmt.Sprint(want) || w.flying != 0 && strings.Contains(fmt.Sprint(want), "done") {
		t.Errorf("saw %q, %d in flight, want %q", w.events, w.flying, want)
	}
	w.events = nil
}

// watch runs a site with watched nodes, and returns its address and the witness.
func watch(t *testing.T, options string, nodes ...string) (string, *witness) {
	t.Helper()
	registry, m := newMemory(t)
	for i, endpoint := range nodes {
		list(t, m, string(rune('a'+i)), endpoint, "service", t.Name())
	}
	w := new(witness)
	witnesses.Store(t.Name(), w)
	t.Cleanup(func() { witnesses.Delete(t.Name()) })
	site := "http://127.0.0.1:" + freeport.String(t)
	load(t, site+" {\nreverse_proxy {\ndynamic watched {\nregistry memory "+registry+"\nservice "+t.Name()+"\n}\n"+options+"\n}\n}")
	return site, w
}

// TestWhatBecomesOfAttempts has an observer told of each attempt, for what is to be told
// apart.
func TestWhatBecomesOfAttempts(t *testing.T) {
	serve := func(t *testing.T, h http.HandlerFunc) string {
		s := httptest.NewServer(h)
		t.Cleanup(s.Close)
		return s.URL
	}
	cutOff := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "10")
		_, _ = io.WriteString(w, "half")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}

	t.Run("answered", func(t *testing.T) {
		site, w := watch(t, "", serve(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("For-The-Observer", "1")
			w.Header().Set("For-The-Client", "1")
			http.Error(w, "no", http.StatusTeapot)
		}))
		resp, err := http.Get(site)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusTeapot || resp.Header.Get("For-The-Observer") != "" || resp.Header.Get("For-The-Client") == "" {
			t.Errorf("the client got %v, %v", resp.Status, resp.Header)
		}
		w.saw(t, "a sent 0", "a answered 418", "a done 0")
	})
	t.Run("no body", func(t *testing.T) {
		site, w := watch(t, "", serve(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))
		get(t, site)
		w.saw(t, "a sent 0", "a answered 204", "a done 0")
	})
	t.Run("no connection, then another node", func(t *testing.T) {
		site, w := watch(t, "lb_policy first\nlb_retries 1", "http://127.0.0.1:"+freeport.String(t), service(t, "b").URL)
		if _, body := get(t, site); body != "b" {
			t.Errorf("answered %q, want the node that serves", body)
		}
		w.saw(t, "a sent 0", "a done 1", "b sent 1", "b answered 200", "b done 0")
	})
	t.Run("no answer", func(t *testing.T) {
		site, w := watch(t, "", serve(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
		get(t, site)
		w.saw(t, "a sent 0", "a done 2")
	})
	t.Run("broken off", func(t *testing.T) {
		site, w := watch(t, "", serve(t, cutOff))
		if resp, err := http.Get(site); err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
			if err == nil {
				t.Error("half of an answer was passed on as whole")
			}
		}
		w.saw(t, "a sent 0", "a answered 200", "a done 3")
	})
	t.Run("retried for its status", func(t *testing.T) {
		site, w := watch(t, "lb_policy first\nlb_retries 1\nlb_retry_match {\nexpression {rp.status_code} == 503\n}",
			serve(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusServiceUnavailable) }), service(t, "b").URL)
		if _, body := get(t, site); body != "b" {
			t.Errorf("answered %q, want the node that serves", body)
		}
		w.saw(t, "a sent 0", "a answered 503", "a done 0", "b sent 1", "b answered 200", "b done 0")
	})
}

// TestWhatClientsAbort counts for nothing: before there is an answer, while its body
// comes, and while their own body goes.
func TestWhatClientsAbort(t *testing.T) {
	t.Run("before the answer", func(t *testing.T) {
		ctx, abort := context.WithCancel(t.Context())
		slow := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			abort()
			<-r.Context().Done()
		}))
		t.Cleanup(slow.Close)
		site, w := watch(t, "", slow.URL)
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, site, nil)
		if resp, err := http.DefaultClient.Do(req); err == nil {
			resp.Body.Close()
		}
		w.saw(t, "a sent 0", "a done 4")
	})
	t.Run("while it comes", func(t *testing.T) {
		endless := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, "half")
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}))
		t.Cleanup(endless.Close)
		site, w := watch(t, "flush_interval -1", endless.URL)
		resp, err := http.Get(site)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		w.saw(t, "a sent 0", "a answered 200", "a done 4")
	})
	t.Run("while they send", func(t *testing.T) {
		hungry := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
		t.Cleanup(hungry.Close)
		site, w := watch(t, "", hungry.URL)
		conn, err := net.Dial("tcp", strings.TrimPrefix(site, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\nhalf")
		w.saw(t, "a sent 0")
		conn.Close()
		w.saw(t, "a done 4")
	})
}

// TestWatchedUpgrades has the connection of a WebSocket work both ways, end by halves, and
// be in flight for as long as it lasts.
func TestWatchedUpgrades(t *testing.T) {
	echo := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_ = rw.Flush()
		sent, err := io.ReadAll(rw) // to the end of the client's half
		_, _ = fmt.Fprintf(conn, "%s back, %v", sent, err)
	}))
	t.Cleanup(echo.Close)
	site, w := watch(t, "", echo.URL)
	conn, err := net.Dial("tcp", strings.TrimPrefix(site, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("answered %v, %v", resp, err)
	}
	defer resp.Body.Close()
	w.saw(t, "a sent 0", "a answered 101")
	_, _ = io.WriteString(conn, "there and")
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, _ := io.ReadAll(r); string(got) != "there and back, <nil>" {
		t.Errorf("heard %q", got)
	}
	w.saw(t, "a done 0")
}

// TestTheTransportStaysWhatItIs has those find the handler's own transport who look for
// it: with and without one in the configuration.
func TestTheTransportStaysWhatItIs(t *testing.T) {
	for name, pairs := range map[string][]any{
		"default":    nil,
		"configured": {"transport", map[string]any{"protocol": "http"}},
	} {
		t.Run(name, func(t *testing.T) {
			registry, m := newMemory(t)
			list(t, m, "a", "http://127.0.0.1:80")
			witnesses.Store("", new(witness))
			config := map[string]any{"dynamic_upstreams": map[string]any{"source": "watched", "registry": map[string]any{"backend": "memory", "name": registry}}}
			for i := 0; i < len(pairs); i += 2 {
				config[pairs[i].(string)] = pairs[i+1]
			}
			handler := provisionHandler(t, config)
			if _, ok := handler.Transport.(*traffic.Transport); !ok {
				t.Fatalf("the transport is %T, which watches nothing", handler.Transport)
			}
			own, ok := traffic.Real(handler.Transport).(*reverseproxy.HTTPTransport)
			if !ok || own.Transport == nil {
				t.Fatalf("behind it is %T, want Caddy's, provisioned", traffic.Real(handler.Transport))
			}
			if c := newHealthClient(handler); c.http == handler.Transport {
				t.Error("health checks are watched")
			}
		})
	}
}
