package redis

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	goredis "github.com/redis/go-redis/v9"
)

const (
	// How many keys one SCAN and one pipeline of reads ask for: little enough
	// that the server answers others in between.
	scanCount = 1000
	readCount = 250
	// A key that vanished this long before its time was removed by somebody.
	early = 250 * time.Millisecond
	// A key that merely exists is worth an event this often.
	maxRenew = 10 * time.Second
)

// keysLayout is the layout of one string key for each node.
type keysLayout struct {
	r            *Registry
	prefix, meta string

	mu       sync.Mutex
	previous map[string]time.Time // the keys that the last watch knew at its end, and until when they stood
}

func (l *keysLayout) Announce(ctx context.Context, n discovery.Node) error {
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return err
	}
	lease := keyLease(n)
	return l.r.do(ctx, func(ctx context.Context) error {
		pipe := l.r.commands.Pipeline()
		set := pipe.Set(ctx, l.prefix+n.ID, record, lease)
		// Only watchers need the mark; who may not leave it may still announce.
		pipe.HSetNX(ctx, l.meta, "epoch", rand.Text())
		if err := execute(ctx, pipe); err != nil {
			return err
		}
		return set.Err()
	})
}

// execute sends what the pipeline holds. It fails if nothing was sent; else each
// command tells how it went. The client library does not always tell them that a
// connection could not be had: when the server refused the login, as when a
// password was changed, only the pipeline has the error, and each command seems to
// have been answered with nothing (redis.go, pipelineErrShouldStamp).
func execute(ctx context.Context, pipe goredis.Pipeliner) error {
	commands, err := pipe.Exec(ctx)
	if slices.ContainsFunc(commands, func(c goredis.Cmder) bool { return c.Err() != nil }) {
		return nil
	}
	return err
}

// keyLease is how long a key stands that is not renewed, in whole seconds.
func keyLease(n discovery.Node) time.Duration {
	return (leaseOf(n) + time.Second - 1).Truncate(time.Second)
}

func (l *keysLayout) Drain(ctx context.Context, n discovery.Node) (bool, error) {
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return false, err
	}
	return l.r.changed(ctx, func(ctx context.Context) (any, error) {
		return ownKeyScript.run(ctx, l.r.commands, []string{l.prefix + n.ID}, n.Instance(), record, int64(keyLease(n)/time.Second))
	})
}

func (l *keysLayout) Withdraw(ctx context.Context, n discovery.Node) error {
	return l.r.do(ctx, func(ctx context.Context) error {
		_, err := ownKeyScript.run(ctx, l.r.commands, []string{l.prefix + n.ID}, n.Instance())
		return err
	})
}

func (l *keysLayout) record(ctx context.Context, id string) (string, error) {
	return l.r.commands.Get(ctx, l.prefix+id).Result()
}

func (l *keysLayout) History(context.Context, string, int) ([]discovery.Revision, error) {
	return nil, fmt.Errorf("%w: the layout %q keeps no history; %q does", discovery.ErrUnsupported, LayoutKeys, LayoutSortedSet)
}

// stringKey is what a watch knows of one key.
type stringKey struct {
	id       string
	sum      uint64        // of the value
	load     float64       // to repeat with a heartbeat
	heard    time.Time     // when the last event about it was emitted
	renew    time.Duration // how long after that it is worth another
	rejected bool          //
	deadline time.Time     // until when the key stood, when it was read last; zero: for ever
	missing  time.Time     // since when looks have not found it
	reason   string        // the notification that said it is gone, or ""
}

// keysView is the view of one watch.
type keysView struct {
	*keysLayout
	w          *watch
	masters    []string // addresses of a cluster's masters; else nil
	subscribed bool     // to notifications of all of them

	listed bool
	seed   maphash.Seed
	keys   map[string]*stringKey
	epoch  string

	records discovery.Parser
}

func (l *keysLayout) watch(ctx context.Context, w *watch) (view, error) {
	v := &keysView{keysLayout: l, w: w, seed: maphash.MakeSeed(), keys: make(map[string]*stringKey)}
	var err error
	v.masters, err = l.r.masters(ctx)
	w.closers = append(w.closers, v.remember)
	return v, err
}

// remember keeps what the watch knew at its end for the next one's listing.
func (v *keysView) remember() {
	if !v.listed {
		return
	}
	deadlines := make(map[string]time.Time, len(v.keys))
	for key, k := range v.keys {
		deadlines[key] = k.deadline
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.previous = deadlines
}

// ranOut reports whether a key that the last watch knew is gone and may have run
// out, because nobody could renew it while the server was away, rather than been
// deleted.
func (v *keysView) ranOut() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	for key, deadline := range v.previous {
		if v.keys[key] == nil && !deadline.IsZero() && time.Until(deadline) < early {
			return true
		}
	}
	return false
}

func (v *keysView) push() string {
	if v.subscribed {
		return "notifications"
	}
	return "poll"
}

