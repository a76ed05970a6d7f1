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

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

var reliability = flag.String("reliability", "", "file into which TestFaults writes its table")

// lease is that of the nodes in these tests; they heartbeat three times in it.
const lease = time.Second

// A patient is a registry that can be hurt in every way. Its errors are the
// writers' to live with: a fleet goes on trying.
type patient interface {
	// address is where the server listens; block names the registry for Caddy,
	// at that address or through a link.
	address() string
	block(address string) string
	// put and remove are what the nodes of a fleet do.
	put(id, record string) error
	remove(id string) error
	// list returns the ids of the records that stand there.
	list() ([]string, error)
	// wipe empties the registry and makes it another one.
	wipe() error
	kill()
	restart()
	pause()
	resume()
	clients() int
}

var patients = []struct {
	name  string
	admit func(t *testing.T) patient
}{
	{"nats_kv", admitKV},
	{"nats", admitBroadcast},
	{"redis_sorted_set", func(t *testing.T) patient { return admitRedis(t, "sorted_set") }},
	{"redis_keys", func(t *testing.T) patient { return admitRedis(t, "keys") }},
}

type kvPatient struct {
	keep   time.Duration // how long the bucket keeps what nobody renews
	server *natstest.Process
	js     jetstream.JetStream
	conn   *nats.Conn
}

func admitKV(t *testing.T) patient {
	return admitBucket(t, 2*lease)
}

func admitBucket(t *testing.T, keep time.Duration) *kvPatient {
	p := &kvPatient{keep: keep, server: natstest.StartProcess(t)}
	var err error
	p.conn, err = nats.Connect(p.server.URL(), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond),
		nats.ReconnectBufSize(-1), nats.PingInterval(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.conn.Close)
	if p.js, err = jetstream.New(p.conn); err != nil {
		t.Fatal(err)
	}
	if err := p.create(); err != nil {
		t.Fatal(err)
	}
	return p
}

func patientContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 2*time.Second)
}

// create makes a bucket that forgets within a few leases, so that an outage can
// outlast it.
func (p *kvPatient) create() error {
	ctx, cancel := patientContext()
	defer cancel()
	_, err := p.js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 3, TTL: p.keep, LimitMarkerTTL: p.keep})
	return err
}

func (p *kvPatient) do(f func(context.Context, jetstream.KeyValue) error) error {
	ctx, cancel := patientContext()
	defer cancel()
	bucket, err := p.js.KeyValue(ctx, "catga_nodes")
	if err != nil {
		return err
	}
	return f(ctx, bucket)
}

func (p *kvPatient) address() string { return strings.TrimPrefix(p.server.URL(), "nats://") }

func (p *kvPatient) block(address string) string { return "registry nats_kv nats://" + address }

func (p *kvPatient) put(id, record string) error {
	return p.do(func(ctx context.Context, kv jetstream.KeyValue) error {
		_, err := kv.PutString(ctx, "node."+id, record)
		return err
	})
}

func (p *kvPatient) remove(id string) error {
	return p.do(func(ctx context.Context, kv jetstream.KeyValue) error { return kv.Delete(ctx, "node."+id) })
}

func (p *kvPatient) list() (ids []string, err error) {
	err = p.do(func(ctx context.Context, kv jetstream.KeyValue) error {
		lister, err := kv.ListKeys(ctx)
		if err != nil {
			return err
		}
		for key := range lister.Keys() {
			ids = append(ids, strings.TrimPrefix(key, "node."))
		}
		return nil
	})
	return ids, err
}

func (p *kvPatient) wipe() error {
	ctx, cancel := patientContext()
	defer cancel()
	if err := p.js.DeleteKeyValue(ctx, "catga_nodes"); err != nil {
		return err
	}
	return p.create()
}

func (p *kvPatient) kill()    { p.server.Kill() }
func (p *kvPatient) restart() { p.server.Start() }
func (p *kvPatient) pause()   { _ = syscall.Kill(p.server.PID(), syscall.SIGSTOP) }
func (p *kvPatient) resume()  { _ = syscall.Kill(p.server.PID(), syscall.SIGCONT) }

// clients counts what the server has open, by the kernel's own table.
func (p *kvPatient) clients() int { return connectionsTo(p.server.Port) - 1 }

