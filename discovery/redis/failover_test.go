package redis

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

func TestSentinelFailover(t *testing.T) {
	t.Parallel()
	for name, kill := range map[string]func(*redistest.Server){
		"Killed": (*redistest.Server).Kill,
		"Hung":   (*redistest.Server).Pause,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.StartSentinel(t, 1, "sentinel-pw", redistest.Password("pw"), redistest.Notify("KA"))
			c := Config{
				URLs: s.URLs(), Password: "pw",
				SentinelMaster: redistest.SentinelMaster, SentinelPassword: "sentinel-pw",
			}
			writer := openRegistry(t, c)
			keepAlive(t, writer, 200*time.Millisecond, newNode("a", discovery.KeyLease, "1s"), newNode("b", discovery.KeyLease, "1s"))
			d := startDirectory(t, openRegistry(t, c), discovery.Options{})
			waitUntil(t, d, "both join", count(2))
			stop := neverLose(t, d, "a", "b")
			began := time.Now()
			kill(s.Servers[0])
			eventually(t, "the replica takes over", func() bool { return s.Master() == s.Servers[1] })
			took := time.Since(began)
			eventually(t, "the new master takes records", func() bool {
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				return writer.Announce(ctx, newNode("joins")) == nil
			})
			waitUntil(t, d, "the directory follows the new master", has("joins"))
			t.Logf("failover %v, followed after %v", took, time.Since(began))
			stop()
		})
	}
}

// TestSentinelPartition: the master is cut off from the Sentinels but not from
// us, so that none of our connections breaks.
func TestSentinelMasterMoved(t *testing.T) {
	t.Parallel()
	s := redistest.StartSentinel(t, 1, "")
	c := Config{URLs: s.URLs(), SentinelMaster: redistest.SentinelMaster, Poll: 100 * time.Millisecond}
	r := openRegistry(t, c)
	d := startDirectory(t, r, discovery.Options{})
	waitSynced(t, d)
	ctx := context.Background()
	replica := s.Servers[1]
	if err := replica.Client().ReplicaOf(ctx, "no", "one").Err(); err != nil {
		t.Fatal(err)
	}
	for _, sentinel := range s.Sentinels {
		ask := goredis.NewSentinelClient(&goredis.Options{Addr: sentinel.Addr(), DisableIdentity: true})
		if err := ask.Remove(ctx, redistest.SentinelMaster).Err(); err != nil {
			t.Fatal(err)
		}
		if err := ask.Monitor(ctx, redistest.SentinelMaster, "127.0.0.1", strconv.Itoa(replica.Port()), "2").Err(); err != nil {
			t.Fatal(err)
		}
		_ = ask.Close()
	}
	writer := openRegistry(t, c) // asks the Sentinels for the first time
	announce(t, writer, newNode("joins"))
	waitUntil(t, d, "the directory follows the new master", has("joins"))
}

func TestClusterMasterLost(t *testing.T) {
	t.Parallel()
	eachLayout(t, func(t *testing.T, layout string) {
		cluster := redistest.StartCluster(t, 1, redistest.Notify("KA"))
		key := "{fleet}:nodes"
		owner := cluster.Owner(key)
		seed := cluster.Masters[0]
		if seed == owner {
			seed = cluster.Masters[1]
		}
		c := Config{URLs: []string{"redis+cluster://" + seed.Addr()}, Key: key, Layout: layout}
		writer := openRegistry(t, c)
		keepAlive(t, writer, 200*time.Millisecond, newNode("a", discovery.KeyLease, "1s"), newNode("b", discovery.KeyLease, "1s"))
		r := openRegistry(t, c)
		d := startDirectory(t, r, discovery.Options{})
		waitUntil(t, d, "both join", count(2))
		if !strings.HasSuffix(r.Changes(), "notifications") {
			t.Errorf("pushed by %q", r.Changes())
		}
		stop := neverLose(t, d, "a", "b")
		began := time.Now()
		owner.Kill()
		eventually(t, "the replica takes records", func() bool {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			return writer.Announce(ctx, newNode("joins")) == nil
		})
		took := time.Since(began)
		waitUntil(t, d, "the directory follows the new master", has("joins"))
		t.Logf("taken after %v, seen after %v", took, time.Since(began))
		stop()
	})
}

// TestServersAreNoNodes has records point to servers of the registry that no URL
// names: those that the Sentinels or the cluster name.
func TestServersAreNoNodes(t *testing.T) {
	t.Parallel()
	check := func(t *testing.T, c Config, servers ...*redistest.Server) {
		rules, err := discovery.NewRules(discovery.Access{Loopback: true})
		if err != nil {
			t.Fatal(err)
		}
		r := openRegistry(t, c)
		for i, server := range servers {
			n := newNode(fmt.Sprint("n", i))
			if n.Endpoint, err = discovery.ParseEndpoint("http://" + server.Addr()); err != nil {
				t.Fatal(err)
			}
			announce(t, r, n)
		}
		d := startDirectory(t, openRegistry(t, c), discovery.Options{Addresses: c.Addresses()})
		waitUntil(t, d, "every server of the registry is denied", func(s *discovery.Snapshot) bool {
			for _, e := range s.Nodes() {
				if rules.Check(e, d.RegistryAddresses()) != "denied: the registry itself" {
					return false
				}
			}
			return len(s.Nodes()) == len(servers)
		})
	}
	t.Run("Sentinel", func(t *testing.T) {
		t.Parallel()
		s := redistest.StartSentinel(t, 1, "sentinel-pw", redistest.Password("pw"))
		check(t, Config{
			URLs: s.URLs()[:1], Password: "pw",
			SentinelMaster: redistest.SentinelMaster, SentinelPassword: "sentinel-pw",
		}, append(slices.Clone(s.Servers), s.Sentinels...)...)
	})
	t.Run("Cluster", func(t *testing.T) {
		t.Parallel()
		s := redistest.StartCluster(t, 1)
		check(t, Config{URLs: []string{"redis+cluster://" + s.Masters[0].Addr()}, Key: "{fleet}:nodes"},
			append(slices.Clone(s.Masters), s.Replicas...)...)
	})
}
