package discovery

import (
	"maps"
	"math"
	"slices"
	"time"
)

// overrides are those that operators have set, as far as it is known.
type overrides struct {
	all   map[string]Override // by the node's id
	known time.Time           // when they were told of last; the zero time for never
	watch uint64              // the watch that did
	end   *time.Timer         // when the next one of them may end
}

// of returns the override of a node that is in force.
func (o *overrides) of(id string) Override {
	if override := o.all[id]; !override.Ended(time.Now()) {
		return override
	}
	return Override{}
}

// armEnd sets the timer to when the next one ends.
func (o *overrides) armEnd() {
	now, next := time.Now(), time.Duration(math.MaxInt64)
	for _, override := range o.all {
		if !override.Until.IsZero() && !override.Ended(now) {
			next = min(next, override.Until.Sub(now))
		}
	}
	o.end.Stop()
	if next != math.MaxInt64 {
		// By the wall clock, which may be set meanwhile: look again in time.
		o.end.Reset(min(next, time.Minute))
	}
}

// usable returns the overrides that can be of nodes, in the order of their ids no more
// than there may be nodes.
func usable(all map[string]Override) map[string]Override {
	bad := func(id string, o Override) bool { return ValidateID(id) != nil || o.Validate() != nil }
	kept := maps.Clone(all) // the watch may still use it
	maps.DeleteFunc(kept, bad)
	if len(kept) > MaxNodes {
		for _, id := range slices.Sorted(maps.Keys(kept))[MaxNodes:] {
			delete(kept, id)
		}
	}
	return kept
}

// setOverrides takes up all the overrides there are.
func (l *loop) setOverrides(all map[string]Override) {
	old, o := l.overrides.all, &l.overrides
	o.all, o.known, o.watch = usable(all), time.Now(), l.watch.number
	for id := range old {
		l.applyOverride(id)
	}
	l.applyOverrides()
	if l.watch.listedOnce() && !maps.EqualFunc(old, o.all, Override.Equal) {
		l.saver.changed()
	}
}

// applyOverrides brings the nodes in line with the overrides, and comes back when
// the next one ends.
func (l *loop) applyOverrides() {
	for id := range l.overrides.all {
		l.applyOverride(id)
	}
	l.overrides.armEnd()
}

func (l *loop) applyOverride(id string) {
	l.restorer.overridden(id)
	t := l.table.nodes[id]
	if t == nil {
		return
	}
	if next := t.entry.under(l.overrides.of(id)); next != t.entry {
		was := t.entry
		l.show(t, next.in(t.presence))
		l.join(was, t.entry)
		l.reporter.node(ChangeUpdated, t.entry, "operator: "+next.override.String())
	}
}