// broadcastPatient keeps nothing, so that there is nothing to wipe: what is listed
// is what the fleet says of itself.
type broadcastPatient struct {
	server *natstest.Process
	conn   *nats.Conn

	mu    sync.Mutex
	fleet map[string]string
}

func admitBroadcast(t *testing.T) patient {
	p := &broadcastPatient{server: natstest.StartProcess(t), fleet: make(map[string]string)}
	var err error
	p.conn, err = nats.Connect(p.server.URL(), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond),
		nats.ReconnectBufSize(-1), nats.PingInterval(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.conn.Close)
	if _, err := p.conn.Subscribe(prefix+".query", func(m *nats.Msg) {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, record := range p.fleet {
			_ = m.Respond([]byte(record))
		}
	}); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *broadcastPatient) say(subject, message string) error {
	if err := p.conn.Publish(prefix+"."+subject, []byte(message)); err != nil {
		return err
	}
	return p.conn.FlushTimeout(lease)
}

func (p *broadcastPatient) put(id, record string) error {
	p.mu.Lock()
	known := p.fleet[id] == record
	p.fleet[id] = record
	p.mu.Unlock()
	if known {
		return p.say("heartbeat", record) // as ours do
	}
	return p.say("join", record)
}

func (p *broadcastPatient) remove(id string) error {
	p.mu.Lock()
	delete(p.fleet, id)
	p.mu.Unlock()
	return p.say("leave", fmt.Sprintf(`{"NodeId":%q}`, id))
}

func (p *broadcastPatient) list() (ids []string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id := range p.fleet {
		ids = append(ids, id)
	}
	return ids, nil
}

func (p *broadcastPatient) address() string { return strings.TrimPrefix(p.server.URL(), "nats://") }

func (p *broadcastPatient) block(address string) string { return "registry nats nats://" + address }

func (p *broadcastPatient) wipe() error  { return nil }
func (p *broadcastPatient) kill()        { p.server.Kill() }
func (p *broadcastPatient) restart()     { p.server.Start() }
func (p *broadcastPatient) pause()       { _ = syscall.Kill(p.server.PID(), syscall.SIGSTOP) }
func (p *broadcastPatient) resume()      { _ = syscall.Kill(p.server.PID(), syscall.SIGCONT) }
func (p *broadcastPatient) clients() int { return connectionsTo(p.server.Port) - 1 }

type redisPatient struct {
	server  *redistest.Server
	layout  string
	keep    time.Duration // how long a key lives that nobody renews
	client  *goredis.Client
	mu      sync.Mutex
	members map[string]string
}

func admitRedis(t *testing.T, layout string) *redisPatient {
	server := redistest.Start(t, redistest.Config("appendonly", "yes"), redistest.Config("appendfsync", "always"))
	client := goredis.NewClient(&goredis.Options{Addr: server.Addr(), PoolSize: 1, DialTimeout: time.Second, ReadTimeout: time.Second, MaxRetries: -1})
	t.Cleanup(func() { _ = client.Close() })
	return &redisPatient{server: server, layout: layout, keep: 2 * lease, client: client, members: make(map[string]string)}
}

func (p *redisPatient) address() string { return p.server.Addr() }

func (p *redisPatient) block(address string) string {
	return "registry redis redis://" + address + " {\nlayout " + p.layout + "\npoll 100ms\n}"
}

