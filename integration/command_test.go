package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// runCommand runs caddy discovery to its end, and returns its output and exit code.
func runCommand(t *testing.T, r registry, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := discoveryCommand(r, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func discoveryCommand(r registry, args ...string) *exec.Cmd {
	args = append([]string{"discovery"}, args...)
	if r != nil {
		args = append(args, r.flags()...)
	}
	cmd := exec.Command(binary, args...)
	return cmd
}

// background starts caddy discovery, to be interrupted by the test.
func background(t *testing.T, r registry, args ...string) (log *lockedBuffer, interrupt func()) {
	t.Helper()
	cmd := discoveryCommand(r, args...)
	log = new(lockedBuffer)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	interrupt = func() {
		if ended {
			return
		}
		ended = true
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("caddy discovery %s: %v\n%s", strings.Join(args, " "), err, log)
		}
	}
	t.Cleanup(interrupt)
	return log, interrupt
}

// TestCommand lists, watches, registers and removes nodes from a shell.
func TestCommand(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		r.put("a", camel("a", "http://127.0.0.1:80", `"service":"orders","zone":"eu-1"`))
		r.put("b", camel("b", "http://127.0.0.2:80", `"service":"pay","state":"draining"`))
		r.put("bad", `{"nodeId":"bad","endpoint":"http://{env.HOME}:80","lastSeen":"2025-10-10T12:00:00Z","load":0,"isOnline":true}`)

		out, stderr, code := runCommand(t, r, "nodes")
		if code != 0 || stderr != "" {
			t.Fatalf("nodes: %d %s", code, stderr)
		}
		for _, want := range []string{"ID ", "a    orders   http://127.0.0.1:80  up ", "zone=eu-1", "draining", "rejected", "placeholders are not accepted"} {
			if !strings.Contains(out, want) {
				t.Errorf("nodes does not show %q:\n%s", want, out)
			}
		}
		out, _, _ = runCommand(t, r, "nodes", "--json", "--state", "up", "--service", "orders")
		var nodes []map[string]any
		if err := json.Unmarshal([]byte(out), &nodes); err != nil || len(nodes) != 1 || nodes[0]["id"] != "a" {
			t.Errorf("nodes --json: %v %s", err, out)
		}

		watched, interrupt := background(t, r, "watch")
		eventually(t, "the watch runs", func() bool { return strings.Contains(watched.String(), "with 2 nodes") })
		_, leave := background(t, r, "register", "c", "http://127.0.0.1:9", "--service", "pay", "-m", "weight=3", "--heartbeat", "100ms", "--drain", "100ms")
		eventually(t, "the node is listed", func() bool { return strings.Contains(r.record("c"), `"weight":"3"`) })
		eventually(t, "the watch shows it", func() bool {
			return strings.Contains(watched.String(), "seen          c  http://127.0.0.1:9  service=pay")
		})
		if out, stderr, code := runCommand(t, r, "history", "c"); code == 2 {
			t.Logf("no history here: %s", stderr)
		} else if code != 0 || !strings.Contains(out, "http://127.0.0.1:9") {
			t.Errorf("history: %d %s %s", code, out, stderr)
		} else if _, stderr, code := runCommand(t, r, "history", "nobody"); code != 3 || !strings.Contains(stderr, "no such node") {
			t.Errorf("history of nobody: %d %s", code, stderr)
		}
		leave()
		// What is said on pub/sub takes its time to whoever listens.
		eventually(t, "the record is gone after the interrupt", func() bool { return r.record("c") == "" })
		eventually(t, "the watch shows that it left", func() bool { return strings.Contains(watched.String(), "left          c") })

		if out, stderr, code := runCommand(t, r, "deregister", "a"); code != 0 || !strings.Contains(out, "a left ") {
			t.Errorf("deregister: %d %s %s", code, out, stderr)
		}
		eventually(t, "the record is gone", func() bool { return r.record("a") == "" })
		if _, stderr, code := runCommand(t, r, "deregister", "nobody"); code != 3 || !strings.Contains(stderr, "does not list") {
			t.Errorf("deregister nobody: %d %s", code, stderr)
		}
		interrupt()
	})
}

