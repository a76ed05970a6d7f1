package integration

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// A visitor is a client that keeps the cookie of its session.
type visitor struct {
	t      *testing.T
	cookie string // name=value
	status int
	state  string   // kept, new or moved
	set    []string // what the newest response set
}

// visit returns which node has answered at the URL.
func (v *visitor) visit(url string) string {
	v.t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		v.t.Fatal(err)
	}
	req.Close = true // a reload closes connections
	if v.cookie != "" {
		req.Header.Set("Cookie", v.cookie)
	}
	resp, err := client.Do(req)
	if err != nil {
		v.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	v.status, v.state, v.set = resp.StatusCode, resp.Header.Get("Session"), resp.Header["Set-Cookie"]
	if len(v.set) > 0 {
		v.cookie, _, _ = strings.Cut(v.set[0], ";")
	}
	return string(body)
}

// stays fails the test unless requests to each URL go to the node, as parts of the session
// that there is.
func (v *visitor) stays(what, node string, urls ...string) {
	v.t.Helper()
	for _, url := range urls {
		for range 5 {
			if got := v.visit(url); got != node || v.state != "kept" || len(v.set) > 0 {
				v.t.Errorf("%s: a request to %s went to %q (%d, session %s, cookies %q), want %s where its session is", what, url, got, v.status, v.state, v.set, node)
				return
			}
		}
	}
}

// moves waits until the session has moved to another node than the one.
func (v *visitor) moves(what, from, url string) (to string) {
	v.t.Helper()
	eventually(v.t, what, func() bool { to = v.visit(url); return to != from })
	if v.state != "moved" || len(v.set) != 1 || to == "" {
		v.t.Errorf("%s: it went to %q as %s with the cookies %q, want it moved, with one cookie", what, to, v.state, v.set)
	}
	return to
}

// a stickySite keeps sessions by the secrets in files.
func stickySite(r registry, port, options, rest string, secrets ...string) string {
	return site(port, r.block("ttl 1h")+"\nservice orders\nsync_timeout 1s\n"+options+"\nsticky {\nsecret {file."+strings.Join(secrets, "}\nsecret {file.")+"}\n}",
		"header_down Session {http.reverse_proxy.upstream.node.session}\n"+rest)
}

