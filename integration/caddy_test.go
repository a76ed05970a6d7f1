package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
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

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// binary is the Caddy under test, as make build makes it.
var binary string

func TestMain(m *testing.M) {
	if natstest.Child() {
		return
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	// The binary is built the way a user builds it, through xcaddy.
	build := exec.Command("make", "-C", "..", "build")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "make build:", err)
		return 1
	}
	var err error
	if binary, err = filepath.Abs("../bin/caddy"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// patience bounds every wait, far beyond what anything needs.
const patience = 30 * time.Second

// A proxy is a running Caddy.
type proxy struct {
	t     *testing.T
	cmd   *exec.Cmd
	admin string // host:port
	log   *lockedBuffer
	done  chan struct{} // closed when the process ended
	err   error         // how it ended, once done
}

// start runs Caddy with a Caddyfile (without global options for the admin
// endpoint, which are added) until the test ends.
func start(t *testing.T, options, sites string) *proxy {
	t.Helper()
	return startOn(t, t.TempDir(), options, sites)
}

// startOn is start with a data directory, in which Caddy may find what another one
// has left.
func startOn(t *testing.T, data, options, sites string) *proxy {
	t.Helper()
	return startIn(t, data, nil, options, sites)
}

// startIn is startOn with further environment variables.
func startIn(t *testing.T, data string, environment []string, options, sites string) *proxy {
	t.Helper()
	dir := t.TempDir()
	p := &proxy{t: t, admin: "127.0.0.1:" + freeport.String(t), log: new(lockedBuffer), done: make(chan struct{})}
	file := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(file, []byte(p.caddyfile(options, sites)), 0o600); err != nil {
		t.Fatal(err)
	}
	p.cmd = exec.Command(binary, "run", "--config", file, "--adapter", "caddyfile")
	p.cmd.Env = append(append(os.Environ(), "XDG_DATA_HOME="+data, "XDG_CONFIG_HOME="+dir+"/config"), environment...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	// An aborted test leaves nothing running. The signal is tied to the thread that
	// starts the process (https://go.dev/issue/27505), so that thread must live as
	// long: other helpers of these tests end theirs.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := p.cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			// Its last words are where every goroutine was. Caddy takes SIGQUIT for
			// something else.
			_ = p.cmd.Process.Signal(syscall.SIGABRT)
			select {
			case <-p.done:
			case <-time.After(5 * time.Second):
			}
		}
		p.kill(syscall.SIGKILL)
		if t.Failed() {
			t.Logf("the log of Caddy:\n%s", p.log)
		}
	})
	eventually(t, "Caddy runs", func() bool {
		select {
		case <-p.done:
			t.Fatalf("Caddy ended: %v\n%s", p.err, p.log)
		default:
		}
		return strings.Contains(p.log.String(), "serving initial configuration")
	})
	return p
}

func (p *proxy) caddyfile(options, sites string) string {
	return "{\nadmin " + p.admin + "\nauto_https off\n" + options + "\n}\n" + sites + "\n"
}

// admin is the client for the admin endpoint. Each reload replaces the server
// behind it, so that a connection that was kept would be cut.
var admin = &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}

// reload loads a Caddyfile into the running Caddy, also if it is the one that
// runs, as caddy reload --force does.
func (p *proxy) reload(options, sites string) {
	p.t.Helper()
	eventually(p.t, "Caddy takes a configuration", func() bool {
		req, err := http.NewRequest(http.MethodPost, "http://"+p.admin+"/load", strings.NewReader(p.caddyfile(options, sites)))
		if err != nil {
			p.t.Fatal(err)
		}
		req.Header.Set("Content-Type", "text/caddyfile")
		req.Header.Set("Cache-Control", "must-revalidate")
		resp, err := admin.Do(req)
		if closed(err) {
			return false // the reload before has closed a connection that it had just accepted
		}
		if err != nil {
			p.t.Fatalf("reload: %v", err)
		}
		defer resp.Body.Close()
		if body, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
			p.t.Fatalf("reload: %s: %s", resp.Status, body)
		}
		return true
	})
}

// closed reports whether a connection was closed before anything was answered.
func closed(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) }

