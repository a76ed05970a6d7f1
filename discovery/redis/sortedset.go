package redis

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

var (
	announceScript = newScript("instance.lua", "announce.lua")
	withdrawScript = newScript("instance.lua", "withdraw.lua")
	recordScript   = newScript("record.lua")
	overrideScript = newScript("override.lua")
	historyScript  = newScript("history.lua")
)

// sortedSet is the layout of one sorted set, with what our writers keep beside it.
type sortedSet struct {
	client *client
	keys   setKeys

	mu       sync.Mutex
	previous map[string]bool // the nodes that the last watch knew at its end
	slow     bool            // and whether it found writers that replace a record slowly
}

// absence returns how long records must be absent before their nodes count as gone.
func (l *sortedSet) absence() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.slow {
		return longAbsence
	}
	return absence
}

// setKeys are the set and what lies beside it, as the package's documentation says.
type setKeys struct{ set, members, leases, changes, meta string }

func (k setKeys) all() []string { return []string{k.set, k.members, k.leases, k.changes, k.meta} }

func newSortedSet(c *client) *sortedSet {
	side := c.config.side
	return &sortedSet{client: c, keys: setKeys{
		set: c.config.Key, members: side("members"), leases: side("leases"), changes: side("changes"), meta: side("meta"),
	}}
}

func (l *sortedSet) put(ctx context.Context, n discovery.Node, record []byte) error {
	_, err := l.announce(ctx, n, record)
	return err
}

func (l *sortedSet) replace(ctx context.Context, n discovery.Node, record []byte) (bool, error) {
	return own(l.announce(ctx, n, record, n.Instance()))
}

func (l *sortedSet) announce(ctx context.Context, n discovery.Node, record []byte, instance ...any) (any, error) {
	args := []any{n.ID, digest(n), record, n.LeaseOr(discovery.DefaultTTL).Milliseconds(), l.client.config.History, rand.Text()}
	return announceScript.run(ctx, l.client.commands, l.keys.all(), append(args, instance...)...)
}

func (l *sortedSet) remove(ctx context.Context, n discovery.Node) error {
	_, err := withdrawScript.run(ctx, l.client.commands, l.keys.all(), n.ID, n.Instance())
	return err
}

func (l *sortedSet) record(ctx context.Context, id string) (string, error) {
	// The digest and a space come first: see announce.lua.
	const before = 17
	answer, err := recordScript.run(ctx, l.client.commands, []string{l.keys.members}, id, before+discovery.MaxRecord)
	member := as[string](answer)
	return member[min(len(member), before):], err
}

func (l *sortedSet) override(ctx context.Context, id, record string) error {
	keys := []string{l.client.config.overridesKey(), l.keys.changes, l.keys.meta}
	_, err := overrideScript.run(ctx, l.client.commands, keys, id, record, rand.Text())
	return err
}

// Kinds of entries of the stream.
const (
	entryPut     = "put"
	entryLeft    = "left"
	entryExpired = "expired" // swept up long after its lease

	entryOverride = "override" // an operator decided, which is kept elsewhere
)

// An entry is one change as our writers record it.
type entry struct {
	seq    uint64
	time   time.Time
	kind   string
	id     string
	score  float64
	record string
}

func parseEntry(m goredis.XMessage) (entry, error) {
	text := func(name string) string { return as[string](m.Values[name]) }
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

// history reads the stream backwards, in parts, so that it keeps the server from
// nothing else.
func (l *sortedSet) history(ctx context.Context, id string, limit int) ([]discovery.Revision, error) {
	most := l.client.config.History
	limit = min(cmp.Or(max(limit, 0), most), most)
	const page = 1000
	var revisions []discovery.Revision
	for end := "+"; ; {
		answer, err := ask(ctx, l.client, func(ctx context.Context) (any, error) {
			return historyScript.run(ctx, l.client.commands, []string{l.keys.changes},
				id, end, page, limit-len(revisions), discovery.MaxRecord)
		})
		if err != nil {
			return nil, err
		}
		// Whether there may be more entries, the id of the last that was looked at, and
		// those about the node.
		parts := listOf[any](answer)
		if len(parts) != 3 {
			return revisions, nil
		}
		for _, found := range listOf[[]any](parts[2]) {
			if e, err := readEntry(found); err == nil && e.kind != entryOverride {
				revisions = append(revisions, e.revision())
			}
		}
		end = as[string](parts[1])
		if len(revisions) >= limit || as[int64](parts[0]) == 0 || end == "" {
			return revisions, nil
		}
	}
}

// readEntry reads an entry that a script answered.
func readEntry(answer []any) (entry, error) {
	if len(answer) != 2 {
		return entry{}, fmt.Errorf("%w entry of the stream of changes", discovery.ErrInvalid)
	}
	m := goredis.XMessage{ID: as[string](answer[0]), Values: make(map[string]any)}
	fields := listOf[string](answer[1])
	for i := 0; i+1 < len(fields); i += 2 {
		m.Values[fields[i]] = fields[i+1]
	}
	return parseEntry(m)
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
