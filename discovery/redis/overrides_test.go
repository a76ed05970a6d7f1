package redis

import (
	"context"
	"fmt"
	"slices"
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
			r := openRegistry(t, c)
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

			listed, events, done := watchEvents(t, openRegistry(t, c))
			if len(listed) < 2 || fmt.Sprint(listed[0].Overrides) != "map[a:state draining é.1:weight × 0.5]" {
				t.Errorf("listed %v, want the overrides first", listed)
			}
			// Those on the way may be seen before, by a look that was due already.
			want := func(overrides string, onTheWay ...string) {
				t.Helper()
				for {
					e := nextEvent(t, events, done)
					got := fmt.Sprint(e.Overrides)
					switch {
					case e.Type != discovery.Overridden || slices.Contains(onTheWay, got):
					case got != overrides:
						t.Errorf("overrides %s, want %s", got, overrides)
						return
					default:
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
			if err := s.Client().HSet(context.Background(), r.client.config.overridesKey(), "b", "nonsense", "c", `{"state":"up"}`).Err(); err != nil {
				t.Fatal(err)
			}
			set("a", discovery.Override{State: discovery.StateUp})
			want("map[a:state up c:state up é.1:weight × 0.5]", "map[c:state up é.1:weight × 0.5]")

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
	r := openRegistry(t, Config{URLs: []string{s.URL()}, Poll: 20 * time.Millisecond})
	announce(t, r, newNode("a"))
	d := startDirectory(t, r, discovery.Options{})
	waitSynced(t, d)
	if err := s.Client().HSet(t.Context(), r.client.config.overridesKey(), "a", `{"state":"draining"}`).Err(); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "it drains", func(s *discovery.Snapshot) bool { return s.Node("a").State() == discovery.StateDraining })
	// A wiped registry keeps what operators decided no longer than it keeps all else.
	if err := s.Client().FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, d, "it is up again", func(s *discovery.Snapshot) bool {
		e := s.Node("a")
		return e != nil && e.State() == discovery.StateUp
	})
}

// TestOverridesEndByTheServersClock has a server whose clock differs from ours: what
// stands there is by its clock, and what we give and get is by ours.
func TestOverridesEndByTheServersClock(t *testing.T) {
	t.Parallel()
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		for _, ahead := range []time.Duration{20 * time.Minute, -20 * time.Minute} {
			t.Run(fmt.Sprint(layout, ahead), func(t *testing.T) {
				t.Parallel()
				s := redistest.Start(t, redistest.Clock())
				s.SetClock(ahead)
				c := Config{URLs: []string{s.URL()}, Layout: layout, Poll: 20 * time.Millisecond}
				r := openRegistry(t, c)
				began := time.Now()
				ends := began.Add(15 * time.Minute)
				// A clock cannot be read more exactly than the question takes.
				near := func(what string, got, want time.Time) {
					t.Helper()
					if apart := got.Sub(want).Abs(); apart > time.Second+time.Since(began) {
						t.Errorf("%s it ends at %v, %v from %v", what, got, apart, want)
					}
				}
				if err := r.SetOverride(t.Context(), "a", discovery.Override{State: discovery.StateDraining, Until: ends}); err != nil {
					t.Fatal(err)
				}
				raw, err := s.Client().HGet(t.Context(), r.client.config.overridesKey(), "a").Result()
				if err != nil {
					t.Fatal(err)
				}
				written, err := discovery.ParseOverride([]byte(raw))
				if err != nil {
					t.Fatal(err)
				}
				near("in the hash", written.Until, ends.Add(ahead))

				reader := openRegistry(t, c)
				all, err := reader.Overrides(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				near("as read", all["a"].Until, ends)
				listed, events, done := watchEvents(t, reader)
				near("as listed", listed[0].Overrides["a"].Until, ends)

				// The clock is put right, by which what stands there means another time.
				s.SetClock(0)
				for {
					e := nextEvent(t, events, done)
					if e.Type == discovery.Overridden {
						near("by another clock", e.Overrides["a"].Until, ends.Add(ahead))
						break
					}
				}
				// Nothing more is told while neither clock is set.
				if err := r.SetOverride(t.Context(), "b", discovery.Override{State: discovery.StateDraining}); err != nil {
					t.Fatal(err)
				}
				for {
					e := nextEvent(t, events, done)
					if e.Type == discovery.Overridden {
						if len(e.Overrides) != 2 {
							t.Errorf("told %v again", e.Overrides)
						}
						break
					}
				}
			})
		}
	}
}

// TestOverridesWithoutTheServersClock: a user who may not ask for the time goes by
// the clock of this machine.
func TestOverridesWithoutTheServersClock(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t, redistest.Clock(), redistest.User("u", "on >pw ~* &* +@all -time"))
	s.SetClock(20 * time.Minute)
	r := openRegistry(t, Config{URLs: []string{s.URL()}, Layout: LayoutKeys, Username: "u", Password: "pw"})
	ends := time.Now().Add(15 * time.Minute)
	if err := r.SetOverride(t.Context(), "a", discovery.Override{State: discovery.StateDraining, Until: ends}); err != nil {
		t.Fatal(err)
	}
	all, err := r.Overrides(t.Context())
	if err != nil || !all["a"].Until.Equal(ends) {
		t.Errorf("read %v, %v, want one until %v", all, err, ends)
	}
}
