package integration

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

var reliability = flag.String("reliability", "", "file into which TestFaults writes its table")

// lease is that of the nodes in these tests, and of Caddy itself; they heartbeat
// three times in it.
const (
	lease = time.Second
	beat  = lease / 3
)

// ownID is the node that Caddy itself announces, with a heartbeat as often.
const ownID = "edge"

// A ward is a fleet, its registry, and a Caddy in front that is listed there
// itself, under load.
type ward struct {
	t *testing.T
	patient
	link     *link
	further  []*link // to other registries
	proxy    *proxy
	port     string
	ports    []int // of the link and the registry's servers
	services []*service

	mu      sync.Mutex
	quiet   chan struct{}            // where it is not nil, nodes heartbeat when it is closed
	stilled map[string]chan struct{} // and these when theirs is
	away    map[string]bool          // nodes that left
	silent  map[string]chan struct{} // closed when a node has sent its last heartbeat
	join    func(*service)           // makes a node heartbeat until it leaves
	beating sync.WaitGroup
	putting sync.RWMutex // read-locked while a node heartbeats
}

// fault is something that happens to a registry, or between it and Caddy.
type fault struct {
	group, name string
	on          []kind
	do          func(w *ward)
}

// outage is longer than a lease, the bucket's TTL and the keys' EX.
const outage = 3 * lease

func pauseFor(d time.Duration) { <-time.After(d) }

// to is a fault of patients of one type.
func to[P patient](do func(w *ward, p P)) func(w *ward) {
	return func(w *ward) { do(w, w.patient.(P)) }
}

// The groups of faults, as the table has them.
const (
	gone     = "The server goes away"
	between  = "The network between Caddy and the registry"
	cutOff   = "The network between nodes and the registry"
	lost     = "What the registry held is lost"
	deaf     = "The watch is dead and does not say so"
	failover = "Another server takes over"
	rights   = "Caddy's rights are taken away, and given back"
	clocks   = "Clocks are hours apart"
	paused   = "A node says nothing for a while"
	handover = "Caddy's own record changes hands"
	beside   = "Something else stands beside the nodes"
)

var (
	everyKind = []kind{kvKind, broadcastKind, setKind, keysKind}
	redisOnly = []kind{setKind, keysKind}
)

