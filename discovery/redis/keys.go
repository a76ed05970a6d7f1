package redis

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

var ownKeyScript = newScript("instance.lua", "own_key.lua")

// keysLayout is the layout of one string key for each node.
type keysLayout struct {
	client    *client
	prefix    string
	meta      string
	announced string   // the channel on which our writers name the nodes that changed
	foreign   []string // keys that versions before used, and are no node's while they hold no string

	mu            sync.Mutex
	previous      map[string]time.Time // the keys that the last watch knew at its end, and until when they stood
	previousEpoch epoch                // of the data then
	scannedAt     time.Time            // when the last whole pass through the keys ended
	scanTook      time.Duration        // and what it asked of the server
	digests       map[string]string    // what was announced here last, a digest by id
}

func newKeys(c *client) *keysLayout {
	return &keysLayout{
		client: c, prefix: c.config.Key + ":", meta: c.config.side("meta"), announced: c.config.side("announced"),
		foreign: c.config.former("meta", "overrides"), digests: make(map[string]string),
	}
}

func (l *keysLayout) put(ctx context.Context, n discovery.Node, record []byte) error {
	pipe := l.client.commands.Pipeline()
	there := pipe.Exists(ctx, l.prefix+n.ID)
	set := pipe.Set(ctx, l.prefix+n.ID, record, keyLease(n))
	// Only watchers need the mark; who may not leave it may still announce.
	pipe.HSetNX(ctx, l.meta, "epoch", rand.Text())
	if err := execute(ctx, pipe); err != nil {
		return err
	}
	if set.Err() == nil && l.changed(n) || there.Err() == nil && there.Val() == 0 {
		l.publish(ctx, n.ID)
	}
	return set.Err()
}

func (l *keysLayout) replace(ctx context.Context, n discovery.Node, record []byte) (bool, error) {
	ok, err := own(l.ifOwn(ctx, n, record, int64(keyLease(n)/time.Second)))
	if ok && l.changed(n) {
		l.publish(ctx, n.ID)
	}
	return ok, err
}

func (l *keysLayout) remove(ctx context.Context, n discovery.Node) error {
	removed, err := l.ifOwn(ctx, n)
	if removed == int64(1) {
		l.mu.Lock()
		delete(l.digests, n.ID)
		l.mu.Unlock()
		l.publish(ctx, n.ID)
	}
	return err
}

// ifOwn removes a node's record, or replaces it by another with a lease in seconds, if
// it names the same instance.
func (l *keysLayout) ifOwn(ctx context.Context, n discovery.Node, by ...any) (any, error) {
	return ownKeyScript.run(ctx, l.client.commands, []string{l.prefix + n.ID}, append([]any{n.Instance()}, by...)...)
}

func (l *keysLayout) record(ctx context.Context, id string) (string, error) {
	size, err := l.client.commands.StrLen(ctx, l.prefix+id).Result()
	if err != nil || size > discovery.MaxRecord {
		return "", err
	}
	return l.client.commands.Get(ctx, l.prefix+id).Result()
}

func (l *keysLayout) history(context.Context, string, int) ([]discovery.Revision, error) {
	return nil, fmt.Errorf("%w: the layout %q keeps no history; %q does", discovery.ErrUnsupported, LayoutKeys, LayoutSortedSet)
}

func (l *keysLayout) override(ctx context.Context, id, record string) (err error) {
	commands, key := l.client.commands, l.client.config.overridesKey()
	if record == "" {
		err = commands.HDel(ctx, key, id).Err()
	} else {
		err = commands.HSet(ctx, key, id, record).Err()
	}
	for _, former := range l.client.config.former("overrides") {
		// It may be a node's record, which is no hash.
		if e := commands.HDel(ctx, former, id).Err(); err == nil && record == "" && !wrongType(e) {
			err = e
		}
	}
	if err == nil {
		// Who may not publish is found out by the poll.
		_ = commands.Publish(ctx, key, id).Err()
	}
	return err
}

// changed reports whether the record differs from what was announced here before in
// more than the time.
func (l *keysLayout) changed(n discovery.Node) bool {
	sum := digest(n)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.digests[n.ID] == sum {
		return false
	}
	if len(l.digests) >= discovery.MaxNodes {
		clear(l.digests)
	}
	l.digests[n.ID] = sum
	return true
}

// publish names a node whose key has changed to watchers that the server tells nothing.
// Who may not publish is found by their looks. It is for use within do.
func (l *keysLayout) publish(ctx context.Context, id string) {
	_ = l.client.commands.Publish(ctx, l.announced, id).Err()
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
