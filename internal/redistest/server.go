// Package redistest runs real Redis servers, Sentinels and Clusters inside a
// test: each listens on 127.0.0.1 on a port of its own, can be stopped, killed,
// paused and brought back with its data, and is gone when the test ends.
package redistest

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// patience bounds every wait for a server, far beyond what one needs.
const patience = 30 * time.Second

// A Server is one redis-server process. Its methods may be called from the
// goroutine of the test only.
type Server struct {
	t        testing.TB
	dir      string
	port     int
	tlsPort  int // of a Sentinel that speaks TLS as well
	sentinel bool
	lines    []string

	username, password string
	tls                *certtest.Certificates
	mutual             bool
	clock              *clock

	start  chan chan started
	ended  chan struct{} // closed when the running process has ended
	pid    int
	client *goredis.Client
}

type started struct {
	pid   int
	ended chan struct{}
	err   error
}

// An Option changes a Server before it starts.
type Option func(*Server)

// Password makes the server ask for a password.
func Password(password string) Option {
	return func(s *Server) {
		s.password = password
		s.lines = append(s.lines, "requirepass "+password, "masterauth "+password)
	}
}

// User adds an ACL user with the given rules, such as "on >secret ~* +@all".
func User(name, rules string) Option {
	return func(s *Server) { s.lines = append(s.lines, "user "+name+" "+rules) }
}

// TLS makes the server speak TLS only, and with mutual ask for the client's
// certificate.
func TLS(c certtest.Certificates, mutual bool) Option {
	return func(s *Server) { s.tls, s.mutual = &c, mutual }
}

// Notify turns keyspace notifications on, such as "Kzg".
func Notify(flags string) Option { return Config("notify-keyspace-events", flags) }

// Config sets a directive of redis.conf.
func Config(directive, value string) Option {
	return func(s *Server) { s.lines = append(s.lines, directive+" "+value) }
}

// Start starts a server that keeps what it holds over Stop, Kill and Restart,
// and ends it with the test.
func Start(t testing.TB, options ...Option) *Server {
	t.Helper()
	s := newServer(t, options...)
	s.Restart()
	return s
}

func newServer(t testing.TB, options ...Option) *Server {
	t.Helper()
	s := &Server{t: t, dir: t.TempDir(), start: make(chan chan started)}
	for _, o := range options {
		o(s)
	}
	s.port = freePort(t)
	var run sync.WaitGroup
	run.Go(s.run)
	t.Cleanup(func() {
		if s.client != nil {
			_ = s.client.Close()
		}
		s.Kill()
		close(s.start)
		run.Wait()
	})
	return s
}

// run starts the server's processes one after another. It keeps its thread,
// since the death signal of a child is tied to the thread that started it
// (https://go.dev/issue/27505); and it lives as long as the test, so that a
// restart in the middle of one adds no goroutine.
func (s *Server) run() {
	runtime.LockOSThread()
	for reply := range s.start {
		path, err := exec.LookPath("redis-server")
		if err != nil {
			reply <- started{err: fmt.Errorf("%w: these tests need a real server; apt-get install redis-server", err)}
			continue
		}
		log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			reply <- started{err: err}
			continue
		}
		args := []string{filepath.Join(s.dir, "redis.conf")}
		if s.sentinel {
			args = append(args, "--sentinel")
		}
		command := exec.Command(path, args...)
		command.Stdout, command.Stderr = log, log
		command.SysProcAttr = dieWithParent()
		if s.clock != nil {
			command.Env = s.clock.environment()
		}
		err = command.Start()
		_ = log.Close()
		if err != nil {
			reply <- started{err: err}
			continue
		}
		ended := make(chan struct{})
		reply <- started{pid: command.Process.Pid, ended: ended}
		_ = command.Wait()
		close(ended)
	}
}

// Restart starts the server, at its address and with its data, and returns when
// it answers. It must not be running.
func (s *Server) Restart() {
	s.t.Helper()
	s.Launch()
	s.await()
}

// Launch starts the server without waiting until it answers.
func (s *Server) Launch() {
	s.t.Helper()
	s.configure()
	reply := make(chan started)
	s.start <- reply
	r := <-reply
	if r.err != nil {
		s.t.Fatalf("starting redis-server: %v", r.err)
	}
	s.pid, s.ended = r.pid, r.ended
}