var faults = []fault{
	{gone, "killed, back with its data", everyKind, to(func(_ *ward, p single) { p.kill(); pauseFor(outage); p.restart() })},
	{gone, "paused (SIGSTOP)", everyKind, to(func(_ *ward, p single) { p.pause(); pauseFor(outage); p.resume() })},
	{gone, "paused for less than a lease", everyKind, to(func(_ *ward, p single) { p.pause(); pauseFor(lease * 2 / 3); p.resume() })},
	{gone, "reloads while it is away", everyKind, func(w *ward) {
		w.link.refuse(true)
		for range 10 {
			w.proxy.reload(w.options(), w.sites())
		}
		pauseFor(outage)
		w.link.refuse(false)
	}},

	{between, "packets dropped, nothing closed", everyKind, func(w *ward) { w.link.drop(true); pauseFor(outage); w.link.drop(false) }},
	{between, "connections reset, over and over", everyKind, func(w *ward) {
		for range 10 {
			w.link.cut()
			pauseFor(lease / 4)
		}
	}},
	{between, "unreachable for Caddy alone", everyKind, func(w *ward) { w.link.refuse(true); pauseFor(outage); w.link.refuse(false) }},
	{between, "slow, a second each way", everyKind, func(w *ward) { w.link.slow(time.Second); pauseFor(2 * outage); w.link.slow(0) }},

	{cutOff, "the ten nodes of a service cut off, ninety others are not", everyKind, func(w *ward) {
		others := w.crowd(90)
		w.proxy.reload(w.options(), w.sites()+site(freeport.String(w.t), w.block(w.link.address())+"\nservice crowd", ""))
		eventually(w.t, "all are seen", func() bool { return len(w.nodes()) > 100 })
		w.hush(true)
		eventually(w.t, "the ten are held", func() bool {
			held := 0
			for _, n := range w.nodes() {
				if n.State == "held" {
					held++
				}
			}
			return held == 10
		})
		pauseFor(outage)
		w.hush(false)
		w.proxy.reload(w.options(), w.sites())
		others()
	}},

	{lost, "wiped and made anew", everyKind, to(func(w *ward, p single) {
		if err := p.wipe(); err != nil {
			w.t.Errorf("wiping: %v", err)
		}
	})},
	{lost, "killed, wiped and made anew", everyKind, to(func(w *ward, p single) {
		p.kill()
		pauseFor(outage)
		p.restart()
		eventually(w.t, "the registry can be wiped", func() bool { return p.wipe() == nil })
	})},
	{lost, "bucket deleted, Caddy makes it anew", []kind{kvKind}, to(func(w *ward, p *kvPatient) {
		if err := p.delete(); err != nil {
			w.t.Errorf("deleting the bucket: %v", err)
		}
	})},
	{lost, "restarted, all it had was in memory", forgetful, to(func(_ *ward, p single) { p.kill(); p.restart() })},
	{lost, "back when all has expired, before the fleet", []kind{kvKind, keysKind}, to(func(w *ward, p single) {
		w.hush(true)
		p.kill()
		eventually(w.t, "Caddy has lost the registry", func() bool { return !w.connected() })
		pauseFor(outage)
		p.restart()
		eventually(w.t, "Caddy is back before the fleet", w.connected)
		eventually(w.t, "the registry lists nobody but Caddy", func() bool {
			listed, err := p.list()
			return err == nil && !slices.ContainsFunc(listed, func(id string) bool { return id != ownID })
		})
		w.hush(false)
	})},
	{lost, "restored to an older state", withPast, func(w *ward) {
		p := w.patient.(interface {
			single
			relive()
		})
		p.kill()
		p.relive()
		pauseFor(outage)
		p.restart()
	}},
	{lost, "an empty server in its place", redisOnly, to(func(_ *ward, p *redisPatient) {
		p.kill()
		p.server.Restore("")
		p.restart()
	})},
	{lost, "copied from an empty server, nothing closed", redisOnly, to(func(_ *ward, p *redisPatient) { p.becomeEmpty() })},

	{deaf, "consumer deleted", []kind{kvKind}, to(func(w *ward, p *kvPatient) {
		if err := p.deafen(); err != nil {
			w.t.Errorf("deleting the consumer: %v", err)
		}
	})},
	{deaf, "stream of changes deleted", []kind{setKind}, to(func(_ *ward, p *redisPatient) { p.command("DEL", "{"+setKey+"}:changes") })},

	{failover, "the leaders of bucket and cluster step down", []kind{kvClusterKind}, to(func(_ *ward, p *kvCluster) { p.depose() })},
	{failover, "the server that leads the bucket killed", []kind{kvClusterKind}, to(func(_ *ward, p *kvCluster) { p.leader().Kill() })},
	{failover, "the server that Caddy is connected to killed", []kind{kvClusterKind, broadcastClusterKind}, func(w *ward) {
		w.patient.(interface{ killServerOf(w *ward) }).killServerOf(w)
	}},
	{failover, "Sentinel: master killed", []kind{sentinelKind("sorted_set"), rarely(sentinelKind("keys"))}, to(func(w *ward, p *sentinelPatient) {
		p.group.Servers[0].Kill()
		p.failOver(w)
	})},
	{failover, "Sentinel: master hung (SIGSTOP), and back too late", []kind{rarely(sentinelKind("sorted_set")), sentinelKind("keys")}, to(func(w *ward, p *sentinelPatient) {
		p.group.Servers[0].Pause()
		p.failOver(w)
		pauseFor(lease)
		p.group.Servers[0].Resume()
	})},
	{failover, "Cluster: master killed", []kind{clusterKind("sorted_set"), rarely(clusterKind("keys"))}, to(func(_ *ward, p *clusterPatient) { p.cluster.Owner(setKey).Kill() })},

	{rights, "user revoked", everyKind, to(func(_ *ward, p single) { p.revoke(); pauseFor(outage); p.admit() })},
	{rights, "every permission revoked", everyKind, to(func(_ *ward, p single) { p.forbid(); pauseFor(outage); p.admit() })},

	{paused, "for longer than its lease", append([]kind{leanKind}, everyKind...), func(w *ward) {
		s := w.services[1]
		speak := w.still(s)
		listed := func() bool { return slices.Contains(ids(w.nodes()), s.id) }
		eventually(w.t, "the node has lapsed", func() bool { return !listed() })
		speak()
		eventually(w.t, "the node is back", listed)
	}},

	{handover, "six reloads, each with another option of the registry, and a next tier", everyKind, func(w *ward) {
		front := freeport.String(w.t)
		next := start(w.t, "", site(front, w.block(w.link.address())+"\nwhere role proxy", "lb_retries 2\nlb_try_interval 1ms")) // against the resets of a reload of Caddy
		url := "http://127.0.0.1:" + front
		eventually(w.t, "the next tier finds Caddy", func() bool {
			body, err := ask(url)
			return err == nil && strings.HasPrefix(body, "orders-")
		})
		l := steady(w.t, url, pace)
		for i := range 6 {
			beaten := w.heartbeats()
			w.proxy.reload(strings.Replace(w.options(), w.block(w.link.address()), with(w.block(w.link.address()), fmt.Sprintf("ttl %ds", 60+i)), 1), w.sites())
			eventually(w.t, "it is announced", func() bool { return w.heartbeats() > beaten })
		}
		w.proxy.reload(w.options(), w.sites())
		pauseFor(outage)
		l.stop(w.t)
		next.kill(syscall.SIGTERM)
	}},

	{beside, "a record of 64 MiB, and a proxy starts", redisOnly, to(func(w *ward, p *redisPatient) {
		const size = 64 << 20
		before := w.proxy.peak()
		remove := p.bloat(size)
		pauseFor(outage)
		front := freeport.String(w.t)
		anew := start(w.t, "", site(front, w.block(w.link.address())+"\nservice orders", "lb_policy round_robin"))
		eventually(w.t, "a proxy that starts has the fleet", func() bool {
			return fmt.Sprint(round(w.t, 10, "http://127.0.0.1:"+front)) == all(w.services)
		})
		for _, p := range []*proxy{w.proxy, anew} {
			if grown := p.peak() - before; grown > size {
				w.t.Errorf("a proxy grew by %d MiB", grown>>20)
			}
		}
		anew.kill(syscall.SIGTERM)
		remove()
	})},

	{clocks, "those of the nodes", []kind{setKind}, to(func(_ *ward, p *redisPatient) { p.adrift.Store(true); pauseFor(2 * lease) })},
	{clocks, "the registry's jumps ahead", []kind{rarely(withClock[0]), withClock[1]}, to(func(_ *ward, p *redisPatient) { p.server.SetClock(2 * time.Hour); pauseFor(2 * lease) })},
	{clocks, "the registry's jumps back", []kind{withClock[0], rarely(withClock[1])}, to(func(_ *ward, p *redisPatient) { p.server.SetClock(-2 * time.Hour); pauseFor(2 * lease) })},
}

