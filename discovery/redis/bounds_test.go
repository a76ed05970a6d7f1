package redis

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// longRecord is the record of a node that goes on for long.
func longRecord(id string, bytes int) string {
	return fmt.Sprintf(`{"nodeId":%q,"endpoint":"http://10.0.0.7:5001","metadata":{"junk":%q}}`, id, strings.Repeat("x", bytes))
}

// What is too long for a record stays at the server, whether it was there before the
// listing or comes later, and is shown.
func TestTooLong(t *testing.T) {
	const size, most = 32 << 20, 8 << 20
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		for _, when := range []string{"listed", "later"} {
			t.Run(layout+" "+when, func(t *testing.T) {
				s := redistest.Start(t, redistest.Config("appendonly", "no"))
				c := Config{URLs: []string{s.URL()}, Layout: layout, Poll: 20 * time.Millisecond}
				writer := openRegistry(t, c)
				announce(t, writer, newNode("good"))
				record := longRecord("long", size)
				put := func() {
					if layout == LayoutKeys {
						if err := s.Client().Set(t.Context(), DefaultKey+":long", record, 0).Err(); err != nil {
							t.Fatal(err)
						}
					} else {
						addMember(t, s.Client(), record, 0)
					}
				}
				if when == "listed" {
					put()
				}
				before, heap := bytesSent(t, s.Client()), uint64(0)
				d := startDirectory(t, openRegistry(t, c), discovery.Options{})
				waitSynced(t, d)
				if when == "later" {
					put()
				}
				heap = bytesAllocated()
				eventually(t, "the long record is shown", func() bool { return len(d.Status().Rejections) == 1 })
				if r := d.Status().Rejections[0]; r.ID != "long" || !strings.Contains(r.Err.Error(), "want at most 65536") {
					t.Errorf("it is shown as %q: %v", r.ID, r.Err)
				}
				announce(t, writer, newNode("another"))
				waitUntil(t, d, "the fleet beside it", count(2))
				for range 5 {
					announceChange(t, d, writer)
				}
				if n := bytesSent(t, s.Client()) - before; n > most {
					t.Errorf("the server sent %d bytes, want less than %d: the record has %d", n, most, len(record))
				}
				if n := bytesAllocated() - heap; n > size {
					t.Errorf("%d bytes were allocated, want less than the record has", n)
				}
				// It goes, and is shown no more.
				if layout == LayoutKeys {
					_ = s.Client().Del(t.Context(), DefaultKey+":long")
				} else if err := s.Client().ZRem(t.Context(), DefaultKey, record).Err(); err != nil {
					t.Fatal(err)
				}
				eventually(t, "it is shown no more", func() bool { return len(d.Status().Rejections) == 0 })
			})
		}
	}
}

// announceChange waits until one more change was told.
func announceChange(t testing.TB, d *discovery.Directory, w *Registry) {
	t.Helper()
	n := newNode("another", "at", time.Now().String())
	announce(t, w, n)
	waitUntil(t, d, "the change", func(s *discovery.Snapshot) bool {
		return s.Node("another") != nil && s.Node("another").Node.Metadata["at"] == n.Metadata["at"]
	})
}