// TestSticky has a client's session go through what happens to a fleet and its proxies, of
// which there are two with the same secret.
func TestSticky(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		dir := t.TempDir()
		secret := func(name, value string) string {
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, []byte(value+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			return path
		}
		old, next := secret("old", "hunter2-the-old-secret"), secret("new", "hunter2-the-new-secret")
		join := func(id, metadata string) *service {
			s := newService(t, id)
			r.put(id, camel(id, "http://"+s.address, `"service":"orders"`+metadata))
			return s
		}
		fleet := map[string]*service{"a": join("a", ""), "b": join("b", ""), "c": join("c", "")}
		one, two := freeport.String(t), freeport.String(t)
		urls := []string{"http://127.0.0.1:" + one, "http://127.0.0.1:" + two}
		data := t.TempDir()
		p := startOn(t, data, "", stickySite(r, one, "", "lb_policy round_robin", old))
		q := start(t, "", stickySite(r, two, "subset 1\nprefer zone x", "lb_policy least_conn\nlb_retries 2", old))
		if _, broadcast := r.(*broadcast); broadcast {
			// Its nodes are known to a proxy once they have been heard.
			for _, url := range urls {
				eventually(t, "the fleet is heard", func() bool {
					for id, s := range fleet {
						r.put(id, camel(id, "http://"+s.address, `"service":"orders"`))
					}
					body, err := ask(url)
					return err == nil && len(body) == 1
				})
			}
		}
		v := &visitor{t: t}
		for v.visit(urls[0]) != "a" {
			if v.state != "new" || len(v.set) != 1 || strings.Contains(v.set[0], "=a;") {
				t.Fatalf("status %d, session %s, cookies %q, want a new session", v.status, v.state, v.set)
			}
			v.cookie = ""
		}
		eventually(t, "the other proxy knows the node", func() bool { return v.visit(urls[1]) == "a" })
		v.stays("on two proxies", "a", urls...)

		fleet["a"] = join("a", "")
		for _, url := range urls {
			eventually(t, "the new address is known", func() bool {
				nodes, err := ask("http://" + map[string]*proxy{urls[0]: p, urls[1]: q}[url].admin + "/discovery/nodes?id=a")
				return err == nil && strings.Contains(nodes, fleet["a"].address)
			})
		}
		v.stays("at a new address", "a", urls...)

		p.reload("", stickySite(r, one, "pick 2", "lb_policy random", old))
		v.stays("after a reload", "a", urls[0])

		join("a", `,"state":"draining"`)
		eventually(t, "it drains", func() bool {
			nodes, _ := ask("http://" + p.admin + "/discovery/nodes?id=a")
			return strings.Contains(nodes, "draining")
		})
		v.stays("while it drains", "a", urls[0])
		for range 20 {
			if n := (&visitor{t: t}); n.visit(urls[0]) == "a" {
				t.Error("a node that drains got a new session")
			}
		}
		fleet["a"] = join("a", "")

		// Every proxy knows the new secret before one of them uses it.
		p.reload("", stickySite(r, one, "", "", old, next))
		q.reload("", stickySite(r, two, "", "", old, next))
		v.stays("before the new secret is used", "a", urls...)
		p.reload("", stickySite(r, one, "", "", next, old))
		before := v.cookie
		if to := v.visit(urls[0]); to != "a" || v.state != "kept" || len(v.set) != 1 || v.cookie == before {
			t.Errorf("with the new secret it went to %q as %s with the cookies %q, want it renewed", to, v.state, v.set)
		}
		v.stays("with a cookie of the new secret", "a", urls[0])
		if to := v.visit(urls[1]); to != "a" || v.state != "kept" {
			t.Errorf("at the proxy that knows the new secret, and does not use it, it went to %q as %s", to, v.state)
		}
		v.visit(urls[0]) // each renews what is not its own
		q.reload("", stickySite(r, two, "", "", next))
		v.stays("without the old secret", "a", urls...)

		eventually(t, "the list is saved", func() bool {
			for _, file := range warmFiles(t, data) {
				if saved, err := os.ReadFile(file); err == nil && strings.Contains(string(saved), fleet["a"].address) {
					return true
				}
			}
			return false
		})
		p.kill(syscall.SIGTERM)
		r.stop()
		p = startOn(t, data, "", stickySite(r, one, "", "", next))
		// From its first request on: it takes no node for gone that it has not probed yet.
		eventually(t, "it serves from the saved list", func() bool { v.visit(urls[0]); return v.status == http.StatusOK })
		for range 200 {
			if to := v.visit(urls[0]); v.state != "kept" || len(v.set) > 0 {
				t.Fatalf("without the registry it went to %q as %s with the cookies %q, want it kept", to, v.state, v.set)
			}
		}
		eventually(t, "the node itself serves", func() bool { return v.visit(urls[0]) == "a" })
		v.stays("without the registry", "a", urls...)
		r.restart()
		for id, s := range fleet {
			r.put(id, camel(id, "http://"+s.address, `"service":"orders"`))
		}

		eventually(t, "the session moves with maintenance", func() bool {
			r.put("a", camel("a", "http://"+fleet["a"].address, `"service":"orders","state":"maintenance"`))
			return v.visit(urls[0]) != "a"
		})
		if v.state != "moved" || len(v.set) != 1 {
			t.Errorf("in maintenance: session %s, cookies %q, want it moved with a cookie", v.state, v.set)
		}
		at := v.visit(urls[0])
		r.remove(at)
		v.moves("when its node has left", at, urls[0])

		for _, p := range []*proxy{p, q} {
			all, err := ask("http://" + p.admin + "/discovery/nodes")
			if err != nil || strings.Contains(p.log.String()+all, "hunter2") {
				t.Errorf("the log or the admin API shows a secret, %v", err)
			}
		}
	})
}

