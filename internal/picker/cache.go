package picker

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A Cache keeps the pickers of the newest snapshot. Its fields are not changed once it
// is in use; then it may be used by many goroutines.
type Cache struct {
	Builder *Builder
	// Query is what every request asks for. Where Varies, each has values of its own for
	// the criteria and the service.
	Query  Query
	Varies bool
	// Version counts the changes of what the filter says beside those of snapshots.
	Version func() uint64
	// Built is called after a snapshot was taken up, without a lock, with the picker of
	// all requests, nil where they vary. Turned says that it has nodes and the one before
	// had none, or the other way round.
	Built func(s *discovery.Snapshot, p *Picker, turned bool)
	// Charge is told how long it took to make pickers of a snapshot.
	Charge func(took time.Duration)

	current atomic.Pointer[view]
	build   sync.Mutex // held while a view is built; the old one serves meanwhile
	empty   bool       // what Built was told last; guarded by build
}

// A view is what a source made of one snapshot.
type view struct {
	snapshot *discovery.Snapshot
	version  uint64
	fixed    *Picker // where queries do not vary

	values map[string]map[string]bool // where they do: what criteria's keys have for values

	mu      sync.RWMutex
	pickers map[string]*Picker // by the key of the query
	bytes   int                // of all of them, about

	// The view that this one succeeds, for how the nodes were shared out there; nil, also
	// once this one is succeeded.
	before atomic.Pointer[view]
}

// Bounds of what one view keeps, because clients may choose among the values that
// nodes have: pickers, and bytes of all of them. With consistent hashing one of 10,000
// nodes takes more than ten megabytes.
const (
	maxPickers     = 1000
	maxPickerBytes = 128 << 20
)

// Picker returns the picker of a snapshot, where queries vary that for q. The first
// request that sees a new snapshot takes it up; those that come meanwhile get the picker
// before, so that no request waits for another, unless that one is empty.
func (c *Cache) Picker(s *discovery.Snapshot, q *Query) *Picker {
	v := c.current.Load()
	if v == nil || v.snapshot != s || v.version != c.Version() || v.expired() {
		if v == nil {
			c.build.Lock()
		} else if !c.build.TryLock() {
			if p := c.pickerOf(v, q); !p.Empty() {
				return p
			}
			c.build.Lock()
		}
		var turned bool
		v, turned = c.renew(s)
		c.build.Unlock()
		c.Built(v.snapshot, v.fixed, turned)
	}
	return c.pickerOf(v, q)
}

// renew makes the view of a snapshot the current one, unless a newer one is, and
// reports whether there begin or end to be nodes with it. The caller holds build.
func (c *Cache) renew(s *discovery.Snapshot) (v *view, turned bool) {
	version, last := c.Version(), c.current.Load()
	if last != nil && (last.snapshot.Number > s.Number ||
		last.snapshot.Number == s.Number && last.version >= version && !last.expired()) {
		return last, false
	}
	defer c.charge(time.Now())
	v = &view{snapshot: s, version: version}
	if c.Varies {
		v.pickers = make(map[string]*Picker)
		if last != nil && c.Builder.Subset > 0 {
			v.before.Store(last)
			last.before.Store(nil)
		}
		v.values = c.Query.values(s.Nodes())
	} else {
		var before *Picker
		if last != nil {
			before = last.fixed
		}
		v.fixed = c.Builder.succeed(before, s, &c.Query)
		v.fixed.inherit(before)
		v.fixed.prepare()
		// One that waits for first checks is not empty yet.
		if empty := v.fixed.Empty(); v.fixed.retry.IsZero() {
			turned, c.empty = c.empty != empty, empty
		}
	}
	c.current.Store(v)
	return v, turned
}

func (c *Cache) pickerOf(v *view, q *Query) *Picker {
	if v.fixed != nil {
		return v.fixed
	}
	q, ok := v.reduce(q)
	if !ok || len(q.candidates(v.snapshot)) == 0 {
		return new(Picker)
	}
	key := q.key()
	p := v.kept(key)
	if p != nil && !p.expired() {
		return p
	}
	defer c.charge(time.Now())
	if p == nil {
		p = v.before.Load().kept(key)
	}
	p = c.Builder.succeed(p, v.snapshot, q)
	p.prepare()
	v.keep(key, p)
	return p
}

func (c *Cache) charge(began time.Time) { c.Charge(time.Since(began)) }

func (v *view) expired() bool { return v.fixed != nil && v.fixed.expired() }

// reduce returns a query without what no node has, so that what clients make up costs
// nothing: all of it gets one picker. What has expanded to nothing goes, too. It
// reports false if no node can fulfil the query.
func (v *view) reduce(q *Query) (*Query, bool) {
	reduced := *q
	reduced.Where, reduced.Prefer = slices.Clone(q.Where), slices.Clone(q.Prefer)
	for _, criteria := range [][]Criterion{reduced.Where, reduced.Prefer} {
		for i, c := range criteria {
			unknown := func(value string) bool { return value == "" || !v.values[c.Key][value] }
			if slices.ContainsFunc(c.Values, unknown) {
				criteria[i].Values = slices.DeleteFunc(slices.Clone(c.Values), unknown)
			}
		}
	}
	return &reduced, !slices.ContainsFunc(reduced.Where, func(c Criterion) bool { return len(c.Values) == 0 })
}

// kept returns the picker that is kept for the key of a query, nil if none is. The view may
// be nil.
func (v *view) kept(key string) *Picker {
	if v == nil {
		return nil
	}
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.pickers[key]
}

// keep keeps a picker for later requests with the same query. Where there is no
// room it takes that of others, so that odd values do not shut out those that are
// asked for often. The newest picker is always kept, however large it is: to
// build it anew for each request would cost more.
func (v *view) keep(key string, p *Picker) {
	p.bytes = len(key) + p.size()
	v.mu.Lock()
	defer v.mu.Unlock()
	if old := v.pickers[key]; old != nil {
		if !old.expired() {
			return
		}
		v.drop(key)
	}
	for other := range v.pickers {
		if len(v.pickers) < maxPickers && v.bytes+p.bytes <= maxPickerBytes {
			break
		}
		v.drop(other)
	}
	v.pickers[key] = p
	v.bytes += p.bytes
}

// drop lets go of a picker. The caller holds the lock.
func (v *view) drop(key string) {
	v.bytes -= v.pickers[key].bytes
	delete(v.pickers, key)
}
