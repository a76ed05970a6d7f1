package traffic

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Tally counts the exchanges with the nodes of one registry, by service, or by service
// and node. How many counts there are is bounded, whatever records say: what is beyond
// is counted together, as [Other].
type Tally struct {
	listed func(service, node string) bool
	swept  atomic.Int64  // when a node without a count last made look for others that are gone
	freed  atomic.Uint64 // how many counts were forgotten

	mu       sync.Mutex // guards what follows
	counts   map[tallyKey]*Count
	services map[string]int // of counts, how many have the service
	nodes    int            // of counts, those of a node
}

type tallyKey struct{ service, node string }

// Other is the service, or the node, of what is counted together because there are too
// many.
const Other = "other"

const (
	maxServices = 200 // with counts of their own
	sweepEvery  = time.Second
)

// NewTally returns one without counts. Listed reports whether there is a node of a
// service, which has the name that [Label] returns; without a node, whether there is any
// of the service. It is called in the way of requests, too, and by many goroutines.
func NewTally(listed func(service, node string) bool) *Tally {
	return &Tally{listed: listed, counts: make(map[tallyKey]*Count), services: make(map[string]int)}
}

// Codes are the classes of statuses by which exchanges are counted: those of HTTP,
// "error" where there was no answer, and "aborted" where the client did not wait for one.
var Codes = [...]string{"1xx", "2xx", "3xx", "4xx", "5xx", "error", "aborted"}

const codeError, codeAborted = 5, 6

// Bounds are the upper bounds, in seconds, of the buckets of durations.
var Bounds = [...]float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// Count is what was counted of one service, or of one node. All of it is safe for use by
// many goroutines.
type Count struct {
	Service, Node string // as labels; Node is "" where it is that of a service

	forgotten atomic.Bool

	inFlight atomic.Int64
	retries  atomic.Uint64
	ejected  atomic.Uint64
	codes    [len(Codes)]atomic.Uint64
	buckets  [len(Bounds) + 1]atomic.Uint64
	sum      atomic.Int64 // of durations, in nanoseconds
}

// InFlight returns how many exchanges are not over yet.
func (c *Count) InFlight() int64 { return c.inFlight.Load() }

// Retries returns how many attempts there were after the first ones of their requests.
func (c *Count) Retries() uint64 { return c.retries.Load() }

// Ejections returns how often a node was ejected.
func (c *Count) Ejections() uint64 { return c.ejected.Load() }

// Code returns how many exchanges ended with the i-th of Codes.
func (c *Count) Code(i int) uint64 { return c.codes[i].Load() }

// Durations returns how long exchanges took: how many there were up to each of Bounds,
// how many in all, and their sum in seconds.
func (c *Count) Durations() (upTo map[float64]uint64, count uint64, sum float64) {
	upTo = make(map[float64]uint64, len(Bounds))
	for i, bound := range Bounds {
		count += c.buckets[i].Load()
		upTo[bound] = count
	}
	count += c.buckets[len(Bounds)].Load()
	return upTo, count, time.Duration(c.sum.Load()).Seconds()
}

// end counts an exchange that is over. Without an answer, one that the client aborted took
// as long as he waited, which says nothing of the node; an upgraded connection lasts as
// long as those on both ends want, so that it counts until it was there.
func (c *Count) end(x *Exchange) {
	c.inFlight.Add(-1)
	switch {
	case x.Status > 0:
		c.codes[min(max(x.Status/100, 1), 5)-1].Add(1)
	case x.Outcome == Aborted:
		c.codes[codeAborted].Add(1)
		return
	default:
		c.codes[codeError].Add(1)
	}
	took := x.DoneAt - x.SentAt
	if x.Status == 101 {
		took = x.AnsweredAt - x.SentAt
	}
	seconds := took.Seconds()
	i := 0
	for i < len(Bounds) && seconds > Bounds[i] {
		i++
	}
	c.buckets[i].Add(1)
	c.sum.Add(int64(took))
}

// ByService returns an observer that counts by the service of nodes.
func (t *Tally) ByService() Observer { return &counter{tally: t} }

// ByNode returns an observer that counts by node, as long as there are no more counts of
// nodes than that.
func (t *Tally) ByNode(most int) Observer { return &counter{tally: t, nodes: true, most: most} }

// counter counts the exchanges of one source.
type counter struct {
	tally *Tally
	nodes bool
	most  int
}

// seats are where a node is counted, so that an exchange needs no look into the maps.
type seats struct{ byService, byNode atomic.Pointer[seat] }

type seat struct {
	*Count
	tally   *Tally
	service string // of the node
	shared  bool   // with others, because there were too many
	freed   uint64 // Tally.freed at that time
}

// valid reports whether the seat is that of a node, now.
func (s *seat) valid(t *Tally, service string, now time.Duration) bool {
	return s != nil && s.tally == t && s.service == service &&
		(!s.shared || s.freed == t.freed.Load() && !t.dueAt(now))
}

