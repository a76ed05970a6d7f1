package benchmarks

import (
	"context"
	"debug/buildinfo"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

const (
	beginPeers = "<!-- make bench-peers: begin -->"
	endPeers   = "<!-- make bench-peers: end -->"

	// How many nodes join and leave, one after the other.
	peerChanges = 20
	// How long it is watched whether a node that left still gets requests.
	peerLinger = 3 * time.Second
	// How long Redis is away, and how long it is empty.
	peerOutage, peerFlushed = 12 * time.Second, 3 * time.Second
)

var traefik = flag.String("traefik", "", "the Traefik to compare with: its binary")

// A peer is a proxy that follows a fleet in Redis, and what a node writes there to be
// listed. The nodes write for all of them.
type peer struct {
	name    string
	url     string
	list    func(n peerNode) map[string]string // keys to set
	expires bool                               // the keys do, unless they are set again

	joined, left    []time.Duration
	outage, flushed peerLoad
	rejoined        time.Duration // after the outage
}

// A peerLoad is what became of requests that went on all the while.
type peerLoad struct{ asked, failed int }

// A peerNode answers with its name.
type peerNode struct {
	number  int
	name    string
	address string
}

func newPeerNode(b *testing.B, number int) peerNode {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	n := peerNode{number, fmt.Sprintf("orders-%d", number), l.Addr().String()}
	server := &http.Server{
		ReadHeaderTimeout: time.Minute,
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, n.name) }),
	}
	go func() { _ = server.Serve(l) }()
	b.Cleanup(func() { _ = server.Close() })
	return n
}

// BenchmarkPeers follows one fleet in one Redis by Caddy and by Traefik, in one run.
func BenchmarkPeers(b *testing.B) {
	if *traefik == "" {
		b.Fatal("no Traefik is given; want make bench-peers TRAEFIK=<its binary>")
	}
	goredis.SetLogger(quiet{})                           // it is killed
	redis := redistest.Start(b, redistest.Notify("AKE")) // as Traefik wants it
	f := &peerFleet{b: b, redis: redis, client: redis.Client()}
	f.peers = []*peer{startCaddyPeer(b, redis), startTraefik(b, redis)}
	for i := range 3 {
		f.add(newPeerNode(b, i))
	}
	stop := f.heartbeat()
	defer stop()
	for _, p := range f.peers {
		p.await(b, f.nodes[2].name)
	}

	for i := range peerChanges {
		f.change(newPeerNode(b, 100+i))
	}
	f.during(func(p *peer) *peerLoad { return &p.outage }, func() {
		redis.Kill()
		time.Sleep(peerOutage)
		redis.Restart()
	})
	late := newPeerNode(b, 200)
	f.add(late)
	began := time.Now()
	for _, p := range f.peers {
		p.rejoined = p.awaitUntil(b, late.name, began.Add(time.Minute)).Sub(began)
	}
	f.during(func(p *peer) *peerLoad { return &p.flushed }, func() {
		f.silence(func() {
			f.must(f.client.FlushAll(context.Background()).Err())
			time.Sleep(peerFlushed)
		})
	})
	for _, p := range f.peers {
		slices.Sort(p.joined)
		slices.Sort(p.left)
		b.Logf("%s: %+v", p.name, *p)
	}
	if *report != "" {
		if err := writeSection(*report, f.section(), beginPeers, endPeers); err != nil {
			b.Fatal(err)
		}
	}
}

func startCaddyPeer(b *testing.B, redis *redistest.Server) *peer {
	port := freeport.String(b)
	runCaddy(b, "http://127.0.0.1:"+port+` {
		reverse_proxy {
			dynamic discovery {
				registry redis `+redis.URL()+` {
					layout keys
				}
				service orders
			}
			lb_policy round_robin
		}
	}`)
	binary, err := build()
	if err != nil {
		b.Fatal(err)
	}
	return &peer{
		name: "this plugin, " + version(b, "Caddy", binary, "github.com/caddyserver/caddy/v2"), url: "http://127.0.0.1:" + port, expires: true,
		list: func(n peerNode) map[string]string {
			return map[string]string{"catga:nodes:" + n.name: fmt.Sprintf(
				`{"nodeId":%q,"endpoint":"http://%s","metadata":{"service":"orders"}}`, n.name, n.address)}
		},
	}
}

func startTraefik(b *testing.B, redis *redistest.Server) *peer {
	port := freeport.String(b)
	cmd := exec.Command(*traefik, "--entrypoints.web.address=127.0.0.1:"+port, "--providers.redis.endpoints="+redis.Addr(),
		"--log.level=ERROR", "--global.checknewversion=false", "--global.sendanonymoususage=false")
	cmd.Stderr = os.Stderr
	startProgram(b, cmd, syscall.SIGKILL)
	return &peer{
		name: version(b, "Traefik", *traefik, "github.com/traefik/traefik/v3"), url: "http://127.0.0.1:" + port,
		list: func(n peerNode) map[string]string {
			return map[string]string{
				"traefik/http/routers/orders/rule":                                                "PathPrefix(`/`)",
				"traefik/http/routers/orders/service":                                             "orders",
				fmt.Sprintf("traefik/http/services/orders/loadbalancer/servers/%d/url", n.number): "http://" + n.address,
			}
		},
	}
}

// version returns the version of a program's module, as it was linked.
func version(b *testing.B, name, binary, module string) string {
	b.Helper()
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		b.Fatal(err)
	}
	for _, m := range append(info.Deps, &info.Main) {
		if m.Path == module {
			return name + " " + m.Version
		}
	}
	b.Fatalf("%s is not built of %s", binary, module)
	return ""
}

