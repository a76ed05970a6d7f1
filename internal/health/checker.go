// Package health checks the nodes of a directory actively: it asks each one now and
// then, and tells those that answer as they should from those that do not.
package health

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// State is what the checks have shown of a node.
type State int32

// The states of a node.
const (
	Unchecked State = iota
	Presumed        // healthy by other checks; this one has no result yet
	Healthy
	Unhealthy
)

// Known reports whether this check has had a result.
func (s State) Known() bool { return s == Healthy || s == Unhealthy }

// Serves reports whether a node may get requests.
func (s State) Serves() bool { return s == Healthy || s == Presumed }

// publishInterval is how long after a change of some node's state another one may
// wait, to be published together with what follows.
const publishInterval = 50 * time.Millisecond

// A Checker checks those nodes of a directory that its subscribers want. One
// goroutine, Run, decides; every other method may be called from any goroutine.
type Checker struct {
	directory *discovery.Directory
	options   Options
	lines     *rate.Limiter

	client  atomic.Pointer[Client]
	targets atomic.Pointer[map[string]*target] // by node id; what is published is not changed
	edition atomic.Pointer[edition]
	woken   chan struct{} // the subscribers have changed; has room for one

	mu sync.Mutex // guards what follows; nothing else happens under it
	// subscribers is a set of pointers, because functions cannot be compared.
	subscribers map[*func(*discovery.Entry) bool]struct{}
	others      []*Checker // see Subscribe; nil once they were asked

	// What follows is Run's alone.
	snapshot  *discovery.Snapshot // which the targets were made of
	schedule  schedule
	results   chan result
	changed   bool // there are states that are not published yet
	published time.Time
}

// An edition is a set of states as the subscribers have seen it.
type edition struct {
	number     uint64
	superseded chan struct{}
}

// A target is a node that is checked. It is replaced when what is checked is another
// process, or elsewhere.
type target struct {
	state atomic.Int32 // State

	address, instance string
	since             time.Time

	// What follows is Run's alone.
	node          *discovery.Entry // as it was listed last
	passes, fails int              // in a row
	checked       bool
	dropped       bool // the result of a check that is under way counts no more
	due           time.Time
	late          bool // the last check ran into its timeout
}

// result is how a check ended; err is nil if the node passed it.
type result struct {
	target *target
	began  time.Time
	err    error
}

// New returns a checker, which needs Use and Run.
func New(directory *discovery.Directory, options Options) *Checker {
	c := &Checker{
		directory:   directory,
		options:     options,
		lines:       rate.NewLimiter(20, 20),
		woken:       make(chan struct{}, 1),
		subscribers: make(map[*func(*discovery.Entry) bool]struct{}),
		results:     make(chan result, maxUnderWay),
	}
	c.targets.Store(new(map[string]*target))
	c.edition.Store(&edition{superseded: make(chan struct{})})
	return c
}

// Use makes the checks go over the client from now on, and closes the one before.
func (c *Checker) Use(client Client) {
	if old := c.client.Swap(&client); old != nil {
		(*old).Close()
	}
}

// Subscribe has the nodes checked that wants accepts, until cancel is called. wants is
// called without a lock, for each node of each snapshot.
//
// The others are checkers of the same directory. Where nothing is known of a node yet,
// their results count: as its own those of a checker that asks the same, and of the
// rest that the node is healthy, until the first result. They are looked at once, so
// that a node that joins later gets no requests before it has passed these checks.
func (c *Checker) Subscribe(wants func(*discovery.Entry) bool, others []*Checker) (cancel func()) {
	c.mu.Lock()
	c.subscribers[&wants] = struct{}{}
	c.others = others
	c.mu.Unlock()
	c.wake()
	return func() {
		c.mu.Lock()
		delete(c.subscribers, &wants)
		c.mu.Unlock()
		c.wake()
	}
}

func (c *Checker) wake() {
	select {
	case c.woken <- struct{}{}:
	default:
	}
}

// Of returns what the checks have shown of the node, and since when it is checked:
// the zero time if it is not yet.
func (c *Checker) Of(e *discovery.Entry) (State, time.Time) {
	t := (*c.targets.Load())[e.Node.ID]
	if t == nil || !t.is(e, c.options.HTTPS) {
		return Unchecked, time.Time{}
	}
	return State(t.state.Load()), t.since
}

// is reports whether the target is the process that the entry lists.
func (t *target) is(e *discovery.Entry, https bool) bool {
	return t.address == e.DialAddress(https) && t.instance == e.Instance()
}

// Version returns a number that grows whenever the state of some node has changed.
func (c *Checker) Version() uint64 { return c.edition.Load().number }

// Superseded returns a channel that is closed when the version is another one.
func (c *Checker) Superseded() <-chan struct{} { return c.edition.Load().superseded }

