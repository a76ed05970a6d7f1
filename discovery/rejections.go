package discovery

import (
	"crypto/sha256"
	"maps"
	"slices"
	"time"
)

const (
	// How many rejected records are remembered, for people to look at.
	maxRejections = 1000
	// maxKey is how long the key of a record may be before its hash stands for it.
	maxKey = 1 << 10
)

// rejections remembers the records that are rejected at present, a bounded number of
// them.
type rejections struct {
	byRecord map[string]Rejection
	changed  bool // since they were shown last
}

func newRejections() rejections { return rejections{byRecord: make(map[string]Rejection)} }

// add notes that a record was rejected, and reports whether that is news. The same bad
// record again, as with every heartbeat, is none. Beyond those that are remembered nobody
// could tell what is.
func (r *rejections) add(record string, is Rejection) (Rejection, bool) {
	was, stands := r.byRecord[record]
	switch {
	case stands && was.Err.Error() == is.Err.Error():
		was.watch = is.watch
		r.byRecord[record] = was
		return was, false
	case !stands && len(r.byRecord) >= maxRejections:
		return is, false
	}
	is.ID, is.Key, is.Time = visible(is.ID), visible(is.Key), time.Now()
	r.byRecord[record] = is
	r.changed = true
	return is, true
}

// remove notes that a record is not rejected any more: it is good, or it is gone.
func (r *rejections) remove(record string) {
	if _, stands := r.byRecord[record]; stands {
		delete(r.byRecord, record)
		r.changed = true
	}
}

// endListing forgets the records that the listing of a watch did not show.
func (r *rejections) endListing(watch uint64) {
	maps.DeleteFunc(r.byRecord, func(_ string, r Rejection) bool { return r.watch != watch })
	r.changed = true
}

// of returns why a watch rejected a record, nil if it did not.
func (r *rejections) of(record string, watch uint64) error {
	if is := r.byRecord[record]; is.watch == watch {
		return is.Err
	}
	return nil
}

// all returns them, sorted by key and id.
func (r *rejections) all() []Rejection {
	all := make([]Rejection, 0, len(r.byRecord))
	for _, record := range slices.Sorted(maps.Keys(r.byRecord)) {
		all = append(all, r.byRecord[record])
	}
	return all
}

// record names the record that the event is about. Where records have keys, the key
// decides: a record that cannot be read may have no id, or a wrong one.
func (e *Event) record() string { return recordName(e.Key, e.ID) }

// recordName names a record by its key, or by its node's id where it has none, in a
// bounded length: it is kept for as long as the record is rejected, whoever made it up.
func recordName(key, id string) string {
	switch {
	case key == "":
		return "\x00" + id
	case len(key) > maxKey:
		sum := sha256.Sum256([]byte(key))
		return "\x00\x00" + string(sum[:])
	default:
		return key
	}
}
