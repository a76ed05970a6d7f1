package redistest

import (
	"context"
	"strconv"
	"strings"
	"testing"
)

const slots = 16384 // of every cluster

// A Cluster is three masters, each with as many replicas.
type Cluster struct {
	t        testing.TB
	Masters  []*Server // at the start
	Replicas []*Server // replica i*n+j follows master i
}

// StartCluster starts a cluster of three masters.
func StartCluster(t testing.TB, replicas int, options ...Option) *Cluster {
	t.Helper()
	c := &Cluster{t: t}
	// Only replicas make use of a short timeout. Without them it would only bring
	// down the cluster of a busy machine.
	timeout := "3000"
	if replicas > 0 {
		timeout = "1000"
	}
	options = append(options,
		Config("cluster-enabled", "yes"), Config("cluster-node-timeout", timeout),
		Config("cluster-config-file", "nodes.conf"), Config("cluster-replica-validity-factor", "0"))
	for range 3 {
		c.Masters = append(c.Masters, Start(t, options...))
	}
	for range 3 * replicas {
		c.Replicas = append(c.Replicas, Start(t, options...))
	}
	ctx := context.Background()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("making a cluster: %v", err)
		}
	}
	for i, m := range c.Masters {
		must(m.Client().ClusterAddSlotsRange(ctx, i*slots/3, (i+1)*slots/3-1).Err())
		must(m.Client().Do(ctx, "cluster", "set-config-epoch", i+1).Err())
	}
	all := append(append([]*Server(nil), c.Masters...), c.Replicas...)
	for _, s := range all[1:] {
		must(all[0].Client().ClusterMeet(ctx, "127.0.0.1", strconv.Itoa(s.port)).Err())
	}
	for _, s := range all {
		until(t, "the servers know each other", func(ctx context.Context) bool {
			nodes, err := s.Client().ClusterNodes(ctx).Result()
			return err == nil && strings.Count(nodes, "\n") == len(all) && !strings.Contains(nodes, "handshake")
		})
	}
	for i, r := range c.Replicas {
		id, err := c.Masters[i/replicas].Client().ClusterMyID(ctx).Result()
		must(err)
		must(r.Client().ClusterReplicate(ctx, id).Err())
	}
	for _, s := range all {
		until(t, "the cluster is up", func(ctx context.Context) bool {
			info, err := s.Client().ClusterInfo(ctx).Result()
			if err != nil || !strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, "cluster_slots_ok:16384") {
				return false
			}
			nodes, err := s.Client().ClusterNodes(ctx).Result()
			return err == nil && strings.Count(nodes, "slave") == len(c.Replicas)
		})
	}
	for _, r := range c.Replicas {
		until(t, "the replicas are in step", func(ctx context.Context) bool {
			info, err := r.Client().Info(ctx, "replication").Result()
			return err == nil && strings.Contains(info, "master_link_status:up")
		})
	}
	return c
}

// URLs returns the URLs of all masters.
func (c *Cluster) URLs() []string {
	var urls []string
	for _, m := range c.Masters {
		urls = append(urls, "redis+cluster://"+m.Addr())
	}
	return urls
}

// Owner returns the master, at the start, of a key.
func (c *Cluster) Owner(key string) *Server {
	c.t.Helper()
	slot, err := c.Masters[0].Client().ClusterKeySlot(context.Background(), key).Result()
	if err != nil {
		c.t.Fatal(err)
	}
	for i := 2; ; i-- {
		if int(slot) >= i*slots/3 {
			return c.Masters[i]
		}
	}
}
