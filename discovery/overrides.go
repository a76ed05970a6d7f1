package discovery

import (
	"maps"
	"math"
	"slices"
	"time"
)

// decisions are what operators have decided, as far as it is known.
type decisions struct {
	all     map[string]Override // by the node's id
	known   time.Time           // when they were told of last; the zero time for never
	listing uint64              // the watch that did
}

// of returns the override of a node that is in force.
func (d *decisions) of(id string) Override {
	if o := d.all[id]; !o.Ended(time.Now()) {
		return o
	}
	return Override{}
}

// usable returns the overrides that can be of nodes, in the order of their ids no more
// than there may be nodes.
func usable(all map[string]Override) map[string]Override {
	bad := func(id string, o Override) bool { return ValidateID(id) != nil || o.Validate() != nil }
	good := len(all) <= MaxNodes
	for id, o := range all {
		good = good && !bad(id, o)
	}
	if good {
		return all
	}
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
	old := l.decisions.all
	all = usable(all)
	l.decisions = decisions{all: all, known: time.Now(), listing: l.listing}
	for id := range old {
		if _, stands := all[id]; !stands {
			l.applyOverride(id)
		}
	}
	l.applyOverrides()
	if l.everyNode && !maps.EqualFunc(old, all, Override.Equal) {
		l.keep()
	}
}

// applyOverrides brings the nodes in line with the overrides, and comes back when
// the next one ends.
func (l *loop) applyOverrides() {
	now, next := time.Now(), time.Duration(math.MaxInt64)
	for id, o := range l.decisions.all {
		l.applyOverride(id)
		if !o.Until.IsZero() && !o.Ended(now) {
			next = min(next, o.Until.Sub(now))
		}
	}
	l.overrideEnd.Stop()
	if next != math.MaxInt64 {
		// By the wall clock, which may be set meanwhile: look again in time.
		l.overrideEnd.Reset(min(next, time.Minute))
	}
}

func (l *loop) applyOverride(id string) {
	if t := l.memory.byID[id]; t != nil && t.doubt == restored {
		if next := t.entry.under(l.decisions.of(id)); next != t.entry {
			t.entry = next.in(restored)
			l.recalled[id] = t.entry
		}
	}
	t := l.table.nodes[id]
	if t == nil {
		return
	}
	if next := t.entry.under(l.decisions.of(id)); next != t.entry {
		was := t.entry
		t.entry = next.in(t.doubt)
		l.joinAnew(was, t.entry)
		l.change(id, t.entry)
		l.note(ChangeUpdated, t.entry, "operator: "+next.override.String())
	}
}
