package integration

import (
	"flag"
	"fmt"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

var soakReloads = flag.Int("reloads", 200, "how often TestManyReloads reloads")

// TestManyReloads loads one configuration after another under load. Between them
// sources, directories, connections, checks and the proxy's own record come and
// go; at the end Caddy holds what it held at the beginning.
func TestManyReloads(t *testing.T) {
	t.Parallel()
	bucket, set := startKV(t, keeping(2*randomLease)), setKind.start(t).(*faultyRedis)
	rig := &testRig{t: t, faultyRegistry: bucket, link: newLink(t, bucket.addresses()[0]), port: freeport.String(t)}
	second := newLink(t, set.addresses()[0])
	rig.further = []*link{second}
	for i := range 10 {
		id := fmt.Sprintf("orders-%d", i)
		rig.services = append(rig.services, newService(t, id))
		enlist(t, wildWriter{bucket}, id, "orders", rig.services[i], randomLease)
	}
	enlist(t, wildWriter{set}, "pay-1", "pay", newService(t, "pay-1"), randomLease)

	own := fmt.Sprintf("registrar {\n%s\nnode_id edge-1\nendpoint http://127.0.0.1:%s\nheartbeat 1s\nttl %v\ndrain 50ms\n}",
		bucket.block(rig.link.address()), rig.port, randomLease)
	block := bucket.block(rig.link.address()) + "\nservice orders"
	other := freeport.String(t)
	const retries = "\nlb_retries 5\nfail_duration 10s"
	configs := []struct{ options, sites string }{
		{own, site(rig.port, block, "lb_policy round_robin"+retries)},
		// Another registry, another policy, checks.
		{own, site(rig.port, block+"\npick 2\nhealth {\nuri /\ninterval 1s\n}", "lb_policy least_conn"+retries) +
			site(other, set.block(second.address())+"\nservice pay", "")},
		// Another directory of the same registry, and no record.
		{"", site(rig.port, with(bucket.block(rig.link.address()), "ttl 1h")+"\nservice orders\nsubset 5\nproxy_id edge-1", "lb_policy random"+retries) +
			site(other, block+"\nprefer zone x", "")},
	}
	rig.proxy = start(t, configs[0].options, configs[0].sites)
	rest := func() {
		t.Helper()
		rig.proxy.reload(configs[0].options, configs[0].sites)
		eventually(t, "Caddy knows the fleet and itself", func() bool {
			view := rig.view()
			return len(view) == 11 && view["edge-1"] == "http://127.0.0.1:"+rig.port+" up"
		})
		eventually(t, "all serve", func() bool {
			return fmt.Sprint(round(t, 10, "http://127.0.0.1:"+rig.port)) == all(rig.services)
		})
		// A new transport has no connections to nodes.
		rig.proxy.reload(configs[0].options, configs[0].sites)
		client.CloseIdleConnections()
	}
	reload := func(n int) time.Duration {
		began := time.Now()
		for i := range n {
			c := configs[(i+1)%len(configs)]
			rig.proxy.reload(c.options, c.sites)
			// A config that is replaced before its first request has nothing to let go of.
			eventually(t, "a request is served", func() bool {
				body, err := ask("http://127.0.0.1:" + rig.port)
				if err != nil && !closed(err) || len(body) == 3 {
					t.Fatalf("a request was answered %q, %v", body, err)
				}
				return err == nil
			})
		}
		return time.Since(began)
	}
	rest()
	reload(len(configs) * 5)
	rest()
	before := rig.resourcesAtRest()
	l := steady(t, "http://127.0.0.1:"+rig.port, 20*time.Millisecond)
	took := reload(*soakReloads)
	l.stop(t)
	rest()
	after := rig.resourcesReleased(before)
	t.Logf("%d reloads in %v; before: %v; after: %v", *soakReloads, took.Round(time.Millisecond), before, after)
}
