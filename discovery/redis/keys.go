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
	// For how long, and how many, keys that are gone are looked for: their nodes are
	// the likeliest to come back.
	formerFor = 10 * time.Minute
	maxFormer = 10_000
	// A key that vanished this long before its time was removed by somebody.
	early = 250 * time.Millisecond
	// A key that merely exists is worth an event this often.
	maxRenew = 10 * time.Second
	// What PTTL says of a key that is not there.
	notThere = -2
)

// keysLayout is the layout of one string key for each node.
type keysLayout struct {
	r            *Registry
	prefix, meta string
	announced    string          // the channel on which our writers name the nodes that changed
	foreign      map[string]bool // keys that versions before used, and are no node's while they hold no string

	mu            sync.Mutex
	previous      map[string]time.Time // the keys that the last watch knew at its end, and until when they stood
	previousEpoch string               // of the data then
	scannedAt     time.Time            // when the last whole pass through the keys ended
	scanTook      time.Duration        // and what it asked of the server
	told          map[string]string    // what was announced here last, a digest by id
}

func newKeysLayout(r *Registry) *keysLayout {
	l := &keysLayout{
		r: r, prefix: r.config.Key + ":", meta: r.config.side("meta"), announced: r.config.side("announced"),
		foreign: make(map[string]bool), told: make(map[string]string),
	}
	for _, name := range []string{"meta", "overrides"} {
		if former, ok := r.config.formerSide(name); ok {
			l.foreign[former] = true
		}
	}
	return l
}

func (l *keysLayout) Announce(ctx context.Context, n discovery.Node) error {
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return err
	}
	lease := keyLease(n)
	return l.r.do(ctx, func(ctx context.Context) error {
		pipe := l.r.commands.Pipeline()
		there := pipe.Exists(ctx, l.prefix+n.ID)
		set := pipe.Set(ctx, l.prefix+n.ID, record, lease)
		// Only watchers need the mark; who may not leave it may still announce.
		pipe.HSetNX(ctx, l.meta, "epoch", rand.Text())
		if err := execute(ctx, pipe); err != nil {
			return err
		}
		if set.Err() == nil && l.news(n) || there.Err() == nil && there.Val() == 0 {
			l.tell(ctx, n.ID)
		}
		return set.Err()
	})
}

// news reports whether the record differs from what was announced here before in
// more than the time.
func (l *keysLayout) news(n discovery.Node) bool {
	sum := digest(n)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.told[n.ID] == sum {
		return false
	}
	if len(l.told) >= discovery.MaxNodes {
		clear(l.told)
	}
	l.told[n.ID] = sum
	return true
}

// tell names a node whose key has changed to watchers that the server tells nothing.
// Who may not publish is found by their looks. It is for use within do.
func (l *keysLayout) tell(ctx context.Context, id string) {
	_ = l.r.commands.Publish(ctx, l.announced, id).Err()
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
	return (n.LeaseOr(discovery.DefaultTTL) + time.Second - 1).Truncate(time.Second)
}

func (l *keysLayout) Drain(ctx context.Context, n discovery.Node) (bool, error) {
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return false, err
	}
	return l.r.changed(ctx, func(ctx context.Context) (any, error) {
		answer, err := ownKeyScript.run(ctx, l.r.commands, []string{l.prefix + n.ID}, n.Instance(), record, int64(keyLease(n)/time.Second))
		if answer == int64(1) && l.news(n) {
			l.tell(ctx, n.ID)
		}
		return answer, err
	})
}

func (l *keysLayout) Withdraw(ctx context.Context, n discovery.Node) error {
	return l.r.do(ctx, func(ctx context.Context) error {
		removed, err := ownKeyScript.run(ctx, l.r.commands, []string{l.prefix + n.ID}, n.Instance())
		if removed == int64(1) {
			l.mu.Lock()
			delete(l.told, n.ID)
			l.mu.Unlock()
			l.tell(ctx, n.ID)
		}
		return err
	})
}

