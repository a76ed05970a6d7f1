package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// TestExample runs the example as it stands, and has a node leave whose id would do
// harm in a shell.
func TestExample(t *testing.T) {
	dir := t.TempDir()
	binary := filepath.Join(dir, "caddy")
	if out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	server := natstest.Start(t)
	bucket := server.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 10})
	log := filepath.Join(dir, "log")
	cmd := exec.Command(binary, "run")
	cmd.Env = append(os.Environ(), "REGISTRY="+server.URL(), "PORT="+freeport.String(t), "ADMIN=127.0.0.1:"+freeport.String(t),
		"NOTIFY_LOG="+log, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		if t.Failed() {
			t.Log(out.String())
		}
	})
	const id = "a; touch harm"
	said := ""
	await(t, func() bool {
		// The node comes and goes until the proxy watches: what the first listing
		// shows is no event.
		if _, err := bucket.PutString(t.Context(), "node.a=3B=20touch=20harm", `{"nodeId":"`+id+`","endpoint":"http://10.0.0.1:80"}`); err != nil {
			t.Fatal(err)
		}
		if err := bucket.Delete(t.Context(), "node.a=3B=20touch=20harm"); err != nil {
			t.Fatal(err)
		}
		content, _ := os.ReadFile(log)
		said = string(content)
		return said != ""
	})
	if want := "node_left " + id + " (left): its record was removed\n"; !strings.HasPrefix(said, want) {
		t.Errorf("the command said %q, want %q", said, want)
	}
	if _, err := os.Stat("harm"); err == nil {
		t.Error("an id was run by a shell")
	}
	server.Stop()
	await(t, func() bool {
		content, _ := os.ReadFile(log)
		return strings.Contains(string(content), "registry_disconnected nats_kv://")
	})
}

func await(t *testing.T, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
		time.Sleep(10 * time.Millisecond)
	}
}
