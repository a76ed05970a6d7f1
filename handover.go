package caddydiscovery

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// announcements are those of this process.
var announcements = announcer{nodes: make(map[announcementKey]*wantedNode), changed: make(chan struct{})}

func init() {
	caddy.OnExit(func(context.Context) { announcements.leaving.Wait() })
}

// An announcer keeps the nodes listed that configs want, and hands their records over
// from one config to the next.
//
// A reload that changes an option of a registry, such as a rotated password, makes
// another announcement of the same id, on a connection of its own, which cannot be
// told from a move to another registry: one server may have several addresses. What
// the config in force announces owns the record, therefore. The announcement before
// it does not renew its own any more, and leaves when the new one stands: in the
// same registry there is nothing left that it may touch.
//
// A config may fail after it came into force. Then the one below it is in force
// again, and announces anew what was overwritten.
type announcer struct {
	leaving sync.WaitGroup // of announcements that no config wants

	mu      sync.Mutex // guards what follows; nothing else happens under it
	nodes   map[announcementKey]*wantedNode
	configs []*announcedConfig // that run; the last one is in force
	changed chan struct{}      // closed when another one is, or a record has come to stand
}

type announcementKey struct {
	registry backend.Key
	id       string
}

func (n *ProxyNode) key() (announcementKey, error) {
	registry, err := backend.KeyOf(n.backend)
	return announcementKey{registry, n.NodeID}, err
}

// A wantedNode is a node and the configs that want it, newest last: the newest one
// says how it is announced. Should that fail to start, the one before says so again.
type wantedNode struct {
	*announcement
	by []*ProxyNode
}

// An announcedConfig is what one config announces.
type announcedConfig struct {
	nodes         []*ProxyNode
	announcements []*announcement // of each
}

// acquire notes that a config wants its nodes to be announced, and how; enforce puts
// that into force. It is matched by one of release.
func (all *announcer) acquire(nodes []*ProxyNode) (*announcedConfig, error) {
	c := new(announcedConfig)
	for _, n := range nodes {
		a, err := all.want(n)
		if err != nil {
			all.release(c)
			return nil, err
		}
		c.nodes, c.announcements = append(c.nodes, n), append(c.announcements, a)
	}
	return c, nil
}

func (all *announcer) want(n *ProxyNode) (*announcement, error) {
	key, err := n.key()
	if err != nil {
		return nil, err
	}
	registry, err := acquireRegistry(n.backend)
	if err != nil {
		return nil, fmt.Errorf("opening the registry: %w", err)
	}
	all.mu.Lock()
	defer all.mu.Unlock()
	if w := all.nodes[key]; w != nil {
		w.by = append(w.by, n)
		return w.announcement, registry.release() // it holds the registry already
	}
	w := &wantedNode{newAnnouncement(key, n, registry), []*ProxyNode{n}}
	all.nodes[key] = w
	var ctx context.Context
	ctx, w.cancel = context.WithCancel(context.Background())
	go w.run(ctx, func() *ProxyNode { return all.newest(w) }, ownRecord{
		Registry:   registry.conn,
		successors: func() []*announcement { found, _ := all.successors(w.announcement); return found },
		taken:      func() { all.taken(w.announcement) },
	})
	return w.announcement, nil
}

// newest returns what the newest config says of a node, nil if none wants it.
func (all *announcer) newest(w *wantedNode) *ProxyNode {
	all.mu.Lock()
	defer all.mu.Unlock()
	if len(w.by) == 0 {
		return nil
	}
	return w.by[len(w.by)-1]
}

// enforce makes a config the one in force, and has its nodes announced.
func (all *announcer) enforce(c *announcedConfig) {
	all.mu.Lock()
	all.configs = append(all.configs, c)
	all.wake()
	all.mu.Unlock()
	for _, a := range c.announcements {
		a.notify()
	}
}

// release ends what a config wants, if c is not nil. The nodes that no other config
// wants leave, in the background.
func (all *announcer) release(c *announcedConfig) {
	if c == nil {
		return
	}
	all.mu.Lock()
	defer all.mu.Unlock()
	all.drop(c)
	for i, a := range c.announcements {
		w, n := all.nodes[a.key], c.nodes[i]
		w.by = slices.DeleteFunc(w.by, func(by *ProxyNode) bool { return by == n })
		if len(w.by) > 0 {
			a.notify()
			continue
		}
		delete(all.nodes, a.key)
		all.leaving.Go(func() { all.handOver(a, time.Duration(n.TTL)) })
	}
}

