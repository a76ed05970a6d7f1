package redis

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

func TestHistoryIsTrimmed(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := openRegistry(t, Config{URLs: []string{s.URL()}, History: 5})
	ctx := context.Background()
	for i := range 200 {
		for _, id := range []string{"a", "b"} {
			n := newNode(id)
			n.Load = float64(i)
			announce(t, r, n)
		}
	}
	got, err := r.History(ctx, "a", 0)
	if err != nil || len(got) != 5 {
		t.Fatalf("%d revisions, %v, want 5", len(got), err)
	}
	for i, h := range got {
		if h.Type != discovery.Put || h.Node.Load != float64(199-i) || time.Since(h.Time) > time.Minute {
			t.Errorf("revision %d is %+v", i, h)
		}
	}
	// Trimming goes by whole nodes of the stream, of 100 entries each.
	if n, err := s.Client().XLen(ctx, r.client.config.side("changes")).Result(); err != nil || n > 220 {
		t.Errorf("the stream has %d entries, %v", n, err)
	}
	// Heartbeats that change nothing are no history.
	n := newNode("c")
	announce(t, r, n, n, n)
	if got, err := r.History(ctx, "c", 0); err != nil || len(got) != 1 {
		t.Errorf("history %+v, %v, want one revision", got, err)
	}
	_, err = openRegistry(t, Config{URLs: []string{s.URL()}, Layout: LayoutKeys}).History(ctx, "a", 0)
	wantError(t, err, discovery.ErrUnsupported)
}

// TestHistoryOfLongAgo reads past many changes of others.
func TestHistoryOfLongAgo(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := openRegistry(t, Config{URLs: []string{s.URL()}, History: 5})
	err := s.Client().Eval(t.Context(), `for i = 1, 2500 do
		redis.call('XADD', KEYS[1], '*', 'seq', i, 'type', 'left', 'id', i % 1000 == 1 and 'a' or 'b')
	end`, []string{r.client.config.side("changes")}).Err()
	if err != nil && !errors.Is(err, goredis.Nil) {
		t.Fatal(err)
	}
	for _, limit := range []int{0, 2} {
		revisions, err := r.History(t.Context(), "a", limit)
		var numbers []uint64
		for _, h := range revisions {
			numbers = append(numbers, h.Number)
		}
		if want := []uint64{2001, 1001, 1}; err != nil || !slices.Equal(numbers, want[:cmp.Or(limit, len(want))]) {
			t.Errorf("of up to %d changes %v were read, %v, want %v", limit, numbers, err, want)
		}
	}
}

// TestSweep: a record of ours that nobody renews goes after ten leases, without
// being called a goodbye; a foreign one stays.
func TestSweep(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx := context.Background()
	r := openRegistry(t, Config{URLs: []string{s.URL()}})
	addMember(t, s.Client(), foreignRecord("theirs", 0), time.Hour)
	announce(t, r, newNode("crashed", discovery.KeyLease, "100ms"))
	_, events, done := watchEvents(t, r)
	var h []discovery.Revision
	eventually(t, "the record is swept up", func() bool {
		announce(t, r, newNode("alive"))
		var err error
		if h, err = r.History(ctx, "crashed", 0); err != nil {
			t.Fatal(err)
		}
		return len(h) == 2
	})
	if h[0].Type != discovery.Expired {
		t.Errorf("history %+v", h)
	}
	if n, err := s.Client().ZCard(ctx, DefaultKey).Result(); err != nil || n != 2 {
		t.Errorf("%d members, %v, want alive and theirs", n, err)
	}
	announce(t, r, newNode("last"))
	for {
		e := nextEvent(t, events, done)
		if e.ID == "crashed" {
			t.Errorf("%v of a record that was swept up", e.Type)
		}
		if e.ID == "last" {
			break
		}
	}
}
