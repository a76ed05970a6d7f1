package redis

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	goredis "github.com/redis/go-redis/v9"
)

const (
	// Sets up to this size are always looked at whole: it takes the server a
	// tenth of a millisecond.
	smallSet = 256
	// A partial look reads what has a score from this long before the last
	// look; writers' clocks differ. Whole looks find those that differ by more,
	// and widen it.
	minMargin = 2 * time.Second
	maxMargin = 10 * time.Minute
	// How long partial looks are enough.
	wholeInterval = 5 * time.Second
	// How long the stream may lag behind what looks have found in it.
	streamLag = 2 * time.Second
	// How long a member that is too long counts as being there because as many as
	// before have its score. To look at it costs the server a copy of it.
	longInterval = time.Minute
	// maxLong is of how many scores that may be known.
	maxLong = 64
)

// Bounds of what one look reads.
const (
	// maxRead is how many bytes of records are read without a question; a hundred
	// thousand usual ones are a fourth of it.
	maxRead = 128 << 20
	// usualRecord is the longest record that is read when there are more. It bounds
	// the rest without a judgement about who may be listed.
	usualRecord = 1 << 10
	// maxMembers is how many members are read. Those of nodes that come and go
	// twice as often as a directory has room for are among the newest.
	maxMembers = 2 * discovery.MaxNodes
)

// sortedSet is the layout of one sorted set.
type sortedSet struct {
	r                                   *Registry
	set, members, leases, changes, meta string

	mu       sync.Mutex
	previous map[string]bool // the nodes that the last watch knew at its end
}

func newSortedSet(r *Registry) *sortedSet {
	c := r.config
	return &sortedSet{
		r: r, set: c.Key,
		members: c.side("members"), leases: c.side("leases"), changes: c.side("changes"), meta: c.side("meta"),
	}
}

func (l *sortedSet) keys() []string {
	return []string{l.set, l.members, l.leases, l.changes, l.meta}
}

func (l *sortedSet) Announce(ctx context.Context, n discovery.Node) error {
	now := time.Now()
	record, err := discovery.AppendRecord(nil, n, now)
	if err != nil {
		return err
	}
	return l.r.do(ctx, func(ctx context.Context) error {
		_, err := announceScript.run(ctx, l.r.commands, l.keys(),
			n.ID, digest(n), record, n.LeaseOr(discovery.DefaultTTL).Milliseconds(), l.r.config.History, rand.Text())
		return err
	})
}

func (l *sortedSet) Drain(ctx context.Context, n discovery.Node) (bool, error) {
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return false, err
	}
	return l.r.changed(ctx, func(ctx context.Context) (any, error) {
		return announceScript.run(ctx, l.r.commands, l.keys(),
			n.ID, digest(n), record, n.LeaseOr(discovery.DefaultTTL).Milliseconds(), l.r.config.History, rand.Text(), n.Instance())
	})
}

// changed calls a script that answers with a negative number if it has left the
// record as it was, because that is not the caller's own.
func (r *Registry) changed(ctx context.Context, call func(context.Context) (any, error)) (bool, error) {
	answers := make(chan any, 1) // the call may outlive its caller
	err := r.do(ctx, func(ctx context.Context) error {
		answer, err := call(ctx)
		answers <- answer
		return err
	})
	if err != nil {
		return false, err
	}
	n, ok := (<-answers).(int64)
	return ok && n >= 0, nil
}

// digest tells records apart that differ in more than the time: 16 characters.
func digest(n discovery.Node) string {
	record, _ := discovery.AppendRecord(nil, n, time.Time{})
	h := fnv.New64a()
	_, _ = h.Write(record)
	return fmt.Sprintf("%016x", h.Sum64())
}

func (l *sortedSet) Withdraw(ctx context.Context, n discovery.Node) error {
	return l.r.do(ctx, func(ctx context.Context) error {
		_, err := withdrawScript.run(ctx, l.r.commands, l.keys(), n.ID, n.Instance())
		return err
	})
}

func (l *sortedSet) record(ctx context.Context, id string) (string, error) {
	// The digest and a space come first: see announce.lua.
	const before = 17
	answer, err := recordScript.run(ctx, l.r.commands, []string{l.members}, id, before+discovery.MaxRecord)
	member, _ := answer.(string)
	return member[min(len(member), before):], err
}

