package natstest

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// Names of what a child process is told.
const (
	envStore  = "NATSTEST_STORE"
	envPort   = "NATSTEST_PORT"
	envConfig = "NATSTEST_CONFIG"
)

// What a child says when it has taken its configuration anew.
const reloaded = "reloaded"

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
	configure := func() (*server.Options, error) {
		port, err := strconv.Atoi(os.Getenv(envPort))
		if err != nil {
			return nil, err
		}
		options := defaults(store)
		options.Port = port
		return options, options.ProcessConfigFile(os.Getenv(envConfig))
	}
	options, err := configure()
	if err != nil {
		return err
	}
	s := &Server{options: options, scheme: "nats"}
	if err := s.start(); err != nil {
		return err
	}
	fmt.Println(s.Port)
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	go func() {
		for range reload {
			options, err := configure()
			if err == nil {
				err = s.running.ReloadOptions(options)
			}
			if err != nil {
				fmt.Println(err)
				continue
			}
			fmt.Println(reloaded)
		}
	}()
	// The parent closes the pipe to end us, and so does its death.
	_, err = io.Copy(io.Discard, os.Stdin)
	s.Stop()
	return err
}

// A Process is a server with JetStream in a process of its own, for tests that
// count the goroutines of theirs, or that kill, pause or configure it anew.
type Process struct {
	// Port is where the server listens; it stays the same across restarts.
	Port int

	t             testing.TB
	store, config string
	child         *exec.Cmd
	stdin         io.Closer
	stdout        *bufio.Reader
}

// StartProcess starts a server on a free port, and stops it when the test ends.
// The lines are those of a configuration file of the server.
func StartProcess(t testing.TB, lines ...string) *Process {
	t.Helper()
	p := newProcess(t, lines...)
	p.Start()
	return p
}

func newProcess(t testing.TB, lines ...string) *Process {
	t.Helper()
	p := &Process{Port: freeport.Get(t), t: t, store: t.TempDir(), config: filepath.Join(t.TempDir(), "server.conf")}
	p.configure(lines)
	t.Cleanup(p.Stop)
	return p
}

func (p *Process) configure(lines []string) {
	p.t.Helper()
	text := "host: 127.0.0.1\n" + strings.Join(lines, "\n") + "\n" // an empty file is an error
	if err := os.WriteFile(p.config, []byte(text), 0o600); err != nil {
		p.t.Fatalf("configuring a NATS server: %v", err)
	}
}

// SystemUser is the name and the password of who may, in a cluster of
// [StartProcesses], do what concerns all of it.
const SystemUser = "admin"

// StartProcesses starts servers that form a cluster. They know each other when it
// returns, but may not have agreed on a leader yet.
func StartProcesses(t testing.TB, size int) []*Process {
	t.Helper()
	var routes []string
	for range size {
		routes = append(routes, net.JoinHostPort("127.0.0.1", freeport.String(t)))
	}
	processes := make([]*Process, size)
	var group sync.WaitGroup
	for i := range processes {
		processes[i] = newProcess(t,
			fmt.Sprintf("server_name: %s", memberName(i)),
			fmt.Sprintf("cluster { name: natstest, listen: %q, routes: [nats-route://%s] }", routes[i], strings.Join(routes, ", nats-route://")),
			// Everybody else is let in without a name, into the global account.
			fmt.Sprintf("accounts { $SYS { users: [{user: %[1]s, password: %[1]s}] } }", SystemUser))
	}
	errs := make([]error, size)
	for i, p := range processes {
		group.Go(func() { errs[i] = p.start() })
	}
	group.Wait()
	for _, err := range errs {
		if err != nil {
			t.Fatalf("starting a NATS cluster: %v", err)
		}
	}
	return processes
}

func memberName(i int) string { return fmt.Sprintf("natstest-%d", i) }

// URL returns where the server is.
func (p *Process) URL() string { return fmt.Sprintf("nats://127.0.0.1:%d", p.Port) }

// PID returns the id of the server's process.
func (p *Process) PID() int { return p.child.Process.Pid }

// Start starts a server that was stopped, on the same port with the same store.
func (p *Process) Start() {
	p.t.Helper()
	if err := p.start(); err != nil {
		p.t.Fatalf("starting a NATS server: %v", err)
	}
}

func (p *Process) start() error {
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), envStore+"="+p.store, envPort+"="+strconv.Itoa(p.Port), envConfig+"="+p.config,
		// Under the race detector a process otherwise idles before it exits.
		"GORACE=atexit_sleep_ms=0")
	child.Stderr = os.Stderr
	stdin, err := child.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := child.StdoutPipe()
	if err != nil {
		return err
	}
	if err := child.Start(); err != nil {
		return err
	}
	p.child, p.stdin, p.stdout = child, stdin, bufio.NewReader(stdout)
	line, err := p.stdout.ReadString('\n')
	if err == nil {
		p.Port, err = strconv.Atoi(strings.TrimSpace(line))
	}
	if err != nil {
		return fmt.Errorf("it says %q: %w", line, err)
	}
	return nil
}

// Reload gives the running server other lines of its configuration, such as
// other users, and returns when it has taken them.
func (p *Process) Reload(lines ...string) {
	p.t.Helper()
	p.configure(lines)
	if err := p.child.Process.Signal(syscall.SIGHUP); err != nil {
		p.t.Fatalf("reloading the NATS server: %v", err)
	}
	if line, err := p.stdout.ReadString('\n'); err != nil || strings.TrimSpace(line) != reloaded {
		p.t.Fatalf("reloading the NATS server: it says %q, %v", line, err)
	}
}

// Save copies the store of a server that is stopped, for [Process.Restore].
func (p *Process) Save() (copied string) {
	p.t.Helper()
	copied = filepath.Join(p.t.TempDir(), "store")
	if err := os.CopyFS(copied, os.DirFS(p.store)); err != nil {
		p.t.Fatalf("copying the store of the NATS server: %v", err)
	}
	return copied
}

// Restore gives a server that is stopped a store that was saved.
func (p *Process) Restore(copied string) {
	p.t.Helper()
	if err := os.RemoveAll(p.store); err != nil {
		p.t.Fatalf("restoring the store of the NATS server: %v", err)
	}
	if err := os.CopyFS(p.store, os.DirFS(copied)); err != nil {
		p.t.Fatalf("restoring the store of the NATS server: %v", err)
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