func (p *redisPatient) put(id, record string) error {
	ctx, cancel := patientContext()
	defer cancel()
	if p.layout == "keys" {
		return p.client.Set(ctx, setKey+":"+id, record, p.keep).Err()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if old, ok := p.members[id]; ok && old != record {
		if err := p.client.ZRem(ctx, setKey, old).Err(); err != nil {
			return err
		}
	}
	err := p.client.ZAdd(ctx, setKey, goredis.Z{Score: float64(time.Now().UnixMilli()), Member: record}).Err()
	if err == nil {
		p.members[id] = record
	}
	return err
}

func (p *redisPatient) remove(id string) error {
	ctx, cancel := patientContext()
	defer cancel()
	if p.layout == "keys" {
		return p.client.Del(ctx, setKey+":"+id).Err()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.client.ZRem(ctx, setKey, p.members[id]).Err()
}

func (p *redisPatient) list() (ids []string, err error) {
	ctx, cancel := patientContext()
	defer cancel()
	if p.layout == "keys" {
		keys, err := p.client.Keys(ctx, setKey+":*").Result()
		for _, key := range keys {
			ids = append(ids, strings.TrimPrefix(key, setKey+":"))
		}
		return ids, err
	}
	members, err := p.client.ZRange(ctx, setKey, 0, -1).Result()
	for _, m := range members {
		n, err := discovery.ParseNode([]byte(m))
		if err != nil {
			return nil, err
		}
		ids = append(ids, n.ID)
	}
	return ids, err
}

func (p *redisPatient) wipe() error {
	ctx, cancel := patientContext()
	defer cancel()
	return p.client.FlushAll(ctx).Err()
}

func (p *redisPatient) kill()    { p.server.Kill() }
func (p *redisPatient) restart() { p.server.Restart() }
func (p *redisPatient) pause()   { p.server.Pause() }
func (p *redisPatient) resume()  { p.server.Resume() }

func (p *redisPatient) clients() int { return connectionsTo(p.server.Port()) - 1 }

// connectionsTo counts the established connections of which the far end is the
// port on this machine, one end only.
func connectionsTo(port int) int {
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return 0
	}
	n := 0
	want := fmt.Sprintf(":%04X", port)
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasSuffix(f[2], want) && f[3] == "01" {
			n++
		}
	}
	return n
}

// A ward is a fleet, its registry, and a Caddy in front, under load.
type ward struct {
	t *testing.T
	patient
	link     *link
	further  []*link // to other registries
	proxy    *proxy
	port     string
	services []*service

	mu      sync.Mutex
	away    map[string]bool          // nodes that left
	silent  map[string]chan struct{} // closed when a node has sent its last heartbeat
	join    func(*service)           // makes a node heartbeat until it leaves
	beating sync.WaitGroup
}

// fault is something that happens to a registry, or between it and Caddy.
type fault struct {
	name string
	do   func(w *ward)
}

// outage is longer than a lease, the bucket's TTL and the keys' EX.
const outage = 4 * lease

func pauseFor(d time.Duration) { <-time.After(d) }

var faults = []fault{
	{"killed, back with its data", func(w *ward) { w.kill(); pauseFor(outage); w.restart() }},
	{"paused (SIGSTOP)", func(w *ward) { w.pause(); pauseFor(outage); w.resume() }},
	{"paused for less than a lease", func(w *ward) { w.pause(); pauseFor(lease * 2 / 3); w.resume() }},
	{"packets dropped, nothing closed", func(w *ward) { w.link.drop(true); pauseFor(outage); w.link.drop(false) }},
	{"connections reset, over and over", func(w *ward) {
		for range 10 {
			w.link.cut()
			pauseFor(lease / 4)
		}
	}},
	{"unreachable for Caddy alone", func(w *ward) { w.link.refuse(true); pauseFor(outage); w.link.refuse(false) }},
	{"slow, a second each way", func(w *ward) { w.link.slow(time.Second); pauseFor(2 * outage); w.link.slow(0) }},
	{"wiped and made anew", func(w *ward) {
		if err := w.wipe(); err != nil {
			w.t.Errorf("wiping: %v", err)
		}
	}},
	{"killed, wiped and made anew", func(w *ward) {
		w.kill()
		pauseFor(outage)
		w.restart()
		eventually(w.t, "the registry can be wiped", func() bool { return w.wipe() == nil })
	}},
	{"reloads while it is away", func(w *ward) {
		w.link.refuse(true)
		for range 10 {
			w.proxy.reload("", w.sites())
		}
		pauseFor(outage)
		w.link.refuse(false)
	}},
}

func (w *ward) sites() string {
	return site(w.port, w.block(w.link.address())+"\nservice orders", "lb_policy round_robin")
}

// admit starts a fleet of ten, Caddy in front of it through a link, and waits
// until all serve.
func admitWard(t *testing.T, p patient) *ward {
	w := &ward{t: t, patient: p, link: newLink(t, p.address()), port: freeport.String(t), away: make(map[string]bool), silent: make(map[string]chan struct{})}
	for i := range 10 {
		w.services = append(w.services, newService(t, fmt.Sprintf("orders-%d", i)))
	}
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(func() { stop(); w.beating.Wait() })
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
	w.proxy = start(t, "", w.sites())
	eventually(t, "all serve", func() bool {
		return fmt.Sprint(round(t, 10, "http://127.0.0.1:"+w.port)) == all(w.services)
	})
	return w
}

