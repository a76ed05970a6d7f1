package natstest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// Names of what a child process is told.
const (
	envStore = "NATSTEST_STORE"
	envPort  = "NATSTEST_PORT"
)

// Child serves and returns true if this process is the child of [StartProcess].
// TestMain of a package that uses StartProcess calls it first, and returns if it
// did.
func Child() bool {
	store := os.Getenv(envStore)
	if store == "" {
		return false
	}
	if err := serve(store); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}

func serve(store string) error {
	port, err := strconv.Atoi(os.Getenv(envPort))
	if err != nil {
		return err
	}
	options := defaults(store)
	options.Port = port
	s := &Server{options: options, scheme: "nats"}
	if err := s.start(); err != nil {
		return err
	}
	fmt.Println(s.Port)
	// The parent closes the pipe to end us, and so does its death.
	_, err = io.Copy(io.Discard, os.Stdin)
	s.Stop()
	return err
}

// A Process is a server with JetStream in a process of its own, for tests that
// count the goroutines of theirs.
type Process struct {
	// Port is where the server listens; it stays the same across restarts.
	Port int

	t     testing.TB
	store string
	child *exec.Cmd
	stdin io.Closer
}

// StartProcess starts a server on a free port, and stops it when the test ends.
func StartProcess(t testing.TB) *Process {
	t.Helper()
	p := &Process{Port: freeport.Get(t), t: t, store: t.TempDir()}
	t.Cleanup(p.Stop)
	p.Start()
	return p
}

// URL returns where the server is.
func (p *Process) URL() string { return fmt.Sprintf("nats://127.0.0.1:%d", p.Port) }

// PID returns the id of the server's process.
func (p *Process) PID() int { return p.child.Process.Pid }

// Start starts a server that was stopped, on the same port with the same store.
func (p *Process) Start() {
	p.t.Helper()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), envStore+"="+p.store, envPort+"="+strconv.Itoa(p.Port),
		// Under the race detector a process otherwise idles before it exits.
		"GORACE=atexit_sleep_ms=0")
	child.Stderr = os.Stderr
	stdin, err := child.StdinPipe()
	if err != nil {
		p.t.Fatalf("starting a NATS server: %v", err)
	}
	stdout, err := child.StdoutPipe()
	if err != nil {
		p.t.Fatalf("starting a NATS server: %v", err)
	}
	if err := child.Start(); err != nil {
		p.t.Fatalf("starting a NATS server: %v", err)
	}
	p.child, p.stdin = child, stdin
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err == nil {
		p.Port, err = strconv.Atoi(strings.TrimSpace(line))
	}
	if err != nil {
		p.t.Fatalf("starting a NATS server: it says %q: %v", line, err)
	}
}

// Kill ends the server without giving it a chance, and returns when it is gone.
func (p *Process) Kill() {
	p.t.Helper()
	if err := p.child.Process.Kill(); err != nil {
		p.t.Fatalf("killing the NATS server: %v", err)
	}
	_ = p.child.Wait() // it was killed, and says so
	p.stdin.Close()
	p.child = nil
}

// Stop shuts the server down and returns when it is gone.
func (p *Process) Stop() {
	if p.child == nil {
		return
	}
	p.stdin.Close()
	if err := p.child.Wait(); err != nil {
		p.t.Errorf("the NATS server ended with: %v", err)
	}
	p.child = nil
}