// TestStickyWebSockets upgrades connections, which stay at their node while it drains.
func TestStickyWebSockets(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		for _, id := range []string{"a", "b", "c"} {
			r.put(id, camel(id, "http://"+newEcho(t, id), `"service":"orders"`))
		}
		port, secret := freeport.String(t), filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(secret, []byte("s"), 0o600); err != nil {
			t.Fatal(err)
		}
		start(t, "", stickySite(r, port, "", "lb_policy round_robin", secret))
		var cookie, node string
		eventually(t, "a WebSocket", func() bool { _, node, cookie = upgrade(t, port, ""); return node != "" })
		if cookie == "" {
			t.Fatal("the response that upgrades sets no cookie")
		}
		for range 10 {
			if _, got, set := upgrade(t, port, cookie); got != node || set != "" {
				t.Errorf("the next one went to %q with the cookie %q, want %s", got, set, node)
			}
		}
	})
}

// newEcho starts a service that upgrades and then says its id, and keeps the connection
// for as long as the client does. It returns its address.
func newEcho(t *testing.T, id string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + id + "\n")
		_ = rw.Flush()
		_, _ = io.Copy(io.Discard, rw)
	})}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
	return l.Addr().String()
}

// upgrade opens a connection that is upgraded, and returns which node is at its other end,
// "" if none is, and the cookie that was set.
func upgrade(t *testing.T, port, cookie string) (conn net.Conn, node, set string) {
	t.Helper()
	conn, err := net.Dial("tcp", "127.0.0.1:"+port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	head := "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n"
	if cookie != "" {
		head += "Cookie: " + cookie + "\r\n"
	}
	if _, err := io.WriteString(conn, head+"\r\n"); err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReader(conn)
	resp, err := http.ReadResponse(reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		_ = resp.Body.Close()
		return conn, "", ""
	}
	line, err := reader.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	set, _, _ = strings.Cut(resp.Header.Get("Set-Cookie"), ";")
	return conn, strings.TrimSpace(line), set
}

// TestDrainWaits drains a node that has a WebSocket through one proxy and a session
// through another, and waits until both have ended.
func TestDrainWaits(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		if !r.persistent() {
			t.Log("pub/sub keeps no overrides")
			return
		}
		r.put("a", camel("a", "http://"+newEcho(t, "a"), `"service":"sockets"`))
		b := newService(t, "b")
		r.put("b", camel("b", "http://"+b.address, `"service":"orders"`))
		one, two := freeport.String(t), freeport.String(t)
		p := start(t, "", site(one, r.block("ttl 1h")+"\nservice sockets", ""))
		q := start(t, "", site(two, r.block("ttl 1h")+"\nservice orders\nsticky", "header_down Session {http.reverse_proxy.upstream.node.session}"))
		var conn net.Conn
		eventually(t, "a WebSocket", func() bool { var node string; conn, node, _ = upgrade(t, one, ""); return node == "a" })
		v := &visitor{t: t}
		eventually(t, "a session", func() bool { return v.visit("http://127.0.0.1:"+two) == "b" })

		addresses := []string{"--address", p.admin, "--address", q.admin, "--option", "ttl 1h"}
		wait := func(id, wait, idle string, more ...string) []string {
			return append(append([]string{"drain", id, "--wait", wait, "--idle", idle}, addresses...), more...)
		}
		// The time is over.
		out, stderr, code := runCommand(t, r, wait("a", "700ms", "300ms")...)
		if code != 1 || !strings.Contains(stderr, "is not idle after 700ms") || !strings.Contains(stderr, p.admin+": 1 in flight; "+q.admin+": idle") || !strings.Contains(out, "a is draining") {
			t.Errorf("with a WebSocket: %d %s %s", code, out, stderr)
		}
		// A proxy that does not answer is not idle.
		if _, stderr, code := runCommand(t, r, wait("b", "700ms", "300ms", "--address", "127.0.0.1:"+freeport.String(t))...); code != 1 || !strings.Contains(stderr, "connection refused") {
			t.Errorf("with a proxy that is away: %d %s", code, stderr)
		}
		// What ends meanwhile.
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var sessions sync.WaitGroup
		sessions.Go(func() {
			for ctx.Err() == nil {
				if to := v.visit("http://127.0.0.1:" + two); to != "b" || v.state != "kept" {
					t.Errorf("the session went to %q as %s", to, v.state)
				}
				time.Sleep(20 * time.Millisecond)
			}
		})
		for id, left := range map[string]func(){"a": func() { _ = conn.Close() }, "b": func() { stop(); sessions.Wait() }} {
			cmd := discoveryCommand(r, wait(id, "30s", "500ms")...)
			log := new(lockedBuffer)
			cmd.Stdout, cmd.Stderr = log, log
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			sign := map[string]string{"a": p.admin + ": 1 in flight", "b": q.admin + ": none in flight, sessions still come"}[id]
			eventually(t, "it says what is left of "+id, func() bool { return strings.Contains(log.String(), sign) })
			left()
			if err := cmd.Wait(); err != nil || !strings.Contains(log.String(), id+" is idle") {
				t.Errorf("drain %s --wait: %v\n%s", id, err, log)
			}
		}
		// It is gone.
		r.remove("a")
		eventually(t, "the proxies know", func() bool {
			nodes, err := ask("http://" + p.admin + "/discovery/nodes?id=a")
			return err == nil && strings.TrimSpace(nodes) == "[]"
		})
		if out, stderr, code := runCommand(t, r, wait("a", "20s", "10s", "--force")...); code != 0 || !strings.Contains(out, p.admin+": it is gone") {
			t.Errorf("of a node that is gone: %d %s %s", code, out, stderr)
		}
	})
}