// configure writes the configuration, once: Sentinel and Cluster keep state in
// theirs.
func (s *Server) configure() {
	s.t.Helper()
	path := filepath.Join(s.dir, "redis.conf")
	if _, err := os.Stat(path); err == nil {
		return
	}
	lines := []string{"bind 127.0.0.1", "dir " + s.dir, "daemonize no", "protected-mode no"}
	if s.tls != nil {
		lines = append(lines, "port 0", fmt.Sprint("tls-port ", s.port),
			"tls-ca-cert-file "+s.tls.CA, "tls-cert-file "+s.tls.ServerCert, "tls-key-file "+s.tls.ServerKey,
			"tls-auth-clients "+map[bool]string{true: "yes", false: "no"}[s.mutual])
	} else {
		lines = append(lines, fmt.Sprint("port ", s.port))
	}
	if !s.sentinel {
		// Without save points a SIGTERM loses nothing either: the log is written
		// before a command is answered, and outlives the process. With a sync each
		// second it would wait while a slow disk syncs, and a kill lose what was answered.
		lines = append(lines, `save ""`, "appendonly yes", "appendfsync no", "repl-diskless-sync-delay 0")
	}
	lines = append(lines, s.lines...)
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// await returns when the server answers and has loaded its data.
func (s *Server) await() {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		// The client would log each vain try.
		conn, err := net.Dial("tcp", s.Addr())
		if err == nil {
			_ = conn.Close()
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			err = s.Client().Ping(ctx).Err()
			cancel()
		}
		if err == nil {
			return
		}
		select {
		case <-s.ended:
			s.t.Fatalf("redis-server ended at once:\n%s", s.Log())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("redis-server does not answer: %v\n%s", err, s.Log())
		}
	}
}

// Log returns what the server has logged.
func (s *Server) Log() string {
	b, _ := os.ReadFile(filepath.Join(s.dir, "log"))
	return string(b)
}

// Stop ends the server as an operator would, with SIGTERM.
func (s *Server) Stop() { s.end(syscall.SIGTERM) }

// Kill ends the server at once, with SIGKILL.
func (s *Server) Kill() { s.end(syscall.SIGKILL) }

func (s *Server) end(signal syscall.Signal) {
	if s.pid == 0 {
		return
	}
	_ = syscall.Kill(s.pid, signal)
	<-s.ended
	s.pid = 0
}

// Pause stops the process without closing its connections; Resume ends that.
func (s *Server) Pause() { _ = syscall.Kill(s.pid, syscall.SIGSTOP) }

// Resume ends Pause.
func (s *Server) Resume() { _ = syscall.Kill(s.pid, syscall.SIGCONT) }

// Save copies what a stopped server keeps, for [Server.Restore].
func (s *Server) Save() (copied string) {
	s.t.Helper()
	copied = filepath.Join(s.t.TempDir(), "data")
	if err := os.CopyFS(copied, os.DirFS(s.data())); err != nil {
		s.t.Fatalf("copying the data of redis-server: %v", err)
	}
	return copied
}

// Restore gives a stopped server data that was saved, or none.
func (s *Server) Restore(copied string) {
	s.t.Helper()
	if err := os.RemoveAll(s.data()); err != nil {
		s.t.Fatalf("restoring the data of redis-server: %v", err)
	}
	if copied == "" {
		return
	}
	if err := os.CopyFS(s.data(), os.DirFS(copied)); err != nil {
		s.t.Fatalf("restoring the data of redis-server: %v", err)
	}
}

// data is where the server keeps what it holds: the log, which is all there is
// without save points.
func (s *Server) data() string { return filepath.Join(s.dir, "appendonlydir") }

// PID returns the process id of the running server.
func (s *Server) PID() int { return s.pid }

// Port returns the port.
func (s *Server) Port() int { return s.port }

// Addr returns host:port.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// URL returns the server's URL, with its password if it has one.
func (s *Server) URL() string {
	u := url.URL{Scheme: "redis", Host: s.Addr()}
	if s.tls != nil {
		u.Scheme = "rediss"
	}
	if s.password != "" {
		u.User = url.UserPassword(s.username, s.password)
	}
	return u.String()
}

// Client returns a client for the test's own use. It lives as long as the test.
func (s *Server) Client() *goredis.Client {
	if s.client == nil {
		options := &goredis.Options{
			Addr: s.Addr(), Username: s.username, Password: s.password,
			// No retries and a large pool: a pool stops dialling for a second
			// after as many failures as it has places.
			MaxRetries: -1, DialerRetries: 1, PoolSize: 1000, ReadTimeout: patience,
			ContextTimeoutEnabled: true, DisableIdentity: true,
		}
		if s.tls != nil {
			options.TLSConfig = s.tls.ClientConfig(s.t)
		}
		s.client = goredis.NewClient(options)
	}
	return s.client
}

// RenewCertificates lets the test's own client know that the files of the server's
// certificates were replaced. The server reads them when it starts.
func (s *Server) RenewCertificates() {
	if s.client != nil {
		_ = s.client.Close()
		s.client = nil
	}
}

// freePort returns a port that nobody listens on, and whose bus port (10000
// higher), which a Cluster needs, is free too.
func freePort(t testing.TB) int {
	t.Helper()
	for {
		port := freeport.Get(t)
		bus, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port+10000))
		if err != nil {
			continue
		}
		_ = bus.Close()
		return port
	}
}
