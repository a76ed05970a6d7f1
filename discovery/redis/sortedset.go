package redis

import (
	"context"
	"crypto/rand"
	"sync"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

var (
	announceScript = newScript("instance.lua", "announce.lua")
	withdrawScript = newScript("instance.lua", "withdraw.lua")
	recordScript   = newScript("record.lua")
	overrideScript = newScript("override.lua")
)

// sortedSet is the layout of one sorted set, with what our writers keep beside it.
type sortedSet struct {
	client *client
	keys   setKeys

	mu       sync.Mutex
	previous map[string]bool // the nodes that the last watch knew at its end
}

// setKeys are the set and what lies beside it, as the package's documentation says.
type setKeys struct{ set, members, leases, changes, meta string }

func (k setKeys) all() []string { return []string{k.set, k.members, k.leases, k.changes, k.meta} }

func newSortedSet(c *client) *sortedSet {
	side := c.config.side
	return &sortedSet{client: c, keys: setKeys{
		set: c.config.Key, members: side("members"), leases: side("leases"), changes: side("changes"), meta: side("meta"),
	}}
}

func (l *sortedSet) put(ctx context.Context, n discovery.Node, record []byte) error {
	_, err := l.announce(ctx, n, record)
	return err
}

func (l *sortedSet) replace(ctx context.Context, n discovery.Node, record []byte) (bool, error) {
	return own(l.announce(ctx, n, record, n.Instance()))
}

func (l *sortedSet) announce(ctx context.Context, n discovery.Node, record []byte, instance ...any) (any, error) {
	args := []any{n.ID, digest(n), record, n.LeaseOr(discovery.DefaultTTL).Milliseconds(), l.client.config.History, rand.Text()}
	return announceScript.run(ctx, l.client.commands, l.keys.all(), append(args, instance...)...)
}

func (l *sortedSet) remove(ctx context.Context, n discovery.Node) error {
	_, err := withdrawScript.run(ctx, l.client.commands, l.keys.all(), n.ID, n.Instance())
	return err
}

func (l *sortedSet) record(ctx context.Context, id string) (string, error) {
	// The digest and a space come first: see announce.lua.
	const before = 17
	answer, err := recordScript.run(ctx, l.client.commands, []string{l.keys.members}, id, before+discovery.MaxRecord)
	member, _ := answer.(string)
	return member[min(len(member), before):], err
}

func (l *sortedSet) override(ctx context.Context, id, record string) error {
	keys := []string{l.client.config.overridesKey(), l.keys.changes, l.keys.meta}
	_, err := overrideScript.run(ctx, l.client.commands, keys, id, record, rand.Text())
	return err
}