func (w *ward) options() string {
	return "registrar {\n" + w.block(w.link.address()) + "\nnode_id " + ownID + "\nendpoint http://127.0.0.1:" + w.port +
		"\nheartbeat " + beat.String() + "\nttl " + lease.String() + "\n}"
}

func (w *ward) sites() string {
	return site(w.port, w.block(w.link.address())+"\nservice orders", "lb_policy round_robin")
}

// admitWard starts a fleet of ten, Caddy in front of it, through a link where the
// registry is one server, and waits until all serve and Caddy is listed.
func admitWard(t *testing.T, p patient) *ward {
	w := &ward{
		t: t, patient: p, link: newLink(t, p.addresses()[0]), port: freeport.String(t),
		away: make(map[string]bool), silent: make(map[string]chan struct{}), stilled: make(map[string]chan struct{}),
	}
	for _, address := range append(p.addresses(), w.link.address()) {
		w.ports = append(w.ports, portOf(t, address))
	}
	for i := range 10 {
		w.services = append(w.services, newService(t, fmt.Sprintf("orders-%d", i)))
	}
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(func() {
		stop()
		w.hush(false)
		w.mu.Lock()
		for id, own := range w.stilled {
			delete(w.stilled, id)
			close(own)
		}
		w.mu.Unlock()
		w.beating.Wait()
	})
	w.join = func(s *service) {
		silent := make(chan struct{})
		w.mu.Lock()
		w.silent[s.id] = silent
		w.mu.Unlock()
		w.beating.Go(func() {
			defer close(silent)
			w.beat(ctx, s)
		})
	}
	for _, s := range w.services {
		w.join(s)
	}
	w.proxy = start(t, w.options(), w.sites())
	eventually(t, "all serve", func() bool {
		return fmt.Sprint(round(t, 10, "http://127.0.0.1:"+w.port)) == all(w.services)
	})
	eventually(t, "Caddy is listed", func() bool {
		listed, err := w.list()
		return err == nil && slices.Contains(listed, ownID) && slices.Contains(ids(w.nodes()), ownID)
	})
	return w
}

