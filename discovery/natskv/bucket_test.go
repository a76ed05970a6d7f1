package natskv_test

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestExistingBucketIsUsedAsItIs(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	theirs := jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 3, TTL: time.Hour, MaxBytes: 1 << 20, Storage: jetstream.MemoryStorage}
	kv := s.Bucket(theirs)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	announce(t, r, node(t, "a"))
	w := watch(t, r)
	w.Want(discovery.Put, "a")
	if e := w.Want(discovery.Synced, ""); e.Listing.Expiry != time.Hour {
		t.Errorf("the listing is %+v", e.Listing)
	}
	status, err := kv.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := status.Config(); got.History != 3 || got.TTL != time.Hour || got.MaxBytes != 1<<20 || got.LimitMarkerTTL != 0 {
		t.Errorf("the bucket was changed to %+v", got)
	}
}

func TestCreatedBucket(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{
		URLs: []string{s.URL() + "/fleet"}, BucketTTL: 90 * time.Second, History: 5, MaxBytes: 1 << 20, Storage: natskv.StorageMemory,
	})
	announce(t, r, node(t, "a"))
	status, err := s.KeyValue("fleet").Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := status.Config()
	if got.History != 5 || got.TTL != 90*time.Second || got.MaxBytes != 1<<20 ||
		got.Storage != jetstream.MemoryStorage || got.Replicas != 1 || got.LimitMarkerTTL != time.Second {
		t.Errorf("the bucket is %+v", got)
	}
}

// Those who start a fleet start at once, and not all configured alike.
func TestCreatorsRace(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	var group sync.WaitGroup
	for i := range 8 {
		r := open(t, natskv.Config{URLs: []string{s.URL()}, History: 1 + i})
		group.Go(func() {
			if err := r.Announce(t.Context(), node(t, "a")); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
}

func TestAnnounceAfterWipe(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	strict := open(t, natskv.Config{URLs: []string{s.URL()}, NoCreate: true})
	announce(t, r, node(t, "a"))
	announce(t, strict, node(t, "b"))
	if err := s.JetStream().DeleteKeyValue(t.Context(), "catga_nodes"); err != nil {
		t.Fatal(err)
	}
	wantError(t, strict.Announce(t.Context(), node(t, "b")), discovery.ErrNotFound, "catga_nodes", "nats kv add")
	announce(t, r, node(t, "a"))
	listed, _ := watch(t, r).Listing()
	if len(listed) != 1 || listed[0].ID != "a" {
		t.Errorf("listed %v", listed)
	}
}

// TestWritersTTLHolds holds that a record lives for as long as its writer says in a bucket
// that was created here.
func TestWritersTTLHolds(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	announce(t, r, node(t, "a"))
	w := watch(t, r)
	w.Want(discovery.Put, "a")
	w.Want(discovery.Synced, "")
	if _, err := s.KeyValue("catga_nodes").Create(t.Context(), "node.b", []byte(record("b")), jetstream.KeyTTL(2*time.Second)); err != nil {
		t.Fatal(err)
	}
	w.Want(discovery.Put, "b")
	stream, err := s.JetStream().Stream(t.Context(), "KV_catga_nodes")
	if err != nil {
		t.Fatal(err)
	}
	stored, err := stream.GetLastMsgForSubject(t.Context(), "$KV.catga_nodes.node.b")
	if err != nil {
		t.Fatal(err)
	}
	if ttl := stored.Header.Get(jetstream.MsgTTLHeader); ttl != "2s" {
		t.Errorf("the record is to live for %q, want 2s", ttl)
	}
	w.Want(discovery.Expired, "b")
}

// TestBucketOfEarlierVersion holds that one which raises the TTLs of writers is told of,
// and that what is said mends it.
func TestBucketOfEarlierVersion(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", Description: "nodes of a fleet", TTL: 5 * time.Minute, LimitMarkerTTL: 5 * time.Minute})
	s.Bucket(jetstream.KeyValueConfig{Bucket: "theirs", TTL: 5 * time.Minute, LimitMarkerTTL: 5 * time.Minute})
	advice := func(bucket string) string {
		t.Helper()
		_, synced := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}, Bucket: bucket})).Listing()
		return synced.Listing.Advice
	}
	want := "nats stream edit KV_catga_nodes --subject-del-markers-ttl=1s"
	if got := advice("catga_nodes"); !strings.Contains(got, want) || !strings.Contains(got, "5m0s") {
		t.Errorf("the advice is %q, want one with %q", got, want)
	}
	if got := advice("theirs"); got != "" {
		t.Errorf("about a bucket of others the advice is %q", got)
	}

	stream, err := s.JetStream().Stream(t.Context(), "KV_catga_nodes")
	if err != nil {
		t.Fatal(err)
	}
	config := stream.CachedInfo().Config
	config.SubjectDeleteMarkerTTL = time.Second
	if _, err := s.JetStream().UpdateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	if got := advice("catga_nodes"); got != "" {
		t.Errorf("after it was followed the advice is %q", got)
	}
}
