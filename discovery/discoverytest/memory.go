package discoverytest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Memory is a registry in memory, for tests of logic: it can be broken,
// silenced and wiped at will. All its methods may be called concurrently.
type Memory struct {
	mu      sync.Mutex
	epoch   int
	broken  chan struct{} // closed while the registry is unreachable
	silent  bool          // watches are told nothing, and verification fails
	seq     uint64
	records map[string]stored
	log     []discovery.Event // what happened since the epoch began, for the watches
	grown   chan struct{}     // closed when log grew
	past    map[string][]discovery.Revision
	watches int
	writes  int

	overrides map[string]discovery.Override // they survive a Wipe, as in a bucket of their own

	// Expiry and Partial are reported in every listing. Set them before use.
	Expiry  time.Duration
	Partial bool
}

type stored struct {
	data    []byte
	written time.Time
	seq     uint64
}

// dialTimeout is how long a new watch waits for a registry that is silent.
const dialTimeout = 2 * time.Second

// NewMemory returns an empty registry.
func NewMemory() *Memory {
	m := &Memory{}
	m.reset()
	m.broken = make(chan struct{})
	return m
}

func (m *Memory) reset() {
	m.epoch++
	m.seq = 0
	m.records = make(map[string]stored)
	m.past = make(map[string][]discovery.Revision)
	m.log = nil
	m.grown = make(chan struct{})
}

// Open returns a connection.
func (m *Memory) Open() discovery.Registry { return &memoryConn{m: m} }

// Break makes the registry unreachable until Restore.
func (m *Memory) Break() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down() == nil {
		close(m.broken)
	}
}

// Restore ends Break.
func (m *Memory) Restore() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down() == nil {
		return // the watches hold the channel that the next Break closes
	}
	m.broken = make(chan struct{})
}

// Silence makes the registry one that seems to be there and says nothing: it
// takes no writes, watches hear nothing, new ones fail after seconds and
// verification fails, as behind a packet filter. false ends it.
func (m *Memory) Silence(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.silent = on
	if !on {
		m.wake()
	}
}

// Wipe empties the registry and gives it a new identity; watches break.
func (m *Memory) Wipe() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down() == nil {
		close(m.broken)
		m.broken = make(chan struct{})
	}
	m.reset()
}

// Put stores a record as a writer in the wild would, whatever it is.
func (m *Memory) Put(id string, data []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(id, data)
}

// Age makes a record look as if it had been written that much earlier.
func (m *Memory) Age(id string, by time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r, ok := m.records[id]; ok {
		r.written = r.written.Add(-by)
		m.records[id] = r
	}
}

// Drop removes a record without a word to the watches.
func (m *Memory) Drop(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.records, id)
}

// Expire lets a record run out.
func (m *Memory) Expire(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.records[id]; ok {
		m.delete(id, discovery.Expired)
	}
}

// Watches returns how many watches are running.
func (m *Memory) Watches() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.watches
}

// Writes returns how many records were announced and withdrawn so far.
func (m *Memory) Writes() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.writes
}

// Record returns the record of a node, nil if there is none.
func (m *Memory) Record(id string) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.records[id].data
}

func (m *Memory) put(id string, data []byte) {
	m.seq++
	m.records[id] = stored{data: data, written: time.Now(), seq: m.seq}
	m.append(m.event(id))
}

func (m *Memory) delete(id string, t discovery.EventType) {
	m.seq++
	delete(m.records, id)
	m.append(discovery.Event{Type: t, ID: id, Revision: m.seq})
}

func (m *Memory) append(e discovery.Event) {
	m.log = append(m.log, e)
	m.past[e.ID] = append(m.past[e.ID], discovery.Revision{
		Number: e.Revision, Time: time.Now(), Type: e.Type, Node: e.Node, Err: e.Err,
	})
	if !m.silent {
		m.wake()
	}
}

func (m *Memory) wake() {
	close(m.grown)
	m.grown = make(chan struct{})
}

func (m *Memory) event(id string) discovery.Event {
	r := m.records[id]
	e := discovery.Event{Type: discovery.Put, ID: id, Revision: r.seq}
	var err error
	if e.Node, err = discovery.ParseNode(r.data); err != nil {
		e.Type, e.Err = discovery.Rejected, err
	}
	return e
}

func (m *Memory) down() error {
	select {
	case <-m.broken:
		return fmt.Errorf("%w: the memory registry was broken", discovery.ErrUnreachable)
	default:
		return nil
	}
}

type memoryConn struct {
	m *Memory

	mu      sync.Mutex
	emitted uint64 // the newest revision that the watch emitted
	epoch   int    // of the watch; 0 while there is none
}

func (c *memoryConn) String() string { return "memory" }

func (c *memoryConn) Close() error { return nil }

func (c *memoryConn) note(epoch int, revision uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.epoch, c.emitted = epoch, revision
}