// beat heartbeats for a node, like a process of its own, until it leaves.
func (w *ward) beat(ctx context.Context, s *service) {
	for ctx.Err() == nil && !w.gone(s) {
		w.putting.RLock()
		w.mu.Lock()
		quiet := w.quiet
		if own := w.stilled[s.id]; own != nil {
			quiet = own
		}
		w.mu.Unlock()
		if quiet == nil {
			_ = w.put(s.id, record(s))
		}
		w.putting.RUnlock()
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
func (w *ward) crowd(size int) (disperse func()) {
	ctx, stop := context.WithCancel(context.Background())
	w.t.Cleanup(stop)
	var beating sync.WaitGroup
	id := func(i int) string { return fmt.Sprintf("crowd-%02d", i) }
	beating.Go(func() {
		for ctx.Err() == nil {
			for i := range size {
				_ = w.put(id(i), camel(id(i), "http://127.0.0.1:9", `"service":"crowd","lease":"`+lease.String()+`"`))
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
			eventually(w.t, "the registry takes the goodbye", func() bool { return w.remove(id(i)) == nil })
		}
	}
}

// hush makes the nodes hold their heartbeats back until it ends, and returns when
// none is under way any more.
func (w *ward) hush(on bool) {
	w.mu.Lock()
	if w.quiet != nil {
		close(w.quiet)
		w.quiet = nil
	}
	if on {
		w.quiet = make(chan struct{})
	}
	w.mu.Unlock()
	if on {
		w.putting.Lock()
		defer w.putting.Unlock()
	}
}

// still makes one node hold its heartbeats back until speak is called.
func (w *ward) still(s *service) (speak func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	own := make(chan struct{})
	w.stilled[s.id] = own
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.stilled[s.id] == own {
			delete(w.stilled, s.id)
			close(own)
		}
	}
}

func (w *ward) gone(s *service) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.away[s.id]
}

func record(s *service) string {
	return camel(s.id, "http://"+s.address, `"service":"orders","lease":"`+lease.String()+`"`)
}

func (w *ward) living() []*service {
	w.mu.Lock()
	defer w.mu.Unlock()
	var living []*service
	for _, s := range w.services {
		if !w.away[s.id] {
			living = append(living, s)
		}
	}
	return living
}

// ask gets something from the admin endpoint. A reload replaces the server behind
// it, and with it goes a connection that was just accepted.
func (w *ward) ask(path string) (body []byte) {
	w.t.Helper()
	eventually(w.t, "the admin endpoint answers "+path, func() bool {
		resp, err := admin.Get("http://" + w.proxy.admin + path)
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
func (w *ward) nodes() (nodes []node) {
	w.t.Helper()
	if err := json.Unmarshal(w.ask("/discovery/nodes"), &nodes); err != nil {
		w.t.Fatal(err)
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
func (w *ward) connected() bool {
	w.t.Helper()
	var registries []struct{ Connected, Synced bool }
	if err := json.Unmarshal(w.ask("/discovery/registries"), &registries); err != nil {
		w.t.Fatal(err)
	}
	return len(registries) == 1 && registries[0].Connected && registries[0].Synced
}

// heartbeats returns how many of Caddy's own heartbeats the registry has taken.
func (w *ward) heartbeats() (n float64) {
	w.t.Helper()
	for line := range strings.Lines(string(w.ask("/metrics"))) {
		if strings.HasPrefix(line, "caddy_discovery_heartbeats_total{") && strings.Contains(line, `result="ok"`) {
			_, value, _ := strings.Cut(line, "} ")
			if _, err := fmt.Sscan(value, &n); err != nil {
				w.t.Fatalf("the metric of heartbeats reads %q", line)
			}
		}
	}
	return n
}

// clients returns how many connections Caddy has to the registry.
func (w *ward) clients() int { return connectionsOf(w.proxy.cmd.Process.Pid, w.ports...) }

// goroutines returns how many goroutines of Caddy belong to the plugin or to a
// client of a registry. The others are Caddy's connections, of which a load
// leaves some idle.
func (w *ward) goroutines() int {
	w.t.Helper()
	total := 0
	for stack := range strings.SplitSeq(string(w.ask("/debug/pprof/goroutine?debug=1")), "\n\n") {
		if !strings.Contains(stack, "caddy-discovery/") && !strings.Contains(stack, "nats-io/nats.go") && !strings.Contains(stack, "redis/go-redis") {
			continue
		}
		count, _, found := strings.Cut(stack, " @ ")
		if i := strings.LastIndexByte(count, '\n'); i >= 0 {
			count = count[i+1:]
		}
		n, err := strconv.Atoi(count)
		if !found || err != nil {
			w.t.Fatalf("a stack of the profile reads %q", stack)
		}
		total += n
	}
	return total
}

// finding is a row of the table.
type finding struct {
	fault, backend string
	served, failed int
	listed         time.Duration // until Caddy's own record was renewed
	settled        time.Duration
	clients        [2]int
	goroutines     [2]int
}

// treat does the fault under load and says what became of it. When the fault is
// over a node joins and another leaves: the time until the view equals the
// registry again is counted from then.
func (w *ward) treat(f fault) finding {
	t := w.t
	found := finding{fault: f.name}
	found.clients[0], found.goroutines[0] = w.clients(), w.goroutines()
	l := steady(t, "http://127.0.0.1:"+w.port, pace)
	served := 0
	eventually(t, "the load runs", func() bool { served = l.served(); return served > 20 })
	f.do(w)
	over, beaten := time.Now(), w.heartbeats()

	joined := newService(t, "orders-new")
	w.mu.Lock()
	w.services = append(w.services, joined)
	left := w.services[0]
	w.away[left.id] = true
	silent := w.silent[left.id]
	w.mu.Unlock()
	<-silent // a heartbeat that is still under way would bring the record back
	w.join(joined)
	eventually(t, "the registry takes the goodbye", func() bool { return w.remove(left.id) == nil })
	want := []string{ownID}
	for _, s := range w.living() {
		want = append(want, s.id)
	}
	slices.Sort(want)
	var listed, viewed []string
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the registry lists %v, Caddy's view is %v, want %v", listed, viewed, want)
		}
	})
	within(t, 4*patience, "the view equals the registry again, with Caddy in it", func() bool {
		time.Sleep(20 * time.Millisecond) // Caddy has a fleet to serve
		var err error
		if listed, err = w.list(); err != nil {
			return false
		}
		slices.Sort(listed)
		listed = slices.Compact(listed)
		if found.listed == 0 && slices.Contains(listed, ownID) && w.heartbeats() > beaten {
			found.listed = time.Since(over)
		}
		nodes := w.nodes()
		viewed = ids(nodes)
		if slices.Contains(nodes, node{left.id, "held"}) {
			// The fleet lapsed as one, on a machine this busy, while this node said
			// goodbye to a registry that was away. It stays for as long as it accepts
			// connections, as it should.
			l.stop(t)
			left.close()
		}
		return found.listed > 0 && slices.Equal(listed, want) && slices.Equal(viewed, want)
	})
	found.settled = time.Since(over)
	// A crashed node was never part of this, so nothing may have failed.
	l.stop(t)
	found.served, found.failed = l.served(), len(l.failures)
	client.CloseIdleConnections()
	eventually(t, "no connection is left behind", func() bool {
		found.clients[1] = w.clients()
		most := max(found.clients[0], 1)
		if c, ok := w.patient.(*clusterPatient); ok {
			most = len(c.addresses()) + 2 // a client asks any of them how the cluster is
		}
		return found.clients[1] <= most
	})
	eventually(t, "no goroutine is left behind", func() bool {
		found.goroutines[1] = w.goroutines()
		return found.goroutines[1] <= found.goroutines[0]
	})
	return found
}

// pace is how long each of the workers waits after a request: most of the time
// of a fault is spent waiting, and other tests want to run meanwhile.
const pace = 20 * time.Millisecond

// TestFaults is the registry's worst day: each fault on each kind of registry that
// can have it, under a load of which every response is checked. No request may
// fail, because at every moment there is a healthy node.
func TestFaults(t *testing.T) {
	var mu sync.Mutex
	findings := make(map[string][]finding) // by fault
	t.Run("all", func(t *testing.T) {
		for _, f := range faults {
			for _, k := range f.on {
				if k.rare && *reliability == "" {
					continue
				}
				t.Run(k.name+"/"+f.name, func(t *testing.T) {
					t.Parallel()
					found := admitWard(t, k.admit(t)).treat(f)
					found.backend = k.name
					mu.Lock()
					defer mu.Unlock()
					findings[f.name] = append(findings[f.name], found)
				})
			}
		}
	})
	if *reliability == "" || t.Failed() {
		return
	}
	if err := os.MkdirAll(filepath.Dir(*reliability), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(*reliability, []byte(report(findings)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// report is the document that make reliability writes.
func report(findings map[string][]finding) string {
	var s strings.Builder
	s.WriteString(`# The registry's worst day

` + "`make reliability`" + ` writes these tables: each fault on real servers, ten nodes with a
lease of ` + lease.String() + ` that heartbeat three times in it, Caddy as users build it, which is
listed itself, and a constant load of which every response is checked. When a fault
is over one node joins and one leaves.

- *served* and *failed*: requests; none may fail, since a healthy node is always there
- *own record*: how long it took from then until a heartbeat of Caddy's own was taken and
  its record stood there
- *settled*: how long it took from then until Caddy's view equalled the registry's own
  listing
- *connections* of Caddy to the registry, and its *goroutines* that belong to the plugin or
  to a client of a registry, before and after

An outage lasts ` + outage.String() + `: longer than a lease, than the bucket's TTL and than the keys' EX,
which are ` + (2 * lease).String() + `. The nodes go on heartbeating all the time.

Some days take more than one process, and have tests of their own, without a failed
request: a drained node stays drained when the proxy restarts while the registry is
away (` + "`TestDrainOutlivesRestart`" + `), a process that leaves takes nothing from the successor
that has its id, 150 ms away (` + "`TestRollingRestart`" + `), six reloads in a row change an option
of the registry (` + "`TestReloadsOfOptions`" + `), and a release of the writers makes all records
unreadable (` + "`TestReleaseOfTheWriters`" + `).
`)
	group := ""
	for _, f := range faults {
		if f.group != group {
			group = f.group
			s.WriteString("\n## " + group + "\n\n| fault | backend | served | failed | own record | settled | connections | goroutines |\n|---|---|--:|--:|--:|--:|---|---|\n")
		}
		rows := findings[f.name]
		slices.SortFunc(rows, func(a, b finding) int { return strings.Compare(a.backend, b.backend) })
		for _, row := range rows {
			fmt.Fprintf(&s, "| %s | `%s` | %d | %d | %.1f s | %.1f s | %d → %d | %d → %d |\n", row.fault, row.backend, row.served, row.failed,
				row.listed.Seconds(), row.settled.Seconds(), row.clients[0], row.clients[1], row.goroutines[0], row.goroutines[1])
		}
	}
	return s.String()
}
