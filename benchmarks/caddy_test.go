// Package benchmarks measures what the README claims, on the binary that users
// build and on real registries: make bench.
package benchmarks

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"io"
	"net"
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
)

var otherBinary = flag.String("binary", "", "the Caddy to measure. Default: one that is built from here")

// build makes the binary, once, the way a user does.
var build = sync.OnceValues(func() (string, error) {
	if *otherBinary != "" {
		return filepath.Abs(*otherBinary)
	}
	if out, err := exec.Command("make", "-C", "..", "build").CombinedOutput(); err != nil {
		return "", fmt.Errorf("make build: %w\n%s", err, out)
	}
	return filepath.Abs("../bin/caddy")
})

// runCaddy runs Caddy with some sites, without its admin API, until the benchmark
// ends.
func runCaddy(b *testing.B, sites string) {
	b.Helper()
	startCaddy(b, "off", sites)
}

// startCaddy runs Caddy with some sites and its admin API at an address until the
// benchmark ends.
func startCaddy(b *testing.B, admin, sites string) *program {
	b.Helper()
	return startConfig(b, "admin "+admin, sites)
}

// startConfig is startCaddy with global options.
func startConfig(b *testing.B, options, sites string) *program {
	b.Helper()
	binary, err := build()
	if err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	file := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(file, []byte("{\n"+options+"\npersist_config off\nauto_https off\n}\n"+sites), 0o600); err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(binary, "run", "--config", file, "--adapter", "caddyfile")
	cmd.Env = append(os.Environ(), "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	log, err := cmd.StderrPipe()
	if err != nil {
		b.Fatal(err)
	}
	p := startProgram(b, cmd, syscall.SIGKILL)
	var head bytes.Buffer
	lines := bufio.NewScanner(io.TeeReader(log, &head))
	lines.Buffer(nil, 16<<20) // a warning may quote thousands of upstreams
	for lines.Scan() {
		if strings.Contains(lines.Text(), "serving initial configuration") {
			go func() { _, _ = io.Copy(io.Discard, log) }()
			return p
		}
	}
	b.Fatalf("Caddy did not start:\n%s", &head)
	return nil
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
	c, err := dialOnce(address)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	return c
}

func dialOnce(address string) (*conn, error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	return &conn{c, bufio.NewReader(c)}, nil
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
			const name = "content-length: " // HAProxy writes it so
			if len(line) > len(name) && strings.EqualFold(string(line[:len(name)]), name) {
				if length, err = strconv.Atoi(strings.TrimSpace(string(line[len(name):]))); err != nil {
					return fail(err)
				}
			}
		}
	}
}
