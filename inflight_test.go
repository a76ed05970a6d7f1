package caddydiscovery

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

// shownNode returns what the admin API says of a node.
func shownNode(t *testing.T, id string) view.Node {
	t.Helper()
	_, body := askAdmin(t, http.MethodGet, "/discovery/nodes?id="+url.QueryEscape(id))
	var nodes []view.Node
	if err := json.Unmarshal(body, &nodes); err != nil {
		t.Fatal(err)
	}
	if len(nodes) != 1 || nodes[0].ID != id || nodes[0].InFlight == nil {
		t.Fatalf("the admin API says of %s: %s", id, body)
	}
	return nodes[0]
}

// TestRequestsInFlight counts what is under way to a node where no option counts, over
// plain requests and one that upgrades.
func TestRequestsInFlight(t *testing.T) {
	name, m := newMemory(t)
	entered, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	end := func() { once.Do(func() { close(release) }) }
	defer end()
	list(t, m, "a", troubledService(t, "a", entered, release), "service", "a")
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(io.Discard, rw)
	}))
	t.Cleanup(s.Close)
	list(t, m, "b", s.URL, "service", "b")
	site := serveNodes(t, name, "service {query.of}", "")
	if hasWork() {
		t.Fatal("there is work before there is any")
	}
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() { get(t, site+"/slow?of=a") })
		<-entered
	}
	if n := *shownNode(t, "a").InFlight; n != 3 {
		t.Errorf("%d requests in flight to a, want 3", n)
	}
	if n := *shownNode(t, "b").InFlight; n != 0 {
		t.Errorf("%d requests in flight to b, want none", n)
	}
	end()
	group.Wait()
	eventually(t, "none is in flight to a", func() bool { return *shownNode(t, "a").InFlight == 0 && !hasWork() })

	conn, err := net.Dial("tcp", strings.TrimPrefix(site, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "GET /?of=b HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v %v", resp, err)
	}
	defer resp.Body.Close()
	if n := *shownNode(t, "b").InFlight; n != 1 || !hasWork() {
		t.Errorf("%d requests in flight to b, want the WebSocket", n)
	}
	_ = conn.Close()
	eventually(t, "the WebSocket has ended", func() bool { return *shownNode(t, "b").InFlight == 0 && !hasWork() })
}

// TestNodesWithSeveralAddresses counts what goes to any address of a node.
func TestNodesWithSeveralAddresses(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "http://[2001:db8::1]:8080")
	list(t, m, "b", "http://localhost:8081")
	u := source(t, "registry memory "+name)
	eventually(t, "localhost is resolved", func() bool { return len(u.directory.Snapshot().Node("b").Addresses()) > 0 })
	s := u.directory.Snapshot()
	requests := map[string]int{"[2001:db8::1]:8080": 2, "localhost:8081": 1, "[2001:db8::1]:8081": 5}
	for _, addr := range s.Node("b").Addresses() {
		requests[net.JoinHostPort(addr.String(), "8081")] = 1
	}
	if n := toNode(s.Node("a"), requests); n != 2 {
		t.Errorf("%d requests to a, want 2", n)
	}
	if n, want := toNode(s.Node("b"), requests), 1+len(s.Node("b").Addresses()); n != want {
		t.Errorf("%d requests to b, want %d", n, want)
	}
}

func TestLastSessionIsShown(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL)
	site := serveNodes(t, name, "sticky", sessionHeader)
	waitSynced(t)
	if at := shownNode(t, "a").LastSession; at != nil {
		t.Errorf("before there is one a session was seen at %v", at)
	}
	v := newVisitor(t, site)
	v.visit("")
	first := shownNode(t, "a").LastSession
	if first == nil || time.Since(*first) > patience {
		t.Fatalf("a session was seen at %v", first)
	}
	eventually(t, "it is seen again", func() bool {
		v.visit("")
		return shownNode(t, "a").LastSession.After(*first)
	})
	// Who has none leaves it as it is.
	newVisitor(t, site).visit("", "Cookie", "other=1")
}

// TestRegistrarDrainsUntilIdle has a proxy leave while it answers requests, over each
// version of HTTP.
func TestRegistrarDrainsUntilIdle(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	entered, release := make(chan struct{}), make(chan struct{})
	slow := troubledService(t, "slow", entered, release)
	load(t, `{
		auto_https disable_redirects
		skip_install_trust
		registrar {
			registry memory `+name+`
			node_id edge
			endpoint https://127.0.0.1:`+port+`
			drain until_idle 1m
		}
	}
	https://127.0.0.1:`+port+` {
		tls internal
		reverse_proxy `+slow+`
	}`)
	eventually(t, "it is listed", func() bool { return record(t, m, "edge") != nil })
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		protocols := new(http.Protocols)
		protocols.SetHTTP1(proto == "HTTP/1.1")
		protocols.SetHTTP2(proto == "HTTP/2.0")
		client := &http.Client{Transport: &http.Transport{
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, Protocols: protocols,
		}}
		defer client.CloseIdleConnections()
		done := make(chan error, 1)
		go func() {
			resp, err := client.Get("https://127.0.0.1:" + port + "/slow") //nolint:noctx // it ends with its server
			if err == nil {
				if resp.Proto != proto {
					err = fmt.Errorf("it was %s, want %s", resp.Proto, proto)
				}
				_ = resp.Body.Close()
			}
			done <- err
		}()
		<-entered
		if n := ownWork.n.Load(); n != 1 {
			t.Errorf("over %s: %d connections with a request, want 1", proto, n)
		}
		release <- struct{}{}
		if err := <-done; err != nil {
			t.Error(err)
		}
		eventually(t, "it is answered", func() bool { return ownWork.n.Load() == 0 })
	}
	// The config goes, and the proxy lives on.
	done := make(chan struct{})
	go func() {
		defer close(done)
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
		defer client.CloseIdleConnections()
		resp, err := client.Get("https://127.0.0.1:" + port + "/slow") //nolint:noctx // as above
		if err != nil {
			t.Error(err)
			return
		}
		_ = resp.Body.Close()
	}()
	<-entered
	began := time.Now()
	load(t, "http://127.0.0.1:"+freeport.String(t)+" {\nrespond ok\n}")
	eventually(t, "it drains", func() bool { n := record(t, m, "edge"); return n != nil && n.State() == discovery.StateDraining })
	// Longer than an idle proxy would take.
	ctx, cancel := context.WithDeadline(t.Context(), began.Add(discovery.DefaultDrain+time.Second))
	defer cancel()
	<-ctx.Done()
	if record(t, m, "edge") == nil {
		t.Error("it left while a request was under way")
	}
	close(release)
	<-done
	eventually(t, "it has left", func() bool { return record(t, m, "edge") == nil })
}