// beat heartbeats for a node, like a process of its own, until it leaves.
func (w *ward) beat(ctx context.Context, s *service) {
	for ctx.Err() == nil && !w.gone(s) {
		_ = w.put(s.id, record(s))
		select {
		case <-ctx.Done():
		case <-time.After(lease / 3):
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

// viewed returns the ids of the nodes that Caddy knows.
func (w *ward) viewed() []string {
	w.t.Helper()
	var nodes []struct{ ID, State string }
	if err := json.Unmarshal(w.ask("/discovery/nodes"), &nodes); err != nil {
		w.t.Fatal(err)
	}
	var ids []string
	for _, n := range nodes {
		ids = append(ids, n.ID)
	}
	slices.Sort(ids)
	return ids
}

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
	l := traffic(t, "http://127.0.0.1:"+w.port)
	served := 0
	eventually(t, "the load runs", func() bool { served = l.served(); return served > 20 })
	f.do(w)
	over := time.Now()

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
	want := func() []string {
		var ids []string
		for _, s := range w.living() {
			ids = append(ids, s.id)
		}
		slices.Sort(ids)
		return ids
	}
	eventually(t, "the view equals the registry again: "+fmt.Sprint(want()), func() bool {
		listed, err := w.list()
		if err != nil {
			return false
		}
		slices.Sort(listed)
		return slices.Equal(listed, want()) && slices.Equal(w.viewed(), listed)
	})
	found.settled = time.Since(over)
	// A crashed node was never part of this, so nothing may have failed.
	l.stop(t)
	found.served, found.failed = l.served(), len(l.failures)
	client.CloseIdleConnections()
	eventually(t, "no connection is left behind", func() bool {
		found.clients[1] = w.clients()
		return found.clients[1] <= max(found.clients[0], 1)
	})
	eventually(t, "no goroutine is left behind", func() bool {
		found.goroutines[1] = w.goroutines()
		return found.goroutines[1] <= found.goroutines[0]
	})
	return found
}

// TestFaults is the registry's worst day: each fault on each kind of registry,
// under a load of which every response is checked. No request may fail, because
// at every moment there is a healthy node.
func TestFaults(t *testing.T) {
	var mu sync.Mutex
	var findings []finding
	t.Run("all", func(t *testing.T) {
		for _, p := range patients {
			for _, f := range faults {
				t.Run(p.name+"/"+f.name, func(t *testing.T) {
					t.Parallel()
					found := admitWard(t, p.admit(t)).treat(f)
					found.backend = p.name
					mu.Lock()
					findings = append(findings, found)
					mu.Unlock()
				})
			}
		}
	})
	if *reliability == "" || t.Failed() {
		return
	}
	order := func(name string) int {
		return slices.IndexFunc(faults, func(f fault) bool { return f.name == name })
	}
	slices.SortFunc(findings, func(a, b finding) int {
		if c := order(a.fault) - order(b.fault); c != 0 {
			return c
		}
		return strings.Compare(a.backend, b.backend)
	})
	var s strings.Builder
	s.WriteString("# The registry's worst day\n\n`make reliability` writes this table: each fault on a real server, ten nodes with a lease of " + lease.String() +
		" that heartbeat three times in it, Caddy as users build it, and a constant load of which every response is checked. " +
		"When a fault is over one node joins and one leaves, and *settled* is how long it took from then until Caddy's view equalled the registry's own listing. " +
		"Connections to the registry and goroutines of Caddy are counted before and after.\n\n" +
		"| fault | backend | requests served | failed | settled | connections | goroutines |\n|---|---|--:|--:|--:|---|---|\n")
	for _, f := range findings {
		fmt.Fprintf(&s, "| %s | `%s` | %d | %d | %.1f s | %d → %d | %d → %d |\n", f.fault, f.backend, f.served, f.failed,
			f.settled.Seconds(), f.clients[0], f.clients[1], f.goroutines[0], f.goroutines[1])
	}
	if err := os.MkdirAll(filepath.Dir(*reliability), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(*reliability, []byte(s.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}
