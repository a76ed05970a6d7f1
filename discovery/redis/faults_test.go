package redis

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// keepAlive announces nodes until the test ends, as registrars do: it never
// gives up.
func keepAlive(t testing.TB, r discovery.Announcer, every time.Duration, nodes ...discovery.Node) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	for _, n := range nodes {
		group.Go(func() {
			tick := time.NewTicker(every)
			defer tick.Stop()
			for {
				callCtx, stop := context.WithTimeout(ctx, 2*time.Second)
				_ = r.Announce(callCtx, n)
				stop()
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		group.Wait()
	})
}

// neverLose fails the test if the directory is ever without one of the nodes,
// until the returned function is called.
func neverLose(t testing.TB, d *discovery.Directory, ids ...string) (stop func()) {
	t.Helper()
	done := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		for {
			s := d.Snapshot()
			for _, id := range ids {
				if s.Node(id) == nil {
					t.Errorf("%s was dropped", id)
					return
				}
			}
			select {
			case <-s.Superseded():
			case <-done:
				return
			}
		}
	})
	return sync.OnceFunc(func() {
		close(done)
		group.Wait()
	})
}

// TestForeignHeartbeatsNeverFlicker lets two writers renew their records as the
// fleets in the wild do: ZREM, then ZADD, without MULTI.
func TestForeignHeartbeatsNeverFlicker(t *testing.T) {
	t.Parallel()
	for name, options := range map[string][]redistest.Option{
		"Poll": nil, "Notifications": {redistest.Notify("Kz")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, options...)
			const each = 5
			var ids []string
			for i := range 2 * each {
				id := fmt.Sprint("n", i)
				ids = append(ids, id)
				add(t, s.Client(), foreign(id, 0), 0)
			}
			r := open(t, Config{URLs: []string{s.URL()}, Poll: 10 * time.Millisecond})
			d := directory(t, r, discovery.Options{TTL: 2 * time.Second})
			synced(t, d)
			_, events, done := watchEvents(t, open(t, Config{URLs: []string{s.URL()}, Poll: 10 * time.Millisecond}))
			stop := neverLose(t, d, ids...)

			var writers sync.WaitGroup
			for w := range 2 {
				client := goredis.NewClient(&goredis.Options{Addr: s.Addr(), DisableIdentity: true})
				writers.Go(func() {
					defer func() { _ = client.Close() }()
					ctx := context.Background()
					for beat := range 1000 {
						for i := w * each; i < (w+1)*each; i++ {
							id := ids[i]
							if err := client.ZRem(ctx, DefaultKey, foreign(id, beat)).Err(); err != nil {
								t.Error(err)
							}
							z := goredis.Z{Score: float64(time.Now().UnixMilli()), Member: foreign(id, beat+1)}
							if err := client.ZAdd(ctx, DefaultKey, z).Err(); err != nil {
								t.Error(err)
							}
						}
					}
				})
			}
			writers.Wait()
			stop()
			if err := r.Verify(context.Background()); err != nil {
				t.Error(err)
			}
			select {
			case err := <-done:
				t.Fatalf("the watch ended: %v", err)
			default:
			}
			puts := 0
			for range len(events) {
				switch e := <-events; e.Type {
				case discovery.Put:
					puts++
				default:
					t.Errorf("%v of %s", e.Type, e.ID)
				}
			}
			if puts < 2*each {
				t.Errorf("%d heartbeats were seen", puts)
			}
			// And when a node does leave, it is seen.
			if err := s.Client().ZRem(context.Background(), DefaultKey, foreign("n0", 1000)).Err(); err != nil {
				t.Fatal(err)
			}
			until(t, d, "n0 leaves", lacks("n0"))
		})
	}
}

