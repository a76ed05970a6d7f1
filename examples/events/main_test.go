package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// build returns the path of the example's binary.
var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "caddy-discovery-events")
	if err != nil {
		return "", err
	}
	binary := filepath.Join(dir, "caddy")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return binary, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if binary, err := build(); err == nil {
		_ = os.RemoveAll(filepath.Dir(binary))
	}
	os.Exit(code)
}

// example is the example as it runs.
type example struct {
	t      *testing.T
	cmd    *exec.Cmd
	admin  string
	server *natstest.Server
	bucket jetstream.KeyValue
	ended  chan struct{}

	mu  sync.Mutex
	out bytes.Buffer
}

func (e *example) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.out.Write(p)
}

func (e *example) log() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.out.String()
}

// start runs the example with one of its Caddyfiles, and waits until it watches.
func start(t *testing.T, file string, env ...string) *example {
	t.Helper()
	binary, err := build()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	e := &example{t: t, admin: "127.0.0.1:" + freeport.String(t), ended: make(chan struct{})}
	e.server = natstest.Start(t)
	e.bucket = e.server.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 10})
	e.cmd = exec.Command(binary, "run", "--config", file, "--adapter", "caddyfile")
	e.cmd.Env = append(append(os.Environ(), "REGISTRY="+e.server.URL(), "PORT="+freeport.String(t), "ADMIN="+e.admin,
		"CADDY="+binary, "CONFIG="+file, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir), env...)
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	e.cmd.Stdout, e.cmd.Stderr = e, e
	e.cmd.WaitDelay = time.Second // commands that it left behind have its output
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = e.cmd.Wait(); close(e.ended) }()
	t.Cleanup(func() {
		_ = e.cmd.Process.Kill()
		<-e.ended
		if t.Failed() {
			t.Log(e.log())
		}
	})
	await(t, "it watches the registry", func() bool { return strings.Contains(e.log(), "listed the registry") })
	return e
}

// list writes the record of a node; its id is also its key.
func (e *example) list(id string) {
	e.t.Helper()
	if _, err := e.bucket.PutString(e.t.Context(), "node."+id, `{"nodeId":"`+id+`","endpoint":"http://10.0.0.1:80"}`); err != nil {
		e.t.Fatal(err)
	}
}

// terminate ends the example as a service manager does.
func (e *example) terminate() {
	e.t.Helper()
	_ = e.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-e.ended:
	case <-time.After(patience):
		e.t.Fatal("it does not end")
	}
}

// TestExample runs the example as it stands, and has a node leave whose id would do
// harm in a shell.
func TestExample(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	e := start(t, "Caddyfile", "NOTIFY_LOG="+log)
	const id, key = "a; touch harm", "node.a=3B=20touch=20harm"
	if _, err := e.bucket.PutString(t.Context(), key, `{"nodeId":"`+id+`","endpoint":"http://10.0.0.1:80"}`); err != nil {
		t.Fatal(err)
	}
	if err := e.bucket.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	content := ""
	said := func(what string) bool {
		bytes, _ := os.ReadFile(log)
		content = string(bytes)
		return strings.Contains(content, what)
	}
	await(t, "the command is run", func() bool { return said("node_left") })
	if want := "node_left " + id + " (left): its record was removed\n"; !strings.HasPrefix(content, want) {
		t.Errorf("the command said %q, want %q", content, want)
	}
	if _, err := os.Stat("harm"); err == nil {
		t.Error("an id was run by a shell")
	}
	e.server.Stop()
	await(t, "the loss of the registry is told", func() bool { return said("registry_disconnected nats_kv://") })
	e.terminate()
}

// TestReload has the handler reload Caddy at each event, again and again.
func TestReload(t *testing.T) {
	e := start(t, "reload.Caddyfile")
	for i := range 5 {
		e.list(fmt.Sprintf("n%d", i))
		await(t, "Caddy is reloaded by the handler", func() bool { return strings.Count(e.log(), `"msg":"load complete"`) > i })
		await(t, "the command that reloads ends well", func() bool { return strings.Count(e.log(), `"msg":"ran"`) > i })
	}
	if strings.Contains(e.log(), "handler error") {
		t.Error("a handler failed")
	}
	e.terminate()
}

// TestChildThatGoesOn has the handler's command leave a child behind that keeps its
// output open, and another one that does not end itself: neither a reload nor the
// exit waits for them.
func TestChildThatGoesOn(t *testing.T) {
	for name, then := range map[string]string{"child": "", "endless": "wait"} {
		t.Run(name, func(t *testing.T) {
			children := filepath.Join(t.TempDir(), "children")
			notify := filepath.Join(t.TempDir(), "notify")
			if err := os.WriteFile(notify, []byte("#!/bin/sh\nsleep 300 &\necho $! >>"+children+"\n"+then+"\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			e := start(t, "Caddyfile", "NOTIFY="+notify)
			e.list("a")
			if err := e.bucket.Delete(t.Context(), "node.a"); err != nil {
				t.Fatal(err)
			}
			var child int
			await(t, "the command is run", func() bool {
				pid, _ := os.ReadFile(children)
				child, _ = strconv.Atoi(strings.TrimSpace(string(pid)))
				return child > 0
			})
			t.Cleanup(func() { _ = syscall.Kill(child, syscall.SIGKILL) })
			client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
			config, err := os.ReadFile("Caddyfile")
			if err != nil {
				t.Fatal(err)
			}
			// The running Caddy has the same environment for what the file names.
			req, err := http.NewRequest(http.MethodPost, "http://"+e.admin+"/load", bytes.NewReader(config))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "text/caddyfile")
			req.Header.Set("Cache-Control", "must-revalidate")
			resp, err := client.Do(req)
			if err != nil {
				t.Fatalf("the reload waits for the command: %v", err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("the reload: %s", resp.Status)
			}
			e.terminate()
		})
	}
}

// patience bounds every wait, far below what the commands of the tests take.
const patience = 30 * time.Second

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