// peak returns how many bytes of memory the process has held at most.
func (p *proxy) peak() int {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		p.t.Fatalf("the system does not tell the memory of process %d", p.cmd.Process.Pid)
	}
	kilobytes, err := strconv.Atoi(fields[0])
	if err != nil {
		p.t.Fatal(err)
	}
	return kilobytes << 10
}

// kill sends a signal, and returns when the process has ended.
func (p *proxy) kill(s syscall.Signal) {
	p.t.Helper()
	_ = p.cmd.Process.Signal(s)
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Errorf("Caddy did not end after signal %v", s)
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	within(t, patience, what, ok)
}

func within(t *testing.T, patience time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// A service answers requests with its id.
type service struct {
	id, address string
	server      *http.Server
}

func newService(t *testing.T, id string) *service {
	t.Helper()
	return newServiceAt(t, id, "127.0.0.1")
}

func newServiceAt(t *testing.T, id, host string) *service {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	s := &service{id: id, address: l.Addr().String(), server: &http.Server{
		ReadHeaderTimeout: patience,
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, id) }),
	}}
	go func() { _ = s.server.Serve(l) }()
	t.Cleanup(s.close)
	return s
}

func (s *service) close() { _ = s.server.Close() }

// client is shared by all requests of the tests.
var client = &http.Client{Timeout: patience, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

// ask sends one request, and returns the body, or the status if it is not 200.
func ask(url string, header ...string) (string, error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Sprint(resp.StatusCode), nil
	}
	return string(body), nil
}

// round asks n times and returns who answered how often. Under round_robin over
// n nodes every one of them must answer once.
func round(t *testing.T, n int, url string, header ...string) map[string]int {
	t.Helper()
	answers := make(map[string]int)
	for range n {
		body, err := ask(url, header...)
		if err != nil {
			t.Fatalf("request: %v", err)
		}
		answers[body]++
	}
	return answers
}

// load is constant traffic whose every response is checked.
type load struct {
	cancel context.CancelFunc
	group  sync.WaitGroup

	mu       sync.Mutex
	answers  map[string]int
	recent   map[string]int // to what was asked since mark
	times    int            // how often it was called
	failures []string
	closed   int // connections that Caddy closed before it answered anything
}

// traffic starts some workers that ask as fast as they can until stop.
func traffic(t *testing.T, url string) *load {
	t.Helper()
	return steady(t, url, 0)
}

// steady is traffic of which each worker pauses after each answer.
func steady(t *testing.T, url string, pause time.Duration) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{cancel: cancel, answers: make(map[string]int), recent: make(map[string]int)}
	for range 4 {
		l.group.Go(func() {
			for ; ctx.Err() == nil; time.Sleep(pause) {
				l.mu.Lock()
				asked := l.times
				l.mu.Unlock()
				body, err := ask(url)
				l.mu.Lock()
				switch {
				case closed(err):
					// A reload of Caddy closes some connections that it has just
					// accepted, with static upstreams as well; a client that gets
					// nothing tries again, as this one does in its next turn.
					l.closed++
				case err != nil:
					l.failures = append(l.failures, err.Error())
				case len(body) == 3 && body[0] >= '4':
					l.failures = append(l.failures, "status "+body)
				default:
					l.answers[body]++
					if asked == l.times {
						l.recent[body]++
					}
				}
				l.mu.Unlock()
			}
		})
	}
	t.Cleanup(func() { cancel(); l.group.Wait() })
	return l
}

// mark forgets who answered; sinceMark returns how often each one answered
// what was asked since.
func (l *load) mark() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.times++
	clear(l.recent)
}

func (l *load) sinceMark() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.recent)
}

// failed returns how many requests failed so far.
func (l *load) failed() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.failures)
}

func (l *load) served() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, count := range l.answers {
		n += count
	}
	return n
}

// stop ends the traffic. Any failed request fails the test.
func (l *load) stop(t *testing.T) {
	t.Helper()
	l.cancel()
	l.group.Wait()
	served := l.served()
	if len(l.failures) > 0 {
		t.Errorf("%d of %d requests failed, the first with: %s", len(l.failures), served+len(l.failures), l.failures[0])
	}
	t.Logf("%d requests served, %d connections closed before an answer", served, l.closed)
}
