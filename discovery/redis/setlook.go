package redis

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// How long a member that is too long counts as being there because as many as
	// before have its score. To look at it costs the server a copy of it.
	longInterval = time.Minute
	// maxLong is of how many scores that may be known.
	maxLong = 64
	// In how many ranges of scores a look that wants what is missing compares numbers of
	// members. One that differs is read: of 10,000 members some 80.
	gapRanges = 128
)

var lookScript = newScript("look.lua")

// A setLook is one look at the set: what it is for, and what it has read.
type setLook struct {
	keys []string // of the script
	args []any

	whole   bool
	least   uint64  // the sequence was already here before
	since   float64 // the lowest score that a partial look would have read
	started time.Time
	ranges  []scoreRange
	compare bool        // numbers of members by ranges with what is known
	known   []string    // scores that only members had that were too long
	before  longMembers // those members
	afresh  bool        // nothing is known of them any more

	took    time.Duration
	clock   float64 // the server's, in ms
	epoch   epoch
	seq     uint64
	last    string // id of the stream's last entry; "": it may not be read
	count   int    // members of the set
	members []foundMember
	gaps    bool // every member that is missing shows: the ranges in which some are were read
	long    longMembers
	alike   map[string]int // how often a made-up text came
}

// A foundMember is a member as a look has found it.
type foundMember struct {
	text  string
	score float64
	long  int // the length of one that is too long to be read, of which the text is made up; else 0
}

// longMembers are those that looks found and did not read, by their score, as the
// server writes it.
type longMembers map[string][]foundMember

// largest returns the scores of the largest of them, in order.
func (l longMembers) largest() []string {
	size := func(score string) (n int) {
		for _, m := range l[score] {
			n += m.long
		}
		return n
	}
	scores := slices.SortedFunc(maps.Keys(l), func(a, b string) int {
		return cmp.Or(cmp.Compare(size(b), size(a)), cmp.Compare(a, b))
	})
	scores = scores[:min(len(scores), maxLong)]
	slices.SortFunc(scores, func(a, b string) int { return cmp.Compare(l[a][0].score, l[b][0].score) })
	return scores
}

// prepare returns a look for what the request asks for.
func (v *setView) prepare(q request) *setLook {
	l := &setLook{
		keys:    []string{v.keys.set, v.keys.changes, v.keys.meta},
		whole:   q.whole || len(v.members) <= smallSet || time.Since(v.wholeAt) >= wholeInterval,
		least:   max(v.seq, v.streamed),
		since:   v.clock - float64(v.margin.Milliseconds()),
		started: time.Now(),
		before:  v.long,
		long:    make(longMembers),
		alike:   make(map[string]int),
	}
	if v.narrow {
		l.keys = l.keys[:1]
	}
	lowest := "-inf"
	if !l.whole {
		lowest = strconv.FormatFloat(l.since, 'f', 0, 64)
	}
	// Where the stream begins matters to the listing; and whether it may be read,
	// where it is not.
	last := "0"
	if !v.listed || !v.streams {
		last = "1"
	}
	if l.compare = q.gaps && !l.whole; l.compare {
		l.ranges = v.scoreRanges(l.since)
	}
	l.args = []any{lowest, last, discovery.MaxRecord, maxRead, usualRecord, maxMembers, len(l.ranges)}
	for _, r := range l.ranges {
		l.args = append(l.args, strconv.FormatFloat(r.end, 'f', -1, 64), r.members)
	}
	if l.afresh = l.whole && time.Since(v.longAt) >= longInterval; l.afresh {
		return l
	}
	for _, score := range l.before.largest() {
		if l.whole || l.before[score][0].score >= l.since {
			l.known = append(l.known, score)
			l.args = append(l.args, score, len(l.before[score]))
		}
	}
	return l
}

// A scoreRange has the members with scores below its end, from that of the range before
// it on.
type scoreRange struct {
	end     float64
	members int // that are known
	read    bool
}

// scoreRanges returns ranges of about as many of the known members each, for scores below
// the highest.
func (v *setView) scoreRanges(highest float64) []scoreRange {
	scores := make([]float64, 0, len(v.members))
	for _, m := range v.members {
		if m.score < highest {
			scores = append(scores, m.score)
		}
	}
	slices.Sort(scores)
	var ranges []scoreRange
	for before, step := 0, max(len(scores)/gapRanges, 1); before < len(scores); {
		next := min(before+step, len(scores))
		for next < len(scores) && scores[next] == scores[next-1] {
			next++
		}
		end := highest
		if next < len(scores) {
			end = scores[next]
		}
		ranges = append(ranges, scoreRange{end: end, members: next - before})
		before = next
	}
	return ranges
}

