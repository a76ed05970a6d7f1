package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// recorder is an Announcer that notes what passes through it.
type recorder struct {
	discovery.Registry
	mu    sync.Mutex
	calls []call
}

type call struct {
	at       time.Time
	withdraw bool
	node     discovery.Node
	err      error
}

func (r *recorder) note(c call) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, c)
}

func (r *recorder) taken() []call {
	r.mu.Lock()
	defer r.mu.Unlock()
	calls := r.calls
	r.calls = nil
	return calls
}

func (r *recorder) Announce(ctx context.Context, n discovery.Node) error {
	at := time.Now()
	err := r.Registry.Announce(ctx, n)
	r.note(call{at: at, node: n, err: err})
	return err
}

func (r *recorder) Drain(ctx context.Context, n discovery.Node) (bool, error) {
	at := time.Now()
	own, err := r.Registry.Drain(ctx, n)
	r.note(call{at: at, node: n, err: err})
	return own, err
}

func (r *recorder) Withdraw(ctx context.Context, n discovery.Node) error {
	at := time.Now()
	err := r.Registry.Withdraw(ctx, n)
	r.note(call{at: at, withdraw: true, node: n, err: err})
	return err
}

// registration is a Registrar that runs.
type registration struct {
	*discovery.Registrar
	cancel context.CancelFunc
	done   chan error
	ended  bool
}

func (r *registration) leave() error {
	r.ended = true
	r.cancel()
	return <-r.done
}

func register(t *testing.T, a discovery.Announcer, n discovery.Node, o discovery.RegistrarOptions) *registration {
	t.Helper()
	registrar, err := discovery.NewRegistrar(a, n, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &registration{Registrar: registrar, cancel: cancel, done: make(chan error, 1)}
	go func() { r.done <- registrar.Run(ctx) }()
	t.Cleanup(func() {
		if !r.ended {
			_ = r.leave()
		}
	})
	synctest.Wait()
	return r
}

// record returns the record that stands in the registry, nil if none does.
func record(t *testing.T, m *discoverytest.Memory, id string) *discovery.Node {
	t.Helper()
	data := m.Record(id)
	if data == nil {
		return nil
	}
	n, err := discovery.ParseNode(data)
	if err != nil {
		t.Fatal(err)
	}
	return &n
}

func TestRegistrarHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		a := &recorder{Registry: m.Open()}
		given := newNode("a")
		r := register(t, a, given, discovery.RegistrarOptions{})
		n := record(t, m, "a")
		if n == nil {
			t.Fatal("not announced at once")
		}
		if n.Lease() != 30*time.Second || n.Instance() != r.Instance() || n.Instance() == "" || n.Service() != "orders" {
			t.Errorf("announced %+v", n)
		}
		if len(given.Metadata) != 1 {
			t.Errorf("the caller's metadata was changed: %v", given.Metadata)
		}
		time.Sleep(1000 * time.Second)
		calls := a.taken()
		if len(calls) < 100 || len(calls) > 112 {
			t.Errorf("%d heartbeats in 1000 seconds", len(calls))
		}
		different := map[time.Duration]bool{}
		for i := range len(calls) - 1 {
			pause := calls[i+1].at.Sub(calls[i].at)
			if pause < 9*time.Second || pause > 10*time.Second {
				t.Errorf("%v between two heartbeats", pause)
			}
			different[pause] = true
		}
		if len(different) < 10 {
			t.Errorf("the heartbeats are not spread: %v", different)
		}
	})
}

