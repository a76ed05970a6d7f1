package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A proxy is the Caddy that the demo is about.
type proxy struct {
	url, registry string
	admin         string
	ports         map[string]string // by variable

	cmd     *exec.Cmd // the guard
	stdin   io.Closer
	logFile string
	ended   chan struct{}
}

// The ports of a Caddy of the demo, by the variables of its Caddyfile.
const (
	portHTTP  = "HTTP_PORT"
	portHTTPS = "HTTPS_PORT"
	portNATS  = "NATS_PORT"
	portAdmin = "ADMIN"
)

// startProxy starts Caddy with the given Caddyfile and returns when it serves.
// All of its files are below dir. The preferred ports are taken if they are free,
// others if not.
func startProxy(ctx context.Context, binary, config, dir string, preferred map[string]string) (*proxy, error) {
	p := &proxy{ports: make(map[string]string), logFile: filepath.Join(dir, "caddy.log"), ended: make(chan struct{})}
	for variable, port := range preferred {
		var err error
		if p.ports[variable], err = freePort(port); err != nil {
			return nil, err
		}
	}
	p.url = "http://localhost:" + p.ports[portHTTP] + "/"
	p.registry = "nats://127.0.0.1:" + p.ports[portNATS]
	p.admin = "localhost:" + p.ports[portAdmin]
	out, err := os.Create(p.logFile)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p.cmd = exec.Command(self, "guard", binary, "run", "--config", config, "--adapter", "caddyfile")
	p.cmd.Env = append(os.Environ(), portAdmin+"="+p.admin, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	for variable, port := range p.ports {
		if variable != portAdmin {
			p.cmd.Env = append(p.cmd.Env, variable+"="+port)
		}
	}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting Caddy: %w", err)
	}
	go func() {
		defer close(p.ended)
		_ = p.cmd.Wait() // how it ended stands in its log
	}()

	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	err = until(ctx, func() bool {
		select {
		case <-p.ended:
			return true
		default:
		}
		// Caddy starts its apps in any order.
		for _, port := range p.ports {
			conn, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", port), time.Second)
			if err != nil || conn.Close() != nil {
				return false
			}
		}
		return true
	})
	select {
	case <-p.ended:
		return nil, errors.Join(fmt.Errorf("%s ended at once", binary), p.log())
	default:
	}
	if err != nil {
		p.stop()
		return nil, errors.Join(fmt.Errorf("waiting for Caddy: %w", err), p.log())
	}
	return p, nil
}

// guard runs a command and ends it when it is told to end itself, or when its
// standard input ends: that happens to it together with the demo, even if the
// demo is killed.
func guard(command []string) error {
	signal.Ignore(os.Interrupt, syscall.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	ownGroup(cmd)
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	var failure error
	go func() {
		defer close(ended)
		failure = cmd.Wait()
	}()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	select {
	case <-ctx.Done():
		end(cmd.Process, ended, 8*time.Second)
		return nil
	case <-ended:
		return failure
	}
}

// errNoAdmin says that this build of Caddy does not tell what it knows.
var errNoAdmin = errors.New("there is no /discovery/nodes")

// lists reports whether Caddy has the node on its list.
func (p *proxy) lists(ctx context.Context, id string) (bool, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.admin+"/discovery/nodes", nil)
	if err != nil {
		return false, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound {
		return false, errNoAdmin
	}
	var nodes []struct {
		ID string `json:"id"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&nodes); err != nil {
		return false, fmt.Errorf("reading /discovery/nodes: %w", err)
	}
	for _, n := range nodes {
		if n.ID == id {
			return true, nil
		}
	}
	return false, nil
}

// stop ends Caddy and waits until it has.
func (p *proxy) stop() { end(p.cmd.Process, p.ended, 10*time.Second) }

// log returns the end of Caddy's log as an error, without the demo's own requests to the
// admin API.
func (p *proxy) log() error {
	b, err := os.ReadFile(p.logFile)
	if err != nil {
		return err
	}
	lines := slices.DeleteFunc(strings.Split(strings.TrimSpace(string(b)), "\n"), func(line string) bool {
		return strings.Contains(line, `"logger":"admin.api"`)
	})
	lines = lines[max(0, len(lines)-15):]
	return errors.New("the end of Caddy's log:\n  " + strings.Join(lines, "\n  "))
}

// freePort returns the preferred port if nobody has it, or any other.
func freePort(preferred string) (string, error) {
	for _, port := range []string{preferred, "0"} {
		l, err := net.Listen("tcp", ":"+port)
		if err != nil {
			continue
		}
		_, port, err = net.SplitHostPort(l.Addr().String())
		return port, errors.Join(err, l.Close())
	}
	return "", errors.New("there is no free port")
}

// end asks a process to end, and kills it if it has not within patience.
func end(p *os.Process, ended <-chan struct{}, patience time.Duration) {
	// Where there is no SIGTERM, it goes the hard way.
	if p.Signal(syscall.SIGTERM) == nil {
		select {
		case <-ended:
			return
		case <-time.After(patience):
		}
	}
	_ = p.Kill() // it fails only if the process has ended
	<-ended
}

// until waits for a condition.
func until(ctx context.Context, condition func() bool) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