// withdraw takes all nodes of an exiting Caddy out of service, and returns when
// their records are gone.
func (all *announcer) withdraw(c *announcedConfig) {
	all.mu.Lock()
	all.configs = nil
	all.wake() // who waits for a successor waits no longer
	all.mu.Unlock()
	if c == nil {
		return
	}
	var group sync.WaitGroup
	for _, a := range c.announcements {
		group.Go(a.withdraw)
	}
	group.Wait()
}

// wake wakes those who wait for a change. The caller holds mu.
func (all *announcer) wake() {
	close(all.changed)
	all.changed = make(chan struct{})
}

// drop takes a config out of those that run. The caller holds mu.
func (all *announcer) drop(c *announcedConfig) {
	i := slices.Index(all.configs, c)
	if i < 0 {
		return
	}
	all.configs = slices.Delete(all.configs, i, i+1)
	if i > 0 && i == len(all.configs) { // the one below is in force again
		for _, b := range all.configs[i-1].announcements {
			if slices.ContainsFunc(c.announcements, func(a *announcement) bool { return a != b && a.sharesRecord(b) }) {
				b.stands.Store(false)
				b.renew()
			}
		}
	}
	all.wake()
}

// sharesRecord reports whether both may write the same record.
func (a *announcement) sharesRecord(b *announcement) bool {
	return a.kind == b.kind && a.key.id == b.key.id
}

// taken notes that the registry has taken the record of an announcement.
func (all *announcer) taken(a *announcement) {
	if !a.stands.Swap(true) {
		all.mu.Lock()
		defer all.mu.Unlock()
		all.wake()
	}
}

// successors returns the announcements of the config in force that announce the id
// of a in its place, and what is closed when there may be others.
func (all *announcer) successors(a *announcement) (found []*announcement, changed <-chan struct{}) {
	all.mu.Lock()
	defer all.mu.Unlock()
	if len(all.configs) > 0 {
		for _, b := range all.configs[len(all.configs)-1].announcements {
			if b == a {
				return nil, all.changed
			}
			if b.sharesRecord(a) {
				found = append(found, b)
			}
		}
	}
	return found, all.changed
}

// handOver waits until the successors are announced, for as long as the record that
// stands is good without being renewed, and leaves. A successor announces once more
// after that: whatever was under way has arrived by then.
func (all *announcer) handOver(a *announcement, lease time.Duration) {
	timeout := time.NewTimer(lease)
	defer timeout.Stop()
	successors, changed := all.successors(a)
	for waiting := true; waiting && slices.ContainsFunc(successors, func(b *announcement) bool { return !b.stands.Load() }); {
		select {
		case <-changed:
			successors, changed = all.successors(a)
		case <-timeout.C:
			waiting = false
		}
	}
	a.withdraw()
	for _, b := range successors {
		b.renew()
	}
}

// ownRecord is the registry as an announcement writes to it.
type ownRecord struct {
	discovery.Registry
	successors func() []*announcement // those that announce the node in its place
	taken      func()                 // is told that the record stands
}

// Announce renews nothing once there is a successor.
func (r ownRecord) Announce(ctx context.Context, n discovery.Node) error {
	if len(r.successors()) > 0 {
		return nil
	}
	err := r.Registry.Announce(ctx, n)
	if err == nil {
		r.taken()
	}
	return err
}

// Drain implements discovery.Announcer.
func (r ownRecord) Drain(ctx context.Context, n discovery.Node) (bool, error) {
	if r.replaced() {
		return false, nil
	}
	return r.Registry.Drain(ctx, n)
}

// Withdraw implements discovery.Announcer.
func (r ownRecord) Withdraw(ctx context.Context, n discovery.Node) error {
	if r.replaced() {
		return nil
	}
	return r.Registry.Withdraw(ctx, n)
}

// replaced reports whether a successor's record stands in this very registry for
// sure, so that nothing has to be said, nor heard by those who know no instances.
func (r ownRecord) replaced() bool {
	return slices.ContainsFunc(r.successors(), func(b *announcement) bool {
		return b.stands.Load() && b.registry.conn.String() == r.String()
	})
}

// Record implements discovery.Reader.
func (r ownRecord) Record(ctx context.Context, id string) (discovery.Node, error) {
	reader, ok := discovery.As[discovery.Reader](r.Registry)
	if !ok {
		return discovery.Node{}, errors.ErrUnsupported
	}
	if len(r.successors()) > 0 {
		return discovery.Node{}, nil // theirs is no record of another process
	}
	return reader.Record(ctx, id)
}

var (
	_ discovery.Announcer = ownRecord{}
	_ discovery.Reader    = ownRecord{}
)
