package redis

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// How many keys one pipeline asks for: little enough that the server answers
	// others in between.
	readCount = 250
	// A value of up to this is read with each look. A longer one is read again only
	// if its length or its time to live has changed, or after so long.
	shortValue   = 4 << 10
	longValueAge = 30 * time.Second
	// By how much the time to live may seem to change though nobody set it: by what
	// an answer takes.
	ttlNoise = 100 * time.Millisecond
	// What PTTL says of a key that is not there.
	notThere = -2
)

// A keysLook is one look at the keys: what it is for, and what it has read.
type keysLook struct {
	layout *keysLayout
	wanted map[string]bool
	known  map[string]longValue // that need not be read again if they are as they were
	whole  bool
	beats  bool // of every key that is there
	scan   bool // for keys that are not known
	first  bool // of a listing

	epoch   epoch
	masters []string
	reads   []keyRead
	size    int // of what was read
	started time.Time
	slowest time.Duration // what the slowest question took
}

// A longValue is what is known of a value that is not read with each look.
type longValue struct {
	size     int64
	deadline time.Time
}

// A keyRead is what a look found under one key.
type keyRead struct {
	key   string
	value string
	same  bool          // the value is as it was, as far as the server tells without it
	size  int64         // its length
	ttl   time.Duration // negative: for ever
	there bool
	err   error // of the value, such as that it is no string
}

// errNoString says why a key that holds something else is rejected.
var errNoString = discovery.Invalidf(discovery.FaultRecord, "record: the key holds no string")

// prepare returns a look for what the request asks for.
func (v *keysView) prepare(q request) *keysLook {
	l := &keysLook{
		layout: v.keysLayout, wanted: make(map[string]bool, len(q.keys)), known: make(map[string]longValue),
		whole: q.whole || q.some, beats: q.whole, first: !v.listed, started: time.Now(),
		// Whoever waits for a look need not wait for a pass through a large database,
		// that finds out only who is not known yet.
		scan: q.whole && (!v.listed || v.quick()),
	}
	if l.whole {
		// A scan may miss a key only if it was not there all the time; to read
		// what was there before settles it.
		for key, k := range v.keys {
			l.wanted[key] = true
			if !q.whole && !q.keys[key] && k.size > shortValue && time.Since(k.read) < longValueAge {
				l.known[key] = longValue{k.size, k.deadline}
			}
		}
		for key, since := range v.former {
			if time.Since(since) < formerFor {
				l.wanted[key] = true
			} else {
				delete(v.former, key)
			}
		}
	}
	maps.Copy(l.wanted, q.keys)
	return l
}

// ask reads the keys that are wanted, after those were looked for that are not known,
// where that is part of the look.
func (l *keysLook) ask(ctx context.Context) error {
	if l.whole {
		if err := l.readEpoch(ctx); err != nil {
			return err
		}
	}
	if known := l.layout.knownBefore(l.epoch); l.first && known != nil {
		// The last watch has just seen all keys; a pass beside this one finds
		// those that are new.
		for key := range known {
			l.wanted[key] = true
		}
		l.scan = false
	}
	if l.scan {
		pass := &scan{layout: l.layout, count: listScanCount}
		for !pass.done {
			keys, err := pass.step(ctx)
			if err != nil {
				return err
			}
			for _, key := range keys {
				if len(l.wanted) < maxMembers {
					l.wanted[key] = true
				}
			}
		}
		l.slowest = max(l.slowest, pass.slowest)
		l.layout.scanned(pass.took)
	}
	for chunk := range slices.Chunk(slices.Sorted(maps.Keys(l.wanted)), readCount) {
		if err := l.read(ctx, chunk); err != nil {
			return fmt.Errorf("reading keys: %w", err)
		}
	}
	return nil
}

// knownBefore returns the keys that the last watch knew, if that is enough of a
// listing: of the same data, in which it takes long to look for keys, and not long
// ago. Else nil.
func (l *keysLayout) knownBefore(epoch epoch) map[string]time.Time {
	quick := l.quick()
	l.mu.Lock()
	defer l.mu.Unlock()
	if quick || epoch == "" || epoch != l.previousEpoch || l.scannedAt.IsZero() || time.Since(l.scannedAt) > formerFor {
		return nil
	}
	return l.previous
}

