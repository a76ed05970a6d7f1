package redis

import (
	"context"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// sent returns how many bytes the server has sent to everybody.
func sent(t testing.TB, c *goredis.Client) int {
	t.Helper()
	info, err := c.Info(context.Background(), "stats").Result()
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(info, "total_net_output_bytes:")
	line, _, _ := strings.Cut(rest, "\r")
	n, err := strconv.Atoi(line)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// allocated returns how many bytes this process has ever allocated.
func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

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
				s := redistest.Start(t)
				c := Config{URLs: []string{s.URL()}, Layout: layout, Poll: 20 * time.Millisecond}
				writer := open(t, c)
				announce(t, writer, newNode("good"))
				record := longRecord("long", size)
				put := func() {
					if layout == LayoutKeys {
						if err := s.Client().Set(t.Context(), DefaultKey+":long", record, 0).Err(); err != nil {
							t.Fatal(err)
						}
					} else {
						add(t, s.Client(), record, 0)
					}
				}
				if when == "listed" {
					put()
				}
				before, heap := sent(t, s.Client()), uint64(0)
				d := directory(t, open(t, c), discovery.Options{})
				synced(t, d)
				if when == "later" {
					put()
				}
				heap = allocated()
				eventually(t, "the long record is shown", func() bool { return len(d.Status().Rejections) == 1 })
				if r := d.Status().Rejections[0]; r.ID != "long" || !strings.Contains(r.Err.Error(), "want at most 65536") {
					t.Errorf("it is shown as %q: %v", r.ID, r.Err)
				}
				announce(t, writer, newNode("another"))
				until(t, d, "the fleet beside it", count(2))
				for range 5 {
					changed(t, d, writer)
				}
				if n := sent(t, s.Client()) - before; n > most {
					t.Errorf("the server sent %d bytes, want less than %d: the record has %d", n, most, len(record))
				}
				if n := allocated() - heap; n > size {
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

// changed waits until one more change was told.
func changed(t testing.TB, d *discovery.Directory, w *Registry) {
	t.Helper()
	n := newNode("another", "at", time.Now().String())
	announce(t, w, n)
	until(t, d, "the change", func(s *discovery.Snapshot) bool {
		return s.Node("another") != nil && s.Node("another").Node.Metadata["at"] == n.Metadata["at"]
	})
}

// An entry of the stream, an override and a message cannot be left out by the
// server, or are not records; none costs the watch, nor the memory of what it holds.
func TestTooLongElsewhere(t *testing.T) {
	const size = 32 << 20
	junk := strings.Repeat("x", size)
	s := redistest.Start(t)
	c := Config{URLs: []string{s.URL()}, Poll: 20 * time.Millisecond}
	w := open(t, c)
	announce(t, w, newNode("a"))
	if err := w.SetOverride(t.Context(), "a", discovery.Override{State: discovery.StateDraining}); err != nil {
		t.Fatal(err)
	}
	d := directory(t, open(t, c), discovery.Options{})
	synced(t, d)
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
	before, out := allocated(), sent(t, client)
	if got, err := w.Overrides(ctx); err != nil || len(got) != 1 {
		t.Errorf("%d overrides, %v, want the one of a", len(got), err)
	}
	if n, err := w.Record(ctx, "b"); err != nil || n.ID != "" {
		t.Errorf("record %+v, %v, want none", n, err)
	}
	if got, err := w.History(ctx, "a", 0); err != nil || len(got) != 1 {
		t.Errorf("history %+v, %v, want one revision", got, err)
	}
	if n := sent(t, client) - out; n > 3*size {
		t.Errorf("the server sent %d bytes, want no more than the stream's reader asked for", n)
	}
	for range 5 {
		announce(t, w, newNode("a", "at", time.Now().String()))
	}
	announce(t, w, newNode("another"))
	until(t, d, "changes go on", has("another"))
	if n := allocated() - before; n > size {
		t.Errorf("%d bytes were allocated, want less than one of those", n)
	}
	if restarts := d.Status().Restarts; restarts > 1 {
		t.Errorf("the watch began anew %d times", restarts)
	}
}