func TestStaleMemberIsNeverRouted(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	add(t, s.Client(), foreign("stale", 0), time.Hour)
	add(t, s.Client(), foreign("fresh", 0), time.Second)
	add(t, s.Client(), foreign("future", 0), -time.Hour)
	r := open(t, Config{URLs: []string{s.URL()}})
	d := directory(t, r, discovery.Options{})
	synced(t, d)
	add(t, s.Client(), foreign("late", 0), time.Hour)
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
	add(t, s.Client(), foreign("stale", 0), time.Hour-time.Second)
	until(t, d, "the node is heard", has("stale"))
}

// TestUnchangedMemberLapses: what stands there and is not renewed is not alive,
// however often it is looked at.
func TestUnchangedMemberLapses(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	add(t, s.Client(), foreign("quiet", 0), 0)
	d := directory(t, open(t, Config{URLs: []string{s.URL()}, Poll: 20 * time.Millisecond}), discovery.Options{TTL: 500 * time.Millisecond})
	synced(t, d)
	until(t, d, "the lease runs out", lacks("quiet"))
	// A higher score is a heartbeat, also of the same record.
	add(t, s.Client(), foreign("quiet", 0), 0)
	until(t, d, "it is back", has("quiet"))
}

func TestKillAndRestart(t *testing.T) {
	t.Parallel()
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		t.Run(layout, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, redistest.Notify("K$gxz"))
			c := Config{URLs: []string{s.URL()}, Layout: layout}
			writer := open(t, c)
			announce(t, writer, newNode("leaves", discovery.KeyLease, "10s"))
			a, b := newNode("a", discovery.KeyLease, "1s"), newNode("b", discovery.KeyLease, "1s")
			keepAlive(t, writer, 100*time.Millisecond, a, b)
			d := directory(t, open(t, c), discovery.Options{})
			until(t, d, "all join", count(3))
			stop := neverLose(t, d, "a", "b")
			s.Kill()
			eventually(t, "the loss is noticed", func() bool { return !d.Status().Connected })
			s.Restart()
			// Before or after the directory is back: it must not matter.
			eventually(t, "the server takes writes", func() bool { return writer.Withdraw(context.Background(), newNode("leaves")) == nil })
			announce(t, writer, newNode("joins"))
			until(t, d, "the changes appear", func(s *discovery.Snapshot) bool { return lacks("leaves")(s) && has("joins")(s) })
			stop()
		})
	}
}

// TestConnectionsKilled: nothing that is told while a connection is being
// replaced is lost.
func TestConnectionsKilled(t *testing.T) {
	t.Parallel()
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		t.Run(layout, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, redistest.Notify("K$gxz"))
			ctx := context.Background()
			c := Config{URLs: []string{s.URL()}, Layout: layout}
			writer := open(t, c)
			c.Name = "watched"
			r := open(t, c)
			d := directory(t, r, discovery.Options{})
			synced(t, d)
			subscriber := func(line string) bool { return strings.Contains(line, "subscribe") }
			reader := func(line string) bool { return strings.Contains(line, "cmd=xread") }
			kill := map[string]func(line string) bool{
				"subscriber": subscriber,
				"commands":   func(line string) bool { return !subscriber(line) && !reader(line) },
			}
			want := "notifications"
			if layout == LayoutSortedSet {
				kill["reader"] = reader
				want = "stream and notifications"
			}
			if got := r.Changes(); got != want {
				t.Errorf("pushed by %q, want %q", got, want)
			}
			n := 0
			for name, match := range kill {
				restarts := d.Status().Restarts
				// A connection may be between two commands, and then look like another
				// one: once more until it was the right one.
				eventually(t, "the watch is started anew after its "+name+" was killed", func() bool {
					list, err := s.Client().ClientList(ctx).Result()
					if err != nil {
						t.Fatal(err)
					}
					for line := range strings.Lines(list) {
						id, _, _ := strings.Cut(strings.TrimPrefix(line, "id="), " ")
						if strings.Contains(line, "name=watched") && match(line) {
							_ = s.Client().ClientKillByFilter(ctx, "id", id).Err()
						}
					}
					return d.Status().Restarts > restarts
				})
				id := fmt.Sprint("n", n)
				n++
				eventually(t, "the record is taken", func() bool { return writer.Announce(ctx, newNode(id)) == nil })
				until(t, d, id+" joins after the "+name+" was killed", has(id))
				if name != "commands" {
					eventually(t, "the watch is started anew", func() bool { return d.Status().Restarts > restarts && d.Status().Connected })
				}
			}
			until(t, d, "all are there", count(n))
		})
	}
}

