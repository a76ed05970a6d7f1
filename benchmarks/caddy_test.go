// Package benchmarks measures what the README claims, on the binary that users
// build and on real registries: make bench.
package benchmarks

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// build makes the binary, once, the way a user does.
func build(b *testing.B) string {
	b.Helper()
	if out, err := exec.Command("make", "-C", "..", "build").CombinedOutput(); err != nil {
		b.Fatalf("make build: %v\n%s", err, out)
	}
	path, err := filepath.Abs("../bin/caddy")
	if err != nil {
		b.Fatal(err)
	}
	return path
}

// runCaddy runs Caddy with some sites until the benchmark ends.
func runCaddy(b *testing.B, sites string) {
	b.Helper()
	binary, dir := build(b), b.TempDir()
	file := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(file, []byte("{\nadmin off\npersist_config off\nauto_https off\n}\n"+sites), 0o600); err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(binary, "run", "--config", file, "--adapter", "caddyfile")
	cmd.Env = append(os.Environ(), "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	log, err := cmd.StderrPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var head bytes.Buffer
	lines := bufio.NewScanner(io.TeeReader(log, &head))
	for lines.Scan() {
		if strings.Contains(lines.Text(), "serving initial configuration") {
			go func() { _, _ = io.Copy(io.Discard, log) }()
			return
		}
	}
	b.Fatalf("Caddy did not start:\n%s", &head)
}

// newBackend returns the address of a server that answers "ok".
func newBackend(b *testing.B) string {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	server := &http.Server{
		ReadHeaderTimeout: time.Minute,
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }),
	}
	go func() { _ = server.Serve(l) }()
	b.Cleanup(func() { _ = server.Close() })
	return l.Addr().String()
}

// A conn is one connection that asks and reads as cheaply as possible, because it
// shares the machine with what it measures.
type conn struct {
	net.Conn
	r *bufio.Reader
}

func dial(b *testing.B, address string) *conn {
	b.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	return &conn{c, bufio.NewReader(c)}
}

// get asks for "/" and returns the status.
func (c *conn) get(b *testing.B, service string) int {
	fail := func(err error) int {
		b.Errorf("request: %v", err)
		return 0
	}
	if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Service: %s\r\n\r\n", service); err != nil {
		return fail(err)
	}
	status, length := 0, 0
	for {
		line, err := c.r.ReadSlice('\n')
		if err != nil {
			return fail(err)
		}
		switch {
		case status == 0:
			if len(line) < 12 {
				return fail(fmt.Errorf("answer starts with %q", line))
			}
			if status, err = strconv.Atoi(string(line[9:12])); err != nil {
				return fail(err)
			}
		case len(line) <= 2:
			if _, err := c.r.Discard(length); err != nil {
				return fail(err)
			}
			return status
		default:
			if v, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
				if length, err = strconv.Atoi(strings.TrimSpace(string(v))); err != nil {
					return fail(err)
				}
			}
		}
	}
}
