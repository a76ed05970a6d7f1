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

func TestAnnounceAndWithdraw(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	w.listing()

	ours, theirs := node(t, "a", "instance", "1"), node(t, "a", "instance", "2")
	if err := r.Withdraw(t.Context(), ours); err != nil {
		t.Errorf("of a node that is not there: %v", err)
	}
	announce(t, r, ours)
	w.want(discovery.Put, "a")
	announce(t, r, ours)
	w.want(discovery.Put, "a")
	if err := r.Withdraw(t.Context(), ours); err != nil {
		t.Fatal(err)
	}
	w.want(discovery.Left, "a")
	if err := r.Withdraw(t.Context(), ours); err != nil {
		t.Errorf("for the second time: %v", err)
	}

	// Another process took the id.
	announce(t, r, ours)
	w.want(discovery.Put, "a")
	announce(t, open(t, natskv.Config{URLs: []string{s.URL()}}), theirs)
	w.want(discovery.Put, "a")
	if err := r.Withdraw(t.Context(), ours); err != nil {
		t.Errorf("of somebody else's: %v", err)
	}
	// The same process, through another connection, as after a reload.
	if err := open(t, natskv.Config{URLs: []string{s.URL()}}).Withdraw(t.Context(), theirs); err != nil {
		t.Fatal(err)
	}
	w.want(discovery.Left, "a")

	// What cannot be read is nobody's.
	put(t, s.KeyValue("catga_nodes"), "node.a", "{}")
	w.want(discovery.Rejected, "a")
	if err := r.Withdraw(t.Context(), ours); err != nil {
		t.Errorf("of what cannot be read: %v", err)
	}
	announce(t, r, node(t, "end"))
	w.want(discovery.Put, "end") // and not Left
}

// A process of ours takes an id over within one process, as over a reload: what it
// wrote is not what another instance may change. And a bucket that is made anew
// counts from 1 again.
func TestOwnRecordOnly(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	old, successor := node(t, "a", "instance", "1", "state", "draining"), node(t, "a", "instance", "2")
	stands := func(want string) {
		t.Helper()
		if n, err := r.Record(t.Context(), "a"); err != nil || n.Instance() != want {
			t.Errorf("instance %q stands, %v, want %q", n.Instance(), err, want)
		}
	}
	drain := func(n discovery.Node, want bool) {
		t.Helper()
		if own, err := r.Drain(t.Context(), n); err != nil || own != want {
			t.Errorf("Drain = %v, %v, want %v", own, err, want)
		}
	}
	announce(t, r, old)
	announce(t, r, successor)
	drain(old, false)
	if err := r.Withdraw(t.Context(), old); err != nil {
		t.Error(err)
	}
	stands("2")

	for range 5 {
		announce(t, r, old)
	}
	if err := s.JetStream().DeleteKeyValue(t.Context(), "catga_nodes"); err != nil {
		t.Fatal(err)
	}
	drain(old, false)
	if err := r.Withdraw(t.Context(), old); err != nil {
		t.Errorf("without a bucket: %v", err)
	}
	announce(t, open(t, natskv.Config{URLs: []string{s.URL()}}), successor)
	drain(old, false)
	stands("")
	announce(t, open(t, natskv.Config{URLs: []string{s.URL()}}), old)
	drain(old, true)
	stands("1")
}

func TestWithdrawWithoutBucket(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}, NoCreate: true})
	if err := r.Withdraw(t.Context(), node(t, "a")); err != nil {
		t.Error(err)
	}
	history, err := open(t, natskv.Config{URLs: []string{s.URL()}}).History(t.Context(), "a", 0)
	if err != nil || len(history) != 0 {
		t.Errorf("History = %v, %v", history, err)
	}
	for range s.JetStream().StreamNames(t.Context()).Name() {
		t.Error("a bucket was created only to take something out of it")
	}
}

func TestOddIDs(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, r)
	w.listing()
	for _, id := range []string{"a b", "*", ">", "a.b", "..", "=", "=41", "é/ü", "node.x", "🦀", strings.Repeat(".", discovery.MaxID)} {
		n := node(t, id)
		announce(t, r, n)
		w.want(discovery.Put, id)
		history, err := r.History(t.Context(), id, 0)
		if err != nil || len(history) != 1 || history[0].Node.ID != id {
			t.Errorf("history of %q is %v, %v", id, history, err)
		}
		if err := r.Withdraw(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		w.want(discovery.Left, id)
	}
}

func TestExistingBucketIsUsedAsItIs(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	theirs := jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 3, TTL: time.Hour, MaxBytes: 1 << 20, Storage: jetstream.MemoryStorage}
	kv := s.Bucket(theirs)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	announce(t, r, node(t, "a"))
	w := watch(t, r)
	w.want(discovery.Put, "a")
	if e := w.want(discovery.Synced, ""); e.Listing.Expiry != time.Hour {
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
		got.Storage != jetstream.MemoryStorage || got.Replicas != 1 || got.LimitMarkerTTL != 90*time.Second {
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
	listed, _ := watch(t, r).listing()
	if len(listed) != 1 || listed[0].ID != "a" {
		t.Errorf("listed %v", listed)
	}
}

func TestHistory(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	n := node(t, "a", "version", "1")
	announce(t, r, n)
	kv := s.KeyValue("catga_nodes")
	put(t, kv, "a", record("a")) // the bare form
	put(t, kv, "node.a", "{}")
	n.Metadata["version"] = "2"
	announce(t, r, n)
	announce(t, r, node(t, "other"))
	if err := r.Withdraw(t.Context(), n); err != nil {
		t.Fatal(err)
	}
	history, err := r.History(t.Context(), "a", 0)
	if err != nil {
		t.Fatal(err)
	}
	want := []discovery.EventType{discovery.Left, discovery.Put, discovery.Rejected, discovery.Put, discovery.Put}
	if len(history) != len(want) {
		t.Fatalf("%d revisions, want %d: %v", len(history), len(want), history)
	}
	for i, revision := range history {
		if revision.Type != want[i] || revision.Time.IsZero() ||
			(revision.Type == discovery.Rejected) != (revision.Err != nil) ||
			i > 0 && revision.Number >= history[i-1].Number {
			t.Errorf("revision %d is %+v, want %s", i, revision, want[i])
		}
	}
	if got := history[1].Node.Metadata["version"]; got != "2" {
		t.Errorf("the newest record has version %q", got)
	}
	if limited, err := r.History(t.Context(), "a", 2); err != nil || len(limited) != 2 || limited[0].Number != history[0].Number {
		t.Errorf("with a limit: %v, %v", limited, err)
	}
	if none, err := r.History(t.Context(), "never", 0); err != nil || len(none) != 0 {
		t.Errorf("of a node never heard of: %v, %v", none, err)
	}
}