// TestPauseDropsNobody pauses the server for two leases.
func TestPauseDropsNobody(t *testing.T) {
	t.Parallel()
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		t.Run(layout, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t)
			c := Config{URLs: []string{s.URL()}, Layout: layout, Poll: 100 * time.Millisecond}
			a, b := newNode("a", discovery.KeyLease, "1s"), newNode("b", discovery.KeyLease, "1s")
			keepAlive(t, open(t, c), 200*time.Millisecond, a, b)
			d := directory(t, open(t, c), discovery.Options{})
			until(t, d, "both join", count(2))
			stop := neverLose(t, d, "a", "b")
			if err := s.Client().ClientPause(context.Background(), 2*time.Second).Err(); err != nil {
				t.Fatal(err)
			}
			// It is answered when the pause is over.
			if err := s.Client().Set(context.Background(), "x", "y", 0).Err(); err != nil {
				t.Fatal(err)
			}
			heard := d.Snapshot().Node("a").LastHeard()
			eventually(t, "a is heard again", func() bool {
				n := d.Snapshot().Node("a")
				return n == nil || n.LastHeard().After(heard)
			})
			stop()
		})
	}
}

// TestUserRevoked: a login that is refused says nothing about the fleet, and ends
// when the server lets us in again.
func TestUserRevoked(t *testing.T) {
	t.Parallel()
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		t.Run(layout, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, redistest.User("edge", "on >pw ~* &* +@all"))
			ctx := context.Background()
			c := Config{URLs: []string{s.URL()}, Layout: layout, Poll: 50 * time.Millisecond}
			a, b := newNode("a", discovery.KeyLease, "1s"), newNode("b", discovery.KeyLease, "1s")
			keepAlive(t, open(t, c), 100*time.Millisecond, a, b)
			c.Username, c.Password = "edge", "pw"
			r := open(t, c)
			d := directory(t, r, discovery.Options{})
			until(t, d, "both join", count(2))
			stop := neverLose(t, d, "a", "b")
			for _, args := range [][]any{{"ACL", "SETUSER", "edge", "off"}, {"CLIENT", "KILL", "USER", "edge"}} {
				if err := s.Client().Do(ctx, args...).Err(); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "the loss is noticed", func() bool { return !d.Status().Connected })
			eventually(t, "an announcement is refused, and says why", func() bool {
				err := r.Announce(ctx, newNode("c"))
				if err == nil {
					t.Fatal("an announcement is taken from a user that is off")
				}
				return errors.Is(err, discovery.ErrCredentials)
			})
			// Whatever a look begins with: no answer is no empty record.
			if l, ok := r.layout.(*keysLayout); ok {
				look := &keysLook{layout: l}
				if err := look.read(ctx, []string{l.prefix + "a"}); err == nil {
					t.Error("keys were read by a user that is off")
				}
			}
			if err := s.Client().Do(ctx, "ACL", "SETUSER", "edge", "on").Err(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "an announcement is taken", func() bool { return r.Announce(ctx, newNode("c")) == nil })
			until(t, d, "c joins", has("c"))
			stop()
		})
	}
}

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
			writer := open(t, config)
			put := func(id string) {
				switch {
				case !c.foreign:
					announce(t, writer, newNode(id, discovery.KeyLease, "2s"))
				case c.layout == LayoutKeys:
					if err := s.Client().Set(context.Background(), DefaultKey+":"+id, foreign(id, 1), time.Minute).Err(); err != nil {
						t.Fatal(err)
					}
				default:
					add(t, s.Client(), foreign(id, 1), 0)
				}
			}
			for _, id := range []string{"a", "b", "c", "d"} {
				put(id)
			}
			d := directory(t, open(t, reader), discovery.Options{TTL: 2 * time.Second})
			until(t, d, "all join", count(4))
			stop := neverLose(t, d, "a", "b", "c", "d")
			restarts := d.Status().Restarts
			if err := s.Client().FlushAll(context.Background()).Err(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the wipe is noticed", func() bool { return d.Status().Restarts > restarts && d.Status().Connected })
			put("a")
			put("new")
			until(t, d, "new joins", has("new"))
			stop()
			until(t, d, "who does not come back lapses", func(s *discovery.Snapshot) bool {
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
	r := open(t, Config{URLs: []string{s.URL()}})
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
	r := open(t, Config{URLs: []string{s.URL()}})
	announce(t, r, newNode("a"))
	d := directory(t, r, discovery.Options{})
	until(t, d, "a is listed", has("a"))
	for _, id := range []string{"b", "c"} {
		if err := s.Client().Del(context.Background(), r.client.config.side("changes")).Err(); err != nil {
			t.Fatal(err)
		}
		announce(t, r, newNode(id))
		until(t, d, id+" joins", has(id))
	}
	if err := r.Withdraw(context.Background(), newNode("b")); err != nil {
		t.Fatal(err)
	}
	until(t, d, "b leaves", lacks("b"))
	if d.Snapshot().Node("a") == nil {
		t.Error("a was dropped")
	}
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
			writer := open(t, config)
			keepAlive(t, writer, 100*time.Millisecond, newNode("a", discovery.KeyLease, "5s"), newNode("b", discovery.KeyLease, "5s"))
			d := directory(t, open(t, config), discovery.Options{})
			until(t, d, "both join", count(2))
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
			until(t, d, "c lapses", lacks("c"))
			stop()
		})
	}
}