// Run checks until ctx ends, and returns when no check is under way any more and the
// client is closed. It is called once, after Use.
func (c *Checker) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var underWay sync.WaitGroup
	defer func() {
		underWay.Wait()
		(*c.client.Load()).Close()
	}()
	for {
		snapshot := c.directory.Snapshot()
		if snapshot != c.snapshot {
			began := time.Now()
			c.reconcile(snapshot)
			c.directory.Charge(time.Since(began))
		}
		c.begin(ctx, &underWay)
		timer.Reset(min(c.schedule.wait(time.Now()), c.publish()))
		select {
		case <-ctx.Done():
			return
		case <-snapshot.Superseded():
		case <-c.woken:
			c.reconcile(snapshot)
		case r := <-c.results:
			c.note(r)
			for range len(c.results) {
				c.note(<-c.results)
			}
		case <-timer.C:
		}
	}
}

// reconcile makes targets of the nodes of a snapshot that a subscriber wants.
func (c *Checker) reconcile(snapshot *discovery.Snapshot) {
	c.mu.Lock()
	subscribers := slices.Collect(maps.Keys(c.subscribers))
	if len(subscribers) == 0 {
		c.mu.Unlock()
		return // the checks end, and the checker that comes next may still look at their results
	}
	others := c.others
	c.others = nil
	c.mu.Unlock()

	c.snapshot = snapshot
	now := time.Now()
	before := *c.targets.Load()
	targets := make(map[string]*target, len(before))
	var added []*target
	for _, e := range snapshot.Nodes() {
		if !slices.ContainsFunc(subscribers, func(wants *func(*discovery.Entry) bool) bool { return (*wants)(e) }) {
			continue
		}
		t := before[e.Node.ID]
		if known := t != nil; !known || !t.is(e, c.options.HTTPS) {
			t = &target{address: e.DialAddress(c.options.HTTPS), instance: e.Instance(), since: now, due: now}
			state := c.inherited(e, others)
			t.state.Store(int32(state))
			c.changed = c.changed || known || state != Unchecked
			added = append(added, t)
		}
		t.node = e
		targets[e.Node.ID] = t
	}
	for id, t := range before {
		t.dropped = targets[id] != t
	}
	c.schedule.sweep()
	c.schedule.add(added...)
	c.targets.Store(&targets)
}

// inherited returns what a target begins with, by what other checkers have shown.
func (c *Checker) inherited(e *discovery.Entry, others []*Checker) State {
	state := Unchecked
	for _, other := range others {
		switch s, _ := other.Of(e); {
		case s.Known() && other.options.Question == c.options.Question:
			return s
		case s.Serves():
			state = Presumed
		}
	}
	return state
}

// begin begins the checks that are due.
func (c *Checker) begin(ctx context.Context, underWay *sync.WaitGroup) {
	now := time.Now()
	for t := c.schedule.take(now); t != nil; t = c.schedule.take(now) {
		node := t.node
		underWay.Go(func() {
			err := c.options.check(ctx, *c.client.Load(), node, t.address)
			c.results <- result{t, now, err} // there is room for all that may be under way
		})
	}
}

// note takes up how a check ended.
func (c *Checker) note(r result) {
	t := r.target
	c.schedule.ended(t)
	c.options.Count(r.err == nil)
	if t.dropped {
		return // it is gone, or another process has taken its place
	}
	was := State(t.state.Load())
	now := was
	if r.err == nil {
		t.passes, t.fails = t.passes+1, 0
		if !was.Known() || t.passes >= c.options.Passes {
			now = Healthy
		}
	} else {
		t.passes, t.fails = 0, t.fails+1
		c.directory.Failed(t.node, t.address) // it may be elsewhere by now
		if !was.Known() || t.fails >= c.options.Fails {
			now = Unhealthy
		}
	}
	if now != was {
		c.changed = true
		t.state.Store(int32(now))
		if was.Known() || now == Unhealthy {
			c.tell(t, r.err)
		}
	}
	interval := c.options.Interval
	if !t.checked {
		// From here on the checks of a fleet that joined at once are spread.
		interval = time.Duration(rand.Float64() * float64(interval))
	}
	t.checked = true
	t.due = r.began.Add(interval)
	t.late = errors.Is(r.err, context.DeadlineExceeded)
	c.schedule.add(t)
}

// tell notes in the journal and in the log that a node fails its checks, or, without
// an error, that it passes them again.
func (c *Checker) tell(t *target, err error) {
	id := t.node.Node.ID
	change := discovery.Change{Type: discovery.ChangeRestored, ID: id, Reason: "it passes its health checks again", Entry: c.directory.Snapshot().Node(id)}
	if err != nil {
		change.Type, change.Reason = discovery.ChangeEjected, "it fails its health checks: "+err.Error()
	}
	c.directory.Journal().Add(change)
	switch node, address := slog.String("node", id), slog.String("address", t.address); {
	case !c.lines.Allow():
	case err == nil:
		c.options.Logger.Info("node is healthy again", node, address)
	default:
		c.options.Logger.Warn("node is unhealthy", node, address, slog.Any("error", err))
	}
}

// publish makes the subscribers look again, if something changed, and returns when it
// must be called next.
func (c *Checker) publish() time.Duration {
	if !c.changed {
		return time.Hour
	}
	if wait := publishInterval - time.Since(c.published); wait > 0 {
		return wait
	}
	c.published, c.changed = time.Now(), false
	last := c.edition.Load()
	c.edition.Store(&edition{number: last.number + 1, superseded: make(chan struct{})})
	close(last.superseded)
	return time.Hour
}
