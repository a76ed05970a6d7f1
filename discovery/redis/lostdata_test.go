package redis

import (
	"context"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// TestWipe: a server that was emptied is no empty fleet.
func TestWipe(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		layout  string
		foreign bool
		user    bool // may not leave a mark
	}{
		"Own":             {layout: LayoutSortedSet},
		"Foreign":         {layout: LayoutSortedSet, foreign: true},
		"ForeignReadOnly": {layout: LayoutSortedSet, foreign: true, user: true},
		"Keys":            {layout: LayoutKeys},
		"ForeignKeys":     {layout: LayoutKeys, foreign: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, redistest.User("reader", "on >pw ~* -@all +@read +@connection +eval +evalsha +time +xread"))
			config := Config{URLs: []string{s.URL()}, Layout: c.layout, Poll: 50 * time.Millisecond}
			reader := config
			if c.user {
				reader.Username, reader.Password = "reader", "pw"
			}
			writer := openRegistry(t, config)
			put := func(id string) {
				switch {
				case !c.foreign:
					announce(t, writer, newNode(id, discovery.KeyLease, "2s"))
				case c.layout == LayoutKeys:
					if err := s.Client().Set(context.Background(), DefaultKey+":"+id, foreignRecord(id, 1), time.Minute).Err(); err != nil {
						t.Fatal(err)
					}
				default:
					addMember(t, s.Client(), foreignRecord(id, 1), 0)
				}
			}
			for _, id := range []string{"a", "b", "c", "d"} {
				put(id)
			}
			d := startDirectory(t, openRegistry(t, reader), discovery.Options{TTL: 2 * time.Second})
			waitUntil(t, d, "all join", count(4))
			stop := neverLose(t, d, "a", "b", "c", "d")
			restarts := d.Status().Restarts
			if err := s.Client().FlushAll(context.Background()).Err(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the wipe is noticed", func() bool { return d.Status().Restarts > restarts && d.Status().Connected })
			put("a")
			put("new")
			waitUntil(t, d, "new joins", has("new"))
			stop()
			waitUntil(t, d, "who does not come back lapses", func(s *discovery.Snapshot) bool {
				return lacks("b")(s) && lacks("c")(s) && lacks("d")(s)
			})
		})
	}
}

// TestLostChanges: a server that comes back without the newest changes has lost
// data, whatever else it says.
func TestLostChanges(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := openRegistry(t, Config{URLs: []string{s.URL()}})
	announce(t, r, newNode("a"), newNode("b"))
	_, _, done := watchEvents(t, r)
	if err := s.Client().HSet(context.Background(), r.client.config.side("meta"), "seq", 1).Err(); err != nil {
		t.Fatal(err)
	}
	wantBroken(t, done)

	// A gap in the stream.
	_, _, done = watchEvents(t, r)
	if err := s.Client().HIncrBy(context.Background(), r.client.config.side("meta"), "seq", 5).Err(); err != nil {
		t.Fatal(err)
	}
	announce(t, r, newNode("c"))
	wantBroken(t, done)
}

// TestStreamDeleted: nobody tells that the stream of changes is gone, and what is
// written next makes it anew.
func TestStreamDeleted(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := openRegistry(t, Config{URLs: []string{s.URL()}})
	announce(t, r, newNode("a"))
	d := startDirectory(t, r, discovery.Options{})
	waitUntil(t, d, "a is listed", has("a"))
	for _, id := range []string{"b", "c"} {
		if err := s.Client().Del(context.Background(), r.client.config.side("changes")).Err(); err != nil {
			t.Fatal(err)
		}
		announce(t, r, newNode(id))
		waitUntil(t, d, id+" joins", has(id))
	}
	if err := r.Withdraw(context.Background(), newNode("b")); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "b leaves", lacks("b"))
	if d.Snapshot().Node("a") == nil {
		t.Error("a was dropped")
	}
}

// TestExpiryOfTheSet: writers in the wild let the whole set expire after ten of
// their leases, which must not take ours with it.
func TestExpiryOfTheSet(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx := context.Background()
	r := openRegistry(t, Config{URLs: []string{s.URL()}})
	ttl := func() time.Duration {
		d, err := s.Client().PTTL(ctx, DefaultKey).Result()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	// A set that becomes empty is deleted, and its expiry with it.
	announce(t, r, newNode("a", discovery.KeyLease, "1m"), newNode("b", discovery.KeyLease, "1m"))
	if got := ttl(); got >= 0 {
		t.Errorf("the set expires in %v although nobody asked for it", got)
	}
	s.Client().Expire(ctx, DefaultKey, 5*time.Second)
	announce(t, r, newNode("a", discovery.KeyLease, "1m"))
	if got := ttl(); got < 9*time.Minute {
		t.Errorf("the set expires in %v, want ten leases", got)
	}
	s.Client().Expire(ctx, DefaultKey, time.Hour)
	announce(t, r, newNode("a", discovery.KeyLease, "1m"))
	if got := ttl(); got < 50*time.Minute {
		t.Errorf("the set's expiry was shortened to %v", got)
	}
	// Nobody has announced for long: the set is gone, and nobody left.
	_, events, done := watchEvents(t, r)
	s.Client().PExpire(ctx, DefaultKey, time.Millisecond)
	eventually(t, "the set expires", func() bool { return s.Client().Exists(ctx, DefaultKey).Val() == 0 })
	if err := r.Verify(ctx); err != nil {
		t.Fatal(err)
	}
	announce(t, r, newNode("a", discovery.KeyLease, "1m"))
	if e := nextEvent(t, events, done); e.Type != discovery.Put || e.ID != "a" {
		t.Errorf("%v of %s", e.Type, e.ID)
	}
}