func wantBroken(t *testing.T, done chan error) {
	t.Helper()
	select {
	case err := <-done:
		wantError(t, err, discovery.ErrBroken)
	case <-time.After(patience):
		t.Fatal("the watch did not end")
	}
}

// TestConnections counts them on the server.
func TestConnections(t *testing.T) {
	t.Parallel()
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		t.Run(layout, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, redistest.Notify("KA"))
			r := open(t, Config{URLs: []string{s.URL()}, Layout: layout, Name: "counted", Poll: 10 * time.Millisecond})
			d := directory(t, r, discovery.Options{})
			synced(t, d)
			var nodes []discovery.Node
			for i := range 8 {
				nodes = append(nodes, newNode(strconv.Itoa(i)))
			}
			keepAlive(t, r, 5*time.Millisecond, nodes...)
			ctx, cancel := context.WithCancel(context.Background())
			var group sync.WaitGroup
			for range 4 {
				group.Go(func() {
					for ctx.Err() == nil {
						_ = r.Verify(ctx)
						_, _ = r.History(ctx, "1", 0)
					}
				})
			}
			until(t, d, "all join", count(len(nodes)))
			most := 0
			for range 100 {
				list, err := s.Client().ClientList(context.Background()).Result()
				if err != nil {
					t.Fatal(err)
				}
				most = max(most, strings.Count(list, "name=counted"))
			}
			cancel()
			group.Wait()
			if most > 3 || most < 2 {
				t.Errorf("%d connections, want at most 3", most)
			}
		})
	}
}