// TestCommandDialsNobody looks at a fleet whose leases have run out, from a machine
// that all its records name.
func TestCommandDialsNobody(t *testing.T) {
	// The other kinds do not tell whoever comes later how old a record is.
	for name, start := range map[string]func(*testing.T) registry{"nats_kv": newKV, "redis_sorted_set": newSortedSet} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t)
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			var dialled atomic.Int64
			go func() {
				for {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					dialled.Add(1)
					_ = conn.Close()
				}
			}()
			for i := range 5 {
				id := fmt.Sprintf("n%d", i)
				r.put(id, camel(id, "http://"+listener.Addr().String(), `"service":"`+id+`"`))
			}
			eventually(t, "the leases have run out", func() bool {
				out, stderr, code := runCommand(t, r, "nodes", "--option", "ttl 1s")
				if code != 0 {
					t.Fatalf("nodes: %d %s", code, stderr)
				}
				return strings.Contains(out, " held ")
			})
			if _, stderr, code := runCommand(t, r, "drain", "n1", "--force", "--option", "ttl 1s"); code != 0 {
				t.Errorf("drain: %d %s", code, stderr)
			}
			if n := dialled.Load(); n > 0 {
				t.Errorf("%d connections were made to what the records name", n)
			}
		})
	}
}

// TestOverrides drains a node that goes on announcing itself, on two proxies, under
// traffic.
func TestOverrides(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		a, b := newService(t, "a"), newService(t, "b")
		beat := func() {
			for _, s := range []*service{a, b} {
				r.put(s.id, camel(s.id, "http://"+s.address, `"service":"orders"`))
			}
		}
		beat()
		if _, stderr, code := runCommand(t, r, "drain", "a"); code == 2 {
			for _, args := range [][]string{{"undrain", "a"}, {"weight", "a", "2"}, {"overrides"}} {
				if _, stderr, code := runCommand(t, r, args...); code != 2 || !strings.Contains(stderr, "keeps no overrides") {
					t.Errorf("%v: %d %s", args, code, stderr)
				}
			}
			t.Logf("no overrides here: %s", stderr)
			return
		} else if code != 0 {
			t.Fatalf("drain: %d %s", code, stderr)
		}
		ports := []string{freeport.String(t), freeport.String(t)}
		for _, port := range ports {
			start(t, "", site(port, r.block("ttl 1h")+"\nservice orders", "lb_policy round_robin"))
		}
		serve := func(what string, want ...*service) {
			t.Helper()
			for _, port := range ports {
				eventually(t, what, func() bool {
					beat() // it does not undo what the operator has decided
					return fmt.Sprint(round(t, len(want), "http://127.0.0.1:"+port)) == all(want)
				})
			}
		}
		serve("what was drained before", b)
		out, stderr, code := runCommand(t, r, "undrain", "a")
		if code != 0 || !strings.Contains(out, "a is up with weight 1") {
			t.Errorf("undrain: %d %s %s", code, out, stderr)
		}
		serve("both", a, b)
		out, stderr, code = runCommand(t, r, "drain", "b", "--for", "1h")
		if code != 0 || !strings.Contains(out, "b is draining") || !strings.Contains(out, "until ") {
			t.Errorf("drain: %d %s %s", code, out, stderr)
		}
		t.Log(strings.TrimSpace(out))
		serve("a alone", a)
		if out, _, code := runCommand(t, r, "weight", "b", "0.5"); code != 0 || !strings.Contains(out, "b is draining with weight 0.5") {
			t.Errorf("weight: %d %s", code, out)
		}
		if out, _, code := runCommand(t, r, "weight", "a", "0"); code != 0 || !strings.Contains(out, "a is up with weight 0") {
			t.Errorf("weight: %d %s", code, out)
		}
		if out, _, code := runCommand(t, r, "overrides"); code != 0 || !strings.Contains(out, "a   -         × 0     -      yes") {
			t.Errorf("overrides: %d %s", code, out)
		}
		for _, args := range [][]string{{"weight", "a", "1"}, {"weight", "b", "1"}, {"undrain", "b"}} {
			if _, stderr, code := runCommand(t, r, args...); code != 0 {
				t.Errorf("%v: %d %s", args, code, stderr)
			}
		}
		serve("both again", a, b)
		if out, _, _ := runCommand(t, r, "overrides", "--json"); out != "[]\n" {
			t.Errorf("overrides are left: %s", out)
		}
		if _, stderr, code := runCommand(t, r, "drain", "nobody"); code != 3 || !strings.Contains(stderr, "no such node") {
			t.Errorf("drain nobody: %d %s", code, stderr)
		}
		if out, _, code := runCommand(t, r, "drain", "nobody", "--force"); code != 0 || !strings.Contains(out, "is not listed now") {
			t.Errorf("drain nobody --force: %d %s", code, out)
		}
	})
}

