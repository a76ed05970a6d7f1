package redis

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A setWatcher applies looks at a set that the test makes up.
type setWatcher struct {
	*setView
	t      *testing.T
	events []discovery.Event
}

func newSetWatcher(t *testing.T, l *sortedSet) *setWatcher {
	w := &setWatcher{t: t}
	w.setView = newSetView(l, &feed{emit: func(e discovery.Event) { w.events = append(w.events, e) }})
	return w
}

// found is the member of a node with its record of some number.
func found(id string, beat int) foundMember {
	return foundMember{text: foreignRecord(id, beat), score: float64(time.Now().UnixMilli() + int64(beat))}
}

// see applies a look that has found the members, in a set of count. It returns what is to
// be looked at next, and what was emitted.
func (w *setWatcher) see(whole bool, count int, members ...foundMember) (next request, events string) {
	w.t.Helper()
	l := w.prepare(request{whole: whole})
	l.whole, l.count, l.members = whole, count, members
	w.events = nil
	next, err := w.apply(l)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range w.events {
		events += fmt.Sprint(e.Type, " ", e.ID, ",")
	}
	return next, events
}

func (w *setWatcher) expect(what string, whole bool, after time.Duration, events string) func(request, string) {
	return func(next request, got string) {
		w.t.Helper()
		if got != events || next.whole != whole || next.after != after || next.none() != (!whole && after == 0) {
			w.t.Fatalf("%s: emitted %q, next %+v; want %q, whole %v after %v", what, got, next, events, whole, after)
		}
	}
}

// left is what the Left of a node looks like in what see returns.
func left(id string) string { return fmt.Sprint(discovery.Left, " ", id, ",") }

// TestMissingRecord: a node whose record is missing has left when a second look some tens
// of milliseconds later, which accounts for every member of the set, still lacks it.
func TestMissingRecord(t *testing.T) {
	t.Parallel()
	for name, then := range map[string]func(w *setWatcher, a, b foundMember){
		"gone": func(w *setWatcher, a, b foundMember) {
			time.Sleep(absence)
			w.expect("the second look", false, 0, left("b"))(w.see(false, 1))
		},
		"gone, by a look at everything": func(w *setWatcher, a, b foundMember) {
			time.Sleep(absence)
			w.expect("the second look", false, 0, left("b"))(w.see(true, 1, a))
		},
		"another look comes too early": func(w *setWatcher, a, b foundMember) {
			time.Sleep(absence - time.Millisecond)
			w.expect("the early look", false, absence, "")(w.see(true, 1, a))
			time.Sleep(time.Millisecond)
			w.expect("the next look", false, 0, left("b"))(w.see(false, 1))
		},
		"replaced": func(w *setWatcher, a, b foundMember) {
			time.Sleep(absence)
			w.expect("the second look", false, 0, fmt.Sprint(discovery.Put, " b,"))(w.see(false, 2, found("b", 1)))
		},
		"back, with an old score": func(w *setWatcher, a, b foundMember) {
			time.Sleep(absence)
			if next, events := w.see(false, 2); !next.gaps || !next.soon || next.whole || events != "" {
				t.Errorf("the partial look: next %+v, events %q, want one for what is missing", next, events)
			}
			w.expect("the whole look", false, 0, fmt.Sprint(discovery.Put, " b,"))(w.see(true, 2, a, b))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w, a, b := newSetWatcher(t, new(sortedSet)), found("a", 0), found("b", 0)
				w.see(true, 2, a, b)
				next, events := w.see(true, 1, a)
				w.expect("the first look", false, absence, "")(next, events)
				if !next.soon {
					t.Error("the second look waits until the server has had a rest")
				}
				then(w, a, b)
			})
		})
	}
}

// TestOlderRecordInPlace: where an older record stands in the place of the one that is
// missing, a look at everything decides.
func TestOlderRecordInPlace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newSetWatcher(t, new(sortedSet))
		a, older, newer := found("a", 0), found("b", 0), found("b", 1)
		w.see(true, 3, a, older, newer)
		w.expect("the first look", true, absence, "")(w.see(true, 2, a, older))
		time.Sleep(absence)
		w.expect("a partial look", true, absence, "")(w.see(false, 2))
		w.expect("a look at everything", false, 0, left("b")+fmt.Sprint(discovery.Put, " b,"))(w.see(true, 2, a, older))
	})
}

// TestSlowReplacement: a writer that takes long between removing a record and adding the
// next one drops its node once, and no other after that, in this watch and the next.
func TestSlowReplacement(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		set := new(sortedSet)
		w := newSetWatcher(t, set)
		a, b := found("a", 0), found("b", 0)
		w.see(true, 2, a, b)
		w.see(true, 1, a)
		time.Sleep(absence)
		w.expect("it is gone", false, 0, left("b"))(w.see(false, 1))
		time.Sleep(longAbsence / 2)
		next := found("b", 1)
		w.see(false, 2, next)
		for range 2 {
			w.expect("it is missing again", false, longAbsence, "")(w.see(true, 1, a))
			time.Sleep(absence)
			w.expect("for as long as before", false, longAbsence, "")(w.see(false, 1))
			time.Sleep(longAbsence - absence)
			w.expect("for long", false, 0, left("b"))(w.see(false, 1))
			time.Sleep(longAbsence)
			w.listed = true
			w.remember()
			w = newSetWatcher(t, set)
			w.see(true, 2, a, next)
		}
	})
}