func TestSentinelFailover(t *testing.T) {
	t.Parallel()
	for name, kill := range map[string]func(*redistest.Server){
		"Killed": (*redistest.Server).Kill,
		"Hung":   (*redistest.Server).Pause,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.StartSentinel(t, 1, "sentinel-pw", redistest.Password("pw"), redistest.Notify("KA"))
			c := Config{
				URLs: s.URLs(), Password: "pw",
				SentinelMaster: redistest.SentinelMaster, SentinelPassword: "sentinel-pw",
			}
			writer := open(t, c)
			keepAlive(t, writer, 200*time.Millisecond, newNode("a", discovery.KeyLease, "1s"), newNode("b", discovery.KeyLease, "1s"))
			d := directory(t, open(t, c), discovery.Options{})
			until(t, d, "both join", count(2))
			stop := neverLose(t, d, "a", "b")
			began := time.Now()
			kill(s.Servers[0])
			eventually(t, "the replica takes over", func() bool { return s.Master() == s.Servers[1] })
			took := time.Since(began)
			eventually(t, "the new master takes records", func() bool {
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				return writer.Announce(ctx, newNode("joins")) == nil
			})
			until(t, d, "the directory follows the new master", has("joins"))
			t.Logf("failover %v, followed after %v", took, time.Since(began))
			stop()
		})
	}
}

// TestSentinelPartition: the master is cut off from the Sentinels but not from
// us, so that none of our connections breaks.
func TestSentinelMasterMoved(t *testing.T) {
	t.Parallel()
	s := redistest.StartSentinel(t, 1, "")
	c := Config{URLs: s.URLs(), SentinelMaster: redistest.SentinelMaster, Poll: 100 * time.Millisecond}
	r := open(t, c)
	d := directory(t, r, discovery.Options{})
	synced(t, d)
	ctx := context.Background()
	replica := s.Servers[1]
	if err := replica.Client().ReplicaOf(ctx, "no", "one").Err(); err != nil {
		t.Fatal(err)
	}
	for _, sentinel := range s.Sentinels {
		ask := goredis.NewSentinelClient(&goredis.Options{Addr: sentinel.Addr(), DisableIdentity: true})
		if err := ask.Remove(ctx, redistest.SentinelMaster).Err(); err != nil {
			t.Fatal(err)
		}
		if err := ask.Monitor(ctx, redistest.SentinelMaster, "127.0.0.1", strconv.Itoa(replica.Port()), "2").Err(); err != nil {
			t.Fatal(err)
		}
		_ = ask.Close()
	}
	writer := open(t, c) // asks the Sentinels for the first time
	announce(t, writer, newNode("joins"))
	until(t, d, "the directory follows the new master", has("joins"))
}

func TestClusterMasterLost(t *testing.T) {
	t.Parallel()
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		t.Run(layout, func(t *testing.T) {
			t.Parallel()
			cluster := redistest.StartCluster(t, 1, redistest.Notify("KA"))
			key := "{fleet}:nodes"
			owner := cluster.Owner(key)
			seed := cluster.Masters[0]
			if seed == owner {
				seed = cluster.Masters[1]
			}
			c := Config{URLs: []string{"redis+cluster://" + seed.Addr()}, Key: key, Layout: layout}
			writer := open(t, c)
			keepAlive(t, writer, 200*time.Millisecond, newNode("a", discovery.KeyLease, "1s"), newNode("b", discovery.KeyLease, "1s"))
			r := open(t, c)
			d := directory(t, r, discovery.Options{})
			until(t, d, "both join", count(2))
			if !strings.HasSuffix(r.Changes(), "notifications") {
				t.Errorf("pushed by %q", r.Changes())
			}
			stop := neverLose(t, d, "a", "b")
			began := time.Now()
			owner.Kill()
			eventually(t, "the replica takes records", func() bool {
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				return writer.Announce(ctx, newNode("joins")) == nil
			})
			took := time.Since(began)
			until(t, d, "the directory follows the new master", has("joins"))
			t.Logf("taken after %v, seen after %v", took, time.Since(began))
			stop()
		})
	}
}

