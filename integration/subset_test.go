package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// A sharer is one of the proxies that share a fleet. It comes back with the same id. It has
// two sites, of which one is for traffic that must not disturb the turns of the other.
type sharer struct {
	*proxy
	data, port, busy, options, sites string
}

func newSharer(t *testing.T, r registry, subset int) *sharer {
	e := &sharer{data: t.TempDir(), port: freeport.String(t), busy: freeport.String(t)}
	// What Caddy writes there when it first starts, for the default ids.
	if err := errors.Join(os.Mkdir(e.data+"/caddy", 0o700), os.WriteFile(e.data+"/caddy/instance.uuid", []byte(uuid.NewString()), 0o600)); err != nil {
		t.Fatal(err)
	}
	e.options = fmt.Sprintf("registrar {\n%s\nendpoint http://127.0.0.1:%s\nheartbeat 300ms\nttl 1s\ndrain 100ms\n}", r.block(""), e.port)
	source := fmt.Sprintf("%s\nservice orders\nsubset %d", r.block("ttl 1h"), subset)
	e.sites = site(e.port, source, "lb_policy round_robin") + site(e.busy, source, "lb_policy round_robin")
	return e
}

func (e *sharer) start(t *testing.T) {
	t.Helper()
	e.proxy = startOn(t, e.data, e.options, e.sites)
}

// shares waits until the edges share the fleet so that each node is used by one of them,
// and each of them uses as many as the others, or one more. It returns who uses what.
func shares(t *testing.T, what string, edges []*sharer, fleet int) map[string][]string {
	t.Helper()
	least := fleet / len(edges)
	var used map[string][]string
	eventually(t, what, func() bool {
		used = make(map[string][]string)
		count := make(map[string]int)
		for _, e := range edges {
			// In turn, and so in two rounds each of its nodes once at least.
			answers := round(t, 2*(least+1), "http://127.0.0.1:"+e.port)
			if size := len(answers); size != least && (size != least+1 || fleet%len(edges) == 0) {
				return false
			}
			used[e.port] = slices.Sorted(maps.Keys(answers))
			for _, id := range used[e.port] {
				count[id]++
			}
		}
		return len(count) == fleet && !slices.ContainsFunc(slices.Collect(maps.Values(count)), func(n int) bool { return n != 1 })
	})
	return used
}

// TestProxiesShareAFleet has eight proxies, each with a subset of an eighth of a fleet,
// restart one after the other, crash, and lose their registry: whenever things are at
// rest each node is used by exactly one of them, and meanwhile no request fails.
func TestProxiesShareAFleet(t *testing.T) {
	const fleet, size = 200, 25
	onEach(t, func(t *testing.T, r registry) {
		services := make([]*service, fleet)
		for i := range services {
			services[i] = newService(t, fmt.Sprintf("orders-%03d", i))
		}
		settle := enlistAll(t, r, services)
		var edges []*sharer
		for range fleet / size {
			e := newSharer(t, r, size)
			e.start(t)
			edges = append(edges, e)
		}
		before := shares(t, "eight share the fleet", edges, fleet)
		l := steady(t, "http://127.0.0.1:"+edges[0].busy, time.Millisecond)

		for _, e := range edges[5:7] { // a rolling restart, of some
			e.kill(syscall.SIGTERM)
			shares(t, "the other seven share it while one is away", slices.DeleteFunc(slices.Clone(edges), func(other *sharer) bool { return other == e }), fleet)
			e.start(t)
			if after := shares(t, "it is back", edges, fleet); fmt.Sprint(after) != fmt.Sprint(before) {
				t.Error("the same proxies share the fleet in another way than before one was restarted")
			}
		}

		edges[7].kill(syscall.SIGKILL)
		rest := edges[:7]
		before = shares(t, "seven share it after a crash", rest, fleet)
		for _, e := range rest {
			if want := `"proxies":7,"nodes":200,"subset":2`; !strings.Contains(e.log.String(), want) {
				t.Errorf("the log does not say %s", want)
			}
		}

		settle()
		r.stop()
		for _, e := range rest {
			eventually(t, "the registry has been away for longer than the leases of the proxies", func() bool { return e.stale(t) > 1.5 })
		}
		if after := shares(t, "seven share it while the registry is away", rest, fleet); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Error("the proxies share the fleet in another way while the registry is away")
		}
		r.restart()
		for _, e := range rest {
			eventually(t, "the registry is back", func() bool { return e.stale(t) == 0 })
		}
		if after := shares(t, "seven share it with the registry back", rest, fleet); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Error("the proxies share the fleet in another way once the registry is back")
		}
		l.stop(t)
	})
}

// enlistAll lists services, which heartbeat where the registry keeps nothing, until the
// function that it returns is called.
func enlistAll(t *testing.T, r registry, services []*service) (settle func()) {
	put := func() {
		for _, s := range services {
			r.put(s.id, camel(s.id, "http://"+s.address, `"service":"orders"`))
		}
	}
	put()
	if r.persistent() {
		return func() {}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			put()
			select {
			case <-ctx.Done():
			case <-time.After(beat):
			}
		}
	}()
	settle = func() { cancel(); <-done }
	t.Cleanup(settle)
	return settle
}

// stale returns for how many seconds the registry has been away for a sharer.
func (e *sharer) stale(t *testing.T) float64 {
	t.Helper()
	body, err := ask("http://" + e.admin + "/discovery/registries")
	if err != nil {
		t.Fatal(err)
	}
	var registries []struct {
		StaleFor float64 `json:"stale_for"`
	}
	if err := json.Unmarshal([]byte(body), &registries); err != nil {
		t.Fatal(err)
	}
	most := 0.0
	for _, r := range registries {
		most = max(most, r.StaleFor)
	}
	return most
}