func (v *keysView) follow(ctx context.Context) error {
	// Notifications are local to each server of a cluster.
	var options []*goredis.Options
	if v.masters == nil {
		options = append(options, v.r.connector.options(v.r.connector.addresses[0]))
	}
	for _, address := range v.masters {
		options = append(options, v.r.connector.options(address))
	}
	pattern := fmt.Sprintf("__keyspace@%d__:%s*", v.r.config.DB, escapeGlob(v.prefix))
	var clients []*goredis.Client
	for _, o := range options {
		client := goredis.NewClient(o)
		v.w.closeWith(ctx, client)
		clients = append(clients, client)
		if notified, err := v.r.notifies(ctx, client, "$gx"); err != nil || !notified {
			_ = client.Close() // nothing more will be asked of it
			return err
		}
	}
	for i, client := range clients {
		if i == 0 {
			// One connection for both, if the user may hear of both.
			ok, err := offered(v.w.subscribe(ctx, client, true, pattern, escapeGlob(v.r.overridesKey())))
			if err != nil {
				return err
			}
			if v.w.told = ok; ok {
				continue
			}
		}
		if ok, err := offered(v.w.subscribe(ctx, client, true, pattern)); err != nil || !ok {
			return err
		}
	}
	v.subscribed = true
	return nil
}

