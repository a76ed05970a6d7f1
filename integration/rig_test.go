package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// lease is that of the nodes in these tests, and of Caddy itself; they heartbeat
// three times in it.
const (
	lease = time.Second
	beat  = lease / 3
)

// ownID is the node that Caddy itself announces, with a heartbeat as often.
const ownID = "edge"

// A testRig is a fleet, its registry, and a Caddy in front that is listed there
// itself, under load.
type testRig struct {
	t *testing.T
	faultyRegistry
	link     *link
	further  []*link // to other registries
	proxy    *proxy
	port     string
	ports    []int // of the link and the registry's servers
	services []*service

	mu         sync.Mutex
	heldBack   chan struct{}            // where it is not nil, nodes heartbeat when it is closed
	heldBackOf map[string]chan struct{} // and these when theirs is
	away       map[string]bool          // nodes that left
	silent     map[string]chan struct{} // closed when a node has sent its last heartbeat
	join       func(*service)           // makes a node heartbeat until it leaves
	beating    sync.WaitGroup
	putting    sync.RWMutex // read-locked while a node heartbeats
}

func (rig *testRig) options() string {
	return "registrar {\n" + rig.block(rig.link.address()) + "\nnode_id " + ownID + "\nendpoint http://127.0.0.1:" + rig.port +
		"\nheartbeat " + beat.String() + "\nttl " + lease.String() + "\n}"
}

func (rig *testRig) sites() string {
	return site(rig.port, rig.block(rig.link.address())+"\nservice orders", "lb_policy round_robin")
}

// newRig starts a fleet of ten, Caddy in front of it, through a link where the
// registry is one server, and waits until all serve and Caddy is listed.
func newRig(t *testing.T, r faultyRegistry) *testRig {
	rig := &testRig{
		t: t, faultyRegistry: r, link: newLink(t, r.addresses()[0]), port: freeport.String(t),
		away: make(map[string]bool), silent: make(map[string]chan struct{}), heldBackOf: make(map[string]chan struct{}),
	}
	for _, address := range append(r.addresses(), rig.link.address()) {
		rig.ports = append(rig.ports, portOf(t, address))
	}
	for i := range 10 {
		rig.services = append(rig.services, newService(t, fmt.Sprintf("orders-%d", i)))
	}
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(func() {
		stop()
		rig.holdHeartbeats(false)
		rig.mu.Lock()
		for id, own := range rig.heldBackOf {
			delete(rig.heldBackOf, id)
			close(own)
		}
		rig.mu.Unlock()
		rig.beating.Wait()
	})
	rig.join = func(s *service) {
		silent := make(chan struct{})
		rig.mu.Lock()
		rig.silent[s.id] = silent
		rig.mu.Unlock()
		rig.beating.Go(func() {
			defer close(silent)
			rig.beat(ctx, s)
		})
	}
	for _, s := range rig.services {
		rig.join(s)
	}
	rig.proxy = start(t, rig.options(), rig.sites())
	eventually(t, "all serve", func() bool {
		return fmt.Sprint(round(t, 10, "http://127.0.0.1:"+rig.port)) == all(rig.services)
	})
	eventually(t, "Caddy is listed", func() bool {
		listed, err := rig.list()
		return err == nil && slices.Contains(listed, ownID) && slices.Contains(ids(rig.nodes()), ownID)
	})
	return rig
}

// beat heartbeats for a node, like a process of its own, until it leaves.
func (rig *testRig) beat(ctx context.Context, s *service) {
	for ctx.Err() == nil && !rig.gone(s) {
		rig.putting.RLock()
		rig.mu.Lock()
		quiet := rig.heldBack
		if own := rig.heldBackOf[s.id]; own != nil {
			quiet = own
		}
		rig.mu.Unlock()
		if quiet == nil {
			_ = rig.put(s.id, record(s))
		}
		rig.putting.RUnlock()
		if quiet != nil {
			<-quiet
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(beat):
		}
	}
}

// crowd lists nodes of another service, which heartbeat until the function that it
// returns is called, and say goodbye then.
func (rig *testRig) crowd(size int) (disperse func()) {
	ctx, stop := context.WithCancel(context.Background())
	rig.t.Cleanup(stop)
	var beating sync.WaitGroup
	id := func(i int) string { return fmt.Sprintf("crowd-%02d", i) }
	beating.Go(func() {
		for ctx.Err() == nil {
			for i := range size {
				_ = rig.put(id(i), camel(id(i), "http://127.0.0.1:9", `"service":"crowd","lease":"`+lease.String()+`"`))
			}
			select {
			case <-ctx.Done():
			case <-time.After(beat):
			}
		}
	})
	return func() {
		stop()
		beating.Wait()
		for i := range size {
			eventually(rig.t, "the registry takes the goodbye", func() bool { return rig.remove(id(i)) == nil })
		}
	}
}

