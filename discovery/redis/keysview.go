package redis

import (
	"context"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// A key must be absent from two looks at least this far apart before it counts as
	// gone. It is replaced in one step, if the writer does not delete it first for no
	// reason.
	keyAbsence = 100 * time.Millisecond
	// For how long, and how many, keys that are gone are looked for: their nodes are
	// the likeliest to come back.
	formerFor = 10 * time.Minute
	maxFormer = 10_000
	// A key that vanished this long before its time was removed by somebody.
	early = 250 * time.Millisecond
	// A key that merely exists is worth an event this often.
	maxRenew = 10 * time.Second
)

// A stringKey is what a watch knows of one key.
type stringKey struct {
	id       string
	sum      uint64        // of the value
	size     int64         // its length
	read     time.Time     // when it was read last
	load     float64       // to repeat with a heartbeat
	heard    time.Time     // when the last event about it was emitted
	renew    time.Duration // how long after that it is worth another
	rejected bool
	deadline time.Time // until when the key stood, when it was read last; zero: for ever
	missing  time.Time // since when looks have not found it
	reason   string    // the notification that said it is gone, or ""
}

// A keysView is what a watch knows of the keys.
type keysView struct {
	*keysLayout
	feed       *feed
	masters    []string // addresses of a cluster's masters; else nil
	subscribed bool     // to notifications of all of them

	listed bool
	seed   maphash.Seed
	keys   map[string]*stringKey
	former map[string]time.Time // keys that are gone, and since when
	epoch  epoch

	records discovery.Parser
}