// escapeGlob makes a pattern that matches s only.
func escapeGlob(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`).Replace(s)
}

// keyRead is what a look found under one key.
type keyRead struct {
	key   string
	value string
	ttl   time.Duration // negative: for ever
	there bool
	err   error // of the value, such as that it is no string
}

type keysLook struct {
	whole   bool
	beats   bool // of every key that is there
	epoch   string
	masters []string
	reads   []keyRead
	started time.Time
}

func (v *keysView) look(q request) func(context.Context) (any, error) {
	l := &keysLook{whole: q.whole || q.some, beats: q.whole, started: time.Now()}
	keys := make(map[string]bool, len(q.keys))
	for _, key := range q.keys {
		keys[key] = true
	}
	if l.whole {
		// A scan may miss a key only if it was not there all the time; to read
		// what was there before settles it.
		for key := range v.keys {
			keys[key] = true
		}
	}
	return func(ctx context.Context) (any, error) {
		if l.whole {
			if err := v.scan(ctx, l, keys); err != nil {
				return nil, err
			}
		}
		for chunk := range slices.Chunk(slices.Sorted(maps.Keys(keys)), readCount) {
			if err := v.read(ctx, l, chunk); err != nil {
				return nil, err
			}
		}
		return l, nil
	}
}

// scan adds the keys that exist, and finds out which data they are of.
func (v *keysView) scan(ctx context.Context, l *keysLook, keys map[string]bool) error {
	var err error
	if l.masters, err = v.r.masters(ctx); err != nil {
		return err
	}
	err = v.r.do(ctx, func(ctx context.Context) (err error) {
		l.epoch, err = v.r.commands.HGet(ctx, v.meta, "epoch").Result()
		if errors.Is(err, goredis.Nil) || errors.Is(explain(err), discovery.ErrPermission) {
			err = nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("looking for keys: %w", err)
	}
	var mu sync.Mutex
	return v.r.do(ctx, func(ctx context.Context) error {
		return v.r.eachMaster(ctx, func(ctx context.Context, client *goredis.Client) error {
			match := escapeGlob(v.prefix) + "*"
			for cursor := uint64(0); ; {
				found, next, err := client.Scan(ctx, cursor, match, scanCount).Result()
				if err != nil {
					return fmt.Errorf("looking for keys: %w", err)
				}
				mu.Lock()
				for _, key := range found {
					keys[key] = true
				}
				mu.Unlock()
				if cursor = next; cursor == 0 {
					return nil
				}
			}
		})
	})
}

// read reads some keys.
func (v *keysView) read(ctx context.Context, l *keysLook, keys []string) error {
	return v.r.do(ctx, func(ctx context.Context) error {
		pipe := v.r.commands.Pipeline()
		values := make([]*goredis.StringCmd, len(keys))
		ttls := make([]*goredis.DurationCmd, len(keys))
		for i, key := range keys {
			values[i], ttls[i] = pipe.Get(ctx, key), pipe.PTTL(ctx, key)
		}
		if err := execute(ctx, pipe); err != nil {
			return fmt.Errorf("reading keys: %w", err)
		}
		for i, key := range keys {
			r := keyRead{key: key, ttl: ttls[i].Val()}
			switch value, err := values[i].Result(); {
			case err == nil:
				r.value, r.there = value, true
			case errors.Is(err, goredis.Nil):
			case errors.Is(explain(err), discovery.ErrInvalid):
				r.there, r.err = true, fmt.Errorf("%w record: the key holds no string", discovery.ErrInvalid)
			default:
				return fmt.Errorf("reading keys: %w", err)
			}
			if err := ttls[i].Err(); err != nil {
				return fmt.Errorf("reading keys: %w", err)
			}
			l.reads = append(l.reads, r)
		}
		return nil
	})
}

func (v *keysView) list(ctx context.Context) (discovery.Listing, error) {
	result, err := v.w.list(ctx, v)
	if err != nil {
		return discovery.Listing{}, err
	}
	l := result.(*keysLook)
	if l.epoch == "" {
		if l.epoch, err = v.r.mark(ctx, v.meta); err != nil {
			return discovery.Listing{}, err
		}
	}
	v.epoch = l.epoch
	if _, _, err := v.apply(l); err != nil {
		return discovery.Listing{}, err
	}
	v.listed = true
	return discovery.Listing{Epoch: v.epoch, Partial: v.ranOut()}, nil
}

func (v *keysView) stream([]goredis.XMessage) error { return nil }

func (v *keysView) current() bool { return true }

func (v *keysView) notified(m *goredis.Message) request {
	_, key, _ := strings.Cut(m.Channel, "__:")
	if k := v.keys[key]; k != nil {
		switch m.Payload {
		case "del", "unlink", "rename_from", "move_from", "expired", "evicted":
			k.reason = m.Payload
		}
	}
	return request{keys: []string{key}}
}

func (v *keysView) apply(result any) (next request, after time.Duration, err error) {
	l := result.(*keysLook)
	if l.whole {
		if v.epoch != l.epoch {
			if v.epoch != "" {
				return request{}, 0, fmt.Errorf("%w: the registry was emptied or replaced", discovery.ErrBroken)
			}
			v.epoch = l.epoch
		}
		if !slices.Equal(v.masters, l.masters) {
			return request{}, 0, fmt.Errorf("%w: the masters of the cluster changed", discovery.ErrBroken)
		}
	}
	var gone []string
	for _, r := range l.reads {
		if r.there {
			v.found(r, l)
		} else if v.keys[r.key] != nil {
			gone = append(gone, r.key)
		}
	}
	if len(gone) > 2 && 2*len(gone) > len(v.keys) && l.whole && !slices.ContainsFunc(gone, func(key string) bool { return v.keys[key].reason != "" }) {
		// Most are gone at once, and nobody said so: the data was lost. The
		// leases decide.
		for _, key := range gone {
			delete(v.keys, key)
		}
		return request{}, 0, nil
	}
	for _, key := range gone {
		if v.lost(key, l.started) {
			next.keys = append(next.keys, key)
		}
	}
	return next, keyAbsence, nil
}

func (v *keysView) found(r keyRead, l *keysLook) {
	k := v.keys[r.key]
	sum := maphash.String(v.seed, r.value)
	fresh := k == nil || k.sum != sum
	if k == nil {
		k = &stringKey{}
		v.keys[r.key] = k
	}
	k.missing, k.reason, k.sum = time.Time{}, "", sum
	k.deadline = time.Time{}
	if r.ttl >= 0 {
		k.deadline = time.Now().Add(r.ttl)
	}
	if !fresh {
		if due := time.Since(k.heard) >= k.renew; l.whole && !k.rejected && (due || l.beats) {
			// The key exists, so the node lives. Who verifies wants to know at
			// once; else a part of the lease is often enough.
			k.heard = time.Now()
			v.w.emit(discovery.Event{Type: discovery.Beat, ID: k.id, Key: r.key, Load: k.load})
		}
		return
	}
	n, err := v.records.Parse([]byte(r.value))
	if r.err != nil {
		err = r.err
	}
	// The key says whose record it is: who may write one key must not speak for the
	// nodes of others.
	id := strings.TrimPrefix(r.key, v.prefix)
	if err == nil && n.ID != id {
		err = fmt.Errorf("%w record: the key names another node, %q", discovery.ErrInvalid, id[:min(len(id), 64)])
	}
	k.id, k.load, k.rejected = id, n.Load, err != nil
	k.heard, k.renew = time.Now(), min(leaseOf(n)/3, maxRenew)
	if err != nil {
		v.w.emit(discovery.Event{Type: discovery.Rejected, ID: id, Key: r.key, Err: err})
		return
	}
	v.w.emit(discovery.Event{Type: discovery.Put, ID: id, Key: r.key, Node: n})
}

// lost decides what it means that a key is gone, and reports whether it takes
// another look.
func (v *keysView) lost(key string, started time.Time) bool {
	k := v.keys[key]
	e := discovery.Event{ID: k.id, Key: key}
	switch k.reason {
	case "":
		if k.missing.IsZero() {
			k.missing = started
		}
		if time.Since(k.missing) < keyAbsence {
			return true
		}
		// Nobody told: it left if it went before its time.
		e.Type = discovery.Expired
		if k.deadline.IsZero() || k.missing.Before(k.deadline.Add(-early)) {
			e.Type = discovery.Left
		}
	case "expired":
		e.Type = discovery.Expired
	case "evicted":
		// The server was short of memory. That says nothing of the node.
		delete(v.keys, key)
		return false
	default:
		e.Type = discovery.Left
	}
	delete(v.keys, key)
	v.w.emit(e)
	return false
}
