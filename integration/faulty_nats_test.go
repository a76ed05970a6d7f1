package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

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

func (s natsServer) kill() { s.server.Kill() }

func (s natsServer) restart() { s.server.Start() }

func (s natsServer) pause() { _ = syscall.Kill(s.server.PID(), syscall.SIGSTOP) }

func (s natsServer) resume() { _ = syscall.Kill(s.server.PID(), syscall.SIGCONT) }

func (s natsServer) lockOut() { s.server.Reload(natsUsers("")) }

func (s natsServer) denyAll() {
	s.server.Reload(natsUsers(`{publish: {deny: ">"}, subscribe: {deny: ">"}}`))
}

func (s natsServer) allow() { s.server.Reload(natsUsers("{}")) }

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
	ctx, cancel := shortContext()
	defer cancel()
	_, err := b.js.CreateKeyValue(ctx, b.config)
	return err
}

func (b bucket) delete() error {
	ctx, cancel := shortContext()
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
	ctx, cancel := shortContext()
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

type faultyKV struct {
	natsServer
	bucket
	oldState string // a store of the server's, if it has an old state
}

func startKV(t *testing.T, config jetstream.KeyValueConfig) *faultyKV {
	s := startNATS(t)
	r := &faultyKV{natsServer: s, bucket: newBucket(t, s.conn, config)}
	if err := r.create(); err != nil {
		t.Fatal(err)
	}
	return r
}

// block also says how Caddy makes the bucket, should it have to.
func (r *faultyKV) block(address string) string {
	storage := "file"
	if r.config.Storage == jetstream.MemoryStorage {
		storage = "memory"
	}
	return fmt.Sprintf("registry nats_kv %s {\nbucket_ttl %s\nhistory %d\nstorage %s\n}", r.url(address), r.config.TTL, r.config.History, storage)
}

// saveOldState writes what restoreOldState brings back.
func (r *faultyKV) saveOldState(t *testing.T) *faultyKV {
	writeOldState(t, r)
	r.server.Stop()
	r.oldState = r.server.Save()
	r.server.Start()
	return r
}

func (r *faultyKV) restoreOldState() { r.server.Restore(r.oldState) }

// deleteConsumers ends every watch of the bucket without a word to who watches.
func (b bucket) deleteConsumers() error {
	ctx, cancel := shortContext()
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
func (c natsCluster) killServerOf(rig *testRig) {
	c.t.Helper()
	eventually(c.t, "Caddy is connected to a server", func() bool {
		for _, s := range c.servers {
			if connectionsOf(rig.proxy.cmd.Process.Pid, s.Port) > 0 {
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

func startKVCluster(t *testing.T) *kvCluster {
	c := startNATSCluster(t)
	config := fleetBucket
	config.Replicas = len(c.servers)
	r := &kvCluster{natsCluster: c, bucket: newBucket(t, c.conn, config)}
	eventually(t, "the cluster keeps a bucket", func() bool { return r.create() == nil })
	r.waitForReplicas()
	return r
}

func (r *kvCluster) block(string) string {
	return fmt.Sprintf("registry nats_kv %s {\nbucket_ttl %s\nreplicas %d\n}", strings.Join(r.urls(), " "), r.config.TTL, len(r.servers))
}

// waitForReplicas waits until the bucket has a leader and all replicas.
func (r *kvCluster) waitForReplicas() {
	r.t.Helper()
	eventually(r.t, "all replicas are in step", func() bool {
		ctx, cancel := shortContext()
		defer cancel()
		stream, err := r.stream(ctx)
		if err != nil {
			return false
		}
		info := stream.CachedInfo().Cluster
		return info.Leader != "" && len(info.Replicas) == len(r.servers)-1 &&
			!slices.ContainsFunc(info.Replicas, func(r *jetstream.PeerInfo) bool { return r.Offline || !r.Current })
	})
}

// leader returns the server that leads the bucket.
func (r *kvCluster) leader() *natstest.Process {
	r.t.Helper()
	var leader int
	eventually(r.t, "the bucket has a leader", func() bool {
		ctx, cancel := shortContext()
		defer cancel()
		stream, err := r.stream(ctx)
		if err != nil {
			return false
		}
		_, err = fmt.Sscanf(stream.CachedInfo().Cluster.Leader, "natstest-%d", &leader)
		return err == nil
	})
	return r.servers[leader]
}

// stepDown makes the leader of the bucket step down, and that of the cluster.
func (r *kvCluster) stepDown() {
	r.t.Helper()
	step := func(conn *nats.Conn, who string) {
		r.t.Helper()
		eventually(r.t, "the leader steps down", func() bool {
			answer, err := conn.Request("$JS.API."+who, nil, patience)
			return err == nil && strings.Contains(string(answer.Data), `"success":true`)
		})
	}
	step(r.natsCluster.conn, "STREAM.LEADER.STEPDOWN.KV_"+r.config.Bucket)
	step(connectFleet(r.t, strings.Join(r.urls(), ","), nats.UserInfo(natstest.SystemUser, natstest.SystemUser)), "META.LEADER.STEPDOWN")
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

type faultyBroadcast struct {
	natsServer
	*broadcastFleet
}

func startBroadcast(t *testing.T) *faultyBroadcast {
	s := startNATS(t)
	return &faultyBroadcast{s, newBroadcastFleet(t, s.conn)}
}

func (r *faultyBroadcast) block(address string) string { return "registry nats " + r.url(address) }

// wipe does nothing, where there is nothing to wipe.
func (r *faultyBroadcast) wipe() error { return nil }

type broadcastCluster struct {
	natsCluster
	*broadcastFleet
}

func startBroadcastCluster(t *testing.T) *broadcastCluster {
	c := startNATSCluster(t)
	return &broadcastCluster{c, newBroadcastFleet(t, c.conn)}
}

func (r *broadcastCluster) block(string) string {
	return "registry nats " + strings.Join(r.urls(), " ")
}
