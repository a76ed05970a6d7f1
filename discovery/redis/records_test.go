package redis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// TestWireSamples reads every sample as a writer in the wild puts it, by listing
// and as a change.
func TestWireSamples(t *testing.T) {
	t.Parallel()
	files, err := os.ReadDir("../testdata/wire")
	if err != nil {
		t.Fatal(err)
	}
	var accepted, refused []string
	for _, f := range files {
		switch name := f.Name(); {
		case strings.HasPrefix(name, "camel-"), strings.HasPrefix(name, "pascal-"), strings.HasPrefix(name, "lenient-"):
			accepted = append(accepted, sample(t, name))
		case strings.HasPrefix(name, "invalid-"):
			refused = append(refused, sample(t, name))
		}
	}
	if len(accepted) < 5 || len(refused) < 8 {
		t.Fatalf("%d and %d samples", len(accepted), len(refused))
	}
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		for _, when := range []string{"listed", "later"} {
			t.Run(layout+" "+when, func(t *testing.T) {
				t.Parallel()
				s := redistest.Start(t)
				put := func() {
					for i, record := range append(append([]string(nil), accepted...), refused...) {
						if layout == LayoutKeys {
							id := fmt.Sprint(i)
							if n, err := discovery.ParseNode([]byte(record)); err == nil {
								id = n.ID
							}
							if err := s.Client().Set(context.Background(), DefaultKey+":"+id, record, 2*time.Minute).Err(); err != nil {
								t.Fatal(err)
							}
						} else {
							add(t, s.Client(), record, 0)
						}
					}
					if err := s.Client().Expire(context.Background(), DefaultKey, 5*time.Minute).Err(); err != nil {
						t.Fatal(err)
					}
				}
				if when == "listed" {
					put()
				}
				d := directory(t, open(t, Config{URLs: []string{s.URL()}, Layout: layout, Poll: 20 * time.Millisecond}), discovery.Options{})
				synced(t, d)
				if when == "later" {
					put()
				}
				until(t, d, "the records are read", count(len(accepted)))
				for id, address := range map[string]string{
					"orders-1": "127.0.0.1:5001", "orders-2": "127.0.0.1:5002", "pay-1": "pay-1.internal:8443",
					"orders-3": "127.0.0.1:5003", "orders-4": "[::1]:5004",
					"42": "127.0.0.1:5006", "43": "127.0.0.1:5006",
				} {
					if n := d.Snapshot().Node(id); n == nil || n.Node.Endpoint.Address() != address {
						t.Errorf("%s is %+v, want it at %s", id, n, address)
					}
				}
				// Of several bad records of one id the newest is told.
				want := len(refused)
				if layout == LayoutSortedSet {
					want = 3 // x, and two whose id cannot be read
				}
				eventually(t, "the bad records are told", func() bool { return len(d.Status().Rejections) == want })
				for _, r := range d.Status().Rejections {
					wantError(t, r.Err, discovery.ErrInvalid)
				}
				if err := s.Client().FlushAll(context.Background()).Err(); err != nil {
					t.Fatal(err)
				}
				eventually(t, "the bad records are gone", func() bool { return len(d.Status().Rejections) == 0 })
			})
		}
	}
}

// TestKeyOfAnotherType: one bad key costs one node.
func TestKeyOfAnotherType(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx := context.Background()
	if err := s.Client().LPush(ctx, DefaultKey+":list", "x").Err(); err != nil {
		t.Fatal(err)
	}
	c := Config{URLs: []string{s.URL()}, Layout: LayoutKeys}
	announce(t, open(t, c), newNode("a"))
	d := directory(t, open(t, c), discovery.Options{})
	synced(t, d)
	if d.Snapshot().Node("a") == nil || len(d.Status().Rejections) != 1 {
		t.Errorf("%d nodes, rejected %v", len(d.Snapshot().Nodes()), d.Status().Rejections)
	}
}