func (l *keysLayout) record(ctx context.Context, id string) (string, error) {
	size, err := l.r.commands.StrLen(ctx, l.prefix+id).Result()
	if err != nil || size > discovery.MaxRecord {
		return "", err
	}
	return l.r.commands.Get(ctx, l.prefix+id).Result()
}

func (l *keysLayout) History(context.Context, string, int) ([]discovery.Revision, error) {
	return nil, fmt.Errorf("%w: the layout %q keeps no history; %q does", discovery.ErrUnsupported, LayoutKeys, LayoutSortedSet)
}

// stringKey is what a watch knows of one key.
type stringKey struct {
	id       string
	sum      uint64        // of the value
	size     int64         // its length
	read     time.Time     // when it was read last
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
	former map[string]time.Time // keys that are gone, and since when
	epoch  string

	records discovery.Parser
}

func (l *keysLayout) watch(ctx context.Context, w *watch) (view, error) {
	v := &keysView{
		keysLayout: l, w: w, seed: maphash.MakeSeed(),
		keys: make(map[string]*stringKey), former: make(map[string]time.Time),
	}
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
	v.previousEpoch = v.epoch
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
	return "poll" // but for our own writers
}

func (v *keysView) follow(ctx context.Context) error {
	if err := v.followServer(ctx); err != nil || v.subscribed {
		return err
	}
	// What our writers say, together with what operators do, if the user may hear
	// of both.
	ok, err := offered(v.w.subscribe(ctx, v.r.commands, false, v.announced, v.r.overridesKey()))
	v.w.told = v.w.told || ok
	return err
}

// followServer subscribes to the notifications of all servers, if they send them.
func (v *keysView) followServer(ctx context.Context) error {
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
	same  bool          // the value is as it was, as far as the server tells without it
	size  int64         // its length
	ttl   time.Duration // negative: for ever
	there bool
	err   error // of the value, such as that it is no string
}

// keyWanted is a key to look at, with what is known of it.
type keyWanted struct {
	size     int64 // negative: it is to be read in any case
	deadline time.Time
}

type keysLook struct {
	whole   bool
	beats   bool // of every key that is there
	scan    bool // for keys that are not known
	epoch   string
	masters []string
	reads   []keyRead
	size    int // of what was read
	started time.Time
	longest time.Duration // what the slowest step took
}

func (l *keysLook) slowest() time.Duration { return l.longest }

// step calls the server once, with something that takes it little time.
func (v *keysView) step(ctx context.Context, l *keysLook, call func(context.Context) error) error {
	began := time.Now()
	err := v.r.do(ctx, call)
	l.longest = max(l.longest, time.Since(began))
	return err
}

func (v *keysView) look(q request) func(context.Context) (any, error) {
	l := &keysLook{whole: q.whole || q.some, beats: q.whole, started: time.Now()}
	wanted := make(map[string]keyWanted, len(q.keys))
	if l.whole {
		// A scan may miss a key only if it was not there all the time; to read
		// what was there before settles it.
		for key, k := range v.keys {
			w := keyWanted{size: -1}
			if !q.whole && k.size > shortValue && time.Since(k.read) < longValueAge {
				w = keyWanted{size: k.size, deadline: k.deadline}
			}
			wanted[key] = w
		}
		for key, since := range v.former {
			if time.Since(since) < formerFor {
				wanted[key] = keyWanted{size: -1}
			} else {
				delete(v.former, key)
			}
		}
	}
	for key := range q.keys {
		wanted[key] = keyWanted{size: -1}
	}
	// Whoever waits for a look need not wait for a pass through a large database,
	// that finds out only who is not known yet.
	l.scan = q.whole && (!v.listed || v.quick())
	listed := v.listed
	return func(ctx context.Context) (any, error) {
		if l.whole {
			if err := v.place(ctx, l); err != nil {
				return nil, err
			}
		}
		if known := v.knownBefore(l.epoch); !listed && known != nil {
			// The last watch has just seen all keys; a pass beside this one finds
			// those that are new.
			for key := range known {
				wanted[key] = keyWanted{size: -1}
			}
			l.scan = false
		}
		if l.scan {
			pass := v.newScan(listScanCount)
			err := pass.all(ctx, func(key string) {
				if _, known := wanted[key]; !known && len(wanted) < maxMembers {
					wanted[key] = keyWanted{size: -1}
				}
			})
			if err != nil {
				return nil, err
			}
			l.longest = max(l.longest, pass.slowest)
			v.scanned(pass.took)
		}
		for chunk := range slices.Chunk(slices.Sorted(maps.Keys(wanted)), readCount) {
			if err := v.read(ctx, l, chunk, wanted); err != nil {
				return nil, err
			}
		}
		return l, nil
	}
}