// An entry of the stream, an override and a message cannot be left out by the
// server, or are not records; none costs the watch, nor the memory of what it holds.
func TestTooLongElsewhere(t *testing.T) {
	const size = 32 << 20
	junk := strings.Repeat("x", size)
	s := redistest.Start(t, redistest.Config("appendonly", "no"))
	c := Config{URLs: []string{s.URL()}, Poll: 20 * time.Millisecond}
	w := openRegistry(t, c)
	announce(t, w, newNode("a"))
	if err := w.SetOverride(t.Context(), "a", discovery.Override{State: discovery.StateDraining}); err != nil {
		t.Fatal(err)
	}
	d := startDirectory(t, openRegistry(t, c), discovery.Options{})
	waitSynced(t, d)
	ctx, client := t.Context(), s.Client()
	for _, err := range []error{
		client.XAdd(ctx, &goredis.XAddArgs{Stream: w.client.config.side("changes"), Values: []any{"seq", "1", "type", "put", "id", "x", "record", junk}}).Err(),
		client.XAdd(ctx, &goredis.XAddArgs{Stream: w.client.config.side("changes"), Values: []any{"other", junk}}).Err(),
		client.HSet(ctx, w.client.config.overridesKey(), "a-long-one", junk, junk[:1<<20], "{}").Err(),
		client.HSet(ctx, w.client.config.side("members"), "b", junk).Err(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	before, out := bytesAllocated(), bytesSent(t, client)
	if got, err := w.Overrides(ctx); err != nil || len(got) != 1 {
		t.Errorf("%d overrides, %v, want the one of a", len(got), err)
	}
	if n, err := w.Record(ctx, "b"); err != nil || n.ID != "" {
		t.Errorf("record %+v, %v, want none", n, err)
	}
	if got, err := w.History(ctx, "a", 0); err != nil || len(got) != 1 {
		t.Errorf("history %+v, %v, want one revision", got, err)
	}
	if n := bytesSent(t, client) - out; n > 3*size {
		t.Errorf("the server sent %d bytes, want no more than the stream's reader asked for", n)
	}
	for range 5 {
		announce(t, w, newNode("a", "at", time.Now().String()))
	}
	announce(t, w, newNode("another"))
	waitUntil(t, d, "changes go on", has("another"))
	if n := bytesAllocated() - before; n > size {
		t.Errorf("%d bytes were allocated, want less than one of those", n)
	}
	if restarts := d.Status().Restarts; restarts > 1 {
		t.Errorf("the watch began anew %d times", restarts)
	}
}

// A look reads the newest members, each once, no more than it may, and with few
// questions, however scores are shared.
func TestLookIsBounded(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx, c := t.Context(), s.Client()
	const most = 6000
	for name, test := range map[string]struct {
		members int
		score   func(i int) float64 // rises
		lowest  string
		known   []any // a score and how many have it
		user    []string
		want    int // of the newest
	}{
		"one score":          {members: most, score: func(int) float64 { return 7 }, want: most},
		"one score, more":    {members: 2 * most, score: func(int) float64 { return 7 }, want: most},
		"few scores":         {members: most, score: func(i int) float64 { return float64(i / 700) }, want: most},
		"few scores, more":   {members: 2 * most, score: func(i int) float64 { return float64(i / 700) }, want: most},
		"own scores":         {members: 2 * most, score: func(i int) float64 { return float64(i) }, want: most},
		"without end":        {members: most + 10, score: func(i int) float64 { return math.Inf(i - 1000) }, want: most},
		"many, and newer":    {members: 2 * most, score: func(i int) float64 { return float64(i / (2*most - 5)) }, want: most},
		"old and known":      {members: 2 * most, score: func(i int) float64 { return float64(min(i, 1)) }, known: []any{"0", 1}, want: most},
		"in part":            {members: 2 * most, score: func(int) float64 { return 7e12 }, lowest: "5", want: most},
		"in part, but a few": {members: 2 * most, score: func(i int) float64 { return float64(i) }, lowest: fmt.Sprint(2*most - 10), want: 10},
		"without ranks":      {members: 2 * most, score: func(i int) float64 { return float64(i / 700) }, user: []string{"+zrangebyscore", "+zcard"}, want: most},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.FlushAll(ctx).Err(); err != nil {
				t.Fatal(err)
			}
			var all []goredis.Z
			for i := range test.members {
				all = append(all, goredis.Z{Score: test.score(i), Member: fmt.Sprintf("m%06d", i)})
			}
			for chunk := range slices.Chunk(all, 5000) {
				if err := c.ZAdd(ctx, "set", chunk...).Err(); err != nil {
					t.Fatal(err)
				}
			}
			lowest := "-inf"
			if test.lowest != "" {
				lowest = test.lowest
			}
			reader := c
			if test.user != nil {
				rights := append([]string{"reset", "on", "nopass", "~*", "-@all", "+@connection", "+eval", "+evalsha", "+time"}, test.user...)
				if err := c.ACLSetUser(ctx, "narrow", rights...).Err(); err != nil {
					t.Fatal(err)
				}
				reader = goredis.NewClient(&goredis.Options{Addr: s.Addr(), Username: "narrow", Password: "any"})
				defer func() { _ = reader.Close() }()
			}
			before, _ := commandCalls(t, c, "zrangebyscore")
			args := append([]any{lowest, "0", discovery.MaxRecord, maxRead, usualRecord, most, 0}, test.known...)
			answer, err := lookScript.run(ctx, reader, []string{"set"}, args...)
			if err != nil {
				t.Fatal(err)
			}
			l := &setLook{long: make(longMembers), alike: make(map[string]int)}
			for i := 0; i < len(test.known); i += 2 {
				l.known = append(l.known, test.known[i].(string))
			}
			if err := l.read(answer); err != nil {
				t.Fatal(err)
			}
			var want []string
			for _, z := range all[test.members-test.want:] {
				want = append(want, z.Member.(string))
			}
			var got []string
			for _, m := range l.members {
				got = append(got, m.text)
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("%d members were read, want the newest %d", len(got), test.want)
			}
			after, _ := commandCalls(t, c, "zrangebyscore")
			// Where many share a score the server walks past all of them each time.
			if n := after - before; test.score(0) == test.score(test.members-1) && n > 6 {
				t.Errorf("%d questions for one score, want no more than by doubling", n)
			}
		})
	}
}

// What is asked for while a look is under way is kept once, and within a bound.
func TestWantedKeys(t *testing.T) {
	t.Parallel()
	var pending request
	for range 1000 {
		pending.want("same")
	}
	if len(pending.keys) != 1 || pending.some {
		t.Errorf("%d keys, want one", len(pending.keys))
	}
	long := strings.Repeat("x", 1<<10)
	for i := range 2 * maxWanted / len(long) {
		pending.add(request{keys: map[string]bool{fmt.Sprint(i, long): true}})
	}
	size := 0
	for key := range pending.keys {
		size += len(key)
	}
	if size > maxWanted || size < maxWanted/2 || !pending.some {
		t.Errorf("%d bytes of keys, some=%v, want at most %d and a look at what is likely", size, pending.some, maxWanted)
	}
	// What came before has not made room, and is not lost.
	if !pending.keys["same"] {
		t.Error("the first key was lost")
	}
}