// History reads the stream backwards, in parts, so that it keeps the server from
// nothing else.
func (l *sortedSet) History(ctx context.Context, id string, limit int) ([]discovery.Revision, error) {
	if limit <= 0 || limit > l.r.config.History {
		limit = l.r.config.History
	}
	const page = 1000
	var revisions []discovery.Revision
	for end := "+"; ; {
		var answer any
		err := l.r.do(ctx, func(ctx context.Context) (err error) {
			answer, err = historyScript.run(ctx, l.r.commands, []string{l.changes},
				id, end, page, limit-len(revisions), discovery.MaxRecord)
			return err
		})
		if err != nil {
			return nil, err
		}
		more, last, entries := readHistory(answer)
		for _, m := range entries {
			if e, err := parseEntry(m); err == nil && e.kind != entryOverride {
				revisions = append(revisions, e.revision())
			}
		}
		if len(revisions) >= limit || !more {
			return revisions, nil
		}
		end = before(last)
	}
}

// readHistory reads what the script answered: whether there may be more entries, the
// id of the last that it looked at, and those about the node.
func readHistory(answer any) (more bool, last string, entries []goredis.XMessage) {
	parts, _ := answer.([]any)
	if len(parts) != 3 {
		return false, "", nil
	}
	n, _ := parts[0].(int64)
	last, _ = parts[1].(string)
	found, _ := parts[2].([]any)
	for _, f := range found {
		entry, _ := f.([]any)
		if len(entry) != 2 {
			continue
		}
		m := goredis.XMessage{Values: make(map[string]any)}
		m.ID, _ = entry[0].(string)
		fields := listOf(entry[1])
		for i := 0; i+1 < len(fields); i += 2 {
			m.Values[fields[i]] = fields[i+1]
		}
		entries = append(entries, m)
	}
	return n == 1 && last != "", last, entries
}

// revision returns the entry as history.
func (e entry) revision() discovery.Revision {
	r := discovery.Revision{Number: e.seq, Time: e.time, Type: discovery.Put}
	switch e.kind {
	case entryLeft:
		r.Type = discovery.Left
	case entryExpired:
		r.Type = discovery.Expired
	default:
		if r.Node, r.Err = discovery.ParseNode([]byte(e.record)); r.Err != nil {
			r.Type, r.Node = discovery.Rejected, discovery.Node{}
		}
	}
	return r
}

// before returns the id before one of the stream. Redis understands "(" only
// from 6.2 on.
func before(id string) string {
	ms, seq, _ := strings.Cut(id, "-")
	if n, _ := strconv.ParseUint(seq, 10, 64); n > 0 {
		return ms + "-" + strconv.FormatUint(n-1, 10)
	}
	n, _ := strconv.ParseUint(ms, 10, 64)
	return strconv.FormatUint(n-1, 10) + "-18446744073709551615"
}

// Kinds of entries of the stream.
const (
	entryPut     = "put"
	entryLeft    = "left"
	entryExpired = "expired" // swept up long after its lease

	entryOverride = "override" // an operator decided, which is kept elsewhere
)

// entry is one change as our writers record it.
type entry struct {
	seq    uint64
	time   time.Time
	kind   string
	id     string
	score  float64
	record string
}

func parseEntry(m goredis.XMessage) (entry, error) {
	text := func(name string) string { s, _ := m.Values[name].(string); return s }
	e := entry{kind: text("type"), id: text("id"), record: text("record")}
	ms, _, _ := strings.Cut(m.ID, "-")
	at, err := strconv.ParseInt(ms, 10, 64)
	if err == nil {
		e.time = time.UnixMilli(at)
		e.seq, err = strconv.ParseUint(text("seq"), 10, 64)
	}
	if err == nil && e.kind == entryPut {
		e.score, err = strconv.ParseFloat(text("score"), 64)
	}
	if err != nil {
		return entry{}, fmt.Errorf("%w entry %s of the stream of changes: %w", discovery.ErrInvalid, m.ID, err)
	}
	return e, nil
}

