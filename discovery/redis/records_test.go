package redis

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

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
							addMember(t, s.Client(), record, 0)
						}
					}
					if err := s.Client().Expire(context.Background(), DefaultKey, 5*time.Minute).Err(); err != nil {
						t.Fatal(err)
					}
				}
				if when == "listed" {
					put()
				}
				d := startDirectory(t, openRegistry(t, Config{URLs: []string{s.URL()}, Layout: layout, Poll: 20 * time.Millisecond}), discovery.Options{})
				waitSynced(t, d)
				if when == "later" {
					put()
				}
				waitUntil(t, d, "the records are read", count(len(accepted)))
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
	announce(t, openRegistry(t, c), newNode("a"))
	d := startDirectory(t, openRegistry(t, c), discovery.Options{})
	waitSynced(t, d)
	if d.Snapshot().Node("a") == nil || len(d.Status().Rejections) != 1 {
		t.Errorf("%d nodes, rejected %v", len(d.Snapshot().Nodes()), d.Status().Rejections)
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
	set("good", foreignRecord("good", 0))
	d := startDirectory(t, openRegistry(t, Config{URLs: []string{s.URL()}, Layout: LayoutKeys, Poll: 20 * time.Millisecond}), discovery.Options{})
	<-d.Synced()
	was := d.Snapshot().Node("good").Node
	set("mallory", strings.Replace(foreignRecord("good", 0), was.Endpoint.Host(), "10.6.6.6", 1))
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

// unreadableRecord returns a record without an id that can be read, though its beginning
// names one.
func unreadableRecord(id string, beat int) string {
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
				addMember(t, s.Client(), foreignRecord(fmt.Sprint("other", i), 0), 0)
			}
			ids := []string{"in-use", "no-json", "no-utf8", "old-one-left", "too-long"}
			for _, id := range ids {
				addMember(t, s.Client(), foreignRecord(id, 0), 0)
			}
			addMember(t, s.Client(), foreignRecord("old-one-left", 1), time.Hour)
			r := openRegistry(t, Config{URLs: []string{s.URL()}, Poll: 20 * time.Millisecond})
			d := startDirectory(t, r, discovery.Options{TTL: 10 * time.Minute})
			waitUntil(t, d, "all join", count(len(ids)+others))
			stop := neverLose(t, d, ids...)
			settled := func(what, rejected string) {
				t.Helper()
				want := func() string {
					if d.Status().Restarts == 0 {
						return rejected
					}
					// A watch that began anew, as on a slow machine, takes the old one for
					// the node's.
					ids := strings.Fields(strings.Replace(rejected, " old-one-left", " #old-one-left", 1))
					slices.Sort(ids)
					return strings.Join(ids, " ")
				}
				for range 2 {
					eventually(t, what, func() bool { return rejectedAs(d) == want() })
					<-time.After(absence) // what is missing has left by then
					eventually(t, "it is verified", func() bool { return r.Verify(t.Context()) == nil })
				}
				for _, e := range d.Snapshot().Nodes() {
					refused := slices.Contains(strings.Fields(want()), e.Node.ID)
					if (e.Refused() != nil) != refused || !e.Serves() {
						t.Errorf("%s: %s is %s, refused for %v", what, e.Node.ID, e.State(), e.Refused())
					}
				}
			}

			replaceMember(t, s.Client(), foreignRecord("no-json", 0), unreadableRecord("no-json", 0))
			replaceMember(t, s.Client(), foreignRecord("no-utf8", 0), `{"nodeId":"no-utf8","endpoint":"`+"\xff"+`"}`)
			replaceMember(t, s.Client(), foreignRecord("too-long", 0), longRecord("too-long", discovery.MaxRecord))
			replaceMember(t, s.Client(), foreignRecord("old-one-left", 0), unreadableRecord("old-one-left", 0))
			addMember(t, s.Client(), unreadableRecord("in-use", 0), 0)
			settled("each is rejected as that of its node, unless the node has a better one", "#in-use no-json no-utf8 old-one-left too-long")
			replaceMember(t, s.Client(), unreadableRecord("no-json", 0), unreadableRecord("no-json", 1))
			settled("the next heartbeat is no better", "#in-use no-json no-utf8 old-one-left too-long")

			addMember(t, s.Client(), unreadableRecord("nobody", 0), 0)
			settled("one of nobody is shown by the id that it names", "#in-use no-json no-utf8 nobody old-one-left too-long")
			addMember(t, s.Client(), unreadableRecord("nobody", 1), 0)
			addMember(t, s.Client(), unreadableRecord("too-long", 1), 0)
			settled("another takes nothing from the first", "#in-use #nobody #too-long no-json no-utf8 nobody old-one-left too-long")

			replaceMember(t, s.Client(), unreadableRecord("old-one-left", 0), foreignRecord("old-one-left", 2))
			addMember(t, s.Client(), foreignRecord("no-json", 2), 0)
			settled("a better record counts, whatever stands beside it", "#in-use #no-json #nobody #too-long no-utf8 nobody too-long")

			if err := s.Client().ZRem(t.Context(), DefaultKey, unreadableRecord("too-long", 1)).Err(); err != nil {
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
