package redis

import "time"

const (
	// How many bytes of keys a look is asked for by name, which anybody may say who
	// can publish or write. A directory full of usual ones is half of it.
	maxWanted = 32 << 20
	keyRoom   = 64 // beside the key itself
)

// A request says what to look at. The zero value asks for nothing.
type request struct {
	whole bool            // everything
	some  bool            // what the view thinks is likely to have changed
	keys  map[string]bool // these
	size  int             // of them, in bytes

	overrides bool          // the operators' overrides, which are no part of the look
	after     time.Duration // when to look; add leaves it alone
}

// requestFor returns a request for these keys.
func requestFor(keys ...string) (q request) {
	for _, key := range keys {
		q.want(key)
	}
	return q
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
	q.overrides = q.overrides || o.overrides
	for key := range o.keys {
		q.want(key)
	}
}