// readRanges notes in how many ranges members are missing, or new, and which were read.
func (l *setLook) readRanges(differ int, read []int64) {
	for _, i := range read {
		if i >= 0 && int(i) < len(l.ranges) {
			l.ranges[i].read = true
		}
	}
	l.gaps = l.compare && differ == len(read)
}

// lacks reports whether a member with this score would have been read if it were there.
func (l *setLook) lacks(score float64) bool {
	if l.whole || score >= l.since {
		return true
	}
	i, _ := slices.BinarySearchFunc(l.ranges, score, func(r scoreRange, score float64) int {
		if r.end <= score {
			return -1
		}
		return 1
	})
	return i < len(l.ranges) && l.ranges[i].read
}

// ask reads members, and where in the sequence of changes that is.
func (l *setLook) ask(ctx context.Context, c *client) error {
	began := time.Now()
	answer, err := ask(ctx, c, func(ctx context.Context) (any, error) {
		return lookScript.run(ctx, c.commands, l.keys, l.args...)
	})
	l.took = time.Since(began)
	if err == nil {
		err = l.read(answer)
	}
	if err != nil {
		return fmt.Errorf("looking at the set: %w", err)
	}
	return nil
}

// read reads what the script answered.
func (l *setLook) read(answer any) error {
	parts := listOf[any](answer)
	if len(parts) != 9 {
		return fmt.Errorf("%w: the script answered %d parts", discovery.ErrUnsupported, len(parts))
	}
	if at := timeOf(parts[0]); !at.IsZero() {
		l.clock = float64(at.UnixMicro()) / 1e3
	}
	l.epoch = epoch(as[string](parts[1]))
	l.seq, _ = strconv.ParseUint(as[string](parts[2]), 10, 64)
	l.last, l.count = as[string](parts[3]), int(as[int64](parts[4]))
	for _, page := range listOf[[]any](parts[5]) {
		if err := l.readPage(page); err != nil {
			return err
		}
	}
	l.readRanges(int(as[int64](parts[7])), listOf[int64](parts[8]))
	return l.readSkipped(listOf[int64](parts[6]))
}

// readPage reads members and their scores.
func (l *setLook) readPage(page []any) error {
	for i := 0; i+1 < len(page); i += 2 {
		score := as[string](page[i+1])
		at, err := strconv.ParseFloat(score, 64)
		if err != nil {
			return fmt.Errorf("%w score %q: %w", discovery.ErrInvalid, score, err)
		}
		switch m := page[i].(type) {
		case string:
			l.members = append(l.members, foundMember{text: m, score: at})
		case []any:
			if long, ok := readLong(m, at); ok {
				l.addLong(long)
				l.long[score] = append(l.long[score], long)
			}
		}
	}
	return nil
}

// readLong reads what stands in the place of a member that is too long.
func readLong(answer []any, score float64) (foundMember, bool) {
	if len(answer) != 3 {
		return foundMember{}, false
	}
	length := as[int64](answer[0])
	text := fmt.Sprintf("%s%d %s %s", nameless, length, as[string](answer[1]), as[string](answer[2]))
	return foundMember{text, score, int(length)}, length > 0
}

// readSkipped adds the members of scores at which the server looked no further.
// What is known of the others' was read anew.
func (l *setLook) readSkipped(skipped []int64) error {
	if len(skipped) != len(l.known) {
		return fmt.Errorf("%w: the script answered for %d scores of %d", discovery.ErrUnsupported, len(skipped), len(l.known))
	}
	for i, score := range l.known {
		if skipped[i] == 0 {
			continue
		}
		for _, m := range l.before[score] {
			l.addLong(m)
		}
		l.long[score] = l.before[score]
	}
	return nil
}

// addLong adds a member that is too long to be read.
func (l *setLook) addLong(m foundMember) {
	// Two that are alike where we looked are still two.
	if l.alike[m.text]++; l.alike[m.text] > 1 {
		m.text = fmt.Sprintf("%s #%d", m.text, l.alike[m.text])
	}
	l.members = append(l.members, m)
}