// step is ask for something that takes the server little time.
func step[T any](ctx context.Context, l *keysLook, call func(context.Context) (T, error)) (T, error) {
	began := time.Now()
	answer, err := ask(ctx, l.layout.client, call)
	l.slowest = max(l.slowest, time.Since(began))
	return answer, err
}

// readEpoch reads which data and which masters there are.
func (l *keysLook) readEpoch(ctx context.Context) (err error) {
	c := l.layout.client
	if l.masters, err = c.masters(ctx); err != nil {
		return err
	}
	mark, err := step(ctx, l, func(ctx context.Context) (string, error) {
		mark, err := c.commands.HGet(ctx, l.layout.meta, "epoch").Result()
		// Without the right to it, or if something else stands there, there is none.
		if errors.Is(explain(err), discovery.ErrPermission) || wrongType(err) {
			err = nil
		}
		return mark, err
	})
	if err != nil {
		return fmt.Errorf("looking for keys: %w", err)
	}
	l.epoch = epoch(mark)
	return nil
}

// read reads some keys: what there is first, then the values that are needed.
func (l *keysLook) read(ctx context.Context, keys []string) error {
	reads, err := l.measure(ctx, keys)
	if err != nil {
		return err
	}
	var values []*keyRead
	for i := range reads {
		r := &reads[i]
		known, long := l.known[r.key]
		switch {
		case !r.there || r.err != nil:
		case r.size > discovery.MaxRecord, l.size > maxRead && r.size > usualRecord:
			r.err = tooLong(int(r.size))
		case long && known.size == r.size && sameDeadline(known.deadline, r.ttl):
			r.same = true
		default:
			l.size += int(r.size)
			values = append(values, r)
		}
	}
	if err := l.values(ctx, values); err != nil {
		return err
	}
	l.reads = append(l.reads, reads...)
	return nil
}

// sameDeadline reports whether a key with this time to live stands for as long as
// before.
func sameDeadline(deadline time.Time, ttl time.Duration) bool {
	if deadline.IsZero() || ttl < 0 {
		return deadline.IsZero() && ttl < 0
	}
	return time.Until(deadline.Add(-ttl)).Abs() < ttlNoise
}

// measure asks which keys are there, how long their values are and until when they
// stand.
func (l *keysLook) measure(ctx context.Context, keys []string) ([]keyRead, error) {
	return step(ctx, l, func(ctx context.Context) ([]keyRead, error) {
		pipe := l.layout.client.commands.Pipeline()
		sizes, ttls := make([]*goredis.IntCmd, len(keys)), make([]*goredis.DurationCmd, len(keys))
		for i, key := range keys {
			sizes[i], ttls[i] = pipe.StrLen(ctx, key), pipe.PTTL(ctx, key)
		}
		if err := execute(ctx, pipe); err != nil {
			return nil, err
		}
		reads := make([]keyRead, len(keys))
		for i, key := range keys {
			if err := ttls[i].Err(); err != nil {
				return nil, err
			}
			r := keyRead{key: key, ttl: ttls[i].Val(), size: sizes[i].Val(), there: ttls[i].Val() != notThere}
			switch err := sizes[i].Err(); {
			case err == nil:
			case wrongType(err):
				r.err = errNoString
				r.there = r.there && !slices.Contains(l.layout.foreign, key)
			default:
				return nil, err
			}
			reads[i] = r
		}
		return reads, nil
	})
}

// values reads the values of keys. What became too long meanwhile is cut at the
// connection.
func (l *keysLook) values(ctx context.Context, reads []*keyRead) error {
	if len(reads) == 0 {
		return nil
	}
	values, err := step(ctx, l, func(ctx context.Context) ([]*goredis.StringCmd, error) {
		pipe := l.layout.client.commands.Pipeline()
		values := make([]*goredis.StringCmd, len(reads))
		for i, r := range reads {
			values[i] = pipe.Get(ctx, r.key)
		}
		return values, execute(ctx, pipe)
	})
	if err != nil {
		return err
	}
	for i, r := range reads {
		switch value, err := values[i].Result(); {
		case err == nil:
			r.value, r.size = value, int64(len(value))
		case errors.Is(err, goredis.Nil):
			r.there = false
		case wrongType(err):
			r.err = errNoString
		default:
			return explain(err)
		}
	}
	return nil
}