func (l *keysLayout) watch(ctx context.Context, f *feed) (view, error) {
	v := &keysView{
		keysLayout: l, feed: f, seed: maphash.MakeSeed(),
		keys: make(map[string]*stringKey), former: make(map[string]time.Time),
	}
	var err error
	v.masters, err = l.client.masters(ctx)
	f.closers = append(f.closers, v.remember)
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
	v.previous, v.previousEpoch = deadlines, v.epoch
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

func (v *keysView) changes() string {
	if v.subscribed {
		return "notifications"
	}
	return "poll" // but for our own writers
}

// follow subscribes to what the servers notify, or else to what our writers say, and
// together with it to what operators do, if the user may hear of both.
func (v *keysView) follow(ctx context.Context) error {
	overrides := v.client.config.overridesKey()
	told, err := v.followServers(ctx, overrides)
	if err == nil && !v.subscribed {
		var ok bool
		ok, err = v.feed.subscribe(ctx, v.client.commands, false, v.announced, overrides)
		told = told || ok
	}
	if err == nil && !told {
		_, err = v.feed.subscribe(ctx, v.client.commands, false, overrides)
	}
	return err
}

// followServers subscribes to the notifications of all servers, if they send them, and
// reports whether the overrides are told as well.
func (v *keysView) followServers(ctx context.Context, overrides string) (told bool, err error) {
	// Notifications are local to each server of a cluster.
	addresses := v.masters
	if addresses == nil {
		addresses = v.client.connector.addresses[:1]
	}
	pattern := fmt.Sprintf("__keyspace@%d__:%s*", v.client.config.DB, escapeGlob(v.prefix))
	var servers []*goredis.Client
	for _, address := range addresses {
		server := v.client.connector.server(address)
		v.feed.closeWith(ctx, server)
		servers = append(servers, server)
		if notified, err := v.feed.notifies(ctx, server, "$gx"); err != nil || !notified {
			_ = server.Close() // nothing more will be asked of it
			return false, err
		}
	}
	for i, server := range servers {
		ok := false
		if i == 0 {
			// One connection for both, if the user may hear of both.
			told, err = v.feed.subscribe(ctx, server, true, pattern, escapeGlob(overrides))
			ok = told
		}
		if err == nil && !ok {
			ok, err = v.feed.subscribe(ctx, server, true, pattern)
		}
		if err != nil || !ok {
			return told, err
		}
	}
	v.subscribed = true
	return told, nil
}

// escapeGlob makes a pattern that matches s only.
func escapeGlob(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`).Replace(s)
}

func (v *keysView) list(ctx context.Context) (discovery.Listing, time.Duration, error) {
	l := v.prepare(request{whole: true})
	err := l.ask(ctx)
	if err == nil && l.epoch == "" {
		l.epoch, err = v.client.mark(ctx)
	}
	if err == nil {
		_, err = v.apply(l)
	}
	if err != nil {
		return discovery.Listing{}, 0, err
	}
	v.listed = true
	wait := v.scanInterval()
	if !l.scan {
		wait = 0
	}
	v.feed.group.Go(func() { v.scanOn(ctx, wait) })
	return discovery.Listing{Epoch: string(v.epoch), Partial: v.ranOut()}, l.slowest, nil
}

func (v *keysView) look(q request) func(context.Context) (lookResult, error) {
	l := v.prepare(q)
	return func(ctx context.Context) (lookResult, error) {
		err := l.ask(ctx)
		return lookResult{slowest: l.slowest, apply: func() (request, error) { return v.apply(l) }}, err
	}
}

func (v *keysView) notified(m *goredis.Message) (q request) {
	_, key, _ := strings.Cut(m.Channel, "__:")
	switch m.Channel {
	case v.client.config.overridesKey():
		return request{overrides: true}
	case v.announced:
		key = v.prefix + m.Payload
	}
	if len(key) > len(v.prefix)+maxSuffix {
		return q
	}
	if k := v.keys[key]; k != nil && m.Channel != v.announced {
		switch m.Payload {
		case "del", "unlink", "rename_from", "move_from", "expired", "evicted":
			k.reason = m.Payload
		}
	}
	q.want(key)
	return q
}

// apply emits what a look has found to be changed.
func (v *keysView) apply(l *keysLook) (next request, err error) {
	if l.whole {
		if err := v.epoch.follow(l.epoch); err != nil {
			return request{}, err
		}
		if !slices.Equal(v.masters, l.masters) {
			return request{}, fmt.Errorf("%w: the masters of the cluster changed", discovery.ErrBroken)
		}
	}
	var gone []string
	for _, r := range l.reads {
		if r.there {
			v.update(r, l)
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
		return request{}, nil
	}
	for _, key := range gone {
		if v.gone(key, l.started) {
			next.want(key)
		}
	}
	next.after = keyAbsence
	return next, nil
}

// forget moves a key that is gone to the former ones.
func (v *keysView) forget(key string) {
	delete(v.keys, key)
	if len(v.former) < maxFormer {
		v.former[key] = time.Now()
	}
}

// update compares what a look has found under a key with what was known of it.
func (v *keysView) update(r keyRead, l *keysLook) {
	k := v.keys[r.key]
	if k == nil && (r.same || len(v.keys) >= maxMembers) {
		return
	}
	delete(v.former, r.key)
	fresh := false
	if !r.same {
		sum := maphash.Comparable(v.seed, struct {
			value string
			size  int64
			other bool // it is not to be read, or no string
		}{r.value, r.size, r.err != nil})
		fresh = k == nil || k.sum != sum
		if k == nil {
			k = &stringKey{}
			v.keys[r.key] = k
		}
		k.sum, k.size, k.read = sum, r.size, time.Now()
	}
	k.missing, k.reason, k.deadline = time.Time{}, "", time.Time{}
	if r.ttl >= 0 {
		k.deadline = time.Now().Add(r.ttl)
	}
	if fresh {
		v.put(k, r)
	} else if due := time.Since(k.heard) >= k.renew; l.whole && !k.rejected && (due || l.beats) {
		// The key exists, so the node lives. Who verifies wants to know at
		// once; else a part of the lease is often enough.
		k.heard = time.Now()
		v.feed.emit(discovery.Event{Type: discovery.Beat, ID: k.id, Key: r.key, Load: k.load})
	}
}

// put emits a record that is new.
func (v *keysView) put(k *stringKey, r keyRead) {
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
	e := discovery.Event{Type: discovery.Put, ID: id, Key: r.key, Node: n}
	if err != nil {
		e = discovery.Event{Type: discovery.Rejected, ID: id, Key: r.key, Err: err}
	}
	v.feed.emit(e)
}

// gone emits that a node left or that its record ran out, by what is known of how its
// key went, and reports whether another look must confirm first that it did.
func (v *keysView) gone(key string, started time.Time) bool {
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
	v.feed.emit(e)
	return false
}
