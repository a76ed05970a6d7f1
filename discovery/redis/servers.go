package redis

import (
	"context"
	"slices"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"
)

const (
	// How often to ask which servers there are beside those that were dialled.
	locateInterval = 10 * time.Second
	// For how long a server counts that is not heard of any more: a replica that
	// is being replaced, or a master that is down, may come back.
	locatedFor = time.Hour
	// maxLocated bounds what a server may add.
	maxLocated = 1024
)

// servers are those of a registry that were dialled or heard of. They may be used
// concurrently.
type servers struct {
	named []string // by URLs

	mu   sync.Mutex
	seen map[string]time.Time // when, by address
}

// add notes that there are such servers.
func (s *servers) add(addresses ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen == nil {
		s.seen = make(map[string]time.Time)
	}
	for _, address := range addresses {
		if _, known := s.seen[address]; known || len(s.seen) < maxLocated {
			s.seen[address] = time.Now()
		}
	}
}

// located returns the addresses of those that no URL names, sorted.
func (s *servers) located() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var addresses []string
	for address, at := range s.seen {
		switch {
		case time.Since(at) > locatedFor:
			delete(s.seen, address)
		case !slices.Contains(s.named, address):
			addresses = append(addresses, address)
		}
	}
	slices.Sort(addresses)
	return addresses
}

// locate learns of servers until the watch ends. What goes wrong there is left alone:
// not every user may ask, and what is dialled is known anyway.
func (c *client) locate(ctx context.Context) {
	servers := &c.connector.servers
	for again := true; again; again = pause(ctx, locateInterval) {
		_ = c.do(ctx, func(ctx context.Context) error {
			if cluster, ok := c.commands.(*goredis.ClusterClient); ok {
				return cluster.ForEachShard(ctx, func(_ context.Context, shard *goredis.Client) error {
					servers.add(shard.Options().Addr)
					return nil
				})
			}
			servers.add(c.connector.sentinels.askServers(ctx)...)
			return nil
		})
	}
}
