package redis

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// replace replaces a member of the set as the fleets in the wild do, in two steps.
func replace(t testing.TB, c *goredis.Client, old, record string) {
	t.Helper()
	if err := c.ZRem(context.Background(), DefaultKey, old).Err(); err != nil {
		t.Fatal(err)
	}
	add(t, c, record, 0)
}

// unreadable returns a record without an id that can be read, though its beginning
// names one.
func unreadable(id string, beat int) string {
	return fmt.Sprintf(`{"nodeId":%q,"endpoint":"http://127.0.0.1:5001","beat":%d,`, id, beat)
}

// rejectedAs returns the ids under which records are rejected, sorted, "#" for one that
// is nobody's.
func rejectedAs(d *discovery.Directory) string {
	var ids []string
	for _, r := range d.Status().Rejections {
		if strings.HasPrefix(r.Key, "#") {
			ids = append(ids, "#"+r.ID)
		} else {
			ids = append(ids, r.ID)
		}
	}
	slices.Sort(ids)
	return strings.Join(ids, " ")
}

// TestUnreadableMemberEndsNoNode: a member of the set whose id cannot be read takes
// nobody out of service, neither the node whose record it replaced nor another one that
// it names.
func TestUnreadableMemberEndsNoNode(t *testing.T) {
	t.Parallel()
	for name, others := range map[string]int{"Small": 0, "LookedAtInPart": 2 * smallSet} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t)
			for i := range others {
				add(t, s.Client(), foreign(fmt.Sprint("other", i), 0), 0)
			}
			ids := []string{"in-use", "no-json", "no-utf8", "old-one-left", "too-long"}
			for _, id := range ids {
				add(t, s.Client(), foreign(id, 0), 0)
			}
			add(t, s.Client(), foreign("old-one-left", 1), time.Hour)
			r := open(t, Config{URLs: []string{s.URL()}, Poll: 20 * time.Millisecond})
			d := directory(t, r, discovery.Options{TTL: 10 * time.Minute})
			until(t, d, "all join", count(len(ids)+others))
			stop := neverLose(t, d, ids...)
			settled := func(what, rejected string) {
				t.Helper()
				for range 2 {
					eventually(t, what, func() bool { return rejectedAs(d) == rejected })
					<-time.After(absence) // what is missing has left by then
					if err := r.Verify(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				for _, e := range d.Snapshot().Nodes() {
					refused := slices.Contains(strings.Fields(rejected), e.Node.ID)
					if (e.Refused() != nil) != refused || !e.Serves() {
						t.Errorf("%s: %s is %s, refused for %v", what, e.Node.ID, e.State(), e.Refused())
					}
				}
			}

			replace(t, s.Client(), foreign("no-json", 0), unreadable("no-json", 0))
			replace(t, s.Client(), foreign("no-utf8", 0), `{"nodeId":"no-utf8","endpoint":"`+"\xff"+`"}`)
			replace(t, s.Client(), foreign("too-long", 0), longRecord("too-long", discovery.MaxRecord))
			replace(t, s.Client(), foreign("old-one-left", 0), unreadable("old-one-left", 0))
			add(t, s.Client(), unreadable("in-use", 0), 0)
			settled("each is rejected as that of its node, unless the node has a better one", "#in-use no-json no-utf8 old-one-left too-long")
			replace(t, s.Client(), unreadable("no-json", 0), unreadable("no-json", 1))
			settled("the next heartbeat is no better", "#in-use no-json no-utf8 old-one-left too-long")

			add(t, s.Client(), unreadable("nobody", 0), 0)
			settled("one of nobody is shown by the id that it names", "#in-use no-json no-utf8 nobody old-one-left too-long")
			add(t, s.Client(), unreadable("nobody", 1), 0)
			add(t, s.Client(), unreadable("too-long", 1), 0)
			settled("another takes nothing from the first", "#in-use #nobody #too-long no-json no-utf8 nobody old-one-left too-long")

			replace(t, s.Client(), unreadable("old-one-left", 0), foreign("old-one-left", 2))
			add(t, s.Client(), foreign("no-json", 2), 0)
			settled("a better record counts, whatever stands beside it", "#in-use #no-json #nobody #too-long no-utf8 nobody too-long")

			if err := s.Client().ZRem(t.Context(), DefaultKey, unreadable("too-long", 1)).Err(); err != nil {
				t.Fatal(err)
			}
			restarts := d.Status().Restarts
			eventually(t, "the watch begins anew", func() bool {
				_ = s.Client().ClientKillByFilter(t.Context(), "TYPE", "normal", "SKIPME", "yes").Err()
				return d.Status().Restarts > restarts
			})
			eventually(t, "it is connected", func() bool { return d.Status().Connected })
			// Which of two came first is not known there.
			settled("a listing shows the same", "#in-use #no-json #nobody #nobody no-utf8 too-long")
			stop()
		})
	}
}