// knownBefore returns the keys that the last watch knew, if that is enough of a
// listing: of the same data, in which it takes long to look for keys, and not long
// ago. Else nil.
func (l *keysLayout) knownBefore(epoch string) map[string]time.Time {
	quick := l.quick()
	l.mu.Lock()
	defer l.mu.Unlock()
	if quick || epoch == "" || epoch != l.previousEpoch || l.scannedAt.IsZero() || time.Since(l.scannedAt) > formerFor {
		return nil
	}
	return l.previous
}

// place finds out which data and which servers there are.
func (v *keysView) place(ctx context.Context, l *keysLook) error {
	var err error
	if l.masters, err = v.r.masters(ctx); err != nil {
		return err
	}
	err = v.step(ctx, l, func(ctx context.Context) (err error) {
		l.epoch, err = v.r.commands.HGet(ctx, v.meta, "epoch").Result()
		// Without the right to it, or if something else stands there, there is none.
		if errors.Is(err, goredis.Nil) || errors.Is(explain(err), discovery.ErrPermission) || wrongType(err) {
			err = nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("looking for keys: %w", err)
	}
	return nil
}

// read reads some keys.
func (v *keysView) read(ctx context.Context, l *keysLook, keys []string, wanted map[string]keyWanted) error {
	reads, err := v.measure(ctx, l, keys)
	if err != nil {
		return fmt.Errorf("reading keys: %w", err)
	}
	var values []*keyRead
	for i := range reads {
		switch r := &reads[i]; {
		case !r.there || r.err != nil:
		case r.size > discovery.MaxRecord, l.size > maxRead && r.size > usualRecord:
			r.err = tooLong(int(r.size))
		case wanted[r.key].size == r.size && sameDeadline(wanted[r.key].deadline, r.ttl):
			r.same = true
		default:
			l.size += int(r.size)
			values = append(values, r)
		}
	}
	if err := v.values(ctx, l, values); err != nil {
		return fmt.Errorf("reading keys: %w", err)
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
func (v *keysView) measure(ctx context.Context, l *keysLook, keys []string) ([]keyRead, error) {
	reads := make([]keyRead, len(keys))
	err := v.step(ctx, l, func(ctx context.Context) error {
		pipe := v.r.commands.Pipeline()
		sizes := make([]*goredis.IntCmd, len(keys))
		ttls := make([]*goredis.DurationCmd, len(keys))
		for i, key := range keys {
			sizes[i], ttls[i] = pipe.StrLen(ctx, key), pipe.PTTL(ctx, key)
		}
		if err := execute(ctx, pipe); err != nil {
			return err
		}
		for i, key := range keys {
			if err := ttls[i].Err(); err != nil {
				return err
			}
			r := keyRead{key: key, ttl: ttls[i].Val(), size: sizes[i].Val(), there: ttls[i].Val() != notThere}
			switch err := sizes[i].Err(); {
			case err == nil:
			case wrongType(err):
				r.err = discovery.Invalidf(discovery.FaultRecord, "record: the key holds no string")
				r.there = r.there && !v.foreign[key]
			default:
				return err
			}
			reads[i] = r
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return reads, nil
}

// values reads the values of keys. What became too long meanwhile is cut at the
// connection.
func (v *keysView) values(ctx context.Context, l *keysLook, reads []*keyRead) error {
	if len(reads) == 0 {
		return nil
	}
	return v.step(ctx, l, func(ctx context.Context) error {
		pipe := v.r.commands.Pipeline()
		values := make([]*goredis.StringCmd, len(reads))
		for i, r := range reads {
			values[i] = pipe.Get(ctx, r.key)
		}
		if err := execute(ctx, pipe); err != nil {
			return err
		}
		for i, r := range reads {
			switch value, err := values[i].Result(); {
			case err == nil:
				r.value, r.size = value, int64(len(value))
			case errors.Is(err, goredis.Nil):
				r.there = false
			case wrongType(err):
				r.err = discovery.Invalidf(discovery.FaultRecord, "record: the key holds no string")
			default:
				return err
			}
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
	wait := v.scanInterval()
	if !l.scan {
		wait = 0
	}
	v.w.group.Go(func() { v.scanOn(ctx, wait) })
	return discovery.Listing{Epoch: v.epoch, Partial: v.ranOut()}, nil
}

func (v *keysView) stream([]goredis.XMessage) error { return nil }

func (v *keysView) current() bool { return true }

func (v *keysView) notified(m *goredis.Message) request {
	if m.Channel == v.announced {
		if len(m.Payload) > maxSuffix {
			return request{}
		}
		return requestFor(v.prefix + m.Payload)
	}
	_, key, _ := strings.Cut(m.Channel, "__:")
	if len(key) > len(v.prefix)+maxSuffix {
		return request{}
	}
	if k := v.keys[key]; k != nil {
		switch m.Payload {
		case "del", "unlink", "rename_from", "move_from", "expired", "evicted":
			k.reason = m.Payload
		}
	}
	return requestFor(key)
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
			v.forget(key)
		}
		return request{}, 0, nil
	}
	for _, key := range gone {
		if v.lost(key, l.started) {
			next.want(key)
		}
	}
	return next, keyAbsence, nil
}

// forget forgets a key that is gone, but for that it was there.
func (v *keysView) forget(key string) {
	delete(v.keys, key)
	if len(v.former) < maxFormer {
		v.former[key] = time.Now()
	}
}

func (v *keysView) found(r keyRead, l *keysLook) {
	k := v.keys[r.key]
	if k == nil && (r.same || len(v.keys) >= maxMembers) {
		return
	}
	delete(v.former, r.key)
	fresh := false
	if !r.same {
		sum := maphash.Comparable(v.seed, keySum{r.value, r.size, r.err != nil})
		fresh = k == nil || k.sum != sum
		if k == nil {
			k = &stringKey{}
			v.keys[r.key] = k
		}
		k.sum, k.size, k.read = sum, r.size, time.Now()
	}
	k.missing, k.reason = time.Time{}, ""
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
	var n discovery.Node
	err := r.err
	if err == nil {
		n, err = v.records.Parse([]byte(r.value))
	}
	// The key says whose record it is: who may write one key must not speak for the
	// nodes of others.
	id := strings.TrimPrefix(r.key, v.prefix)
	if err == nil && n.ID != id {
		err = discovery.Forbid(discovery.Invalidf(discovery.FaultKey, "record: the key names another node, %q", id[:min(len(id), 64)]))
	}
	k.id, k.load, k.rejected = id, n.Load, err != nil
	k.heard, k.renew = time.Now(), min(n.LeaseOr(discovery.DefaultTTL)/3, maxRenew)
	if err != nil {
		v.w.emit(discovery.Event{Type: discovery.Rejected, ID: id, Key: r.key, Err: err})
		return
	}
	v.w.emit(discovery.Event{Type: discovery.Put, ID: id, Key: r.key, Node: n})
}

// keySum is what tells two values of a key apart.
type keySum struct {
	value string
	size  int64
	other bool // it is not to be read, or no string
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
		v.forget(key)
		return false
	default:
		e.Type = discovery.Left
	}
	v.forget(key)
	v.w.emit(e)
	return false
}
