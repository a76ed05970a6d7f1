package natskv

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// aDayAhead makes the registry believe what is not so of the server's clock.
func aDayAhead(r *Registry) {
	now := time.Now()
	r.clock.Observe(now.Add(24*time.Hour), now, now)
}

// TestOverridesEndByTheServersClock holds that the server is asked for its time
// before anything is converted: what is written, read and told is right although
// what was known of its clock before is not.
func TestOverridesEndByTheServersClock(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r, err := Open(Config{URLs: []string{s.URL()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	want := discovery.Override{State: discovery.StateDraining, Until: time.Now().Add(15 * time.Minute)}

	aDayAhead(r)
	if err := r.SetOverride(ctx, "a", want); err != nil {
		t.Fatal(err)
	}
	entry, err := s.KeyValue("catga_nodes_overrides").Get(ctx, encode("a"))
	if err != nil {
		t.Fatal(err)
	}
	if written, err := discovery.ParseOverride(entry.Value()); err != nil || !written.Equal(want) {
		t.Errorf("written %s, %v, want %v", entry.Value(), err, want)
	}

	aDayAhead(r)
	if all, err := r.Overrides(ctx); err != nil || !all["a"].Equal(want) {
		t.Errorf("read %v, %v, want %v", all, err, want)
	}

	aDayAhead(r)
	ctx, stop := context.WithCancel(ctx)
	told := false
	err = r.Watch(ctx, func(e discovery.Event) {
		switch e.Type {
		case discovery.Overridden:
			told = true
			if !e.Overrides["a"].Equal(want) {
				t.Errorf("told %v, want %v", e.Overrides, want)
			}
		case discovery.Synced:
			stop()
		default:
		}
	})
	if !errors.Is(err, context.Canceled) || !told {
		t.Errorf("Watch returned %v, want the overrides", err)
	}
}

// TestOverridesWhenAClockIsSet: what has been told is told again by the other clock,
// and only then.
func TestOverridesWhenAClockIsSet(t *testing.T) {
	t.Parallel()
	clock := new(discovery.RegistryClock)
	o := newOverridesWatcher(&session{clock: clock})
	now := time.Now()
	stands := map[string]discovery.Override{"a": {State: discovery.StateDraining, Until: now}}
	for _, step := range []struct {
		what       string
		ahead      time.Duration
		told       bool
		endsBefore time.Duration
	}{
		{"at first", 20 * time.Minute, true, 20 * time.Minute},
		{"again", 20 * time.Minute, false, 0},
		{"with some jitter", 20*time.Minute + 800*time.Millisecond, false, 0},
		{"by another clock", -20 * time.Minute, true, -20 * time.Minute},
		{"by one like ours", 0, true, 0},
	} {
		clock.Observe(now.Add(step.ahead), now, now)
		o.offer(stands)
		told := o.pending()
		if (told != nil) != step.told {
			t.Errorf("%s: told %v", step.what, told)
		}
		if want := now.Add(-step.endsBefore); told != nil && !told["a"].Until.Equal(want) {
			t.Errorf("%s: it ends at %v, want %v", step.what, told["a"].Until, want)
		}
	}
}
