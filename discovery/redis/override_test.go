package redis

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// TestOverrides has operators decide about nodes, before and while they are watched.
func TestOverrides(t *testing.T) {
	t.Parallel()
	for name, layout := range map[string]string{
		"sorted set": LayoutSortedSet, "keys": LayoutKeys, "keys with notifications": LayoutKeys,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			notify := ""
			if strings.Contains(name, "notifications") {
				notify = "K$gx"
			}
			s := redistest.Start(t, redistest.Notify(`"`+notify+`"`))
			// No poll: what is seen was told.
			c := Config{URLs: []string{s.URL()}, Layout: layout, Poll: time.Hour}
			r := open(t, c)
			ctx := t.Context()
			if all, err := r.Overrides(ctx); err != nil || len(all) != 0 {
				t.Errorf("before there is any: %v, %v", all, err)
			}
			if err := r.ClearOverride(ctx, "a"); err != nil {
				t.Errorf("clearing what is not there: %v", err)
			}
			set := func(id string, o discovery.Override) {
				t.Helper()
				if err := r.SetOverride(ctx, id, o); err != nil {
					t.Fatal(err)
				}
			}
			announce(t, r, newNode("a"), newNode("b"))
			half := 0.5
			set("a", discovery.Override{State: discovery.StateDraining})
			set("é.1", discovery.Override{Weight: &half})

			listed, events, done := watchEvents(t, open(t, c))
			if len(listed) < 2 || fmt.Sprint(listed[0].Overrides) != "map[a:state draining é.1:weight × 0.5]" {
				t.Errorf("listed %v, want the overrides first", listed)
			}
			want := func(overrides string) {
				t.Helper()
				for {
					if e := next(t, events, done); e.Type == discovery.Overridden {
						if got := fmt.Sprint(e.Overrides); got != overrides {
							t.Errorf("overrides %s, want %s", got, overrides)
						}
						return
					}
				}
			}
			set("b", discovery.Override{State: discovery.StateMaintenance})
			want("map[a:state draining b:state maintenance é.1:weight × 0.5]")
			if err := r.ClearOverride(ctx, "a"); err != nil {
				t.Fatal(err)
			}
			want("map[b:state maintenance é.1:weight × 0.5]")
			if all, err := r.Overrides(ctx); err != nil || fmt.Sprint(all) != "map[b:state maintenance é.1:weight × 0.5]" {
				t.Errorf("read %v, %v", all, err)
			}
			wantError(t, r.SetOverride(ctx, "", discovery.Override{}), discovery.ErrInvalid)
			wantError(t, r.SetOverride(ctx, "a", discovery.Override{State: "nonsense"}), discovery.ErrInvalid)

			// What stands there is hostile input like any other.
			if err := s.Client().HSet(context.Background(), r.overridesKey(), "b", "nonsense", "c", `{"state":"up"}`).Err(); err != nil {
				t.Fatal(err)
			}
			set("a", discovery.Override{State: discovery.StateUp})
			want("map[a:state up c:state up é.1:weight × 0.5]")

			// History is of records.
			if layout == LayoutSortedSet {
				if past, err := r.History(ctx, "a", 0); err != nil || len(past) != 1 || past[0].Type != discovery.Put {
					t.Errorf("history %v, %v", past, err)
				}
			}
		})
	}
}

// TestOverridesArePolled has them change without a word, as by hand.
func TestOverridesArePolled(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := open(t, Config{URLs: []string{s.URL()}, Poll: 20 * time.Millisecond})
	announce(t, r, newNode("a"))
	d := directory(t, r, discovery.Options{})
	synced(t, d)
	if err := s.Client().HSet(t.Context(), r.overridesKey(), "a", `{"state":"draining"}`).Err(); err != nil {
		t.Fatal(err)
	}
	until(t, d, "it drains", func(s *discovery.Snapshot) bool { return s.Node("a").State() == discovery.StateDraining })
	// A wiped registry keeps what operators decided no longer than it keeps all else.
	if err := s.Client().FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	until(t, d, "it is up again", func(s *discovery.Snapshot) bool {
		e := s.Node("a")
		return e != nil && e.State() == discovery.StateUp
	})
}
