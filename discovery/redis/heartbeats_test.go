package redis

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// TestForeignHeartbeatsNeverFlicker lets two writers renew their records as the
// fleets in the wild do: ZREM, then ZADD, without MULTI. Where the machine holds a writer
// up between the two, a watch takes the node to be gone for once, and no other after that.
// A node heartbeats less often than a watch looks for one that is missing: what two looks
// have missed is then one heartbeat, even where the machine holds up those in between.
func TestForeignHeartbeatsNeverFlicker(t *testing.T) {
	t.Parallel()
	for name, options := range map[string][]redistest.Option{
		"Poll": nil, "Notifications": {redistest.Notify("Kz")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, options...)
			const each, beats = 50, 50
			var ids []string
			for i := range 2 * each {
				id := fmt.Sprint("n", i)
				ids = append(ids, id)
				addMember(t, s.Client(), foreignRecord(id, 0), 0)
			}
			r := openRegistry(t, Config{URLs: []string{s.URL()}, Poll: 10 * time.Millisecond})
			d := startDirectory(t, r, discovery.Options{TTL: 2 * time.Second})
			waitSynced(t, d)
			_, events, done := watchEvents(t, openRegistry(t, Config{URLs: []string{s.URL()}, Poll: 10 * time.Millisecond}))

			var slow atomic.Bool // a record was away for longer than a watch bears
			var writers sync.WaitGroup
			for w := range 2 {
				client := goredis.NewClient(&goredis.Options{Addr: s.Addr(), DisableIdentity: true})
				writers.Go(func() {
					defer func() { _ = client.Close() }()
					ctx := context.Background()
					pace := time.NewTicker(4 * absence)
					defer pace.Stop()
					for beat := range beats {
						<-pace.C
						for i := w * each; i < (w+1)*each; i++ {
							id, began := ids[i], time.Now()
							if err := client.ZRem(ctx, DefaultKey, foreignRecord(id, beat)).Err(); err != nil {
								t.Error(err)
							}
							z := goredis.Z{Score: float64(time.Now().UnixMilli()), Member: foreignRecord(id, beat+1)}
							if err := client.ZAdd(ctx, DefaultKey, z).Err(); err != nil {
								t.Error(err)
							}
							if time.Since(began) >= absence {
								slow.Store(true)
							}
						}
					}
				})
			}
			writers.Wait()
			borne := 0 // what each writer has under way when a watch learns that it is slow
			if slow.Load() {
				borne = 2
			}
			if changes, _ := d.Journal().Counts(); changes[discovery.ChangeLeft] > uint64(borne) {
				t.Errorf("%d nodes were dropped, of slow writers (%v)", changes[discovery.ChangeLeft], slow.Load())
			}
			if err := r.Verify(context.Background()); err != nil {
				t.Error(err)
			}
			select {
			case err := <-done:
				t.Fatalf("the watch ended: %v", err)
			default:
			}
			puts, lefts := 0, 0
			for range len(events) {
				switch e := <-events; e.Type {
				case discovery.Put:
					puts++
				case discovery.Left:
					lefts++
				default:
					t.Errorf("%v of %s", e.Type, e.ID)
				}
			}
			if lefts > borne {
				t.Errorf("%d times a node left, of slow writers (%v)", lefts, slow.Load())
			}
			if puts < 2*each {
				t.Errorf("%d heartbeats were seen", puts)
			}
			// And when a node does leave, it is seen.
			if err := s.Client().ZRem(context.Background(), DefaultKey, foreignRecord("n0", beats)).Err(); err != nil {
				t.Fatal(err)
			}
			waitUntil(t, d, "n0 leaves", lacks("n0"))
		})
	}
}

func TestStaleMemberIsNeverRouted(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	addMember(t, s.Client(), foreignRecord("stale", 0), time.Hour)
	addMember(t, s.Client(), foreignRecord("fresh", 0), time.Second)
	addMember(t, s.Client(), foreignRecord("future", 0), -time.Hour)
	r := openRegistry(t, Config{URLs: []string{s.URL()}})
	d := startDirectory(t, r, discovery.Options{})
	waitSynced(t, d)
	addMember(t, s.Client(), foreignRecord("late", 0), time.Hour)
	if err := r.Verify(context.Background()); err != nil {
		t.Fatal(err)
	}
	snapshot := d.Snapshot()
	for id, want := range map[string]bool{"stale": false, "fresh": true, "future": true, "late": false} {
		if (snapshot.Node(id) != nil) != want {
			t.Errorf("%s is routed: %v", id, !want)
		}
	}
	// A writer whose clock is an hour behind is alive when its score changes.
	addMember(t, s.Client(), foreignRecord("stale", 0), time.Hour-time.Second)
	waitUntil(t, d, "the node is heard", has("stale"))
}

