package discovery_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestTwoProcessesWithOneID(t *testing.T) {
	a, b := newNode("x", "instance", "a"), newNode("x", "instance", "b")
	c, d := atEndpoint(newNode("x"), "http://10.0.0.1:80"), atEndpoint(newNode("x"), "http://10.0.0.2:80")
	for _, test := range []struct {
		name    string
		records []discovery.Node // one every 5 seconds
		lines   int
	}{
		{"one process", []discovery.Node{a, a, a, a}, 0},
		{"replaced", []discovery.Node{a, a, b, b, b}, 0},
		{"changed by itself", []discovery.Node{a, newNode("x", "instance", "a", "zone", "z"), a, a}, 0},
		{"two", []discovery.Node{a, b, a, b, a, b}, 1},
		{"two that do not say who they are", []discovery.Node{c, d, c, d, c}, 1},
		{"back after more than a lease", []discovery.Node{a, b, b, b, b, b, b, b, b, a}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log, logs := newLog(slog.LevelWarn)
				m := discoverytest.NewMemory()
				follow(t, m.Open(), discovery.Options{Logger: log})
				for _, n := range test.records {
					write(m, n)
					time.Sleep(5 * time.Second)
				}
				if got := len(logs.containing("two processes")); got != test.lines {
					t.Errorf("%d lines, want %d: %v", got, test.lines, logs.all())
				}
			})
		})
	}
}

// Each of two registrars that announce one id says so once, though the conflict goes on
// with every heartbeat, and once that it is over. Neither gives up.
func TestTwoRegistrarsWithOneID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		start := func(endpoint string, heartbeat time.Duration) (*registration, *logged) {
			log, logs := newLog(slog.LevelInfo)
			r := register(t, m.Open(), atEndpoint(newNode("x"), endpoint), discovery.RegistrarOptions{Heartbeat: heartbeat, Logger: log})
			return r, logs
		}
		told := func(logs *logged, snippet string) int { return len(logs.containing(snippet)) }
		_, a := start("http://10.0.0.1:80", 10*time.Second)
		time.Sleep(3 * time.Second)
		r, b := start("http://10.0.0.2:80", 25*time.Second)
		time.Sleep(time.Hour)
		synctest.Wait()
		for i, logs := range []*logged{a, b} {
			warnings := logs.containing("another process")
			if len(warnings) != 1 {
				t.Fatalf("registrar %d warned %d times in an hour: %v", i, len(warnings), logs.all())
			}
			fields := fmt.Sprint(warnings[0].fields)
			if !strings.Contains(fields, "10.0.0.1") || !strings.Contains(fields, "10.0.0.2") {
				t.Errorf("the warning does not name both endpoints: %s", fields)
			}
		}
		if err := r.leave(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if told(a, "another process") != 1 || told(a, "no other process") != 1 {
			t.Errorf("after the conflict: %v", a.all())
		}
		if n := record(t, m, "x"); n == nil || n.Endpoint.String() != "http://10.0.0.1:80" {
			t.Errorf("the record that stands is %+v", n)
		}
		start("http://10.0.0.3:80", 10*time.Second)
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := told(a, "another process"); got != 2 {
			t.Errorf("of two conflicts it told %d", got)
		}
	})
}

// One record of another process is no conflict: it left it there, or will take over.
func TestRegistrarReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		log, logs := newLog(slog.LevelInfo)
		write(m, newNode("x", "instance", "predecessor"))
		register(t, m.Open(), newNode("x"), discovery.RegistrarOptions{Logger: log})
		for range 3 {
			time.Sleep(time.Hour)
			write(m, newNode("x", "instance", "successor"))
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := logs.containing("process"); len(got) != 0 {
			t.Errorf("told %v", got)
		}
	})
}

// writeOnly is a registry that lets one write, and until it is allowed read nothing.
type writeOnly struct {
	discovery.Registry
	reads, allowed, fails atomic.Int32
}

func (w *writeOnly) Announce(ctx context.Context, n discovery.Node) error {
	if w.fails.Load() > 0 {
		return discovery.ErrUnreachable
	}
	return w.Registry.Announce(ctx, n)
}

func (w *writeOnly) Record(ctx context.Context, id string) (discovery.Node, error) {
	w.reads.Add(1)
	if w.allowed.Load() == 0 {
		return discovery.Node{}, discovery.ErrPermission
	}
	return w.Registry.(discovery.Reader).Record(ctx, id)
}

// A writer that may not read is not refused with every heartbeat.
func TestRegistrarMayNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		w := &writeOnly{Registry: m.Open()}
		log, logs := newLog(slog.LevelWarn)
		register(t, w, newNode("x"), discovery.RegistrarOptions{Logger: log})
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := w.reads.Load(); got != 1 || len(logs.all()) != 0 {
			t.Errorf("read %d times in an hour, and told %v", got, logs.all())
		}
		// The connection is another one after an outage, and may be let do more.
		w.allowed.Store(1)
		w.fails.Store(1)
		time.Sleep(time.Minute)
		w.fails.Store(0)
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := w.reads.Load(); got < 100 {
			t.Errorf("read %d times since it is allowed", got)
		}
	})
}