func TestHigherScoreWins(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx := context.Background()
	record := func(port int) string {
		return fmt.Sprintf(`{"nodeId":"a","endpoint":"http://127.0.0.1:%d","lastSeen":"2025-10-10T12:00:00Z","load":0}`, port)
	}
	at := func(port int) func(*discovery.Snapshot) bool {
		return func(s *discovery.Snapshot) bool {
			return s.Node("a") != nil && s.Node("a").Node.Endpoint.Port() == port
		}
	}
	add(t, s.Client(), record(2), time.Second)
	add(t, s.Client(), record(1), 2*time.Second)
	d := directory(t, open(t, Config{URLs: []string{s.URL()}, Poll: 20 * time.Millisecond}), discovery.Options{})
	synced(t, d)
	until(t, d, "the newer record", at(2))
	add(t, s.Client(), record(3), 0)
	until(t, d, "the newest record", at(3))
	// The newest goes: what is left over is an older record, not a goodbye.
	if err := s.Client().ZRem(ctx, DefaultKey, record(3)).Err(); err != nil {
		t.Fatal(err)
	}
	until(t, d, "the older record", at(2))
	if err := s.Client().ZRem(ctx, DefaultKey, record(1), record(2)).Err(); err != nil {
		t.Fatal(err)
	}
	until(t, d, "it leaves", lacks("a"))

	// Our record beside a foreign one of the same id.
	writer := open(t, Config{URLs: []string{s.URL()}})
	add(t, s.Client(), record(1), time.Second)
	announce(t, writer, newNode("a"))
	until(t, d, "ours", at(5001))
	if n, err := s.Client().ZCard(ctx, DefaultKey).Result(); err != nil || n != 2 {
		t.Errorf("a foreign record was touched: %d members, %v", n, err)
	}
	// A goodbye of ours counts, though an old foreign record stays.
	add(t, s.Client(), record(1), time.Hour)
	// A look that finds the foreign record written and ours gone could not tell
	// which came first, and takes the foreign one for a newer heartbeat. One that
	// finds b has found the foreign record as it now stands.
	add(t, s.Client(), strings.Replace(record(4), `"a"`, `"b"`, 1), 0)
	until(t, d, "b", func(s *discovery.Snapshot) bool { return s.Node("b") != nil })
	if err := writer.Withdraw(ctx, newNode("a")); err != nil {
		t.Fatal(err)
	}
	until(t, d, "it leaves", lacks("a"))
	announce(t, writer, newNode("a"))
	until(t, d, "ours is back", at(5001))
	// A heartbeat of ours leaves one of ours.
	announce(t, writer, newNode("a"), newNode("a", "more", "metadata"))
	if n, err := s.Client().ZCard(ctx, DefaultKey).Result(); err != nil || n != 3 {
		t.Errorf("%d members after heartbeats, want 3: %v", n, err)
	}
}

func TestHistoryIsTrimmed(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := open(t, Config{URLs: []string{s.URL()}, History: 5})
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
	_, err = open(t, Config{URLs: []string{s.URL()}, Layout: LayoutKeys}).History(ctx, "a", 0)
	wantError(t, err, discovery.ErrUnsupported)
}

// TestHistoryOfLongAgo reads past many changes of others.
func TestHistoryOfLongAgo(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := open(t, Config{URLs: []string{s.URL()}, History: 5})
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
	r := open(t, Config{URLs: []string{s.URL()}})
	add(t, s.Client(), foreign("theirs", 0), time.Hour)
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
		e := next(t, events, done)
		if e.ID == "crashed" {
			t.Errorf("%v of a record that was swept up", e.Type)
		}
		if e.ID == "last" {
			break
		}
	}
}

// TestExpiryOfTheSet: writers in the wild let the whole set expire after ten of
// their leases, which must not take ours with it.
func TestExpiryOfTheSet(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx := context.Background()
	r := open(t, Config{URLs: []string{s.URL()}})
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
	if e := next(t, events, done); e.Type != discovery.Put || e.ID != "a" {
		t.Errorf("%v of %s", e.Type, e.ID)
	}
}

// TestLargeSet looks in part, and must miss nothing.
func TestLargeSet(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx := context.Background()
	const n = 4 * smallSet
	pipe := s.Client().Pipeline()
	at := now(t, s.Client(), 0)
	for i := range n {
		pipe.ZAdd(ctx, DefaultKey, goredis.Z{Score: at, Member: foreign(fmt.Sprint("n", i), 0)})
	}
	if _, err := pipe.Exec(ctx); err != nil {
		t.Fatal(err)
	}
	r := open(t, Config{URLs: []string{s.URL()}, Poll: 10 * time.Millisecond})
	d := directory(t, r, discovery.Options{})
	synced(t, d)
	until(t, d, "all join", count(n))

	heartbeat := func(id string, from, to int, behind time.Duration) {
		t.Helper()
		if err := s.Client().ZRem(ctx, DefaultKey, foreign(id, from)).Err(); err != nil {
			t.Fatal(err)
		}
		add(t, s.Client(), foreign(id, to), behind)
	}
	heard := func(id string) time.Time { return d.Snapshot().Node(id).LastHeard() }
	for name, behind := range map[string]time.Duration{"n1": 0, "n2": time.Hour, "n3": -time.Hour, "n4": time.Minute} {
		beats := 0
		for range 2 {
			before, last := heard(name), time.Time{}
			eventually(t, name+" is heard", func() bool {
				// Again and again: one that a watch finds in its first listing, because
				// the one before broke on a slow machine, is as old as its score says.
				if time.Since(last) > 5*time.Second {
					heartbeat(name, beats, beats+1, behind-time.Duration(beats)*time.Second)
					beats, last = beats+1, time.Now()
				}
				return heard(name).After(before)
			})
		}
	}
	add(t, s.Client(), foreign("joins", 0), 0)
	if err := s.Client().ZRem(ctx, DefaultKey, foreign("n5", 0)).Err(); err != nil {
		t.Fatal(err)
	}
	until(t, d, "one joins and one leaves at once", func(s *discovery.Snapshot) bool { return has("joins")(s) && lacks("n5")(s) })
	announce(t, r, newNode("ours"))
	until(t, d, "ours joins", has("ours"))
	if err := r.Withdraw(ctx, newNode("ours")); err != nil {
		t.Fatal(err)
	}
	until(t, d, "ours leaves", lacks("ours"))
	if got := len(d.Snapshot().Nodes()); got != n {
		t.Errorf("%d nodes, want %d", got, n)
	}
}

