package integration

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// redisFleet is a fleet that writes to Redis as those in the wild do.
type redisFleet struct {
	layout string
	keep   time.Duration // how long a key lives that nobody renews
	client goredis.UniversalClient
	adrift atomic.Bool // the nodes' clocks are hours apart

	mu      sync.Mutex
	members map[string]string
}

func newRedisFleet(t *testing.T, layout string, client goredis.UniversalClient) *redisFleet {
	t.Cleanup(func() { _ = client.Close() })
	return &redisFleet{layout: layout, keep: 2 * lease, client: client, members: make(map[string]string)}
}

// options are the lines that name the layout for Caddy.
func (f *redisFleet) options() string {
	return "layout " + f.layout + "\npoll 100ms"
}

// now is what the clock of a node says.
func (f *redisFleet) now(id string) time.Time {
	if f.adrift.Load() {
		return time.Now().Add(time.Duration(int(id[len(id)-1]%10)-5) * time.Hour)
	}
	return time.Now()
}

func (f *redisFleet) put(id, record string) error {
	ctx, cancel := shortContext()
	defer cancel()
	if f.layout == "keys" {
		return f.client.Set(ctx, setKey+":"+id, record, f.keep).Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if old, ok := f.members[id]; ok && old != record {
		if err := f.client.ZRem(ctx, setKey, old).Err(); err != nil {
			return err
		}
	}
	err := f.client.ZAdd(ctx, setKey, goredis.Z{Score: float64(f.now(id).UnixMilli()), Member: record}).Err()
	if err == nil {
		f.members[id] = record
	}
	return err
}

func (f *redisFleet) remove(id string) error {
	ctx, cancel := shortContext()
	defer cancel()
	if f.layout == "keys" {
		return f.client.Del(ctx, setKey+":"+id).Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.client.ZRem(ctx, setKey, f.members[id]).Err()
}

func (f *redisFleet) list() (ids []string, err error) {
	ctx, cancel := shortContext()
	defer cancel()
	if f.layout == "keys" {
		var mu sync.Mutex
		find := func(ctx context.Context, client *goredis.Client) error {
			keys, err := client.Keys(ctx, setKey+":*").Result()
			mu.Lock()
			defer mu.Unlock()
			for _, key := range keys {
				ids = append(ids, strings.TrimPrefix(key, setKey+":"))
			}
			return err
		}
		if cluster, ok := f.client.(*goredis.ClusterClient); ok {
			err = cluster.ForEachMaster(ctx, find)
		} else {
			err = find(ctx, f.client.(*goredis.Client))
		}
		return ids, err
	}
	members, err := f.client.ZRange(ctx, setKey, 0, -1).Result()
	for _, m := range members {
		n, err := discovery.ParseNode([]byte(m))
		if err != nil {
			return nil, err
		}
		ids = append(ids, n.ID)
	}
	return ids, err
}

type faultyRedis struct {
	*redisFleet
	t        *testing.T
	server   *redistest.Server
	oldState string // data of the server's, if it has an old state
}

func redisKind(layout string, options ...redistest.Option) kind {
	return kind{name: "redis_" + layout, start: func(t *testing.T) faultyRegistry {
		server := redistest.Start(t, append([]redistest.Option{
			// What is written outlives the process, if not the machine.
			redistest.Config("appendfsync", "no"), redistest.User(edgeUser, "on >"+secret+" ~* &* +@all"),
		}, options...)...)
		client := goredis.NewClient(&goredis.Options{Addr: server.Addr(), PoolSize: 1, DialTimeout: time.Second, ReadTimeout: time.Second, MaxRetries: -1})
		return &faultyRedis{newRedisFleet(t, layout, client), t, server, ""}
	}}
}

func (r *faultyRedis) addresses() []string { return []string{r.server.Addr()} }

func (r *faultyRedis) block(address string) string {
	return "registry redis redis://" + edgeUser + ":" + secret + "@" + address + " {\n" + r.options() + "\n}"
}

func (r *faultyRedis) wipe() error {
	ctx, cancel := shortContext()
	defer cancel()
	return r.client.FlushAll(ctx).Err()
}

func (r *faultyRedis) kill() { r.server.Kill() }

func (r *faultyRedis) restart() { r.server.Restart() }

func (r *faultyRedis) pause() { r.server.Pause() }

func (r *faultyRedis) resume() { r.server.Resume() }

func (r *faultyRedis) lockOut() {
	r.command("ACL", "SETUSER", edgeUser, "off")
	r.command("CLIENT", "KILL", "USER", edgeUser)
}

func (r *faultyRedis) denyAll() { r.command("ACL", "SETUSER", edgeUser, "-@all") }

func (r *faultyRedis) allow() { r.command("ACL", "SETUSER", edgeUser, "on", "+@all") }

func (r *faultyRedis) command(args ...any) {
	r.t.Helper()
	if err := r.server.Client().Do(context.Background(), args...).Err(); err != nil {
		r.t.Fatalf("%v: %v", args, err)
	}
}

// putLong puts a record of so many bytes beside those of the fleet, which the function
// that it returns removes.
func (r *faultyRedis) putLong(size int) (remove func()) {
	r.t.Helper()
	ctx, client := context.Background(), r.server.Client()
	record := `{"nodeId":"bloated","endpoint":"http://127.0.0.1:1","metadata":{"junk":"` + strings.Repeat("x", size) + `"}}`
	put := func() error { return client.Set(ctx, setKey+":bloated", record, 0).Err() }
	take := func() error { return client.Del(ctx, setKey+":bloated").Err() }
	if r.layout != "keys" {
		put = func() error {
			return client.ZAdd(ctx, setKey, goredis.Z{Score: float64(time.Now().UnixMilli()), Member: record}).Err()
		}
		take = func() error { return client.ZRem(ctx, setKey, record).Err() }
	}
	if err := put(); err != nil {
		r.t.Fatal(err)
	}
	return func() {
		r.t.Helper()
		if err := take(); err != nil {
			r.t.Fatal(err)
		}
	}
}

// saveOldState writes what restoreOldState brings back.
func (r *faultyRedis) saveOldState() *faultyRedis {
	writeOldState(r.t, r)
	r.server.Stop()
	r.oldState = r.server.Save()
	r.server.Restart()
	return r
}

func (r *faultyRedis) restoreOldState() { r.server.Restore(r.oldState) }

// copyEmptyServer makes the server a copy of an empty one, as a failover to a replica that
// has nothing yet does, without closing a connection.
func (r *faultyRedis) copyEmptyServer() {
	r.t.Helper()
	other := redistest.Start(r.t)
	r.command("REPLICAOF", "127.0.0.1", other.Port())
	eventually(r.t, "it is a copy of an empty server", func() bool {
		info, err := r.server.Client().Info(context.Background(), "replication").Result()
		return err == nil && strings.Contains(info, "master_link_status:up")
	})
	r.command("REPLICAOF", "NO", "ONE")
}

type redisSentinel struct {
	*redisFleet
	group *redistest.Sentinel
}

func sentinelKind(layout string) kind {
	return kind{name: "redis_" + layout, start: func(t *testing.T) faultyRegistry {
		group := redistest.StartSentinel(t, 1, "")
		var sentinels []string
		for _, s := range group.Sentinels {
			sentinels = append(sentinels, s.Addr())
		}
		client := goredis.NewFailoverClient(&goredis.FailoverOptions{
			MasterName: redistest.SentinelMaster, SentinelAddrs: sentinels,
			PoolSize: 2, DialTimeout: time.Second, ReadTimeout: time.Second, MaxRetries: -1,
		})
		return &redisSentinel{newRedisFleet(t, layout, client), group}
	}}
}

func (r *redisSentinel) addresses() (addresses []string) {
	for _, s := range r.group.Servers {
		addresses = append(addresses, s.Addr())
	}
	return addresses
}

func (r *redisSentinel) block(string) string {
	return "registry redis " + strings.Join(r.group.URLs(), " ") + " {\nsentinel_master " + redistest.SentinelMaster + "\n" + r.options() + "\n}"
}

// failOver waits until the Sentinels have made the replica the master.
func (r *redisSentinel) failOver(rig *testRig) {
	eventually(rig.t, "the replica takes over", func() bool { return r.group.Master() == r.group.Servers[1] })
}

type redisCluster struct {
	*redisFleet
	cluster *redistest.Cluster
}

func clusterKind(layout string) kind {
	return kind{name: "redis_" + layout, start: func(t *testing.T) faultyRegistry {
		cluster := redistest.StartCluster(t, 1)
		r := &redisCluster{cluster: cluster}
		client := goredis.NewClusterClient(&goredis.ClusterOptions{
			Addrs: r.addresses(), PoolSize: 2, DialTimeout: time.Second, ReadTimeout: time.Second,
			ClusterStateReloadInterval: time.Second,
		})
		r.redisFleet = newRedisFleet(t, layout, client)
		return r
	}}
}

func (r *redisCluster) addresses() (addresses []string) {
	for _, s := range slices.Concat(r.cluster.Masters, r.cluster.Replicas) {
		addresses = append(addresses, s.Addr())
	}
	return addresses
}

func (r *redisCluster) block(string) string {
	return "registry redis " + strings.Join(r.cluster.URLs(), " ") + " {\n" + r.options() + "\n}"
}
