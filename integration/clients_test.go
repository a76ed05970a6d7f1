//go:build clients

package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// clients are the example services in other languages, on each registry that they know.
// What they need is brought by make test-clients.
var clients = []struct {
	name  string
	start func(t *testing.T) registry
	// command runs the service with an id and a heartbeat of a second; the service
	// answers with its id, or the one at the address does.
	command func(registryURL, id, address string) *exec.Cmd
}{
	{"node on nats_kv", newKV, nodeService},
	{"node on redis_keys", newKeys, nodeService},
	{"python on redis_sorted_set", newSortedSet, pythonService},
	{"shell on nats_kv", newKV, shellListing},
	{"shell on redis_keys", newKeys, shellListing},
}

func nodeService(registryURL, id, _ string) *exec.Cmd {
	return exec.Command("node", "../examples/node-service/service.js", "--registry", registryURL,
		"--id", id, "--heartbeat", "1", "--drain", "0.5")
}

func pythonService(registryURL, id, _ string) *exec.Cmd {
	// Debian's own, because it has Debian's package of the client.
	return exec.Command("/usr/bin/python3", "../examples/python-service/service.py", "--registry", registryURL,
		"--id", id, "--heartbeat", "1", "--drain", "0.5")
}

func shellListing(registryURL, id, address string) *exec.Cmd {
	cmd := exec.Command("../examples/shell/list.sh", registryURL, id, "http://"+address, "orders")
	cmd.Env = append(os.Environ(), "HEARTBEAT=1", "DRAIN=1")
	if bin, err := filepath.Abs("../bin"); err == nil { // of the command nats
		cmd.Env = append(cmd.Env, "PATH="+bin+":"+os.Getenv("PATH"))
	}
	return cmd
}

// TestClients holds that services in other languages are in use when they run, are missed
// when they crash, live through a restart of their registry, and drain and leave at SIGTERM
// without a failed request.
func TestClients(t *testing.T) {
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := c.start(t)
			url := r.flags()[1]
			port := freeport.String(t)
			start(t, "", site(port, r.block("")+"\nservice orders", "lb_policy round_robin\nlb_retries 3"))
			site := "http://127.0.0.1:" + port

			run := func(id string) *example {
				behind := newService(t, id)
				return startExample(t, c.command(url, id, behind.address))
			}
			answering := func(what string, want ...string) {
				t.Helper()
				eventually(t, what, func() bool {
					answers := make(map[string]bool)
					for range len(want) {
						body, err := ask(site)
						if err != nil {
							t.Fatal(err)
						}
						answers[strings.TrimSpace(strings.TrimPrefix(body, "hello from "))] = true
					}
					for _, id := range want {
						if !answers[id] {
							return false
						}
					}
					return true
				})
			}

			first, second := run("orders-1"), run("orders-2")
			answering("both serve", "orders-1", "orders-2")

			_ = first.end(syscall.SIGKILL)
			eventually(t, "a crashed one lapses", func() bool { return serves(t, site, "orders-2") })
			first = run("orders-1")
			answering("it is back with its id", "orders-1", "orders-2")

			load := steady(t, site, 5*time.Millisecond)
			before := []string{r.record("orders-1"), r.record("orders-2")}
			r.stop()
			served := load.served()
			eventually(t, "traffic flows while the registry is away", func() bool { return load.served() > served+500 })
			r.restart()
			eventually(t, "both are heard again", func() bool {
				return r.record("orders-1") != before[0] && r.record("orders-2") != before[1]
			})

			if err := second.end(syscall.SIGTERM); err != nil {
				t.Errorf("at SIGTERM it ended with %v", err)
			}
			load.stop(t)
			if record := r.record("orders-2"); record != "" {
				t.Errorf("it left its record behind: %s", record)
			}
			eventually(t, "the other serves alone", func() bool { return serves(t, site, "orders-1") })
			if err := first.end(syscall.SIGINT); err != nil {
				t.Errorf("at SIGINT it ended with %v", err)
			}
			eventually(t, "none serves", func() bool { body, err := ask(site); return err == nil && body == "503" })
		})
	}
}

// serves reports whether ten requests in a row were answered by one node.
func serves(t *testing.T, url, id string) bool {
	t.Helper()
	for range 10 {
		body, err := ask(url)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(strings.TrimSpace(body), id) {
			return false
		}
	}
	return true
}

// An example is a service that runs in a process of its own.
type example struct {
	t    *testing.T
	cmd  *exec.Cmd
	log  *lockedBuffer
	done chan struct{}
	err  error
}

func startExample(t *testing.T, cmd *exec.Cmd) *example {
	t.Helper()
	e := &example{t: t, cmd: cmd, log: new(lockedBuffer), done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = e.log, e.log
	cmd.WaitDelay = time.Second // of a sleep that its shell leaves behind
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // see startOn
		err := cmd.Start()
		started <- err
		if err == nil {
			e.err = cmd.Wait()
			close(e.done)
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = e.end(syscall.SIGKILL)
		if t.Failed() {
			t.Logf("%s:\n%s", cmd, e.log)
		}
	})
	return e
}

// end sends a signal, and returns how the process ended.
func (e *example) end(s syscall.Signal) error {
	e.t.Helper()
	_ = e.cmd.Process.Signal(s)
	select {
	case <-e.done:
	case <-time.After(patience):
		e.t.Errorf("%s did not end after signal %v", e.cmd, s)
		_ = e.cmd.Process.Kill()
		<-e.done
	}
	return e.err
}
