package integration

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// redisServer is what both layouts share.
type redisServer struct {
	t      *testing.T
	server *redistest.Server
	client *goredis.Client
}

const ownName = "integration-test"

func newRedis(t *testing.T) redisServer {
	server := redistest.Start(t)
	options, err := goredis.ParseURL(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	options.ClientName, options.PoolSize = ownName, 1
	options.MaxRetries = 20 // the server may be on its way back
	client := goredis.NewClient(options)
	t.Cleanup(func() { _ = client.Close() })
	return redisServer{t, server, client}
}

func (r redisServer) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r redisServer) clients() int {
	r.t.Helper()
	list, err := r.client.ClientList(context.Background()).Result()
	r.must(err)
	n := 0
	for line := range strings.Lines(list) {
		if !strings.Contains(line, " name="+ownName+" ") {
			n++
		}
	}
	return n
}

func (r redisServer) persistent() bool { return true }

func (r redisServer) maxClients() int { return 3 } // commands, the blocked read, notifications

func (r redisServer) accepted() uint64 {
	r.t.Helper()
	info, err := r.client.Info(context.Background(), "stats").Result()
	r.must(err)
	for line := range strings.Lines(info) {
		if v, ok := strings.CutPrefix(line, "total_connections_received:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 10, 64)
			r.must(err)
			return n
		}
	}
	r.t.Fatal("the server does not tell how many connections it took")
	return 0
}

func (r redisServer) stop()    { r.server.Stop() }
func (r redisServer) restart() { r.server.Restart() }

// sortedSet is written to as the Catga fleet does: the member is the record, and
// a heartbeat removes the old member and adds a new one, in two commands.
type sortedSet struct {
	redisServer
	mu      sync.Mutex
	members map[string]string // what this test wrote, by id
}

const setKey = "catga:nodes"

func newSortedSet(t *testing.T) registry {
	return &sortedSet{redisServer: newRedis(t), members: make(map[string]string)}
}

func (s *sortedSet) block(options string) string {
	// The test writes as writers in the wild do, who announce no change.
	return "registry redis " + s.server.URL() + " {\npoll 50ms\n" + options + "\n}"
}

func (s *sortedSet) flags() []string {
	return []string{"--registry", s.server.URL(), "--option", "poll 50ms"}
}

func (s *sortedSet) put(id, record string) {
	s.t.Helper()
	ctx := context.Background()
	s.mu.Lock()
	defer s.mu.Unlock()
	if old, ok := s.members[id]; ok {
		s.must(s.client.ZRem(ctx, setKey, old).Err())
	}
	s.must(s.client.ZAdd(ctx, setKey, goredis.Z{Score: float64(time.Now().UnixMilli()), Member: record}).Err())
	s.members[id] = record
}

func (s *sortedSet) remove(id string) {
	s.t.Helper()
	s.must(s.client.ZRem(context.Background(), setKey, s.record(id)).Err())
}

func (s *sortedSet) record(id string) string {
	s.t.Helper()
	members, err := s.client.ZRangeArgs(context.Background(), goredis.ZRangeArgs{Key: setKey, Start: 0, Stop: -1, Rev: true}).Result()
	s.must(err)
	for _, m := range members {
		if n, err := discovery.ParseNode([]byte(m)); err == nil && n.ID == id {
			return m
		}
	}
	return ""
}

// keys is a key for each node.
type keys struct{ redisServer }

func newKeys(t *testing.T) registry { return &keys{newRedis(t)} }

func (k *keys) block(options string) string {
	ttl := "ttl 1h"
	if strings.Contains(options, "ttl ") {
		ttl = ""
	}
	return "registry redis " + k.server.URL() + " {\nlayout keys\npoll 50ms\n" + options + "\n" + ttl + "\n}"
}

func (k *keys) flags() []string {
	return []string{"--registry", k.server.URL(), "--option", "layout keys", "--option", "poll 50ms"}
}

func (k *keys) put(id, record string) {
	k.t.Helper()
	k.must(k.client.Set(context.Background(), setKey+":"+id, record, 2*time.Minute).Err())
}

func (k *keys) remove(id string) {
	k.t.Helper()
	k.must(k.client.Del(context.Background(), setKey+":"+id).Err())
}

func (k *keys) record(id string) string {
	k.t.Helper()
	record, err := k.client.Get(context.Background(), setKey+":"+id).Result()
	if errors.Is(err, goredis.Nil) {
		return ""
	}
	k.must(err)
	return record
}