// member is one member of the set. Several may carry one id.
type member struct {
	text  string
	score float64
	id    string // of its node; or a name made up for a record that has none
	err   error  // why it is rejected
	look  uint64 // the last look that found it
	seq   uint64 // of the entry of the stream that brought it, or 0
	node  *discovery.Node
	long  int // the length of one that is too long to be read; else 0

	unnamed *unnamed // of a record whose id cannot be read; else nil
}

// unnamed is what a record whose id cannot be read is called.
type unnamed struct {
	made  string // the name made up for it
	guess string // the id that its beginning names, if its node may stay by that; or ""
}

// nameless begins the names that are made up. No id may contain it.
const nameless = "\x00"

// parse reads the record. It is not kept longer than for one event: it would
// double what a large fleet takes.
func (m *member) parse(records *discovery.Parser) {
	var n discovery.Node
	err := tooLong(m.long)
	if m.long == 0 {
		n, err = records.Parse([]byte(m.text))
	}
	m.err, m.id, m.node = err, n.ID, nil
	if err == nil {
		m.node = &n
	}
	if n.ID == "" {
		h := fnv.New32a()
		_, _ = h.Write([]byte(m.text))
		m.unnamed = &unnamed{made: fmt.Sprintf("%s%08x", nameless, h.Sum32())}
		if guess := m.guess(); discovery.ValidateID(guess) == nil && !errors.Is(err, discovery.ErrForbidden) {
			m.unnamed.guess = guess
		}
		m.id = m.unnamed.made
	}
}

// guess returns the id that the beginning of a record names, to be shown, or "".
func (m *member) guess() string {
	if found := idAt.FindStringSubmatch(m.text[:min(len(m.text), 512)]); found != nil {
		return found[1]
	}
	return ""
}

// tooLong says why a record of so many bytes was not read.
func tooLong(length int) error {
	if length > discovery.MaxRecord {
		return discovery.Invalidf(discovery.FaultRecord, "record: %d bytes, want at most %d", length, discovery.MaxRecord)
	}
	return discovery.Invalidf(discovery.FaultRecord, "record: %d bytes, and at most %d are read where all records together are more than %d MiB",
		length, usualRecord, maxRead>>20)
}

// idAt finds the id in the beginning of a record that cannot be read.
var idAt = regexp.MustCompile(`(?i)"nodeId"\s*:\s*"([^"\\]{1,128})"`)

// longMember is one that a look found and did not read.
type longMember struct {
	text   string // made up: what tells it from others, and its beginning
	length int
}

// readLong reads what stands in the place of a member that is too long.
func readLong(answer []any) (longMember, bool) {
	if len(answer) != 3 {
		return longMember{}, false
	}
	length, _ := answer[0].(int64)
	sum, _ := answer[1].(string)
	beginning, _ := answer[2].(string)
	return longMember{text: fmt.Sprintf("%s%d %s %s", nameless, length, sum, beginning), length: int(length)}, length > 0
}

// node is what a watch knows of one id.
type node struct {
	id      string
	current *member
	seq     uint64    // of the newest entry of the stream about it
	seen    uint64    // until where in the sequence its record is known to stand
	missing time.Time // since when looks have not found its record; zero: it is there

	// Of the look that is being applied: the member with the highest score, and
	// whether it or its score is new.
	look    uint64
	best    *member
	changed bool
}

// setView is the view of one watch.
type setView struct {
	*sortedSet
	w      *watch
	client *goredis.Client // for what blocks

	records discovery.Parser
	members map[string]*member
	nodes   map[string]*node
	gone    map[string]uint64 // left by this entry of the stream, which a late look may not know

	listed      bool // the listing is complete
	narrow      bool // only the set may be read
	subscribed  bool // to notifications
	epoch       string
	streams     bool      // the stream is being read
	streamed    uint64    // the newest entry that was read
	lagging     time.Time // since when looks are ahead of the stream
	seq         uint64    // of the newest look
	looks       uint64
	clock       float64 // the server's, at the newest look; clockBefore: at the one before
	clockBefore float64
	margin      time.Duration
	wholeAt     time.Time
	long        map[string][]longMember // by score, as the server writes it: those that share it with no other
	longAt      time.Time               // when they were looked at last
}

