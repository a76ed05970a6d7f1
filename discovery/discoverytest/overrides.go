package discoverytest

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// overrides holds that a watch begins with what operators decided, and tells of
// what they decide while it runs.
func overrides(s *suite) {
	r := s.open()
	operator, ok := discovery.As[discovery.Overrider](r)
	if !ok {
		return
	}
	ctx := s.within()
	s.announce(r, s.node("a"), s.node("b"))
	if err := errors.Join(
		operator.SetOverride(ctx, "a", discovery.Override{State: discovery.StateDraining}),
		operator.SetOverride(ctx, "not-listed", discovery.Override{Weight: new(0.5)}),
	); err != nil {
		s.Fatal(err)
	}
	w := s.watch(s.open())
	told := func(want string) {
		s.Helper()
		w.until("the overrides "+want, func(e discovery.Event) bool {
			return e.Type == discovery.Overridden && fmt.Sprint(e.Overrides) == want
		})
	}
	const both = "map[a:state draining not-listed:weight × 0.5]"
	if e := w.next("the overrides"); e.Type != discovery.Overridden || fmt.Sprint(e.Overrides) != both {
		s.Error("something came before the overrides")
		told(both)
	}
	if err := operator.ClearOverride(ctx, "not-listed"); err != nil {
		s.Fatal(err)
	}
	told("map[a:state draining]")
	if err := operator.ClearOverride(ctx, "a"); err != nil {
		s.Fatal(err)
	}
	told("map[]")
	// On one machine there is one clock, and no question can make it two: what has an
	// end keeps it to the nanosecond.
	ends := discovery.Override{State: discovery.StateDraining, Until: time.Now().Add(15 * time.Minute)}
	if err := operator.SetOverride(ctx, "a", ends); err != nil {
		s.Fatal(err)
	}
	if all, err := operator.Overrides(ctx); err != nil || !all["a"].Equal(ends) {
		s.Errorf("read %v, %v, want %v", all, err, ends)
	}
	e := w.until("an override with an end", func(e discovery.Event) bool { return e.Type == discovery.Overridden })
	if !e.Overrides["a"].Equal(ends) {
		s.Errorf("told until %v, want %v", e.Overrides["a"].Until, ends.Until)
	}
	w.end()
}

// overridesOutliveRestart holds that a node which an operator drained gets no
// requests from a proxy that starts while the registry is away, nor when it is back.
func overridesOutliveRestart(s *suite) {
	r := s.open()
	operator, ok := discovery.As[discovery.Overrider](r)
	if !ok {
		return
	}
	ctx := s.within()
	s.announce(r, s.node("a"), s.node("b"))
	if err := operator.SetOverride(ctx, "a", discovery.Override{State: discovery.StateDraining}); err != nil {
		s.Fatal(err)
	}
	o := discovery.Options{
		WarmStart: discovery.WarmStart{Path: filepath.Join(s.TempDir(), "nodes.json"), Registry: "suite"},
		Probe:     func(context.Context, string) error { return nil },
	}
	// idle follows a directory until a condition holds, and holds that a never serves.
	idle := func(d *discovery.Directory, what string, ok func(*discovery.Snapshot) bool) {
		s.Helper()
		s.until(d, what, func(snap *discovery.Snapshot) bool {
			if e := snap.Node("a"); e != nil && e.Serves() {
				s.Errorf("%s: the drained node serves", what)
			}
			return ok(snap)
		})
	}
	both := func(snap *discovery.Snapshot) bool { return snap.Node("a") != nil && snap.Node("b") != nil }
	d, stop := s.start(o)
	idle(d, "both are listed", both)
	stop()
	s.h.Break(s.T)
	d, stop = s.start(o)
	defer func() { stop() }()
	d.Restore()
	idle(d, "both are restored", both)
	s.h.Restore(s.T)
	idle(d, "the registry is back", func(snap *discovery.Snapshot) bool { return snap.Synced && both(snap) })
	s.eventually("the override is taken back", func() bool { return operator.ClearOverride(ctx, "a") == nil })
	s.until(d, "a serves again", func(snap *discovery.Snapshot) bool { return snap.Node("a") != nil && snap.Node("a").Serves() })
}
