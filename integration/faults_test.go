package integration

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

var reliability = flag.String("reliability", "", "file into which TestFaults writes its table")

// fault is something that happens to a registry, or between it and Caddy.
type fault struct {
	group, name string
	on          []kind
	do          func(rig *testRig)
}

// outage is longer than a lease, the bucket's TTL and the keys' EX.
const outage = 3 * lease

func pauseFor(d time.Duration) { <-time.After(d) }

// to is a fault of registries of one type.
func to[P faultyRegistry](do func(rig *testRig, r P)) func(rig *testRig) {
	return func(rig *testRig) { do(rig, rig.faultyRegistry.(P)) }
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
	{gone, "killed, back with its data", everyKind, to(func(_ *testRig, r faultyServer) { r.kill(); pauseFor(outage); r.restart() })},
	{gone, "paused (SIGSTOP)", everyKind, to(func(_ *testRig, r faultyServer) { r.pause(); pauseFor(outage); r.resume() })},
	{gone, "paused for less than a lease", everyKind, to(func(_ *testRig, r faultyServer) { r.pause(); pauseFor(lease * 2 / 3); r.resume() })},
	{gone, "reloads while it is away", everyKind, func(rig *testRig) {
		rig.link.refuse(true)
		for range 10 {
			rig.proxy.reload(rig.options(), rig.sites())
		}
		pauseFor(outage)
		rig.link.refuse(false)
	}},

	{between, "packets dropped, nothing closed", everyKind, func(rig *testRig) { rig.link.drop(true); pauseFor(outage); rig.link.drop(false) }},
	{between, "connections reset, over and over", everyKind, func(rig *testRig) {
		for range 10 {
			rig.link.cut()
			pauseFor(lease / 4)
		}
	}},
	{between, "unreachable for Caddy alone", everyKind, func(rig *testRig) { rig.link.refuse(true); pauseFor(outage); rig.link.refuse(false) }},
	{between, "slow, a second each way", everyKind, func(rig *testRig) { rig.link.slow(time.Second); pauseFor(2 * outage); rig.link.slow(0) }},

	{cutOff, "the ten nodes of a service cut off, ninety others are not", everyKind, func(rig *testRig) {
		others := rig.crowd(90)
		rig.proxy.reload(rig.options(), rig.sites()+site(freeport.String(rig.t), rig.block(rig.link.address())+"\nservice crowd", ""))
		eventually(rig.t, "all are seen", func() bool { return len(rig.nodes()) > 100 })
		rig.holdHeartbeats(true)
		eventually(rig.t, "the ten are held", func() bool {
			held := 0
			for _, n := range rig.nodes() {
				if n.State == "held" {
					held++
				}
			}
			return held == 10
		})
		pauseFor(outage)
		rig.holdHeartbeats(false)
		rig.proxy.reload(rig.options(), rig.sites())
		others()
	}},

	{lost, "wiped and made anew", everyKind, to(func(rig *testRig, r faultyServer) {
		if err := r.wipe(); err != nil {
			rig.t.Errorf("wiping: %v", err)
		}
	})},
	{lost, "killed, wiped and made anew", everyKind, to(func(rig *testRig, r faultyServer) {
		r.kill()
		pauseFor(outage)
		r.restart()
		eventually(rig.t, "the registry can be wiped", func() bool { return r.wipe() == nil })
	})},
	{lost, "bucket deleted, Caddy makes it anew", []kind{kvKind}, to(func(rig *testRig, r *faultyKV) {
		if err := r.delete(); err != nil {
			rig.t.Errorf("deleting the bucket: %v", err)
		}
	})},
	{lost, "restarted, all it had was in memory", forgetful, to(func(_ *testRig, r faultyServer) { r.kill(); r.restart() })},
	{lost, "back when all has expired, before the fleet", []kind{kvKind, keysKind}, to(func(rig *testRig, r faultyServer) {
		rig.holdHeartbeats(true)
		r.kill()
		eventually(rig.t, "Caddy has lost the registry", func() bool { return !rig.connected() })
		pauseFor(outage)
		r.restart()
		eventually(rig.t, "Caddy is back before the fleet", rig.connected)
		eventually(rig.t, "the registry lists nobody but Caddy", func() bool {
			listed, err := r.list()
			return err == nil && !slices.ContainsFunc(listed, func(id string) bool { return id != ownID })
		})
		rig.holdHeartbeats(false)
	})},
	{lost, "restored to an older state", withOldState, func(rig *testRig) {
		r := rig.faultyRegistry.(interface {
			faultyServer
			restoreOldState()
		})
		r.kill()
		r.restoreOldState()
		pauseFor(outage)
		r.restart()
	}},
	{lost, "an empty server in its place", redisOnly, to(func(_ *testRig, r *faultyRedis) {
		r.kill()
		r.server.Restore("")
		r.restart()
	})},
	{lost, "copied from an empty server, nothing closed", redisOnly, to(func(_ *testRig, r *faultyRedis) { r.copyEmptyServer() })},

	{deaf, "consumer deleted", []kind{kvKind}, to(func(rig *testRig, r *faultyKV) {
		if err := r.deleteConsumers(); err != nil {
			rig.t.Errorf("deleting the consumer: %v", err)
		}
	})},
	{deaf, "stream of changes deleted", []kind{setKind}, to(func(_ *testRig, r *faultyRedis) { r.command("DEL", "{"+setKey+"}:changes") })},

	{failover, "the leaders of bucket and cluster step down", []kind{kvClusterKind}, to(func(_ *testRig, r *kvCluster) { r.stepDown() })},
	{failover, "the server that leads the bucket killed", []kind{kvClusterKind}, to(func(_ *testRig, r *kvCluster) { r.leader().Kill() })},
	{failover, "the server that Caddy is connected to killed", []kind{kvClusterKind, broadcastClusterKind}, func(rig *testRig) {
		rig.faultyRegistry.(interface{ killServerOf(rig *testRig) }).killServerOf(rig)
	}},
	{failover, "Sentinel: master killed", []kind{sentinelKind("sorted_set"), rarely(sentinelKind("keys"))}, to(func(rig *testRig, r *redisSentinel) {
		r.group.Servers[0].Kill()
		r.failOver(rig)
	})},
	{failover, "Sentinel: master hung (SIGSTOP), and back too late", []kind{rarely(sentinelKind("sorted_set")), sentinelKind("keys")}, to(func(rig *testRig, r *redisSentinel) {
		r.group.Servers[0].Pause()
		r.failOver(rig)
		pauseFor(lease)
		r.group.Servers[0].Resume()
	})},
	{failover, "Cluster: master killed", []kind{clusterKind("sorted_set"), rarely(clusterKind("keys"))}, to(func(_ *testRig, r *redisCluster) { r.cluster.Owner(setKey).Kill() })},

	{rights, "user revoked", everyKind, to(func(_ *testRig, r faultyServer) { r.lockOut(); pauseFor(outage); r.allow() })},
	{rights, "every permission revoked", everyKind, to(func(_ *testRig, r faultyServer) { r.denyAll(); pauseFor(outage); r.allow() })},

	{paused, "for longer than its lease", append([]kind{leanKind}, everyKind...), func(rig *testRig) {
		s := rig.services[1]
		release := rig.holdHeartbeatsOf(s)
		listed := func() bool { return slices.Contains(ids(rig.nodes()), s.id) }
		eventually(rig.t, "the node has lapsed", func() bool { return !listed() })
		release()
		eventually(rig.t, "the node is back", listed)
	}},

	{handover, "six reloads, each with another option of the registry, and a next tier", everyKind, func(rig *testRig) {
		front := freeport.String(rig.t)
		next := start(rig.t, "", site(front, rig.block(rig.link.address())+"\nwhere role proxy", "lb_retries 2\nlb_try_interval 1ms")) // against the resets of a reload of Caddy
		url := "http://127.0.0.1:" + front
		eventually(rig.t, "the next tier finds Caddy", func() bool {
			body, err := ask(url)
			return err == nil && strings.HasPrefix(body, "orders-")
		})
		l := steady(rig.t, url, pace)
		for i := range 6 {
			before := rig.heartbeats()
			rig.proxy.reload(strings.Replace(rig.options(), rig.block(rig.link.address()), with(rig.block(rig.link.address()), fmt.Sprintf("ttl %ds", 60+i)), 1), rig.sites())
			eventually(rig.t, "it is announced", func() bool { return rig.heartbeats() > before })
		}
		rig.proxy.reload(rig.options(), rig.sites())
		pauseFor(outage)
		l.stop(rig.t)
		next.kill(syscall.SIGTERM)
	}},

	{beside, "a record of 64 MiB, and a proxy starts", redisOnly, to(func(rig *testRig, r *faultyRedis) {
		const size = 64 << 20
		before := rig.proxy.peak()
		remove := r.putLong(size)
		pauseFor(outage)
		front := freeport.String(rig.t)
		anew := start(rig.t, "", site(front, rig.block(rig.link.address())+"\nservice orders", "lb_policy round_robin"))
		eventually(rig.t, "a proxy that starts has the fleet", func() bool {
			return fmt.Sprint(round(rig.t, 10, "http://127.0.0.1:"+front)) == all(rig.services)
		})
		for _, p := range []*proxy{rig.proxy, anew} {
			if grown := p.peak() - before; grown > size {
				rig.t.Errorf("a proxy grew by %d MiB", grown>>20)
			}
		}
		anew.kill(syscall.SIGTERM)
		remove()
	})},

	{clocks, "those of the nodes", []kind{setKind}, to(func(_ *testRig, r *faultyRedis) { r.adrift.Store(true); pauseFor(2 * lease) })},
	{clocks, "the registry's jumps ahead", []kind{rarely(withClock[0]), withClock[1]}, to(func(_ *testRig, r *faultyRedis) { r.server.SetClock(2 * time.Hour); pauseFor(2 * lease) })},
	{clocks, "the registry's jumps back", []kind{withClock[0], rarely(withClock[1])}, to(func(_ *testRig, r *faultyRedis) { r.server.SetClock(-2 * time.Hour); pauseFor(2 * lease) })},
}

