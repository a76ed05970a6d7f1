package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// A patient is a registry that can be hurt. Its errors are the writers' to live
// with: a fleet goes on trying.
type patient interface {
	// addresses are where its servers listen; block names the registry for Caddy,
	// at an address of a link to it, if it has but one server.
	addresses() []string
	block(address string) string
	// put and remove are what the nodes of a fleet do.
	put(id, record string) error
	remove(id string) error
	// list returns the ids of the records that stand there.
	list() ([]string, error)
}

// A single is a patient of one server, which can be hurt in every way.
type single interface {
	patient
	// wipe empties the registry and makes it another one.
	wipe() error
	kill()
	restart()
	pause()
	resume()
	// revoke locks Caddy out, and forbid takes from it every right but that to
	// connect; admit ends both.
	revoke()
	forbid()
	admit()
}

// A kind is a kind of registry, and how it comes to its test.
type kind struct {
	name  string
	admit func(t *testing.T) patient
	rare  bool // only make reliability has it: many servers, and little new
}

func rarely(k kind) kind {
	k.rare = true
	return k
}

var (
	kvKind        = kind{name: "nats_kv", admit: func(t *testing.T) patient { return admitKV(t, fleetBucket) }}
	broadcastKind = kind{name: "nats", admit: func(t *testing.T) patient { return admitBroadcast(t) }}
	setKind       = redisKind("sorted_set")
	keysKind      = redisKind("keys")

	leanKind = kind{name: "nats (.NET)", admit: func(t *testing.T) patient {
		p := admitBroadcast(t)
		p.lean = true
		return p
	}}

	kvClusterKind        = kind{name: "nats_kv", admit: func(t *testing.T) patient { return admitKVCluster(t) }}
	broadcastClusterKind = kind{name: "nats", admit: func(t *testing.T) patient { return admitBroadcastCluster(t) }}

	// What these keep, they forget when they are restarted.
	forgetful = []kind{
		{name: "nats_kv", admit: func(t *testing.T) patient {
			config := fleetBucket
			config.Storage = jetstream.MemoryStorage
			return admitKV(t, config)
		}},
		redisKind("sorted_set", redistest.Config("appendonly", "no")),
		redisKind("keys", redistest.Config("appendonly", "no")),
	}
	// These have a past, in which one of the nodes was somewhere else.
	withPast = []kind{
		{name: "nats_kv", admit: func(t *testing.T) patient {
			return admitKV(t, keeping(time.Hour)).settle(t) // the past has not expired
		}},
		{name: setKind.name, admit: func(t *testing.T) patient { return setKind.admit(t).(*redisPatient).settle() }},
		{name: keysKind.name, admit: func(t *testing.T) patient { return keysKind.admit(t).(*redisPatient).settle() }},
	}
	withClock = []kind{redisKind("sorted_set", redistest.Clock()), redisKind("keys", redistest.Clock())}
)

// The users of a server that asks who comes: the fleet, and Caddy.
const (
	fleetUser = "fleet"
	edgeUser  = "edge"
	secret    = "s3cret"
)

func patientContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 2*time.Second)
}

// natsServer is what both kinds on one NATS server share.
type natsServer struct {
	server *natstest.Process
	conn   *nats.Conn // the fleet's
}

func startNATS(t *testing.T) natsServer {
	server := natstest.StartProcess(t, natsUsers("{}"))
	return natsServer{server, connectFleet(t, server.URL(), nats.UserInfo(fleetUser, secret))}
}

