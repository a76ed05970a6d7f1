package redis

import (
	"context"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
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
	// maxWanted is how many bytes of keys a look is asked for by name, which everybody
	// decides who may publish or write. A directory full of usual ones is half of it.
	maxWanted = 32 << 20
	keyRoom   = 64 // what a key takes beside its text
)

// A view is what a watch knows of the registry: enough to tell what changed. Only
// the loop of the watch calls it, and the functions that it hands out to be called
// there; it emits through the feed that it was made with.
type view interface {
	// follow subscribes to what the server offers to tell of changes.
	follow(ctx context.Context) error
	// list reads everything and emits it, and returns what Synced will say, and what
	// the slowest question took. From there on changes are told.
	list(ctx context.Context) (discovery.Listing, time.Duration, error)
	// changes names what tells of changes, once everything is listed.
	changes() string
	// look prepares to read what the request asks for. What it returns reads, and runs
	// beside the loop.
	look(q request) func(ctx context.Context) (lookResult, error)
	// notified returns what a notification makes worth looking at.
	notified(m *goredis.Message) request
}

// A lookResult is what a look has read.
type lookResult struct {
	slowest time.Duration // what the slowest question to the server took
	// apply emits what has changed, and returns what is to be looked at again.
	apply func() (request, error)
	// told reports whether the stream of changes has told all that the look has found;
	// nil: there is none. It is for the loop, after apply.
	told func() bool
}

// A request says what to look at. The zero value asks for nothing.
type request struct {
	whole bool            // everything
	some  bool            // what the view thinks is likely to have changed
	gaps  bool            // with some: also what is missing of what is known
	keys  map[string]bool // these
	size  int             // of them, in bytes

	overrides bool          // the operators' overrides, which are no part of the look
	soon      bool          // some does not wait until the server has had a rest
	after     time.Duration // when to look; add leaves it alone
}

// want adds a key. One for which there is no room counts as likely to have changed.
func (q *request) want(key string) {
	if q.keys[key] {
		return
	}
	if q.size += len(key) + keyRoom; q.size > maxWanted {
		q.some, q.size = true, q.size-len(key)-keyRoom
		return
	}
	if q.keys == nil {
		q.keys = make(map[string]bool)
	}
	q.keys[key] = true
}

// none reports whether there is nothing to look at, but maybe overrides.
func (q request) none() bool { return !q.whole && !q.some && len(q.keys) == 0 }

// add adds what another request asks for.
func (q *request) add(o request) {
	q.whole = q.whole || o.whole
	q.some = q.some || o.some
	q.gaps = q.gaps || o.gaps
	q.overrides = q.overrides || o.overrides
	q.soon = q.soon || o.soon
	for key := range o.keys {
		q.want(key)
	}
}

// tooLong says why a record of so many bytes was not read.
func tooLong(length int) error {
	if length > discovery.MaxRecord {
		return discovery.Invalidf(discovery.FaultRecord, "record: %d bytes, want at most %d", length, discovery.MaxRecord)
	}
	return discovery.Invalidf(discovery.FaultRecord, "record: %d bytes, and at most %d are read where all records together are more than %d MiB", length, usualRecord, maxRead>>20)
}