func (l *sortedSet) watch(ctx context.Context, w *watch) (view, error) {
	v := &setView{
		sortedSet: l, w: w,
		members: make(map[string]*member), nodes: make(map[string]*node), gone: make(map[string]uint64),
		margin: minMargin,
	}
	options, err := l.r.ownerOptions(ctx, l.set)
	if err != nil {
		return nil, err
	}
	v.client = goredis.NewClient(options)
	w.closeWith(ctx, v.client)
	w.closers = append(w.closers, v.remember)
	return v, nil
}

// remember keeps what the watch knew at its end for the next one's listing.
func (v *setView) remember() {
	if !v.listed {
		return
	}
	ids := make(map[string]bool, len(v.nodes))
	for id, n := range v.nodes {
		if n.current.err == nil {
			ids[id] = true
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.previous = ids
}

func (v *setView) follow(ctx context.Context) (err error) {
	// Whether XREAD is allowed shows only in trying.
	err = v.r.do(ctx, func(ctx context.Context) error {
		err := v.client.XRead(ctx, &goredis.XReadArgs{Streams: []string{v.changes, "$"}, Count: 1, Block: -1}).Err()
		if err == goredis.Nil {
			return nil
		}
		return err
	})
	if v.streams, err = offered(err); err != nil {
		return fmt.Errorf("trying to read the stream of changes: %w", err)
	}
	notified, err := v.r.notifies(ctx, v.client, "z")
	if err != nil || !notified {
		return err
	}
	v.subscribed, err = offered(v.w.subscribe(ctx, v.client, false, fmt.Sprintf("__keyspace@%d__:%s", v.r.config.DB, v.set)))
	return err
}

func (v *setView) push() string {
	switch {
	case v.streams && v.subscribed:
		return "stream and notifications"
	case v.streams:
		return "stream"
	case v.subscribed:
		return "notifications"
	default:
		return "poll"
	}
}

// setLook is what one look found.
type setLook struct {
	whole   bool
	least   uint64  // the sequence was already here before
	since   float64 // the lowest score that a partial look would have read
	started time.Time

	clock  float64 // the server's, in ms
	epoch  string
	seq    uint64
	last   string // id of the stream's last entry; "": it may not be read
	count  int    // members of the set
	texts  []string
	scores []float64
	sizes  []int // of members that are too long, of which the texts are made up; else 0

	known     []string                // scores that only members had that were too long
	knownLong [][]longMember          // those members
	long      map[string][]longMember // by score; it is nobody else's
	afresh    bool                    // all such were looked at
	alike     map[string]int          // how often a made-up text came
}

func (v *setView) look(q request) func(context.Context) (any, error) {
	l := &setLook{
		whole:   q.whole || len(v.members) <= smallSet || time.Since(v.wholeAt) >= wholeInterval,
		least:   max(v.seq, v.streamed),
		since:   v.clock - float64(v.margin.Milliseconds()),
		started: time.Now(),
		long:    make(map[string][]longMember),
		afresh:  time.Since(v.longAt) >= longInterval,
	}
	lowest, keys := "-inf", []string{v.set, v.changes, v.meta}
	if v.narrow {
		keys = keys[:1]
	}
	if !l.whole {
		lowest = strconv.FormatFloat(l.since, 'f', 0, 64)
	}
	// Where the stream begins matters to the listing; and whether it may be read,
	// where it is not.
	last := "0"
	if !v.listed || !v.streams {
		last = "1"
	}
	args := []any{lowest, last, discovery.MaxRecord, maxRead, usualRecord, maxMembers}
	if l.afresh = l.afresh && l.whole; !l.afresh {
		for _, score := range v.longScores() {
			if at, _ := strconv.ParseFloat(score, 64); l.whole || at >= l.since {
				l.known, l.knownLong = append(l.known, score), append(l.knownLong, v.long[score])
				args = append(args, score, len(v.long[score]))
			}
		}
	}
	return func(ctx context.Context) (any, error) {
		var answer any
		err := v.r.do(ctx, func(ctx context.Context) (err error) {
			answer, err = lookScript.run(ctx, v.r.commands, keys, args...)
			return err
		})
		if err == nil {
			err = l.read(answer)
		}
		if err != nil {
			return nil, fmt.Errorf("looking at the set: %w", err)
		}
		return l, nil
	}
}

func (l *setLook) read(answer any) error {
	parts, _ := answer.([]any)
	if len(parts) != 7 {
		return fmt.Errorf("%w: the script answered %d parts", discovery.ErrUnsupported, len(parts))
	}
	list := func(v any) []any { l, _ := v.([]any); return l }
	if t := listOf(parts[0]); len(t) == 2 {
		sec, _ := strconv.ParseFloat(t[0], 64)
		usec, _ := strconv.ParseFloat(t[1], 64)
		l.clock = sec*1e3 + usec/1e3
	}
	l.epoch, _ = parts[1].(string)
	seq, _ := parts[2].(string)
	l.seq, _ = strconv.ParseUint(seq, 10, 64)
	l.last, _ = parts[3].(string)
	count, _ := parts[4].(int64)
	l.count = int(count)
	for _, page := range list(parts[5]) {
		if err := l.readPage(list(page)); err != nil {
			return err
		}
	}
	return l.readSkipped(list(parts[6]))
}

// readPage reads members and their scores.
func (l *setLook) readPage(page []any) error {
	for i := 0; i+1 < len(page); i += 2 {
		score, _ := page[i+1].(string)
		at, err := strconv.ParseFloat(score, 64)
		if err != nil {
			return fmt.Errorf("%w score %q: %w", discovery.ErrInvalid, score, err)
		}
		switch m := page[i].(type) {
		case string:
			l.add(m, at, 0)
		case []any:
			if long, ok := readLong(m); ok {
				l.add(long.text, at, long.length)
				l.long[score] = append(l.long[score], long)
			}
		}
	}
	return nil
}

// readSkipped adds the members of scores at which the server looked no further.
// What is known of the others' was read anew.
func (l *setLook) readSkipped(skipped []any) error {
	if len(skipped) != len(l.known) {
		return fmt.Errorf("%w: the script answered for %d scores of %d", discovery.ErrUnsupported, len(skipped), len(l.known))
	}
	for i, score := range l.known {
		n := l.knownLong[i]
		if skip, _ := skipped[i].(int64); skip == 0 {
			continue
		}
		at, err := strconv.ParseFloat(score, 64)
		if err != nil {
			return fmt.Errorf("%w score %q: %w", discovery.ErrInvalid, score, err)
		}
		for _, m := range n {
			l.add(m.text, at, m.length)
		}
		l.long[score] = n
	}
	return nil
}

func (l *setLook) add(text string, score float64, long int) {
	if long > 0 {
		// Two that are alike where we looked are still two.
		if l.alike == nil {
			l.alike = make(map[string]int)
		}
		if l.alike[text]++; l.alike[text] > 1 {
			text = fmt.Sprintf("%s #%d", text, l.alike[text])
		}
	}
	l.texts, l.scores, l.sizes = append(l.texts, text), append(l.scores, score), append(l.sizes, long)
}

func (v *setView) list(ctx context.Context) (discovery.Listing, error) {
	first, err := v.w.list(ctx, v)
	if errors.Is(err, discovery.ErrPermission) {
		// A user may be restricted to the set itself.
		v.narrow = true
		var again error
		if first, again = v.w.list(ctx, v); again == nil {
			err = nil
		}
	}
	if err != nil {
		return discovery.Listing{}, err
	}
	l := first.(*setLook)
	v.streams = v.streams && l.last != ""
	if l.epoch == "" && !v.narrow {
		if l.epoch, err = v.r.mark(ctx, v.meta); err != nil {
			return discovery.Listing{}, err
		}
	}
	v.epoch, v.streamed = l.epoch, l.seq
	if _, _, err := v.apply(l); err != nil {
		return discovery.Listing{}, err
	}
	if v.lacksPrevious() {
		// A record that is being replaced just now must not count as removed.
		select {
		case <-time.After(absence):
		case <-ctx.Done():
			return discovery.Listing{}, ctx.Err()
		}
		second, err := v.w.list(ctx, v)
		if err != nil {
			return discovery.Listing{}, err
		}
		if _, _, err := v.apply(second); err != nil {
			return discovery.Listing{}, err
		}
	}
	v.listed = true
	if v.streams {
		v.w.read(ctx, v.client, v.changes, l.last)
	}
	listing := discovery.Listing{Epoch: v.epoch, Revision: v.seq}
	if v.epoch == "" {
		// We may not leave a mark, so the newest score must do: a server that
		// was emptied has none.
		for _, m := range v.members {
			listing.Revision = max(listing.Revision, uint64(max(m.score, 0)))
		}
	}
	return listing, nil
}

func (v *setView) lacksPrevious() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	for id := range v.previous {
		if v.nodes[id] == nil {
			return true
		}
	}
	return false
}

func (v *setView) notified(*goredis.Message) request { return request{some: true} }

func (v *setView) current() bool { return !v.streams || v.streamed >= v.seq }

func (v *setView) apply(result any) (next request, after time.Duration, err error) {
	l := result.(*setLook)
	if err := v.place(l); err != nil {
		return request{}, 0, err
	}
	present := 0 // nodes that this look should find
	for _, n := range v.nodes {
		if n.missing.IsZero() && n.seq <= l.seq {
			present++
		}
	}
	if l.count == 0 && present > 1 {
		// The whole set is gone at once: somebody deleted it, or it ran out
		// because nobody wrote for long. Nobody said of a node that it left, so
		// the leases decide; and if the data went with it, so does the epoch.
		if v.epoch == "" {
			return request{}, 0, fmt.Errorf("%w: the set was emptied", discovery.ErrBroken)
		}
		maps.DeleteFunc(v.nodes, func(_ string, n *node) bool { return n.seq <= l.seq })
		maps.DeleteFunc(v.members, func(_ string, m *member) bool { return m.seq <= l.seq })
		return request{}, 0, nil
	}

	v.noteLong(l)
	for _, n := range v.compare(l, &next) {
		v.found(n, l, &next)
	}
	if l.whole {
		v.sweep(l)
	} else if len(v.members) != l.count && l.seq >= v.streamed {
		next.whole = true
	}
	if next.whole {
		return next, 0, nil
	}
	for _, n := range v.nodes {
		if !n.missing.IsZero() {
			return request{whole: true}, absence, nil
		}
	}
	return request{}, 0, nil
}

// compare finds out which members of a look are new or have another score, and
// returns the nodes to which the look's members belong.
func (v *setView) compare(l *setLook, next *request) (found []*node) {
	// In the order of scores: the last of an id is its newest.
	belongs := func(m *member, changed bool) {
		n := v.nodes[m.id]
		if n == nil {
			n = &node{id: m.id}
			v.nodes[m.id] = n
		}
		if n.look != v.looks {
			n.look = v.looks
			found = append(found, n)
		}
		n.best, n.changed = m, changed
	}
	type sighting struct {
		*member
		changed bool
	}
	var nameless []sighting
	guesses := make(map[string]int)
	for i, text := range l.texts {
		m, score := v.members[text], l.scores[i]
		fresh := m == nil
		if fresh {
			m = &member{text: text, score: score, long: l.sizes[i]}
			m.parse(&v.records)
			if m.unnamed != nil && !l.whole {
				next.whole = true // whose it is depends on what else stands there
				continue
			}
			v.members[text] = m
		}
		changed := fresh || m.score != score
		if changed && l.whole && v.looks > 1 && score < l.since {
			// This writer's clock is behind by more than partial looks go back.
			v.margin = min(time.Duration(v.clockBefore-score)*time.Millisecond+minMargin, maxMargin)
		}
		m.score, m.look = score, v.looks
		if m.unnamed != nil && l.whole {
			nameless = append(nameless, sighting{m, changed})
			guesses[m.unnamed.guess]++
			continue
		}
		belongs(m, changed)
	}
	for _, m := range nameless {
		id := m.unnamed.made
		if v.replaces(m.member, guesses[m.unnamed.guess] == 1) {
			id = m.unnamed.guess
		}
		if renamed := id != m.id; renamed {
			if n := v.nodes[m.id]; n != nil && n.id == m.unnamed.made && n.current == m.member {
				delete(v.nodes, n.id)
				v.w.emit(n.event(discovery.Left))
			}
			m.id, m.changed = id, true
		}
		belongs(m.member, m.changed)
	}
	return found
}

// replaces reports whether a record whose id cannot be read counts as that of the
// node that its beginning names. That is a guess, since the name may stand in another
// place of the record, so it only ever keeps a node in use, and gives way to every
// record of the node that can be read, but for an old one that nobody removed.
func (v *setView) replaces(m *member, only bool) bool {
	n := v.nodes[m.unnamed.guess]
	if m.unnamed.guess == "" || n == nil {
		return m.unnamed.guess != "" && only
	}
	stands := n.look == v.looks && (n.current == nil || n.current == n.best || n.changed)
	return !stands && (only || n.current == m)
}

// noteLong remembers the members that are too long.
func (v *setView) noteLong(l *setLook) {
	if l.whole {
		v.long = l.long
		if l.afresh {
			v.longAt = l.started
		}
		return
	}
	if v.long == nil {
		v.long = make(map[string][]longMember)
	}
	maps.Copy(v.long, l.long)
}

// longScores returns the scores of the largest of them, in order.
func (v *setView) longScores() []string {
	size := func(score string) (n int) {
		for _, m := range v.long[score] {
			n += m.length
		}
		return n
	}
	scores := slices.SortedFunc(maps.Keys(v.long), func(a, b string) int {
		return cmp.Or(cmp.Compare(size(b), size(a)), cmp.Compare(a, b))
	})
	scores = scores[:min(len(scores), maxLong)]
	slices.SortFunc(scores, func(a, b string) int {
		x, _ := strconv.ParseFloat(a, 64)
		y, _ := strconv.ParseFloat(b, 64)
		return cmp.Compare(x, y)
	})
	return scores
}

// place finds out where in the registry's life the look was taken.
func (v *setView) place(l *setLook) error {
	switch {
	case v.epoch == "" && l.epoch != "":
		// Somebody left the mark that we may not leave.
		v.epoch = l.epoch
	case v.epoch != l.epoch:
		return fmt.Errorf("%w: the registry was emptied or replaced", discovery.ErrBroken)
	}
	if l.seq < l.least {
		return fmt.Errorf("%w: the registry lost changes: it was at %d and is at %d", discovery.ErrBroken, l.least, l.seq)
	}
	v.looks++
	v.seq, v.clock, v.clockBefore = l.seq, l.clock, v.clock
	if l.whole {
		v.wholeAt = l.started
	}
	switch {
	case v.current():
		v.lagging = time.Time{}
	case v.lagging.IsZero():
		v.lagging = time.Now()
	case time.Since(v.lagging) > streamLag:
		return fmt.Errorf("%w: the stream of changes is silent", discovery.ErrBroken)
	}
	return nil
}

// found compares what a look found of a node with what was known.
func (v *setView) found(n *node, l *setLook, next *request) {
	if n.seq > l.seq || v.gone[n.id] > l.seq {
		// The stream has told newer things.
		if n.current == nil {
			delete(v.nodes, n.id)
		}
		return
	}
	was, best := n.current, n.best
	age := time.Duration(max(l.clock-best.score, 0) * float64(time.Millisecond))
	switch {
	case was == nil:
		v.put(n, best, age, 0)
	case best == was:
		n.missing, n.seen = time.Time{}, l.seq
		if n.changed {
			v.put(n, best, 0, 0)
		}
	case !l.whole && best.score < was.score:
		// An older record than the one we know, if that is still there. The
		// whole look that decides must find it as new as this one did.
		if n.changed {
			delete(v.members, best.text)
			next.whole = true
		}
	case n.changed, was.look == v.looks:
		// Written since the last look: a heartbeat, whatever its score says.
		if !l.whole {
			delete(v.members, was.text)
		}
		v.put(n, best, 0, 0)
	case l.whole && v.absent(n):
		// The record is gone, and left an older one that nobody removed.
		v.left(n, 0)
		v.nodes[n.id] = n
		v.put(n, best, age, 0)
	}
}

// absent notes that a look lacks the node's record, and reports whether that has
// been so for long enough.
func (v *setView) absent(n *node) bool {
	if n.missing.IsZero() {
		n.missing = time.Now()
		return false
	}
	return time.Since(n.missing) >= absence
}

// sweep looks for what a whole look lacks.
func (v *setView) sweep(l *setLook) {
	var lost []*node
	for _, n := range v.nodes {
		if n.look != v.looks && n.seq <= l.seq && v.absent(n) {
			lost = append(lost, n)
		}
	}
	slices.SortFunc(lost, func(a, b *node) int { return cmp.Compare(a.id, b.id) })
	for _, n := range lost {
		v.left(n, 0)
	}
	maps.DeleteFunc(v.members, func(_ string, m *member) bool { return m.look != v.looks && m.seq <= l.seq })
	maps.DeleteFunc(v.gone, func(_ string, seq uint64) bool { return seq <= l.seq })
}

// put emits a node's record, which from now on is the current one.
func (v *setView) put(n *node, m *member, age time.Duration, revision uint64) {
	n.current, n.missing, n.seen = m, time.Time{}, max(v.seq, revision)
	if m.node == nil && m.err == nil {
		m.parse(&v.records)
	}
	e := n.event(discovery.Put)
	if m.err != nil {
		e.Type, e.Err = discovery.Rejected, m.err
	} else {
		e.Node = *m.node
	}
	m.node = nil
	e.Age, e.Revision = age, revision
	v.w.emit(e)
}

// left emits that a node's record was removed, and forgets it.
func (v *setView) left(n *node, revision uint64) {
	e := n.event(discovery.Left)
	e.Revision = revision
	v.forget(n)
	v.w.emit(e)
}

func (v *setView) forget(n *node) {
	delete(v.nodes, n.id)
	delete(v.members, n.current.text)
}

// event returns an event about the node. A record without an id has a made-up key, to
// be told from others.
func (n *node) event(kind discovery.EventType) discovery.Event {
	if made, ok := strings.CutPrefix(n.id, nameless); ok {
		return discovery.Event{Type: kind, Key: "#" + made, ID: n.current.guess()}
	}
	return discovery.Event{Type: kind, ID: n.id}
}

func (v *setView) stream(entries []goredis.XMessage) error {
	v.lagging = time.Time{}
	for _, x := range entries {
		e, err := parseEntry(x)
		if err != nil {
			// Somebody else's. If it stands for one of ours the sequence shows it.
			continue
		}
		if e.seq != v.streamed+1 {
			return fmt.Errorf("%w: the stream of changes goes from %d to %d", discovery.ErrBroken, v.streamed, e.seq)
		}
		v.streamed = e.seq
		n := v.nodes[e.id]
		switch e.kind {
		case entryPut:
			v.streamPut(n, e)
		case entryOverride:
			v.w.overridden = true
		case entryLeft, entryExpired:
			if n != nil && e.seq <= n.seen {
				// A look that was taken later has found a record: it is back.
				continue
			}
			if e.seq > v.seq {
				v.gone[e.id] = e.seq
			}
			switch {
			case e.kind == entryExpired && n != nil:
				// Nobody removed it; its lease has run out long ago.
				v.forget(n)
			case e.kind == entryExpired:
			case n != nil:
				v.left(n, e.seq)
			default:
				v.w.emit(discovery.Event{Type: discovery.Left, ID: e.id, Revision: e.seq})
			}
		}
	}
	return nil
}

func (v *setView) streamPut(n *node, e entry) {
	if len(e.record) > discovery.MaxRecord {
		return // the next look finds what became of the node
	}
	if m := v.members[e.record]; m != nil {
		// A look was faster.
		m.seq = e.seq
		if n != nil && n.current == m {
			n.seq = e.seq
		}
		return
	}
	if e.seq <= v.seq {
		// A look that was taken later lacks it: something newer stands there.
		return
	}
	m := &member{text: e.record, score: e.score, seq: e.seq}
	m.parse(&v.records)
	m.id, m.unnamed = e.id, nil
	if n == nil {
		n = &node{id: e.id}
		v.nodes[e.id] = n
	} else {
		delete(v.members, n.current.text)
	}
	delete(v.gone, e.id)
	v.members[m.text] = m
	n.seq = e.seq
	v.put(n, m, 0, e.seq)
}