// TestKeysExpire: a key that runs out is no goodbye, and one that is deleted is.
func TestKeysExpire(t *testing.T) {
	t.Parallel()
	for name, options := range map[string][]redistest.Option{"Poll": nil, "Notifications": {redistest.Notify("K$gx")}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, options...)
			ctx := context.Background()
			set := func(id string, ttl time.Duration) {
				if err := s.Client().Set(ctx, DefaultKey+":"+id, foreign(id, 0), ttl).Err(); err != nil {
					t.Fatal(err)
				}
			}
			set("runs-out", 700*time.Millisecond)
			set("deleted", time.Minute)
			set("for-ever", 0)
			set("other-id", time.Minute)
			_, events, done := watchEvents(t, open(t, Config{URLs: []string{s.URL()}, Layout: LayoutKeys, Poll: 20 * time.Millisecond}))
			want := func(kind discovery.EventType, id string) {
				t.Helper()
				if e := next(t, events, done); e.Type != kind || e.ID != id {
					t.Errorf("%v of %q, want %v of %q", e.Type, e.ID, kind, id)
				}
			}
			want(discovery.Expired, "runs-out")
			s.Client().Del(ctx, DefaultKey+":deleted")
			want(discovery.Left, "deleted")
			s.Client().Del(ctx, DefaultKey+":for-ever")
			want(discovery.Left, "for-ever")
			s.Client().Set(ctx, DefaultKey+":other-id", foreign("another", 0), time.Minute)
			want(discovery.Rejected, "other-id")
		})
	}
}

// TestKeyOfAnotherNode: who may write one key does not speak for the node of another.
func TestKeyOfAnotherNode(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx := context.Background()
	set := func(id, record string) {
		t.Helper()
		if err := s.Client().Set(ctx, DefaultKey+":"+id, record, 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	set("good", foreign("good", 0))
	d := directory(t, open(t, Config{URLs: []string{s.URL()}, Layout: LayoutKeys, Poll: 20 * time.Millisecond}), discovery.Options{})
	<-d.Synced()
	was := d.Snapshot().Node("good").Node
	set("mallory", strings.Replace(foreign("good", 0), was.Endpoint.Host(), "10.6.6.6", 1))
	set("eve", `{"nodeId":"good","endpoint":"http://10.6.6.6/path"}`)
	eventually(t, "both are rejected", func() bool { return len(d.Status().Rejections) == 2 })
	for i, want := range []struct{ id, reason string }{{"eve", "a path is not accepted"}, {"mallory", `the key names another node, "mallory"`}} {
		if r := d.Status().Rejections[i]; r.ID != want.id || !strings.Contains(r.Err.Error(), want.reason) {
			t.Errorf("rejected %q for %v, want %q and %q", r.ID, r.Err, want.id, want.reason)
		}
	}
	if e := d.Snapshot().Node("good"); e == nil || e.Node.Endpoint != was.Endpoint || len(d.Snapshot().Nodes()) != 1 {
		t.Errorf("the view is %v", d.Snapshot().Nodes())
	}
	for _, id := range []string{"mallory", "eve"} {
		if err := s.Client().Del(ctx, DefaultKey+":"+id).Err(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the bad records are gone", func() bool { return len(d.Status().Rejections) == 0 })
	if d.Snapshot().Node("good") == nil {
		t.Error("their end took the node along")
	}
}

// TestKeyLives: a key that exists is alive, though its record never changes.
func TestKeyLives(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	if err := s.Client().Set(context.Background(), DefaultKey+":a", foreign("a", 0), 0).Err(); err != nil {
		t.Fatal(err)
	}
	d := directory(t, open(t, Config{URLs: []string{s.URL()}, Layout: LayoutKeys}), discovery.Options{TTL: 100 * time.Millisecond})
	synced(t, d)
	stop := neverLose(t, d, "a")
	first := d.Snapshot().Node("a").LastHeard()
	eventually(t, "many leases pass", func() bool { return d.Snapshot().Node("a").LastHeard().Sub(first) > time.Second })
	stop()
}