// Sent implements Observer.
func (c *counter) Sent(x *Exchange) {
	at := discovery.Attached[seats](x.Node)
	place := &at.byService
	if c.nodes {
		place = &at.byNode
	}
	service := x.Node.Node.Service()
	s := place.Load()
	if !s.valid(c.tally, service, x.SentAt) || !s.begin() {
		for s = c.tally.seat(c, x, service); !s.begin(); {
			s = c.tally.seat(c, x, service)
		}
		place.Store(s)
	}
	x.count = s.Count
	if x.Retry > 0 {
		x.count.retries.Add(1)
	}
}

// begin counts an exchange that begins, unless the count has been forgotten.
func (c *Count) begin() bool {
	c.inFlight.Add(1)
	if c.forgotten.Load() {
		c.inFlight.Add(-1)
		return false
	}
	return true
}

// Eject counts that a node was ejected where its exchanges are counted, by node rather than
// by service; it returns false if they are not.
func (t *Tally) Eject(node *discovery.Entry) bool {
	at := discovery.Attached[seats](node)
	for _, s := range []*seat{at.byNode.Load(), at.byService.Load()} {
		if s != nil && s.tally == t && s.service == node.Node.Service() && s.begin() {
			s.ejected.Add(1)
			s.inFlight.Add(-1)
			return true
		}
	}
	return false
}

// Answered implements Observer.
func (*counter) Answered(*Exchange) {}

// Done implements Observer.
func (*counter) Done(x *Exchange) { x.count.end(x) }

// seat finds a node its count.
func (t *Tally) seat(c *counter, x *Exchange, service string) *seat {
	s := &seat{tally: t, service: service, freed: t.freed.Load()}
	key := tallyKey{service: Label(service)}
	if c.nodes {
		key.node = x.Node.Node.ID
	}
	s.Count = t.find(key, c.most, false)
	if swept := t.swept.Load(); s.Count == nil && t.dueAt(x.SentAt) && t.swept.CompareAndSwap(swept, int64(x.SentAt)) {
		t.Sweep(t.All())
		s.Count = t.find(key, c.most, false)
	}
	if s.Count == nil {
		s.Count, s.shared = t.find(key, c.most, true), true
	}
	return s
}

// dueAt reports whether a node without a count of its own is a reason to look for others
// that are gone.
func (t *Tally) dueAt(now time.Duration) bool { return now-time.Duration(t.swept.Load()) > sweepEvery }

// find returns the count of a key, which is made if there is room for it; nil if there is
// none. For one that is to be shared it is what is there in its place.
func (t *Tally) find(key tallyKey, most int, shared bool) *Count {
	t.mu.Lock()
	defer t.mu.Unlock()
	if count := t.counts[key]; count != nil {
		return count
	}
	own := t.services[key.service] > 0 || len(t.services) < maxServices
	room := key.node == "" || t.nodes < most
	switch {
	case own && room:
	case !shared:
		return nil
	case own:
		key.node = Other
	case key.node != "":
		key = tallyKey{Other, Other}
	default:
		key = tallyKey{service: Other}
	}
	count := t.counts[key]
	if count == nil {
		count = &Count{Service: key.service, Node: key.node}
		t.counts[key] = count
		t.services[key.service]++
		if key.node != "" && key.node != Other {
			t.nodes++
		}
	}
	return count
}

// All returns the counts, sorted by service and node.
func (t *Tally) All() []*Count {
	t.mu.Lock()
	all := make([]*Count, 0, len(t.counts))
	for _, c := range t.counts {
		all = append(all, c)
	}
	t.mu.Unlock()
	slices.SortFunc(all, func(a, b *Count) int { return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Node, b.Node)) })
	return all
}

// Sweep forgets those of the counts whose node is gone and has no exchange left. Who
// shows them does so first, so that the last of what was counted is seen. Counts of
// services stay as long as there is room.
func (t *Tally) Sweep(counts []*Count) {
	t.mu.Lock()
	crowded := len(t.services) >= maxServices
	t.mu.Unlock()
	for _, c := range counts {
		node := c.Node
		if node == "" && !crowded || c.InFlight() > 0 {
			continue
		}
		if node == Other {
			node = ""
		}
		if c.Service == Other || t.listed(c.Service, node) {
			continue
		}
		t.forget(c)
	}
}

func (t *Tally) forget(c *Count) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := tallyKey{c.Service, c.Node}
	if t.counts[key] != c {
		return
	}
	if c.forgotten.Store(true); c.InFlight() > 0 { // one has begun meanwhile
		c.forgotten.Store(false)
		return
	}
	delete(t.counts, key)
	if t.services[c.Service]--; t.services[c.Service] == 0 {
		delete(t.services, c.Service)
	}
	if c.Node != "" && c.Node != Other {
		t.nodes--
	}
	t.freed.Add(1)
}

// Label returns what a service is called by its counts: records can have names of any
// length.
func Label(service string) string { return discovery.Clip(service) }
