package natskv_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// wantWhole fails the test unless everything that is asked of a bucket works: a
// list, a change, the overrides, the history, a comparison.
func wantWhole(t *testing.T, r *natskv.Registry, listed int) {
	t.Helper()
	w := watch(t, r)
	if got, _ := w.Listing(); len(got) != listed {
		t.Errorf("%d nodes are listed, want %d", len(got), listed)
	}
	announce(t, r, node(t, "a"))
	w.Want(discovery.Put, "a")
	if err := r.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	if history, err := r.History(t.Context(), "a", 0); err != nil || len(history) != 1 {
		t.Errorf("History = %v, %v", history, err)
	}
	if err := r.SetOverride(t.Context(), "a", discovery.Override{State: discovery.StateDraining}); err != nil {
		t.Error(err)
	}
	for w.Next().Type != discovery.Overridden {
	}
	if all, err := r.Overrides(t.Context()); err != nil || all["a"].State != discovery.StateDraining {
		t.Errorf("Overrides = %v, %v", all, err)
	}
	if err := r.Withdraw(t.Context(), node(t, "a")); err != nil {
		t.Error(err)
	}
	w.Want(discovery.Left, "a")
	w.Stop()
}

// A server may limit how many messages one request asks for.
func TestRequestBatchLimit(t *testing.T) {
	t.Parallel()
	const nodes = 1200
	for _, limit := range []int{1, 500} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			t.Parallel()
			s := natstest.Start(t, natstest.Configure(func(o *server.Options) { o.JetStreamLimits.MaxRequestBatch = limit }))
			kv := s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes"})
			for i := range nodes {
				put(t, kv, fmt.Sprintf("node.n%d", i), record(fmt.Sprintf("n%d", i)))
			}
			wantWhole(t, open(t, natskv.Config{URLs: []string{s.URL()}}), nodes)
		})
	}
}

// The owner of a bucket may limit what its consumers do.
func TestConsumerLimits(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	for _, bucket := range []string{"catga_nodes", "catga_nodes_overrides"} {
		config := jetstream.StreamConfig{
			Name: "KV_" + bucket, Subjects: []string{"$KV." + bucket + ".>"}, MaxMsgsPerSubject: 10,
			AllowRollup: true, AllowDirect: true, DenyDelete: true, Discard: jetstream.DiscardNew,
			ConsumerLimits: jetstream.StreamConsumerLimits{InactiveThreshold: 2 * time.Second, MaxAckPending: 5},
		}
		if _, err := s.JetStream().CreateStream(t.Context(), config); err != nil {
			t.Fatal(err)
		}
	}
	wantWhole(t, open(t, natskv.Config{URLs: []string{s.URL()}}), 0)
}

func TestMaxConsumers(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Configure(func(o *server.Options) { o.JetStreamLimits.DefaultMaxConsumers = 1 }))
	first := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	first.Listing()
	wantError(t, watch(t, open(t, natskv.Config{URLs: []string{s.URL()}})).Broken(), discovery.ErrFull, "catga_nodes", "watchers")
}

// credentials of a server that has an operator.
func credentials(s *natstest.Server) natskv.Config {
	return natskv.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{Credentials: s.Creds}}
}

// An account may allow nothing but streams on three servers.
func TestAccountOfThreeReplicas(t *testing.T) {
	t.Parallel()
	s := natstest.StartCluster(t, 3, natstest.Tiers("R3", "R5"))[0]
	r := open(t, credentials(s))
	deadline := time.Now().Add(patience)
	for {
		// A cluster that has just met may not have told all of its members of the account.
		err := r.Announce(t.Context(), node(t, "first"))
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	stream, err := s.JetStream().Stream(t.Context(), "KV_catga_nodes")
	if err != nil {
		t.Fatal(err)
	}
	if n := stream.CachedInfo().Config.Replicas; n != 3 {
		t.Errorf("the bucket has %d replicas, want the least that is allowed, 3", n)
	}
	wantWhole(t, r, 1)

	// What was asked for is not changed behind anybody's back.
	other := credentials(s)
	other.Bucket, other.Replicas = "other", 1
	wantBoth(t, other, discovery.ErrUnsupported, "1 replica", "R3, R5")
}

func TestAccountOfThreeReplicasWithoutCluster(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Tiers("R3"))
	wantBoth(t, credentials(s), discovery.ErrUnsupported, "3 replicas", "cluster")
}

