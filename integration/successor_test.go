package integration

import (
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// longLived is a registrar that renews nothing while a test lasts: what is wrong with
// its record stays wrong.
func longLived(block, id, port string) string {
	return "registrar {\n" + block + "\nnode_id " + id + "\nendpoint http://127.0.0.1:" + port +
		"\nheartbeat 1h\nttl 2h\ndrain 1s\nmetadata service edge\n}"
}

// edgeSite answers with the name of the process, so that nothing behind it matters.
func edgeSite(port, name string) string {
	return "http://127.0.0.1:" + port + " {\nrespond " + name + "\n}\n"
}

var serverAddress = regexp.MustCompile(`127\.0\.0\.1:[0-9]+`)

// TestRollingRestart has a process with the same id as another one come, and then the
// other one go, which has a long way to the registry: the next tier goes over to the
// new one, and no request fails.
func TestRollingRestart(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		block := r.block("ttl 2h")
		way := newLink(t, serverAddress.FindString(block))
		way.slow(75 * time.Millisecond)
		front := freeport.String(t)
		start(t, "", site(front, block+"\nservice edge", ""))
		url := "http://127.0.0.1:" + front
		run := func(name, block string) *proxy {
			port := freeport.String(t)
			p := start(t, longLived(block, "edge-1", port), edgeSite(port, name))
			eventually(t, "requests go to the "+name, func() bool {
				body, err := ask(url)
				return err == nil && body == name
			})
			return p
		}
		old := run("predecessor", serverAddress.ReplaceAllString(block, way.address()))
		run("successor", block)
		instance := instanceOf(t, r.record("edge-1"))
		l := traffic(t, url)
		old.kill(syscall.SIGTERM)
		// What it has said has arrived: it waits for the answers. Where nobody keeps
		// records the next tier tells.
		if record := r.record("edge-1"); r.persistent() && (record == "" || instanceOf(t, record) != instance || strings.Contains(record, "draining")) {
			t.Errorf("the record of the new process, %s, became %q", instance, record)
		}
		l.mark()
		eventually(t, "requests are served after that", func() bool { return l.sinceMark()["successor"] > 50 })
		l.stop(t)
		if l.answers["predecessor"] > 0 {
			t.Errorf("the old process was asked %d times after the new one had come", l.answers["predecessor"])
		}
	})
}

// TestReloadsOfOptions changes an option of the registry with each of six reloads,
// while the next tier asks whoever the record names: no request fails.
func TestReloadsOfOptions(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		front, port := freeport.String(t), freeport.String(t)
		// A reload of Caddy resets some connections that it has just accepted, whatever
		// stands in its configuration. To try again at once helps against that, and
		// against nothing else.
		start(t, "", site(front, r.block("ttl 2h")+"\nservice edge", "lb_retries 2\nlb_try_interval 1ms"))
		options := func(i int) string { return longLived(r.block(fmt.Sprintf("ttl %dm", 120+i)), "edge-1", port) }
		p := start(t, options(0), edgeSite(port, "edge"))
		url := "http://127.0.0.1:" + front
		eventually(t, "the proxy is found", func() bool {
			body, err := ask(url)
			return err == nil && body == "edge"
		})
		l := traffic(t, url)
		const reloads = 6
		for i := range reloads {
			before := instanceOf(t, r.record("edge-1"))
			p.reload(options(i+1), edgeSite(port, "edge"))
			eventually(t, "the new config is announced", func() bool {
				record := r.record("edge-1")
				return record != "" && instanceOf(t, record) != before
			})
		}
		eventually(t, "the old configs have left", func() bool { return strings.Count(p.log.String(), `"msg":"left"`) == reloads })
		l.mark()
		eventually(t, "requests are served after that", func() bool { return l.sinceMark()["edge"] > 50 })
		l.stop(t)
		// In the end the record goes with the process.
		p.kill(syscall.SIGTERM)
		eventually(t, "the record is gone", func() bool { return r.record("edge-1") == "" })
	})
}

// TestOneHost runs two Caddys of one host that share a data directory, and so Caddy's
// instance ID: each is listed under a name of its own, which it has again when it is
// started again.
func TestOneHost(t *testing.T) {
	r := newKV(t).(*kv)
	data := t.TempDir()
	run := func(port string) *proxy {
		return startOn(t, data, "registrar {\n"+r.block("")+"\ndrain 0s\n}", edgeSite(port, "edge"))
	}
	listed := func() (endpoints map[string]string) { // by id
		lister, err := r.bucket.ListKeys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		endpoints = make(map[string]string)
		for key := range lister.Keys() {
			entry, err := r.bucket.Get(t.Context(), key)
			if err != nil {
				continue // it has just left
			}
			if n, err := discovery.ParseNode(entry.Value()); err == nil {
				endpoints[n.ID] = n.Endpoint.String()
			}
		}
		return endpoints
	}
	one, two := freeport.String(t), freeport.String(t)
	run(one)
	eventually(t, "the first is listed", func() bool { return len(listed()) == 1 })
	second := run(two)
	eventually(t, "both are listed", func() bool { return len(listed()) == 2 })
	before := fmt.Sprint(listed())
	second.kill(syscall.SIGTERM)
	eventually(t, "the second has left", func() bool { return len(listed()) == 1 })
	run(two)
	eventually(t, "both have the names that they had", func() bool { return fmt.Sprint(listed()) == before })
}