// connectFleet connects as the clients of a fleet do that is eager to come back.
func connectFleet(t *testing.T, urls string, options ...nats.Option) *nats.Conn {
	t.Helper()
	conn, err := nats.Connect(urls, append(options, nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond),
		nats.ReconnectBufSize(-1), nats.PingInterval(time.Second), nats.Timeout(patience),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

// natsUsers is the part of a server's configuration that says who may do what;
// the permissions are Caddy's, and without any there is no such user.
func natsUsers(permissions string) string {
	users := fmt.Sprintf("{user: %s, password: %s}", fleetUser, secret)
	if permissions != "" {
		users += fmt.Sprintf(", {user: %s, password: %s, permissions: %s}", edgeUser, secret, permissions)
	}
	return "authorization { users: [" + users + "] }"
}

func (s natsServer) url(address string) string {
	return "nats://" + edgeUser + ":" + secret + "@" + address
}

func (s natsServer) addresses() []string {
	return []string{strings.TrimPrefix(s.server.URL(), "nats://")}
}
func (s natsServer) kill()    { s.server.Kill() }
func (s natsServer) restart() { s.server.Start() }
func (s natsServer) pause()   { _ = syscall.Kill(s.server.PID(), syscall.SIGSTOP) }
func (s natsServer) resume()  { _ = syscall.Kill(s.server.PID(), syscall.SIGCONT) }
func (s natsServer) revoke()  { s.server.Reload(natsUsers("")) }
func (s natsServer) forbid() {
	s.server.Reload(natsUsers(`{publish: {deny: ">"}, subscribe: {deny: ">"}}`))
}
func (s natsServer) admit() { s.server.Reload(natsUsers("{}")) }

// bucket is a KV bucket on whichever server the fleet is connected to.
type bucket struct {
	conn   *nats.Conn
	js     jetstream.JetStream
	config jetstream.KeyValueConfig
}

// fleetBucket forgets within two leases, so that an outage can outlast it.
var fleetBucket = jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 3, TTL: 2 * lease, LimitMarkerTTL: 2 * lease}

// keeping is the same with another time.
func keeping(d time.Duration) jetstream.KeyValueConfig {
	config := fleetBucket
	config.TTL, config.LimitMarkerTTL = d, d
	return config
}

func newBucket(t *testing.T, conn *nats.Conn, config jetstream.KeyValueConfig) bucket {
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	return bucket{conn, js, config}
}

func (b bucket) create() error {
	ctx, cancel := patientContext()
	defer cancel()
	_, err := b.js.CreateKeyValue(ctx, b.config)
	return err
}

func (b bucket) delete() error {
	ctx, cancel := patientContext()
	defer cancel()
	return b.js.DeleteKeyValue(ctx, b.config.Bucket)
}

func (b bucket) wipe() error {
	if err := b.delete(); err != nil {
		return err
	}
	return b.create()
}

func (b bucket) stream(ctx context.Context) (jetstream.Stream, error) {
	return b.js.Stream(ctx, "KV_"+b.config.Bucket)
}

func (b bucket) do(f func(context.Context, jetstream.KeyValue) error) error {
	ctx, cancel := patientContext()
	defer cancel()
	kv, err := b.js.KeyValue(ctx, b.config.Bucket)
	if err != nil {
		return err
	}
	return f(ctx, kv)
}

func (b bucket) put(id, record string) error {
	return b.do(func(ctx context.Context, kv jetstream.KeyValue) error {
		_, err := kv.PutString(ctx, "node."+id, record)
		return err
	})
}

func (b bucket) remove(id string) error {
	return b.do(func(ctx context.Context, kv jetstream.KeyValue) error { return kv.Delete(ctx, "node."+id) })
}

func (b bucket) list() (ids []string, err error) {
	err = b.do(func(ctx context.Context, kv jetstream.KeyValue) error {
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

type kvPatient struct {
	natsServer
	bucket
	past string // a store of the server's, if it has a past
}

func admitKV(t *testing.T, config jetstream.KeyValueConfig) *kvPatient {
	s := startNATS(t)
	p := &kvPatient{natsServer: s, bucket: newBucket(t, s.conn, config)}
	if err := p.create(); err != nil {
		t.Fatal(err)
	}
	return p
}

// block also says how Caddy makes the bucket, should it have to.
func (p *kvPatient) block(address string) string {
	storage := "file"
	if p.config.Storage == jetstream.MemoryStorage {
		storage = "memory"
	}
	return fmt.Sprintf("registry nats_kv %s {\nbucket_ttl %s\nhistory %d\nstorage %s\n}", p.url(address), p.config.TTL, p.config.History, storage)
}

// settle gives the patient a past.
func (p *kvPatient) settle(t *testing.T) *kvPatient {
	writePast(t, p)
	p.server.Stop()
	p.past = p.server.Save()
	p.server.Start()
	return p
}

func (p *kvPatient) relive() { p.server.Restore(p.past) }

// writePast writes where a node was in the past: nobody is there now.
func writePast(t *testing.T, p patient) {
	t.Helper()
	past := camel("orders-3", "http://127.0.0.1:1", `"service":"orders","lease":"`+lease.String()+`"`)
	eventually(t, "the past is written", func() bool { return p.put("orders-3", past) == nil })
}

// deafen ends every watch of the bucket without a word to who watches.
func (b bucket) deafen() error {
	ctx, cancel := patientContext()
	defer cancel()
	stream, err := b.stream(ctx)
	if err != nil {
		return err
	}
	for name := range stream.ConsumerNames(ctx).Name() {
		if err := stream.DeleteConsumer(ctx, name); err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
			return err
		}
	}
	return nil
}

// natsCluster is what both kinds on a cluster of three share. There is no link
// in between: its servers tell of each other.
type natsCluster struct {
	t       *testing.T
	servers []*natstest.Process
	conn    *nats.Conn // the fleet's
}

func startNATSCluster(t *testing.T) natsCluster {
	servers := natstest.StartProcesses(t, 3)
	c := natsCluster{t: t, servers: servers}
	c.conn = connectFleet(t, strings.Join(c.urls(), ","))
	return c
}

func (c natsCluster) urls() (urls []string) {
	for _, s := range c.servers {
		urls = append(urls, s.URL())
	}
	return urls
}

func (c natsCluster) addresses() (addresses []string) {
	for _, url := range c.urls() {
		addresses = append(addresses, strings.TrimPrefix(url, "nats://"))
	}
	return addresses
}

// killServerOf kills the server that Caddy is connected to.
func (c natsCluster) killServerOf(w *ward) {
	c.t.Helper()
	eventually(c.t, "Caddy is connected to a server", func() bool {
		for _, s := range c.servers {
			if connectionsOf(w.proxy.cmd.Process.Pid, s.Port) > 0 {
				s.Kill()
				return true
			}
		}
		return false
	})
}

type kvCluster struct {
	natsCluster
	bucket
}

func admitKVCluster(t *testing.T) *kvCluster {
	c := startNATSCluster(t)
	config := fleetBucket
	config.Replicas = len(c.servers)
	p := &kvCluster{natsCluster: c, bucket: newBucket(t, c.conn, config)}
	eventually(t, "the cluster keeps a bucket", func() bool { return p.create() == nil })
	p.whole()
	return p
}

func (p *kvCluster) block(string) string {
	return fmt.Sprintf("registry nats_kv %s {\nbucket_ttl %s\nreplicas %d\n}", strings.Join(p.urls(), " "), p.config.TTL, len(p.servers))
}

// whole waits until the bucket has a leader and all replicas.
func (p *kvCluster) whole() {
	p.t.Helper()
	eventually(p.t, "all replicas are in step", func() bool {
		ctx, cancel := patientContext()
		defer cancel()
		stream, err := p.stream(ctx)
		if err != nil {
			return false
		}
		info := stream.CachedInfo().Cluster
		return info.Leader != "" && len(info.Replicas) == len(p.servers)-1 &&
			!slices.ContainsFunc(info.Replicas, func(r *jetstream.PeerInfo) bool { return r.Offline || !r.Current })
	})
}

// leader returns the server that leads the bucket.
func (p *kvCluster) leader() *natstest.Process {
	p.t.Helper()
	var leader int
	eventually(p.t, "the bucket has a leader", func() bool {
		ctx, cancel := patientContext()
		defer cancel()
		stream, err := p.stream(ctx)
		if err != nil {
			return false
		}
		_, err = fmt.Sscanf(stream.CachedInfo().Cluster.Leader, "natstest-%d", &leader)
		return err == nil
	})
	return p.servers[leader]
}

// depose makes the leader of the bucket step down, and that of the cluster.
func (p *kvCluster) depose() {
	p.t.Helper()
	step := func(conn *nats.Conn, who string) {
		p.t.Helper()
		eventually(p.t, "the leader steps down", func() bool {
			answer, err := conn.Request("$JS.API."+who, nil, patience)
			return err == nil && strings.Contains(string(answer.Data), `"success":true`)
		})
	}
	step(p.natsCluster.conn, "STREAM.LEADER.STEPDOWN.KV_"+p.config.Bucket)
	step(connectFleet(p.t, strings.Join(p.urls(), ","), nats.UserInfo(natstest.SystemUser, natstest.SystemUser)), "META.LEADER.STEPDOWN")
}

// broadcastFleet is a fleet on core NATS, which keeps nothing: what is listed is
// what the fleet says of itself, and who else was heard within a lease.
type broadcastFleet struct {
	conn *nats.Conn
	lean bool // its heartbeats name no endpoint, as those of .NET

	mu    sync.Mutex
	fleet map[string]string
	heard map[string]time.Time // others
}

func newBroadcastFleet(t *testing.T, conn *nats.Conn) *broadcastFleet {
	f := &broadcastFleet{conn: conn, fleet: make(map[string]string), heard: make(map[string]time.Time)}
	for subject, take := range map[string]nats.MsgHandler{
		"query": func(m *nats.Msg) {
			f.mu.Lock()
			defer f.mu.Unlock()
			for _, record := range f.fleet {
				_ = m.Respond([]byte(record))
			}
		},
		"join":      f.hear,
		"heartbeat": f.hear,
	} {
		if _, err := conn.Subscribe(prefix+"."+subject, take); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func (f *broadcastFleet) hear(m *nats.Msg) {
	var said struct{ NodeID string }
	if json.Unmarshal(m.Data, &said) != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.heard[said.NodeID] = time.Now()
}

func (f *broadcastFleet) say(subject, message string) error {
	if err := f.conn.Publish(prefix+"."+subject, []byte(message)); err != nil {
		return err
	}
	return f.conn.FlushTimeout(lease)
}

func (f *broadcastFleet) put(id, record string) error {
	f.mu.Lock()
	known := f.fleet[id] == record
	f.fleet[id] = record
	f.mu.Unlock()
	switch {
	case known && f.lean:
		return f.say("heartbeat", fmt.Sprintf(`{"nodeId":%q,"load":0.4,"timestamp":"2025-10-10T12:00:10Z"}`, id))
	case known:
		return f.say("heartbeat", record) // as ours do
	}
	return f.say("join", record)
}

func (f *broadcastFleet) remove(id string) error {
	f.mu.Lock()
	delete(f.fleet, id)
	f.mu.Unlock()
	return f.say("leave", fmt.Sprintf(`{"NodeId":%q}`, id))
}

func (f *broadcastFleet) list() (ids []string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id := range f.fleet {
		ids = append(ids, id)
	}
	if heard, ok := f.heard[ownID]; ok && time.Since(heard) < lease {
		ids = append(ids, ownID)
	}
	return ids, nil
}

type broadcastPatient struct {
	natsServer
	*broadcastFleet
}

func admitBroadcast(t *testing.T) *broadcastPatient {
	s := startNATS(t)
	return &broadcastPatient{s, newBroadcastFleet(t, s.conn)}
}

func (p *broadcastPatient) block(address string) string { return "registry nats " + p.url(address) }

// wipe does nothing, where there is nothing to wipe.
func (p *broadcastPatient) wipe() error { return nil }

type broadcastCluster struct {
	natsCluster
	*broadcastFleet
}

func admitBroadcastCluster(t *testing.T) *broadcastCluster {
	c := startNATSCluster(t)
	return &broadcastCluster{c, newBroadcastFleet(t, c.conn)}
}

func (p *broadcastCluster) block(string) string {
	return "registry nats " + strings.Join(p.urls(), " ")
}

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
	ctx, cancel := patientContext()
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
	ctx, cancel := patientContext()
	defer cancel()
	if f.layout == "keys" {
		return f.client.Del(ctx, setKey+":"+id).Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.client.ZRem(ctx, setKey, f.members[id]).Err()
}

func (f *redisFleet) list() (ids []string, err error) {
	ctx, cancel := patientContext()
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

type redisPatient struct {
	*redisFleet
	t      *testing.T
	server *redistest.Server
	past   string // data of the server's, if it has a past
}

func redisKind(layout string, options ...redistest.Option) kind {
	return kind{name: "redis_" + layout, admit: func(t *testing.T) patient {
		server := redistest.Start(t, append([]redistest.Option{
			// What is written outlives the process, if not the machine.
			redistest.Config("appendfsync", "no"), redistest.User(edgeUser, "on >"+secret+" ~* &* +@all"),
		}, options...)...)
		client := goredis.NewClient(&goredis.Options{Addr: server.Addr(), PoolSize: 1, DialTimeout: time.Second, ReadTimeout: time.Second, MaxRetries: -1})
		return &redisPatient{newRedisFleet(t, layout, client), t, server, ""}
	}}
}

func (p *redisPatient) addresses() []string { return []string{p.server.Addr()} }

func (p *redisPatient) block(address string) string {
	return "registry redis redis://" + edgeUser + ":" + secret + "@" + address + " {\n" + p.options() + "\n}"
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

func (p *redisPatient) revoke() {
	p.command("ACL", "SETUSER", edgeUser, "off")
	p.command("CLIENT", "KILL", "USER", edgeUser)
}
func (p *redisPatient) forbid() { p.command("ACL", "SETUSER", edgeUser, "-@all") }
func (p *redisPatient) admit()  { p.command("ACL", "SETUSER", edgeUser, "on", "+@all") }

func (p *redisPatient) command(args ...any) {
	p.t.Helper()
	if err := p.server.Client().Do(context.Background(), args...).Err(); err != nil {
		p.t.Fatalf("%v: %v", args, err)
	}
}

// bloat puts a record of so many bytes beside those of the fleet, which the function
// that it returns removes.
func (p *redisPatient) bloat(size int) (remove func()) {
	p.t.Helper()
	ctx, client := context.Background(), p.server.Client()
	record := `{"nodeId":"bloated","endpoint":"http://127.0.0.1:1","metadata":{"junk":"` + strings.Repeat("x", size) + `"}}`
	put := func() error { return client.Set(ctx, setKey+":bloated", record, 0).Err() }
	take := func() error { return client.Del(ctx, setKey+":bloated").Err() }
	if p.layout != "keys" {
		put = func() error {
			return client.ZAdd(ctx, setKey, goredis.Z{Score: float64(time.Now().UnixMilli()), Member: record}).Err()
		}
		take = func() error { return client.ZRem(ctx, setKey, record).Err() }
	}
	if err := put(); err != nil {
		p.t.Fatal(err)
	}
	return func() {
		p.t.Helper()
		if err := take(); err != nil {
			p.t.Fatal(err)
		}
	}
}

// settle gives the patient a past.
func (p *redisPatient) settle() *redisPatient {
	writePast(p.t, p)
	p.server.Stop()
	p.past = p.server.Save()
	p.server.Restart()
	return p
}

func (p *redisPatient) relive() { p.server.Restore(p.past) }

// becomeEmpty makes the server a copy of an empty one, as a failover to a replica that
// has nothing yet does, without closing a connection.
func (p *redisPatient) becomeEmpty() {
	p.t.Helper()
	other := redistest.Start(p.t)
	p.command("REPLICAOF", "127.0.0.1", other.Port())
	eventually(p.t, "it is a copy of an empty server", func() bool {
		info, err := p.server.Client().Info(context.Background(), "replication").Result()
		return err == nil && strings.Contains(info, "master_link_status:up")
	})
	p.command("REPLICAOF", "NO", "ONE")
}

type sentinelPatient struct {
	*redisFleet
	group *redistest.Sentinel
}

func sentinelKind(layout string) kind {
	return kind{name: "redis_" + layout, admit: func(t *testing.T) patient {
		group := redistest.StartSentinel(t, 1, "")
		var sentinels []string
		for _, s := range group.Sentinels {
			sentinels = append(sentinels, s.Addr())
		}
		client := goredis.NewFailoverClient(&goredis.FailoverOptions{
			MasterName: redistest.SentinelMaster, SentinelAddrs: sentinels,
			PoolSize: 2, DialTimeout: time.Second, ReadTimeout: time.Second, MaxRetries: -1,
		})
		return &sentinelPatient{newRedisFleet(t, layout, client), group}
	}}
}

func (p *sentinelPatient) addresses() (addresses []string) {
	for _, s := range p.group.Servers {
		addresses = append(addresses, s.Addr())
	}
	return addresses
}

func (p *sentinelPatient) block(string) string {
	return "registry redis " + strings.Join(p.group.URLs(), " ") + " {\nsentinel_master " + redistest.SentinelMaster + "\n" + p.options() + "\n}"
}

// failOver waits until the Sentinels have made the replica the master.
func (p *sentinelPatient) failOver(w *ward) {
	eventually(w.t, "the replica takes over", func() bool { return p.group.Master() == p.group.Servers[1] })
}

type clusterPatient struct {
	*redisFleet
	cluster *redistest.Cluster
}

func clusterKind(layout string) kind {
	return kind{name: "redis_" + layout, admit: func(t *testing.T) patient {
		cluster := redistest.StartCluster(t, 1)
		p := &clusterPatient{cluster: cluster}
		client := goredis.NewClusterClient(&goredis.ClusterOptions{
			Addrs: p.addresses(), PoolSize: 2, DialTimeout: time.Second, ReadTimeout: time.Second,
			ClusterStateReloadInterval: time.Second,
		})
		p.redisFleet = newRedisFleet(t, layout, client)
		return p
	}}
}

func (p *clusterPatient) addresses() (addresses []string) {
	for _, s := range slices.Concat(p.cluster.Masters, p.cluster.Replicas) {
		addresses = append(addresses, s.Addr())
	}
	return addresses
}

func (p *clusterPatient) block(string) string {
	return "registry redis " + strings.Join(p.cluster.URLs(), " ") + " {\n" + p.options() + "\n}"
}

// connectionsOf counts the established connections of a process to ports of this
// machine.
func connectionsOf(pid int, ports ...int) int {
	own := make(map[string]bool)
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(fds)
	if err != nil {
		return 0
	}
	for _, e := range entries {
		if target, err := os.Readlink(fds + "/" + e.Name()); err == nil && strings.HasPrefix(target, "socket:[") {
			own[strings.Trim(target, "socket:[]")] = true
		}
	}
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return 0
	}
	n := 0
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) < 10 || f[3] != "01" || !own[f[9]] {
			continue
		}
		for _, port := range ports {
			if strings.HasSuffix(f[2], fmt.Sprintf(":%04X", port)) {
				n++
			}
		}
	}
	return n
}

func portOf(t *testing.T, address string) (port int) {
	t.Helper()
	_, number, err := net.SplitHostPort(address)
	if err == nil {
		_, err = fmt.Sscan(number, &port)
	}
	if err != nil {
		t.Fatal(err)
	}
	return port
}
