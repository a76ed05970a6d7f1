package redis

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

var historyScript = newScript("history.lua")

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

// history reads the stream backwards, in parts, so that it keeps the server from
// nothing else.
func (l *sortedSet) history(ctx context.Context, id string, limit int) ([]discovery.Revision, error) {
	if most := l.client.config.History; limit <= 0 || limit > most {
		limit = most
	}
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
		more, last, entries := readHistory(answer)
		for _, m := range entries {
			if e, err := parseEntry(m); err == nil && e.kind != entryOverride {
				revisions = append(revisions, e.revision())
			}
		}
		if len(revisions) >= limit || !more {
			return revisions, nil
		}
		end = last // of which the script looks past
	}
}

// readHistory reads what the script answered: whether there may be more entries, the
// id of the last that it looked at, and those about the node.
func readHistory(answer any) (more bool, last string, entries []goredis.XMessage) {
	parts := listOf[any](answer)
	if len(parts) != 3 {
		return false, "", nil
	}
	n, _ := parts[0].(int64)
	last, _ = parts[1].(string)
	for _, entry := range listOf[[]any](parts[2]) {
		if len(entry) != 2 {
			continue
		}
		m := goredis.XMessage{Values: make(map[string]any)}
		m.ID, _ = entry[0].(string)
		fields := listOf[string](entry[1])
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