// holdHeartbeats makes the nodes hold their heartbeats back until it ends, and returns when
// none is under way any more.
func (rig *testRig) holdHeartbeats(on bool) {
	rig.mu.Lock()
	if rig.heldBack != nil {
		close(rig.heldBack)
		rig.heldBack = nil
	}
	if on {
		rig.heldBack = make(chan struct{})
	}
	rig.mu.Unlock()
	if on {
		rig.putting.Lock()
		defer rig.putting.Unlock()
	}
}

// holdHeartbeatsOf makes one node hold its heartbeats back until release is called.
func (rig *testRig) holdHeartbeatsOf(s *service) (release func()) {
	rig.mu.Lock()
	defer rig.mu.Unlock()
	own := make(chan struct{})
	rig.heldBackOf[s.id] = own
	return func() {
		rig.mu.Lock()
		defer rig.mu.Unlock()
		if rig.heldBackOf[s.id] == own {
			delete(rig.heldBackOf, s.id)
			close(own)
		}
	}
}

func (rig *testRig) gone(s *service) bool {
	rig.mu.Lock()
	defer rig.mu.Unlock()
	return rig.away[s.id]
}

func record(s *service) string {
	return camel(s.id, "http://"+s.address, `"service":"orders","lease":"`+lease.String()+`"`)
}

func (rig *testRig) living() []*service {
	rig.mu.Lock()
	defer rig.mu.Unlock()
	var living []*service
	for _, s := range rig.services {
		if !rig.away[s.id] {
			living = append(living, s)
		}
	}
	return living
}

// ask gets something from the admin endpoint. A reload replaces the server behind
// it, and with it goes a connection that was just accepted.
func (rig *testRig) ask(path string) (body []byte) {
	rig.t.Helper()
	eventually(rig.t, "the admin endpoint answers "+path, func() bool {
		resp, err := admin.Get("http://" + rig.proxy.admin + path)
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		body, err = io.ReadAll(resp.Body)
		return err == nil && resp.StatusCode == http.StatusOK
	})
	return body
}

// node is what Caddy says of one.
type node struct{ ID, State string }

// nodes returns those that Caddy knows, by id.
func (rig *testRig) nodes() (nodes []node) {
	rig.t.Helper()
	if err := json.Unmarshal(rig.ask("/discovery/nodes"), &nodes); err != nil {
		rig.t.Fatal(err)
	}
	return nodes
}

func ids(nodes []node) (ids []string) {
	for _, n := range nodes {
		ids = append(ids, n.ID)
	}
	slices.Sort(ids)
	return ids
}

// connected reports whether Caddy says that it is connected and has a listing.
func (rig *testRig) connected() bool {
	rig.t.Helper()
	var registries []struct{ Connected, Synced bool }
	if err := json.Unmarshal(rig.ask("/discovery/registries"), &registries); err != nil {
		rig.t.Fatal(err)
	}
	return len(registries) == 1 && registries[0].Connected && registries[0].Synced
}

// heartbeats returns how many of Caddy's own heartbeats the registry has taken.
func (rig *testRig) heartbeats() (n float64) {
	rig.t.Helper()
	for line := range strings.Lines(string(rig.ask("/metrics"))) {
		if strings.HasPrefix(line, "caddy_discovery_heartbeats_total{") && strings.Contains(line, `result="ok"`) {
			_, value, _ := strings.Cut(line, "} ")
			if _, err := fmt.Sscan(value, &n); err != nil {
				rig.t.Fatalf("the metric of heartbeats reads %q", line)
			}
		}
	}
	return n
}

// clients returns how many connections Caddy has to the registry.
func (rig *testRig) clients() int { return connectionsOf(rig.proxy.cmd.Process.Pid, rig.ports...) }

// goroutines returns how many goroutines of Caddy belong to the plugin or to a
// client of a registry. The others are Caddy's connections, of which a load
// leaves some idle.
func (rig *testRig) goroutines() int {
	rig.t.Helper()
	total := 0
	for stack := range strings.SplitSeq(string(rig.ask("/debug/pprof/goroutine?debug=1")), "\n\n") {
		if !strings.Contains(stack, "caddy-discovery/") && !strings.Contains(stack, "nats-io/nats.go") && !strings.Contains(stack, "redis/go-redis") {
			continue
		}
		count, _, found := strings.Cut(stack, " @ ")
		if i := strings.LastIndexByte(count, '\n'); i >= 0 {
			count = count[i+1:]
		}
		n, err := strconv.Atoi(count)
		if !found || err != nil {
			rig.t.Fatalf("a stack of the profile reads %q", stack)
		}
		total += n
	}
	return total
}