// TestUnchangedMemberLapses: what stands there and is not renewed is not alive,
// however often it is looked at.
func TestUnchangedMemberLapses(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	addMember(t, s.Client(), foreignRecord("quiet", 0), 0)
	d := startDirectory(t, openRegistry(t, Config{URLs: []string{s.URL()}, Poll: 20 * time.Millisecond}), discovery.Options{TTL: 500 * time.Millisecond})
	waitSynced(t, d)
	waitUntil(t, d, "the lease runs out", lacks("quiet"))
	// A higher score is a heartbeat, also of the same record.
	addMember(t, s.Client(), foreignRecord("quiet", 0), 0)
	waitUntil(t, d, "it is back", has("quiet"))
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
	addMember(t, s.Client(), record(2), time.Second)
	addMember(t, s.Client(), record(1), 2*time.Second)
	d := startDirectory(t, openRegistry(t, Config{URLs: []string{s.URL()}, Poll: 20 * time.Millisecond}), discovery.Options{})
	waitSynced(t, d)
	waitUntil(t, d, "the newer record", at(2))
	addMember(t, s.Client(), record(3), 0)
	waitUntil(t, d, "the newest record", at(3))
	// The newest goes: what is left over is an older record, not a goodbye.
	if err := s.Client().ZRem(ctx, DefaultKey, record(3)).Err(); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "the older record", at(2))
	if err := s.Client().ZRem(ctx, DefaultKey, record(1), record(2)).Err(); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "it leaves", lacks("a"))

	// Our record beside a foreign one of the same id.
	writer := openRegistry(t, Config{URLs: []string{s.URL()}})
	addMember(t, s.Client(), record(1), time.Second)
	announce(t, writer, newNode("a"))
	waitUntil(t, d, "ours", at(5001))
	if n, err := s.Client().ZCard(ctx, DefaultKey).Result(); err != nil || n != 2 {
		t.Errorf("a foreign record was touched: %d members, %v", n, err)
	}
	// A goodbye of ours counts, though an old foreign record stays.
	addMember(t, s.Client(), record(1), time.Hour)
	// A look that finds the foreign record written and ours gone could not tell
	// which came first, and takes the foreign one for a newer heartbeat. One that
	// finds b has found the foreign record as it now stands.
	addMember(t, s.Client(), strings.Replace(record(4), `"a"`, `"b"`, 1), 0)
	waitUntil(t, d, "b", func(s *discovery.Snapshot) bool { return s.Node("b") != nil })
	if err := writer.Withdraw(ctx, newNode("a")); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "it leaves", lacks("a"))
	announce(t, writer, newNode("a"))
	waitUntil(t, d, "ours is back", at(5001))
	// A heartbeat of ours leaves one of ours.
	announce(t, writer, newNode("a"), newNode("a", "more", "metadata"))
	if n, err := s.Client().ZCard(ctx, DefaultKey).Result(); err != nil || n != 3 {
		t.Errorf("%d members after heartbeats, want 3: %v", n, err)
	}
}