// quiet is a logger of the Redis client that says nothing.
type quiet struct{}

// Printf implements the client's interface.
func (quiet) Printf(context.Context, string, ...any) {}

// A peerFleet is what all peers follow.
type peerFleet struct {
	b      *testing.B
	redis  *redistest.Server
	client *goredis.Client
	peers  []*peer

	mu    sync.Mutex // guards what the heartbeats read, and holds them up
	nodes []peerNode
}

func (f *peerFleet) must(err error) {
	f.b.Helper()
	if err != nil {
		f.b.Fatal(err)
	}
}

// add lists a node.
func (f *peerFleet) add(n peerNode) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nodes = append(f.nodes, n)
	f.must(f.write(n, false))
}

// write writes what a node has to say, for all peers, or for those whose keys expire: a
// heartbeat. The others would take it for a change.
func (f *peerFleet) write(n peerNode, heartbeat bool) error {
	pipeline := f.client.Pipeline()
	for _, p := range f.peers {
		if heartbeat && !p.expires {
			continue
		}
		for key, value := range p.list(n) {
			lease := time.Duration(0)
			if p.expires {
				lease = 30 * time.Second
			}
			pipeline.Set(context.Background(), key, value, lease)
		}
	}
	_, err := pipeline.Exec(context.Background())
	return err
}

// heartbeat has all nodes write again, every second.
func (f *peerFleet) heartbeat() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var beating sync.WaitGroup
	beating.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
			f.mu.Lock()
			for _, n := range f.nodes {
				_ = f.write(n, true) // Redis may be away
			}
			f.mu.Unlock()
		}
	})
	return func() { cancel(); beating.Wait() }
}

// silence holds the heartbeats up.
func (f *peerFleet) silence(meanwhile func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	meanwhile()
	for _, n := range f.nodes {
		f.must(f.write(n, false))
	}
}

// change has a node join and leave, for one peer after the other.
func (f *peerFleet) change(n peerNode) {
	for _, p := range f.peers {
		for key, value := range p.list(n) {
			f.must(f.client.Set(context.Background(), key, value, 0).Err())
		}
		began := time.Now()
		p.joined = append(p.joined, p.awaitUntil(f.b, n.name, began.Add(10*time.Second)).Sub(began))
		for key := range p.list(n) {
			if !strings.Contains(key, "routers") {
				f.must(f.client.Del(context.Background(), key).Err())
			}
		}
		began = time.Now()
		last := time.Duration(0)
		for time.Since(began) < peerLinger {
			if body, _ := p.ask(); body == n.name {
				last = time.Since(began)
			}
		}
		p.left = append(p.left, last)
	}
}

// during asks all peers while something happens, and for three seconds more.
func (f *peerFleet) during(of func(*peer) *peerLoad, happens func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var asking sync.WaitGroup
	for _, p := range f.peers {
		asking.Go(func() {
			for l := of(p); ctx.Err() == nil; time.Sleep(10 * time.Millisecond) {
				l.asked++
				if _, ok := p.ask(); !ok {
					l.failed++
				}
			}
		})
	}
	happens()
	time.Sleep(3 * time.Second)
	cancel()
	asking.Wait()
}

// ask sends a request, and returns who answered.
func (p *peer) ask() (body string, ok bool) {
	response, err := http.Get(p.url)
	if err != nil {
		return "", false
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return string(text), err == nil && response.StatusCode == http.StatusOK
}

func (p *peer) await(b *testing.B, name string) {
	b.Helper()
	p.awaitUntil(b, name, time.Now().Add(30*time.Second))
}

// awaitUntil returns when a node answers for the first time.
func (p *peer) awaitUntil(b *testing.B, name string, deadline time.Time) time.Time {
	b.Helper()
	for {
		if body, _ := p.ask(); body == name {
			return time.Now()
		}
		if time.Now().After(deadline) {
			b.Fatalf("%s: %s never answered", p.name, name)
		}
	}
}

// section returns what goes into benchmarks.md.
func (f *peerFleet) section() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s\n## Beside Traefik\n\n`make bench-peers TRAEFIK=<binary>`, one run on %s. One Redis with keyspace notifications, one fleet, "+
		"both proxies at once: %d nodes join and leave one after the other, Redis is killed for %v and comes back with its data, "+
		"and it is flushed, with everything written again %v later. *Left → last request* is watched for %v. "+
		"Traefik collects changes for two seconds by default (`providersThrottleDuration`), whence a change that follows another so long after.\n\n"+
		"| | registered → served, p50 | most | left → last request, p50 | most | failed while Redis was away | joined afterwards → served | failed when it was flushed |\n|---|--:|--:|--:|--:|--:|--:|--:|\n",
		beginPeers, machine(), peerChanges, peerOutage, peerFlushed, peerLinger)
	for _, p := range f.peers {
		fmt.Fprintf(&s, "| %s | %s | %s | %s | %s | %d of %d | %s | %d of %d |\n", p.name,
			micros(p.joined[len(p.joined)/2]), micros(p.joined[len(p.joined)-1]), micros(p.left[len(p.left)/2]), micros(p.left[len(p.left)-1]),
			p.outage.failed, p.outage.asked, micros(p.rejoined), p.flushed.failed, p.flushed.asked)
	}
	s.WriteString(endPeers + "\n")
	return s.String()
}
