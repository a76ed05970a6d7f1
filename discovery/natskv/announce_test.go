package natskv_test

import (
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestAnnounceAndWithdraw(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	w := watch(t, open(t, natskv.Config{URLs: []string{s.URL()}}))
	w.Listing()

	ours, theirs := node(t, "a", "instance", "1"), node(t, "a", "instance", "2")
	if err := r.Withdraw(t.Context(), ours); err != nil {
		t.Errorf("of a node that is not there: %v", err)
	}
	announce(t, r, ours)
	w.Want(discovery.Put, "a")
	announce(t, r, ours)
	w.Want(discovery.Put, "a")
	if err := r.Withdraw(t.Context(), ours); err != nil {
		t.Fatal(err)
	}
	w.Want(discovery.Left, "a")
	if err := r.Withdraw(t.Context(), ours); err != nil {
		t.Errorf("for the second time: %v", err)
	}

	// Another process took the id.
	announce(t, r, ours)
	w.Want(discovery.Put, "a")
	announce(t, open(t, natskv.Config{URLs: []string{s.URL()}}), theirs)
	w.Want(discovery.Put, "a")
	if err := r.Withdraw(t.Context(), ours); err != nil {
		t.Errorf("of somebody else's: %v", err)
	}
	// The same process, through another connection, as after a reload.
	if err := open(t, natskv.Config{URLs: []string{s.URL()}}).Withdraw(t.Context(), theirs); err != nil {
		t.Fatal(err)
	}
	w.Want(discovery.Left, "a")

	// What cannot be read is nobody's.
	put(t, s.KeyValue("catga_nodes"), "node.a", "{}")
	w.Want(discovery.Rejected, "a")
	if err := r.Withdraw(t.Context(), ours); err != nil {
		t.Errorf("of what cannot be read: %v", err)
	}
	announce(t, r, node(t, "end"))
	w.Want(discovery.Put, "end") // and not Left
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
	w.Listing()
	for _, id := range []string{"a b", "*", ">", "a.b", "..", "=", "=41", "é/ü", "node.x", "🦀", strings.Repeat(".", discovery.MaxID)} {
		n := node(t, id)
		announce(t, r, n)
		w.Want(discovery.Put, id)
		history, err := r.History(t.Context(), id, 0)
		if err != nil || len(history) != 1 || history[0].Node.ID != id {
			t.Errorf("history of %q is %v, %v", id, history, err)
		}
		if err := r.Withdraw(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		w.Want(discovery.Left, id)
	}
}
