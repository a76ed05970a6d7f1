package filebackend

import (
	"context"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestBinary holds that xcaddy builds Caddy with the plugin and this backend, and that
// its commands take the URLs.
func TestBinary(t *testing.T) {
	if out, err := exec.Command("make", "-C", "../..", "bin/caddy-file").CombinedOutput(); err != nil {
		t.Fatalf("make: %v\n%s", err, out)
	}
	url := harness{t.TempDir()}.url()
	caddy := func(args ...string) *exec.Cmd {
		c := exec.Command("../../bin/caddy-file", append([]string{"discovery"}, args...)...)
		c.Env = append(c.Environ(), "XDG_DATA_HOME="+filepath.Dir(url), "CADDY_DISCOVERY_REGISTRY="+url)
		return c
	}
	nodes := func() string {
		out, err := caddy("nodes", "--registry", url).CombinedOutput()
		if err != nil {
			t.Fatalf("nodes: %v\n%s", err, out)
		}
		return string(out)
	}
	if out := nodes(); strings.Contains(out, "pay-1") {
		t.Errorf("an empty registry lists\n%s", out)
	}
	register := caddy("register", "pay-1", "http://10.0.0.9:8080", "--drain", "0s")
	if err := register.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the node is listed", func() bool { return strings.Contains(nodes(), "http://10.0.0.9:8080") })
	if out, err := caddy("drain", "pay-1").CombinedOutput(); err != nil {
		t.Errorf("drain: %v\n%s", err, out)
	}
	eventually(t, "the node drains", func() bool { return strings.Contains(nodes(), "draining") })
	if err := register.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := register.Wait(); err != nil {
		t.Errorf("register: %v", err)
	}
	if out := nodes(); strings.Contains(out, "10.0.0.9") {
		t.Errorf("after the node left there is\n%s", out)
	}
}

func unixTransport(socket string) *http.Transport {
	return &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
}