// TestCommandMistakes has every mistake be told, with the exit code of a failure.
func TestCommandMistakes(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(secret, []byte("hunter2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args, want string
	}{
		{"nodes -r http://127.0.0.1:1", "does not name a backend by its scheme, want one of nats://"},
		{"nodes -r nats://127.0.0.1:1", "unreachable"},
		{"nodes -r nats://me:hunter2@127.0.0.1:1", "unreachable"},
		{"nodes -r nats://127.0.0.1:1 --user me --password-file " + secret, "unreachable"},
		{"nodes -r nats://127.0.0.1:1 --user me", "--password-env"},
		{"nodes -r nats://127.0.0.1:1 --user me --password-env NOT_SET_ANYWHERE", "NOT_SET_ANYWHERE"},
		{"nodes -r nats://127.0.0.1:1 -o nonsense", "unknown option"},
		{"nodes --state broken", "want one of up, draining"},
		{"register a http://h:1/path -r nats://127.0.0.1:1", "a path is not accepted"},
		{"register a http://h:1 --ttl 1s -r nats://127.0.0.1:1", "want more than the heartbeat"},
		{"register a http://h:1 -m x -r nats://127.0.0.1:1", "want key=value"},
		{"history", "accepts 1 arg"},
		{"status --address 127.0.0.1:1", "refused"},
		{"nonsense", "unknown command"},
	} {
		_, stderr, code := runCommand(t, nil, strings.Fields(c.args)...)
		if code != 1 || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: exit code %d, %q, want it to say %q", c.args, code, stderr, c.want)
		}
		if strings.Contains(stderr, "hunter2") {
			t.Errorf("%s tells the password: %s", c.args, stderr)
		}
	}
	help, _, code := runCommand(t, nil, "nodes", "--help")
	if code != 0 || !strings.Contains(help, "$ caddy discovery nodes --service orders") {
		t.Errorf("help: %d %s", code, help)
	}
	out, err := exec.Command(binary, "__complete", "discovery", "nodes", "--state", "").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "draining") {
		t.Errorf("completion: %v %s", err, out)
	}
}

// TestAdmin asks a running Caddy, by its admin API and by caddy discovery status.
func TestAdmin(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		const many = 10_000
		for i := range many {
			r.put(fmt.Sprintf("n-%05d", i), camel(fmt.Sprintf("n-%05d", i), fmt.Sprintf("http://127.0.%d.%d:80", i/200, i%200+1), `"service":"orders","zone":"eu-1","version":"1.2.3"`))
		}
		p := start(t, "", site(freeport.String(t), r.block("ttl 1h")+"\nservice orders", ""))
		var nodes []map[string]any
		get := func(path string) error {
			body, err := ask("http://" + p.admin + path)
			if err != nil {
				return err
			}
			nodes = nil
			return json.Unmarshal([]byte(body), &nodes)
		}
		eventually(t, "all are listed", func() bool {
			return get("/discovery/registries") == nil && len(nodes) == 1 && nodes[0]["nodes"] == float64(many)
		})
		began := time.Now()
		body, err := ask("http://" + p.admin + "/discovery/nodes")
		t.Logf("the admin API shows %d nodes in %v", many, time.Since(began).Round(time.Millisecond))
		if n := strings.Count(body, `"lease_left":`); err != nil || n != many {
			t.Errorf("nodes: %v, %d", err, n)
		}
		began = time.Now()
		if out, stderr, code := runCommand(t, r, "nodes"); code != 0 || strings.Count(out, "\n") != many+1 {
			t.Errorf("the command shows %d lines: %d %s", strings.Count(out, "\n"), code, stderr)
		}
		t.Logf("caddy discovery nodes shows them in %v", time.Since(began).Round(time.Millisecond))
		if err := get("/discovery/journal?limit=5"); err != nil || len(nodes) != 5 {
			t.Errorf("journal: %v, %d", err, len(nodes))
		}
		out, stderr, code := runCommand(t, nil, "status", "--address", p.admin)
		if code != 0 || !strings.Contains(out, "10000 up") {
			t.Errorf("status: %d %s %s", code, out, stderr)
		}
		metrics, err := ask("http://" + p.admin + "/metrics")
		if err != nil || !strings.Contains(metrics, `state="up"} 10000`) {
			t.Errorf("the metrics do not count the nodes: %v", err)
		}
		r.stop()
		eventually(t, "the loss is noticed", func() bool {
			_, stderr, code := runCommand(t, nil, "status", "--address", p.admin)
			return code == 1 && strings.Contains(stderr, "has not been watched for")
		})
		r.restart()
	})
}