func (c *memoryConn) Watch(ctx context.Context, emit func(discovery.Event)) error {
	m := c.m
	m.mu.Lock()
	if err := m.down(); err != nil {
		m.mu.Unlock()
		return err
	}
	if m.silent {
		m.mu.Unlock()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(dialTimeout):
			return fmt.Errorf("%w: the memory registry is silent", discovery.ErrUnreachable)
		}
	}
	m.watches++
	defer func() {
		c.note(0, 0)
		m.mu.Lock()
		defer m.mu.Unlock()
		m.watches--
	}()
	listed := []discovery.Event{{Type: discovery.Overridden, Overrides: maps.Clone(m.overrides)}}
	for _, id := range slices.Sorted(maps.Keys(m.records)) {
		e := m.event(id)
		e.Age = time.Since(m.records[id].written)
		listed = append(listed, e)
	}
	epoch, seq, next, broken := m.epoch, m.seq, len(m.log), m.broken
	m.mu.Unlock()

	for _, e := range listed {
		emit(e)
	}
	c.note(epoch, seq)
	emit(discovery.Event{Type: discovery.Synced, Listing: discovery.Listing{
		Epoch: strconv.Itoa(epoch), Revision: seq, Expiry: m.Expiry, Partial: m.Partial,
	}})
	for {
		m.mu.Lock()
		grown := m.grown
		var news []discovery.Event
		if m.epoch == epoch && !m.silent {
			news = m.log[next:]
			next = len(m.log)
		}
		m.mu.Unlock()
		for _, e := range news {
			emit(e)
			if e.Type != discovery.Overridden {
				c.note(epoch, e.Revision)
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-broken:
			return fmt.Errorf("%w: the memory registry was broken", discovery.ErrBroken)
		case <-grown:
		}
	}
}

func (c *memoryConn) Verify(ctx context.Context) error {
	for {
		m := c.m
		m.mu.Lock()
		err, silent, seq, epoch, grown := m.down(), m.silent, m.seq, m.epoch, m.grown
		m.mu.Unlock()
		if err != nil {
			return err
		}
		c.mu.Lock()
		watched, emitted := c.epoch, c.emitted
		c.mu.Unlock()
		if watched == 0 {
			return fmt.Errorf("%w: nothing is being watched", discovery.ErrBroken)
		}
		if watched == epoch && emitted >= seq && !silent {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-grown:
		case <-time.After(time.Millisecond):
		}
	}
}

func (c *memoryConn) write(ctx context.Context, do func(m *Memory) error) error {
	m := c.m
	m.mu.Lock()
	if m.silent {
		m.mu.Unlock()
		<-ctx.Done()
		return ctx.Err()
	}
	defer m.mu.Unlock()
	if err := m.down(); err != nil {
		return err
	}
	m.writes++
	return do(m)
}

func (c *memoryConn) Announce(ctx context.Context, n discovery.Node) error {
	data, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return err
	}
	return c.write(ctx, func(m *Memory) error {
		m.put(n.ID, data)
		return nil
	})
}

func (c *memoryConn) Drain(ctx context.Context, n discovery.Node) (own bool, err error) {
	data, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return false, err
	}
	err = c.write(ctx, func(m *Memory) error {
		if own = m.owned(n); own {
			m.put(n.ID, data)
		}
		return nil
	})
	return own, err
}

func (c *memoryConn) Withdraw(ctx context.Context, n discovery.Node) error {
	return c.write(ctx, func(m *Memory) error {
		if m.owned(n) {
			m.delete(n.ID, discovery.Left)
		}
		return nil
	})
}

// owned reports whether the record that stands names the same instance as n does.
func (m *Memory) owned(n discovery.Node) bool {
	r, ok := m.records[n.ID]
	if !ok {
		return false
	}
	was, err := discovery.ParseNode(r.data)
	return err == nil && was.Instance() == n.Instance()
}

func (c *memoryConn) Record(_ context.Context, id string) (discovery.Node, error) {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if err := c.m.down(); err != nil {
		return discovery.Node{}, err
	}
	n, err := discovery.ParseNode(c.m.records[id].data)
	if err != nil {
		return discovery.Node{}, nil //nolint:nilerr // nothing that could be read stands there
	}
	return n, nil
}

func (c *memoryConn) Overrides(context.Context) (map[string]discovery.Override, error) {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	return maps.Clone(c.m.overrides), c.m.down()
}

func (c *memoryConn) SetOverride(ctx context.Context, id string, o discovery.Override) error {
	return c.override(ctx, func(all map[string]discovery.Override) { all[id] = o })
}

func (c *memoryConn) ClearOverride(ctx context.Context, id string) error {
	return c.override(ctx, func(all map[string]discovery.Override) { delete(all, id) })
}

func (c *memoryConn) override(ctx context.Context, change func(map[string]discovery.Override)) error {
	return c.write(ctx, func(m *Memory) error {
		if m.overrides == nil {
			m.overrides = make(map[string]discovery.Override)
		}
		change(m.overrides)
		m.log = append(m.log, discovery.Event{Type: discovery.Overridden, Overrides: maps.Clone(m.overrides)})
		if !m.silent {
			m.wake()
		}
		return nil
	})
}

func (c *memoryConn) History(_ context.Context, id string, limit int) ([]discovery.Revision, error) {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	past := slices.Clone(c.m.past[id])
	slices.Reverse(past)
	if limit > 0 && len(past) > limit {
		past = past[:limit]
	}
	return past, nil
}