// TestServersAreNoNodes has records point to servers of the registry that no URL
// names: those that the Sentinels or the cluster name.
func TestServersAreNoNodes(t *testing.T) {
	t.Parallel()
	check := func(t *testing.T, c Config, servers ...*redistest.Server) {
		rules, err := discovery.NewRules(discovery.Access{Loopback: true})
		if err != nil {
			t.Fatal(err)
		}
		r := open(t, c)
		for i, server := range servers {
			n := newNode(fmt.Sprint("n", i))
			if n.Endpoint, err = discovery.ParseEndpoint("http://" + server.Addr()); err != nil {
				t.Fatal(err)
			}
			announce(t, r, n)
		}
		d := directory(t, open(t, c), discovery.Options{Addresses: c.Addresses()})
		until(t, d, "every server of the registry is denied", func(s *discovery.Snapshot) bool {
			for _, e := range s.Nodes() {
				if rules.Check(e, d.RegistryAddresses()) != "denied: the registry itself" {
					return false
				}
			}
			return len(s.Nodes()) == len(servers)
		})
	}
	t.Run("Sentinel", func(t *testing.T) {
		t.Parallel()
		s := redistest.StartSentinel(t, 1, "sentinel-pw", redistest.Password("pw"))
		check(t, Config{
			URLs: s.URLs()[:1], Password: "pw",
			SentinelMaster: redistest.SentinelMaster, SentinelPassword: "sentinel-pw",
		}, append(slices.Clone(s.Servers), s.Sentinels...)...)
	})
	t.Run("Cluster", func(t *testing.T) {
		t.Parallel()
		s := redistest.StartCluster(t, 1)
		check(t, Config{URLs: []string{"redis+cluster://" + s.Masters[0].Addr()}, Key: "{fleet}:nodes"},
			append(slices.Clone(s.Masters), s.Replicas...)...)
	})
}

// all kills and restarts several servers together.
func all(servers ...*redistest.Server) (stop, restart func()) {
	return func() {
			for _, s := range servers {
				s.Kill()
			}
		}, func() {
			for _, s := range servers {
				s.Restart()
			}
		}
}

func TestConformanceSentinel(t *testing.T) {
	s := redistest.StartSentinel(t, 1, "sentinel-pw", redistest.Password("pw"))
	stop, restart := all(append(append([]*redistest.Server(nil), s.Servers...), s.Sentinels...)...)
	n := 0
	discoverytest.Run(t, func(*testing.T) discoverytest.Harness {
		n++
		return &harness{stop: stop, restart: restart, config: Config{
			URLs: s.URLs(), Password: "pw", Key: fmt.Sprint("nodes", n),
			SentinelMaster: redistest.SentinelMaster, SentinelPassword: "sentinel-pw",
		}}
	})
}

func TestConformanceCluster(t *testing.T) {
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		t.Run(layout, func(t *testing.T) {
			cluster := redistest.StartCluster(t, 0, redistest.Notify("KA"))
			stop, restart := all(cluster.Masters...)
			n := 0
			discoverytest.Run(t, func(*testing.T) discoverytest.Harness {
				n++
				return &harness{stop: stop, restart: restart, config: Config{
					URLs: cluster.URLs()[:1], Layout: layout, Key: fmt.Sprint("nodes", n),
				}}
			})
		})
	}
}

// TestWithoutHello talks to a server, or a proxy, that knows RESP2 only.
func TestWithoutHello(t *testing.T) {
	t.Parallel()
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		t.Run(layout, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, redistest.Config("rename-command", `HELLO ""`), redistest.Password("pw"), redistest.Notify("KA"))
			r := open(t, Config{URLs: []string{s.URL()}, Layout: layout})
			d := directory(t, r, discovery.Options{})
			synced(t, d)
			if !strings.HasSuffix(r.Changes(), "notifications") {
				t.Errorf("pushed by %q", r.Changes())
			}
			announce(t, r, newNode("a"))
			until(t, d, "a joins", has("a"))
			if err := r.Withdraw(context.Background(), newNode("a")); err != nil {
				t.Fatal(err)
			}
			until(t, d, "a leaves", lacks("a"))
			if status := d.Status(); status.Restarts != 0 {
				t.Errorf("the watch broke: %v", status.LastError)
			}
		})
	}
}