func TestAccountLimits(t *testing.T) {
	t.Parallel()
	limits := jwt.JetStreamLimits{MemoryStorage: -1, DiskStorage: -1, Streams: -1, Consumer: -1}
	for name, test := range map[string]struct {
		limit    func(*jwt.JetStreamLimits)
		maxBytes int64
		sentinel error
		words    []string
	}{
		"a bucket needs a size": {
			func(l *jwt.JetStreamLimits) { l.MaxBytesRequired = true }, -1, discovery.ErrUnsupported, []string{"max_bytes"},
		},
		"the size of one bucket": {
			func(l *jwt.JetStreamLimits) { l.DiskMaxStreamBytes = 1 << 20 }, 0, discovery.ErrFull, []string{"max_bytes", "1048576"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			limits := limits
			test.limit(&limits)
			s := natstest.Start(t, natstest.AccountLimits(limits))
			config := credentials(s)
			config.MaxBytes = test.maxBytes
			wantBoth(t, config, test.sentinel, test.words...)
		})
	}
}

// Who may write may put megabytes. What waits for us then is bounded, and the
// good nodes are listed all the same.
func TestLargeValues(t *testing.T) {
	t.Parallel()
	const (
		small, large, huge = 20, 50, 3 // values, and the sizes of the latter:
		largeSize          = 1 << 20
		hugeSize           = 6 << 20
	)
	s := natstest.Start(t, natstest.Configure(func(o *server.Options) { o.MaxPayload = 8 << 20 }))
	kv := s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", Storage: jetstream.MemoryStorage})
	for i := range large {
		put(t, kv, fmt.Sprintf("node.large%d", i), strings.Repeat("x", largeSize))
	}
	for i := range huge {
		put(t, kv, fmt.Sprintf("node.huge%d", i), strings.Repeat("x", hugeSize))
	}
	for i := range small {
		put(t, kv, fmt.Sprintf("node.n%d", i), record(fmt.Sprintf("n%d", i)))
	}

	w := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	// Nobody takes the first event yet, and the server sends what it may.
	stream, err := s.JetStream().Stream(t.Context(), "KV_catga_nodes")
	if err != nil {
		t.Fatal(err)
	}
	var info *jetstream.ConsumerInfo
	for deadline := time.Now().Add(patience); info == nil || info.Delivered.Consumer == 0 || info.NumWaiting > 0 && info.NumPending > 0; {
		if time.Now().After(deadline) {
			t.Fatal("the server has neither sent everything nor stopped")
		}
		for each := range stream.ListConsumers(t.Context()).Info() {
			info = each
		}
	}
	if most := uint64(8); info.Delivered.Consumer > most {
		t.Errorf("%d values of %d bytes were sent at once, want at most %d", info.Delivered.Consumer, largeSize, most)
	}
	good, rejected := 0, 0
	listed, _ := w.Listing()
	for _, e := range listed {
		switch e.Type {
		case discovery.Put:
			good++
		case discovery.Rejected:
			rejected++
		}
	}
	if good != small || rejected != large+huge {
		t.Errorf("%d nodes and %d rejected are listed, want %d and %d", good, rejected, small, large+huge)
	}
	// One that is written later is no gap either.
	put(t, kv, "node.huge0", strings.Repeat("y", hugeSize))
	w.Want(discovery.Rejected, "huge0")
	put(t, kv, "node.n0", record("n0"))
	w.Want(discovery.Put, "n0")
}