func TestRegistrarOptions(t *testing.T) {
	a := discoverytest.NewMemory().Open()
	pairs := func(n int) discovery.Node {
		node := newNode("a")
		for i := range n - 1 {
			node.Metadata[fmt.Sprint(i)] = ""
		}
		return node
	}
	for _, test := range []struct {
		name string
		node discovery.Node
		o    discovery.RegistrarOptions
		ok   bool
	}{
		{"defaults", newNode("a"), discovery.RegistrarOptions{}, true},
		{"ttl just above the heartbeat", newNode("a"), discovery.RegistrarOptions{Heartbeat: time.Second, TTL: time.Second + 1}, true},
		{"ttl equals the heartbeat", newNode("a"), discovery.RegistrarOptions{Heartbeat: time.Second, TTL: time.Second}, false},
		{"ttl under the default heartbeat", newNode("a"), discovery.RegistrarOptions{TTL: time.Second}, false},
		{"ttl too short", newNode("a"), discovery.RegistrarOptions{Heartbeat: time.Millisecond}, false},
		{"ttl too long", newNode("a"), discovery.RegistrarOptions{TTL: 25 * time.Hour}, false},
		{"heartbeat beyond all bounds", newNode("a"), discovery.RegistrarOptions{Heartbeat: math.MaxInt64}, false},
		{"negative heartbeat", newNode("a"), discovery.RegistrarOptions{Heartbeat: -1, TTL: time.Second}, false},
		{"negative ttl", newNode("a"), discovery.RegistrarOptions{TTL: -1}, false},
		{"negative drain", newNode("a"), discovery.RegistrarOptions{Drain: new(time.Duration(-1))}, false},
		{"no drain", newNode("a"), discovery.RegistrarOptions{Drain: new(time.Duration(0))}, true},
		{"no id", newNode(""), discovery.RegistrarOptions{}, false},
		{"no endpoint", discovery.Node{ID: "a"}, discovery.RegistrarOptions{}, false},
		{"negative load", discovery.Node{ID: "a", Endpoint: newNode("a").Endpoint, Load: -1}, discovery.RegistrarOptions{}, false},
		{"no metadata", discovery.Node{ID: "a", Endpoint: newNode("a").Endpoint}, discovery.RegistrarOptions{}, true},
		// Lease, instance and the state of the last record need room.
		{"as much metadata as may be", pairs(discovery.MaxMetadata - 3), discovery.RegistrarOptions{}, true},
		{"no room for the state", pairs(discovery.MaxMetadata - 2), discovery.RegistrarOptions{}, false},
		{"no room for the lease", pairs(discovery.MaxMetadata), discovery.RegistrarOptions{}, false},
	} {
		_, err := discovery.NewRegistrar(a, test.node, test.o)
		if test.ok && err != nil || !test.ok && !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("%s: %v", test.name, err)
		}
		if valid := test.o.Validate(test.node); fmt.Sprint(valid) != fmt.Sprint(err) {
			t.Errorf("%s: NewRegistrar: %v, Validate: %v", test.name, err, valid)
		}
	}
}

func TestRegistrarNeedsAnAnnouncer(t *testing.T) {
	if _, err := discovery.NewRegistrar(nil, newNode("a"), discovery.RegistrarOptions{}); !errors.Is(err, discovery.ErrInvalid) {
		t.Errorf("without an announcer: %v", err)
	}
}

func TestRegistrarUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{})
		time.Sleep(time.Second)
		if err := r.Update(newNode("a", discovery.KeyService, "pay"), discovery.RegistrarOptions{Heartbeat: time.Second}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		n := record(t, m, "a")
		if n.Service() != "pay" || n.Lease() != 3*time.Second || n.Instance() != r.Instance() {
			t.Errorf("announced %+v", n)
		}
		writes := m.Writes()
		time.Sleep(10 * time.Second)
		if got := m.Writes() - writes; got < 10 || got > 12 {
			t.Errorf("%d heartbeats in 10 seconds, want one a second", got)
		}
		for name, err := range map[string]error{
			"another id":   r.Update(newNode("b"), discovery.RegistrarOptions{}),
			"no id":        r.Update(newNode(""), discovery.RegistrarOptions{}),
			"a bad lease":  r.Update(newNode("a"), discovery.RegistrarOptions{TTL: 1}),
			"bad metadata": r.Update(newNode("a", "x", "\n"), discovery.RegistrarOptions{}),
		} {
			if !errors.Is(err, discovery.ErrInvalid) {
				t.Errorf("update with %s: %v", name, err)
			}
		}
		time.Sleep(time.Second)
		if n := record(t, m, "a"); n.Service() != "pay" || n.Lease() != 3*time.Second || m.Record("b") != nil {
			t.Errorf("a refused update had an effect: %+v", n)
		}
	})
}

func TestRegistrarUpdateConcurrently(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{Heartbeat: 50 * time.Millisecond, Load: func() float64 { return 1 }})
		var group sync.WaitGroup
		for i := range 8 {
			group.Go(func() {
				for j := range 100 {
					n := newNode("a", "writer", fmt.Sprint(i))
					if err := r.Update(n, discovery.RegistrarOptions{Heartbeat: 50 * time.Millisecond}); err != nil {
						t.Error(err)
					}
					n.Metadata["writer"] = "changed by its owner, which is its right"
					time.Sleep(time.Duration(i*j) * time.Microsecond)
				}
			})
		}
		group.Wait()
		if err := r.leave(); err != nil {
			t.Error(err)
		}
		if m.Record("a") != nil {
			t.Error("still listed")
		}
	})
}

func TestRegistrarLogsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		log, logs := newLog(slog.LevelInfo)
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{Logger: log})
		time.Sleep(time.Hour)
		_ = r.leave()
		var told []string
		for _, e := range logs.all() {
			told = append(told, e.message)
		}
		if got := strings.Join(told, ", "); got != "announced, draining, left" {
			t.Errorf("told %s", got)
		}
	})
}