// result is a row of the table.
type result struct {
	fault, backend string
	served, failed int
	listed         time.Duration // until Caddy's own record was renewed
	settled        time.Duration
	clients        [2]int
	goroutines     [2]int
}

// pace is how long each of the workers waits after a request: most of the time
// of a fault is spent waiting, and other tests want to run meanwhile.
const pace = 20 * time.Millisecond

// TestFaults is the registry's worst day: each fault on each kind of registry that
// can have it, under a load of which every response is checked. No request may
// fail, because at every moment there is a healthy node.
func TestFaults(t *testing.T) {
	var mu sync.Mutex
	results := make(map[string][]result) // by fault
	t.Run("all", func(t *testing.T) {
		for _, f := range faults {
			for _, k := range f.on {
				if k.rare && *reliability == "" {
					continue
				}
				t.Run(k.name+"/"+f.name, func(t *testing.T) {
					t.Parallel()
					found := newRig(t, k.start(t)).run(f)
					found.backend = k.name
					mu.Lock()
					defer mu.Unlock()
					results[f.name] = append(results[f.name], found)
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
	if err := os.WriteFile(*reliability, []byte(report(results)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// report is the document that make reliability writes.
func report(results map[string][]result) string {
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
		rows := results[f.name]
		slices.SortFunc(rows, func(a, b result) int { return strings.Compare(a.backend, b.backend) })
		for _, row := range rows {
			fmt.Fprintf(&s, "| %s | `%s` | %d | %d | %.1f s | %.1f s | %d → %d | %d → %d |\n", row.fault, row.backend, row.served, row.failed,
				row.listed.Seconds(), row.settled.Seconds(), row.clients[0], row.clients[1], row.goroutines[0], row.goroutines[1])
		}
	}
	return s.String()
}

// run does the fault under load and says what became of it. When the fault is
// over a node joins and another leaves: the time until the view equals the
// registry again is counted from then.
func (rig *testRig) run(f fault) result {
	t := rig.t
	found := result{fault: f.name}
	found.clients[0], found.goroutines[0] = rig.clients(), rig.goroutines()
	l := steady(t, "http://127.0.0.1:"+rig.port, pace)
	served := 0
	eventually(t, "the load runs", func() bool { served = l.served(); return served > 20 })
	f.do(rig)
	over, before := time.Now(), rig.heartbeats()

	joined := newService(t, "orders-new")
	rig.mu.Lock()
	rig.services = append(rig.services, joined)
	left := rig.services[0]
	rig.away[left.id] = true
	silent := rig.silent[left.id]
	rig.mu.Unlock()
	<-silent // a heartbeat that is still under way would bring the record back
	rig.join(joined)
	eventually(t, "the registry takes the goodbye", func() bool { return rig.remove(left.id) == nil })
	want := []string{ownID}
	for _, s := range rig.living() {
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
		if listed, err = rig.list(); err != nil {
			return false
		}
		slices.Sort(listed)
		listed = slices.Compact(listed)
		if found.listed == 0 && slices.Contains(listed, ownID) && rig.heartbeats() > before {
			found.listed = time.Since(over)
		}
		nodes := rig.nodes()
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
		found.clients[1] = rig.clients()
		most := max(found.clients[0], 1)
		if c, ok := rig.faultyRegistry.(*redisCluster); ok {
			most = len(c.addresses()) + 2 // a client asks any of them how the cluster is
		}
		return found.clients[1] <= most
	})
	eventually(t, "no goroutine is left behind", func() bool {
		found.goroutines[1] = rig.goroutines()
		return found.goroutines[1] <= found.goroutines[0]
	})
	return found
}
