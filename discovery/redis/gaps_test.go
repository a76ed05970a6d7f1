package redis

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

func TestScoreRanges(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, 2, 127, 128, 129, 5000} {
		for _, spread := range []int{1, 3, 10_000} {
			v := &setView{members: make(map[string]*member)}
			counted := 0
			const highest = 5_000
			for i := range n {
				score := float64(rand.IntN(spread))
				if v.members[fmt.Sprint(i)] = (&member{foundMember: foundMember{score: score}}); score < highest {
					counted++
				}
			}
			ranges := v.scoreRanges(highest)
			if len(ranges) > 2*gapRanges {
				t.Errorf("%d members: %d ranges", n, len(ranges))
			}
			before, sum := -1.0, 0
			for _, r := range ranges {
				in := 0
				for _, m := range v.members {
					if m.score >= before && m.score < r.end {
						in++
					}
				}
				if in != r.members || r.end <= before || r.end > highest {
					t.Fatalf("the range from %v to %v has %d members, want %d", before, r.end, r.members, in)
				}
				before, sum = r.end, sum+in
			}
			if sum != counted {
				t.Errorf("the ranges have %d of %d members", sum, counted)
			}
			l := &setLook{since: highest, ranges: ranges}
			if len(ranges) > 1 {
				l.ranges[1].read = true
				for _, m := range v.members {
					want := m.score >= highest || m.score >= ranges[0].end && m.score < ranges[1].end
					if l.lacks(m.score) != want {
						t.Errorf("a member at %v is read: %v, want %v", m.score, !want, want)
					}
				}
			}
		}
	}
}

// TestGapsNeedNoLookAtEverything has a look at a large set read only where the number of
// members differs.
func TestGapsNeedNoLookAtEverything(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newSetWatcher(t, new(sortedSet))
		var all []foundMember
		for i := range 3 * smallSet {
			m := found(fmt.Sprintf("n%04d", i), 0)
			m.score -= float64((3*smallSet - i) * 1000)
			all = append(all, m)
		}
		w.clock = all[len(all)-1].score + 10_000
		w.see(true, len(all), all...)
		w.clock = all[len(all)-1].score + 10_000
		if next, _ := w.see(false, len(all)-1); !next.gaps || next.whole {
			t.Fatalf("one is missing: next %+v, want a look at what is missing", next)
		}
		w.clock = all[len(all)-1].score + 10_000
		l := w.prepare(request{some: true, gaps: true})
		if l.whole || len(l.ranges) < gapRanges/2 {
			t.Fatalf("the look is at everything, or compares %d ranges", len(l.ranges))
		}
		const missing = 400
		lower := 0.0
		for i, r := range l.ranges {
			if all[missing].score >= lower && all[missing].score < r.end {
				for j, m := range all {
					if m.score >= lower && m.score < r.end && j != missing {
						l.members = append(l.members, m)
					}
				}
				l.readRanges(1, []int64{int64(i)})
			}
			lower = r.end
		}
		l.count = len(all) - 1
		next, err := w.apply(l)
		if err != nil || next.whole || next.gaps || next.after != absence || len(w.events) > 0 {
			t.Fatalf("next %+v, %v, events %v, want a partial look after %v", next, err, w.events, absence)
		}
		time.Sleep(absence)
		if _, events := w.see(false, len(all)-1); events != left("n0400") {
			t.Errorf("the second look emits %q, want that the one left", events)
		}
		// Where too many ranges differ, everything is looked at.
		w.clock = all[len(all)-1].score + 10_000
		l = w.prepare(request{some: true, gaps: true})
		l.readRanges(gapRanges/2, nil)
		l.count = len(all) - 200
		if next, err := w.apply(l); err != nil || !next.whole {
			t.Errorf("next %+v, %v, want a look at everything", next, err)
		}
	})
}

// TestForeignLeavesOfALargeSet has some of many members removed by a writer that runs no
// script of ours, while others are replaced, old records, too: those that were removed
// leave, and nobody else.
func TestForeignLeavesOfALargeSet(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t, redistest.Notify("Kz"))
	const nodes = 2_000
	ctx := context.Background()
	for i := range nodes {
		addMember(t, s.Client(), foreignRecord(fmt.Sprint("n", i), 0), time.Duration(10+i%300)*time.Second)
	}
	_, events, done := watchEvents(t, openRegistry(t, Config{URLs: []string{s.URL()}}))
	var want, got []string
	for i := 0; i < nodes; i += 17 {
		id := fmt.Sprint("n", i)
		if i%3 == 0 { // its record is replaced, by one that is as old
			addMember(t, s.Client(), foreignRecord(id, 1), time.Duration(10+i%300)*time.Second)
			if err := s.Client().ZRem(ctx, DefaultKey, foreignRecord(id, 0)).Err(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want = append(want, id)
		if err := s.Client().ZRem(ctx, DefaultKey, foreignRecord(id, 0)).Err(); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 { // one after the other, and some together
			for len(got) < len(want) {
				if e := nextEvent(t, events, done); e.Type == discovery.Left {
					got = append(got, e.ID)
				}
			}
		}
	}
	for len(got) < len(want) {
		if e := nextEvent(t, events, done); e.Type == discovery.Left {
			got = append(got, e.ID)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("left: %v, want %v", got, want)
	}
}