// TestProxyDrainsUntilIdle stops proxies with and without work. Those that have some
// answer meanwhile, announced as draining.
func TestProxyDrainsUntilIdle(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		r.put("a", camel("a", "http://"+newEcho(t, "a"), `"service":"sockets"`))
		port := freeport.String(t)
		registrar := "registrar {\n" + r.block("ttl 1h") + "\nnode_id edge\nendpoint http://127.0.0.1:" + port + "\nheartbeat 100ms\ndrain until_idle 25s\n}"
		p := start(t, registrar, site(port, r.block("ttl 1h")+"\nservice sockets", ""))
		eventually(t, "it is listed", func() bool { return r.record("edge") != "" })
		var conn net.Conn
		eventually(t, "a WebSocket", func() bool { var node string; conn, node, _ = upgrade(t, port, ""); return node == "a" })
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		began := time.Now()
		eventually(t, "it drains", func() bool { return strings.Contains(r.record("edge"), string(discovery.StateDraining)) })
		eventually(t, "it drains for longer than it must", func() bool {
			if r.record("edge") == "" {
				t.Fatal("it left while there was a WebSocket")
			}
			return time.Since(began) > discovery.DefaultDrain+time.Second
		})
		if other, node, _ := upgrade(t, port, ""); node != "a" {
			t.Error("it does not answer any more")
		} else {
			_ = other.Close()
		}
		_ = conn.Close()
		select {
		case <-p.done:
		case <-time.After(15 * time.Second): // of the 25 that it would have
			t.Error("it has not ended after its last WebSocket")
		}
		if took := time.Since(began); r.record("edge") != "" {
			t.Errorf("its record stands after %v", took)
		}
		if !strings.Contains(p.log.String(), `"until_idle":true`) {
			t.Error("the log does not say how it drains")
		}
	})
}
