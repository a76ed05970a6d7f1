package picker

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/balance"
)

// node returns a node with metadata, given as pairs.
func node(id string, pairs ...string) discovery.Node {
	h := Hash(id)
	e, err := discovery.ParseEndpoint(fmt.Sprintf("10.%d.%d.%d:%d", h>>8&0xff, h>>16&0xff, h>>24&0xff, 1000+h>>32&0x7fff))
	if err != nil {
		panic(err)
	}
	n := discovery.Node{ID: id, Endpoint: e, Metadata: map[string]string{}}
	for i := 0; i < len(pairs); i += 2 {
		n.Metadata[pairs[i]] = pairs[i+1]
	}
	return n
}

// plain returns so many nodes without metadata, whose ids sort by their number.
func plain(n int) []discovery.Node {
	nodes := make([]discovery.Node, n)
	for i := range nodes {
		nodes[i] = node(fmt.Sprintf("n%05d", i))
	}
	return nodes
}

func put(t testing.TB, m *discoverytest.Memory, n discovery.Node) {
	t.Helper()
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	m.Put(n.ID, record)
}

// follow returns a directory of the registry that has listed it, and ends with the
// test.
func follow(t testing.TB, m *discoverytest.Memory) *discovery.Directory {
	t.Helper()
	d := discovery.NewDirectory(m.Open(), discovery.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	<-d.Synced()
	return d
}

// snapshotOf returns a snapshot of these nodes.
func snapshotOf(t testing.TB, nodes ...discovery.Node) *discovery.Snapshot {
	t.Helper()
	m := discoverytest.NewMemory()
	for _, n := range nodes {
		put(t, m, n)
	}
	return follow(t, m).Snapshot()
}

// newBuilder returns the builder of a source that uses every node. Its draws can be
// repeated.
func newBuilder() *Builder {
	return &Builder{
		Filter: Filter{
			Scheme: "http",
			Own:    func(string) bool { return false },
			Denied: func(*discovery.Entry) Reason { return "" },
		},
		Strategy: All{},
		Random:   rand.New(rand.NewPCG(1, 2)).Uint64,
		Clock:    func() time.Duration { return time.Hour },
		Cost:     func(*discovery.Entry, time.Duration) (float64, int) { return 0.01, 0 },
		Usage:    func(e *discovery.Entry, _ time.Duration) balance.Member { return balance.Member{Weight: e.Weight()} },
	}
}

// ids returns those of nodes, in their order.
func ids(nodes []*discovery.Entry) []string {
	all := make([]string, len(nodes))
	for i, e := range nodes {
		all[i] = e.Node.ID
	}
	return all
}

// weighted returns nodes of these weights; those that no record may have, and that
// get no requests, are left out.
func weighted(t testing.TB, weights ...float64) []*discovery.Entry {
	t.Helper()
	var nodes []discovery.Node
	for i, w := range weights {
		if w > 0 && w <= discovery.MaxWeight {
			nodes = append(nodes, node(fmt.Sprintf("n%05d", i), discovery.KeyWeight, strconv.FormatFloat(w, 'g', -1, 64)))
		}
	}
	return snapshotOf(t, nodes...).Nodes()
}