// TestLargeSet looks in part, and must miss nothing.
func TestLargeSet(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx := context.Background()
	const n = 4 * smallSet
	pipe := s.Client().Pipeline()
	at := serverTime(t, s.Client(), 0)
	for i := range n {
		pipe.ZAdd(ctx, DefaultKey, goredis.Z{Score: at, Member: foreignRecord(fmt.Sprint("n", i), 0)})
	}
	if _, err := pipe.Exec(ctx); err != nil {
		t.Fatal(err)
	}
	r := openRegistry(t, Config{URLs: []string{s.URL()}, Poll: 10 * time.Millisecond})
	d := startDirectory(t, r, discovery.Options{})
	waitSynced(t, d)
	waitUntil(t, d, "all join", count(n))

	heartbeat := func(id string, from, to int, behind time.Duration) {
		t.Helper()
		if err := s.Client().ZRem(ctx, DefaultKey, foreignRecord(id, from)).Err(); err != nil {
			t.Fatal(err)
		}
		addMember(t, s.Client(), foreignRecord(id, to), behind)
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
	addMember(t, s.Client(), foreignRecord("joins", 0), 0)
	if err := s.Client().ZRem(ctx, DefaultKey, foreignRecord("n5", 0)).Err(); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "one joins and one leaves at once", func(s *discovery.Snapshot) bool { return has("joins")(s) && lacks("n5")(s) })
	announce(t, r, newNode("ours"))
	waitUntil(t, d, "ours joins", has("ours"))
	if err := r.Withdraw(ctx, newNode("ours")); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "ours leaves", lacks("ours"))
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
				if err := s.Client().Set(ctx, DefaultKey+":"+id, foreignRecord(id, 0), ttl).Err(); err != nil {
					t.Fatal(err)
				}
			}
			set("runs-out", 700*time.Millisecond)
			set("deleted", time.Minute)
			set("for-ever", 0)
			set("other-id", time.Minute)
			_, events, done := watchEvents(t, openRegistry(t, Config{URLs: []string{s.URL()}, Layout: LayoutKeys, Poll: 20 * time.Millisecond}))
			want := func(kind discovery.EventType, id string) {
				t.Helper()
				if e := nextEvent(t, events, done); e.Type != kind || e.ID != id {
					t.Errorf("%v of %q, want %v of %q", e.Type, e.ID, kind, id)
				}
			}
			want(discovery.Expired, "runs-out")
			s.Client().Del(ctx, DefaultKey+":deleted")
			want(discovery.Left, "deleted")
			s.Client().Del(ctx, DefaultKey+":for-ever")
			want(discovery.Left, "for-ever")
			s.Client().Set(ctx, DefaultKey+":other-id", foreignRecord("another", 0), time.Minute)
			want(discovery.Rejected, "other-id")
		})
	}
}

// TestKeyLives: a key that exists is alive, though its record never changes.
func TestKeyLives(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	if err := s.Client().Set(context.Background(), DefaultKey+":a", foreignRecord("a", 0), 0).Err(); err != nil {
		t.Fatal(err)
	}
	d := startDirectory(t, openRegistry(t, Config{URLs: []string{s.URL()}, Layout: LayoutKeys}), discovery.Options{TTL: 100 * time.Millisecond})
	waitSynced(t, d)
	stop := neverLose(t, d, "a")
	first := d.Snapshot().Node("a").LastHeard()
	eventually(t, "many leases pass", func() bool { return d.Snapshot().Node("a").LastHeard().Sub(first) > time.Second })
	stop()
}

// TestClocksApart: neither the writers' clocks nor the server's decide who lives.
// Only keys run out when the server's clock jumps ahead, which nobody can tell from
// their being deleted.
func TestClocksApart(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		layout string
		ahead  time.Duration
	}{
		{LayoutSortedSet, 2 * time.Hour}, {LayoutSortedSet, -2 * time.Hour}, {LayoutKeys, -2 * time.Hour},
	} {
		t.Run(fmt.Sprint(c.layout, c.ahead), func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, redistest.Clock())
			config := Config{URLs: []string{s.URL()}, Layout: c.layout, Poll: 50 * time.Millisecond}
			writer := openRegistry(t, config)
			keepAlive(t, writer, 100*time.Millisecond, newNode("a", discovery.KeyLease, "5s"), newNode("b", discovery.KeyLease, "5s"))
			d := startDirectory(t, openRegistry(t, config), discovery.Options{})
			waitUntil(t, d, "both join", count(2))
			stop := neverLose(t, d, "a", "b")
			s.SetClock(c.ahead)
			heard := d.Snapshot().Node("a").LastHeard()
			eventually(t, "a is heard by the other clock", func() bool {
				n := d.Snapshot().Node("a")
				return n == nil || n.LastHeard().After(heard.Add(time.Second))
			})
			eventually(t, "c joins", func() bool {
				_ = writer.Announce(context.Background(), newNode("c", discovery.KeyLease, "1s"))
				return has("c")(d.Snapshot())
			})
			waitUntil(t, d, "c lapses", lacks("c"))
			stop()
		})
	}
}
