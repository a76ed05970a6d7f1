package discovery

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// How many rejected records are remembered, for people to look at.
const maxRejections = 1000

func (l *loop) reject(e Event) {
	if e.Err == nil {
		e.Err = fmt.Errorf("%w record: the backend gave no reason", ErrInvalid)
	}
	key := rejectionKey(e)
	was, stands := l.rejected[key]
	// The same bad record again, as with every heartbeat, is no news.
	known := stands && was.Err.Error() == e.Err.Error()
	t, final := l.table.of(&e), errors.Is(e.Err, ErrForbidden)
	if final {
		l.forget(e)
		l.recant(e)
	} else if m := l.memory.byRecord[key]; m != nil {
		// Not every rejection is kept.
		m.unread, m.listing = e.Err, l.listing
	}
	switch {
	case t != nil && final:
		l.remove(t, ChangeRejected, e.Err.Error())
	case t != nil:
		l.refuse(t, e.Err)
		e.ID = t.entry.Node.ID
		fallthrough
	default:
		if !known && (stands || len(l.rejected) < maxRejections) {
			// Beyond those that are remembered nobody could tell what is news.
			l.noteRejection(e)
		}
	}
	if known {
		was.listing = l.listing
		l.rejected[key] = was
	} else if stands || len(l.rejected) < maxRejections {
		l.rejected[key] = rejection{
			Rejection: Rejection{ID: visible(e.ID), Key: visible(e.Key), Err: e.Err, Time: time.Now()},
			listing:   l.listing,
		}
		l.amended = true
	}
}

// accept forgets that the record was rejected: it is good, or it is gone.
func (l *loop) accept(e Event) {
	if m := l.memory.byRecord[rejectionKey(e)]; m != nil {
		m.unread = nil
	}
	if key := rejectionKey(e); len(l.rejected) > 0 {
		before := len(l.rejected)
		delete(l.rejected, key)
		l.amended = l.amended || len(l.rejected) < before
	}
}

// rejection is a Rejection and the listing that showed it last.
type rejection struct {
	Rejection
	listing uint64
}

// rejectionKey names a record, by its id only where it has no key.
func rejectionKey(e Event) string { return recordName(e.Key, e.ID) }

func recordName(key, id string) string {
	switch {
	case key == "":
		return "\x00" + id
	case len(key) > maxKey:
		// It is kept for as long as the record is rejected, whoever made it up.
		sum := sha256.Sum256([]byte(key))
		return "\x00\x00" + string(sum[:])
	default:
		return key
	}
}

// maxKey is how long the key of a record may be before its hash stands for it.
const maxKey = 1 << 10

// showRejections makes the rejected records visible. While a listing is under
// way its end does it.
func (l *loop) showRejections() {
	if !l.listed || !l.amended {
		return
	}
	l.amended = false
	next := *l.condition.Load()
	next.rejections = make([]Rejection, 0, len(l.rejected))
	for _, key := range slices.Sorted(maps.Keys(l.rejected)) {
		next.rejections = append(next.rejections, l.rejected[key].Rejection)
	}
	l.condition.Store(&next)
}
