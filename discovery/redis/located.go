package redis

import (
	"context"
	"net"
	"slices"
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

// Located returns the servers that no URL names, as host:port, sorted: those that
// were dialled because Sentinels or a cluster named them, and their replicas and
// other Sentinels as far as they tell.
func (r *Registry) Located() []string {
	d := r.connector
	d.mu.Lock()
	defer d.mu.Unlock()
	var addresses []string
	for address, at := range d.located {
		switch {
		case time.Since(at) > locatedFor:
			delete(d.located, address)
		case !slices.Contains(d.addresses, address):
			addresses = append(addresses, address)
		}
	}
	slices.Sort(addresses)
	return addresses
}

// locate notes that there are such servers.
func (d *connector) locate(addresses ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, address := range addresses {
		if _, known := d.located[address]; known || len(d.located) < maxLocated {
			d.located[address] = time.Now()
		}
	}
}

// locate learns of servers until the watch ends. It is not told of what goes wrong
// there: not every user may ask, and what is dialled is known anyway.
func (w *watch) locate(ctx context.Context) {
	for {
		_ = w.r.do(ctx, func(ctx context.Context) error {
			if cluster, ok := w.r.commands.(*goredis.ClusterClient); ok {
				return cluster.ForEachShard(ctx, func(_ context.Context, client *goredis.Client) error {
					w.r.connector.locate(client.Options().Addr)
					return nil
				})
			}
			w.r.connector.askServers(ctx)
			return nil
		})
		select {
		case <-ctx.Done():
			return
		case <-time.After(locateInterval):
		}
	}
}

// askServers asks the first Sentinel that answers for the replicas of the master
// and for the other Sentinels.
func (d *connector) askServers(ctx context.Context) {
	for _, s := range d.sentinels {
		replicas, err := s.Replicas(ctx, d.config.SentinelMaster).Result()
		if err != nil {
			continue
		}
		others, _ := s.Sentinels(ctx, d.config.SentinelMaster).Result()
		for _, server := range append(replicas, others...) {
			if server["ip"] != "" && server["port"] != "" {
				d.locate(net.JoinHostPort(server["ip"], server["port"]))
			}
		}
		return
	}
}
