package redis

import (
	"context"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// addForeignKeys adds so many keys of somebody else.
func addForeignKeys(t testing.TB, c *goredis.Client, n int) {
	t.Helper()
	const step = 50_000
	for i := 0; i < n; i += step {
		err := c.Eval(context.Background(), `for i = ARGV[1], ARGV[2] do redis.call('SET', 'cache:' .. i, 'x') end return 1`,
			nil, i+1, min(i+step, n)).Err()
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Keys of others are passed through to list the fleet, and then seldom: looks ask
// for the keys that are known, and our writers name the others.
func TestManyForeignKeys(t *testing.T) {
	t.Parallel()
	const foreignKeys, polls = 200_000, 20
	s := redistest.Start(t, redistest.Config("appendonly", "no"))
	addForeignKeys(t, s.Client(), foreignKeys)
	c := Config{URLs: []string{s.URL()}, Layout: LayoutKeys, Poll: 20 * time.Millisecond}
	writer := openRegistry(t, c)
	announce(t, writer, newNode("early"))
	d := startDirectory(t, openRegistry(t, c), discovery.Options{})
	waitSynced(t, d)
	if d.Snapshot().Node("early") == nil {
		t.Error("the listing lacks a node")
	}
	scans, _ := commandCalls(t, s.Client(), "scan")
	began, _ := commandCalls(t, s.Client(), "hget") // one for each look
	done := began
	eventually(t, "so many polls", func() bool {
		done, _ = commandCalls(t, s.Client(), "hget")
		return done-began >= polls
	})
	after, _ := commandCalls(t, s.Client(), "scan")
	if whole := foreignKeys / scanCount; after-scans > (done-began)*whole/10 {
		t.Errorf("%d looks made %d steps through the keys, of which a pass has %d", done-began, after-scans, whole)
	}

	// Our own writers are seen whatever else there is, and leave.
	announce(t, writer, newNode("late"))
	waitUntil(t, d, "a node of ours", has("late"))
	if err := writer.Withdraw(t.Context(), newNode("late")); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "it leaves", lacks("late"))
	// One that ran out and comes back, too.
	if err := s.Client().PExpire(t.Context(), DefaultKey+":early", time.Millisecond).Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the key is gone", func() bool { return s.Client().Exists(t.Context(), DefaultKey+":early").Val() == 0 })
	announce(t, writer, newNode("early"))
	waitUntil(t, d, "it is there", has("early"))
	// Those of others in the end.
	if err := s.Client().Set(t.Context(), DefaultKey+":other", foreignRecord("other", 1), time.Minute).Err(); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "a node of somebody else", has("other"))
	if restarts := d.Status().Restarts; restarts != 0 {
		t.Errorf("the watch began anew %d times", restarts)
	}
}

// A watch that begins anew does not wait for a pass through a database that takes
// long: it knows who was there.
func TestListingAnewAmongForeignKeys(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := openRegistry(t, Config{URLs: []string{s.URL()}, Layout: LayoutKeys, Poll: 20 * time.Millisecond})
	announce(t, r, newNode("a"), newNode("b"))
	listed, _, _ := watchEvents(t, r)
	if n := len(listed); n < 3 {
		t.Fatalf("listed %v", listed)
	}
	l := r.layout.(*keysLayout)
	l.scanned(time.Minute) // as if it took so long
	if l.knownBefore("") != nil || l.knownBefore("another") != nil {
		t.Error("keys of other data count as known")
	}
	d := startDirectory(t, r, discovery.Options{})
	waitSynced(t, d)
	if err := s.Client().Set(t.Context(), DefaultKey+":c", foreignRecord("c", 1), time.Minute).Err(); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "the nodes from before and a new one", count(3))
	if err := s.Client().Do(t.Context(), "CLIENT", "KILL", "TYPE", "pubsub").Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the watch begins anew", func() bool { return d.Status().Restarts == 1 && d.Status().Connected })
	if err := s.Client().Set(t.Context(), DefaultKey+":d", foreignRecord("d", 1), time.Minute).Err(); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "one more", count(4))
}

// With a prefix that has a hash tag nothing of ours lies among the nodes.
func TestKeysWithHashTag(t *testing.T) {
	t.Parallel()
	for _, key := range []string{"{fleet}", "a{fleet}b:"} {
		t.Run(key, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t)
			ctx := t.Context()
			c := Config{URLs: []string{s.URL()}, Layout: LayoutKeys, Key: key, Poll: 20 * time.Millisecond}
			r := openRegistry(t, c)
			prefix := r.layout.(*keysLayout).prefix
			// As a version before left it.
			for _, err := range []error{
				s.Client().HSet(ctx, prefix+"meta", "epoch", "old").Err(),
				s.Client().HSet(ctx, prefix+"overrides", "a", `{"state":"draining"}`, "b", `{"state":"draining"}`).Err(),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			announce(t, r, newNode("a"), newNode("b"))
			d := startDirectory(t, openRegistry(t, c), discovery.Options{})
			waitSynced(t, d)
			state := func(id string, want discovery.State) func(*discovery.Snapshot) bool {
				return func(s *discovery.Snapshot) bool { return s.Node(id) != nil && s.Node(id).State() == want }
			}
			waitUntil(t, d, "the override from before", state("a", discovery.StateDraining))
			if rejected := d.Status().Rejections; len(rejected) != 0 {
				t.Errorf("rejected: %v", rejected)
			}
			if err := r.ClearOverride(ctx, "a"); err != nil {
				t.Fatal(err)
			}
			waitUntil(t, d, "it is cleared", state("a", discovery.StateUp))
			if err := r.SetOverride(ctx, "b", discovery.Override{State: discovery.StateMaintenance}); err != nil {
				t.Fatal(err)
			}
			waitUntil(t, d, "the newer one", state("b", discovery.StateMaintenance))

			// Nodes that are called like what lies beside them.
			names := []string{"meta", "overrides", "announced", "changes"}
			for _, name := range names {
				announce(t, r, newNode(name))
				waitUntil(t, d, "the node", has(name))
			}
			anew := startDirectory(t, openRegistry(t, c), discovery.Options{})
			waitSynced(t, anew)
			for _, name := range names {
				if anew.Snapshot().Node(name) == nil {
					t.Errorf("a directory that starts lacks the node %s", name)
				}
			}
			waitUntil(t, anew, "the override", state("b", discovery.StateMaintenance))
			for _, d := range []*discovery.Directory{d, anew} {
				if status := d.Status(); len(status.Rejections) != 0 || status.Restarts != 0 {
					t.Errorf("rejected %v, began anew %d times", status.Rejections, status.Restarts)
				}
			}
		})
	}
}
