package discovery

import (
	"container/heap"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"go.uber.org/zap"
	"golang.org/x/time/rate"
)

// DefaultTTL is the lease of a node whose record names none.
const DefaultTTL = 30 * time.Second

// MaxNodes is how many nodes a directory holds; records of further ones are
// rejected.
const MaxNodes = 100_000

const (
	// A storm of changes publishes at most this many snapshots a second. The
	// burst lets what follows a quiet spell through at once, and the two add up
	// to 20 in any one second.
	snapshotRate  = 16
	snapshotBurst = 4

	// A registry that takes longer than this to prove that the watch is alive is
	// ill, and an ill registry is no evidence that a node is dead.
	verifyTimeout = time.Second

	// The wait before a watch is started again grows from the first to the
	// second, both give or take half.
	firstRetry = 50 * time.Millisecond
	lastRetry  = 3 * time.Second

	// How many rejected records are remembered, for people to look at.
	maxRejections = 1000

	// How many lines about single nodes a directory logs a second.
	logRate = 20
)

// Options are the settings of a Directory. The zero value is ready to use.
type Options struct {
	// TTL is the lease of nodes whose record names none. Default: DefaultTTL.
	TTL time.Duration
	// LossGuard is the share of the nodes, of all or of a service, in percent,
	// beyond which their lapse within one lease is doubted, as is that of the last
	// nodes of a service: each is dialled then, and stays for as long as it accepts
	// connections, unless most others are heard again for a lease. Default:
	// DefaultLossGuard; negative: off.
	LossGuard int
	// Probe dials the address of a node, IP:port, and returns nil if a connection
	// is accepted. Nodes in doubt are dialled, and where a host name stands for several
	// addresses, those. It is called from many goroutines at once and ends with ctx.
	// Default: a TCP connection, which must stay open for a moment: what accepts for
	// everybody, as service meshes do, closes it when there is nobody.
	Probe func(ctx context.Context, address string) error
	// Permit reports whether some request could reach the node. Others are not
	// dialled, because a probe must not reach what no request would, and do not count
	// for the loss guard. It is called from many goroutines at once, also by Run's,
	// which it must not keep waiting. Default: all could.
	Permit func(*Entry) bool
	// Lookup returns the addresses behind a host name. It is called from many
	// goroutines at once and ends with ctx. Default: the system's resolver.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	// RecordsOnly has nothing dialled and no name looked up: what the records say is
	// all that counts, for programs that only look. Nodes that would be dialled stay
	// as if they had answered, and those with a host name have no address.
	RecordsOnly bool
	// WarmStart is where the list is kept for a start without the registry; see
	// [Directory.Restore]. Default: nowhere.
	WarmStart WarmStart
	// Addresses are where the registry itself is, as host:port. Host names among
	// them are resolved like those of nodes.
	Addresses []string
	// Logger is told of nodes that come and go, and of a registry that is lost
	// and found. Default: none.
	Logger *zap.Logger
}

// A Directory is this process's live view of one registry. One goroutine, Run,
// owns its state; everything else reads the snapshot that Run published last.
type Directory struct {
	watcher   Watcher
	verifier  Verifier // nil if the watcher is none
	locator   Locator  // nil if the watcher is none
	ttl       time.Duration
	lossGuard int // 0: off
	probe     func(ctx context.Context, address string) error
	permit    func(*Entry) bool
	lookup    func(ctx context.Context, host string) ([]netip.Addr, error)
	addresses []string
	// recordsOnly: nothing is dialled.
	recordsOnly bool
	warmStart   WarmStart
	restore     chan struct{} // holds at most one token
	failures    chan failure
	log         *zap.Logger

	registry  atomic.Pointer[[]netip.AddrPort]
	snapshot  atomic.Pointer[Snapshot]
	condition atomic.Pointer[condition]
	lastEvent atomic.Int64 // since processStart; 0 before the first
	revision  atomic.Uint64
	synced    chan struct{}
	journal   Journal

	propagation propagation
}

// condition is how the registry is, apart from what it lists.
type condition struct {
	connected  bool
	since      time.Time
	known      time.Time // of a restored list: when it was known to be current
	err        error
	restarts   uint64
	rejections []Rejection
}

// NewDirectory returns a Directory of the registry that the watcher follows. It
// is empty until Run.
func NewDirectory(w Watcher, o Options) *Directory {
	d := &Directory{
		watcher:   w,
		ttl:       o.TTL,
		lossGuard: max(o.LossGuard, 0),
		probe:     o.Probe,
		permit:    o.Permit,
		lookup:    o.Lookup,
		addresses: o.Addresses,
		warmStart: o.WarmStart,
		restore:   make(chan struct{}, 1),
		failures:  make(chan failure, 256),
		log:       o.Logger,
		synced:    make(chan struct{}),
	}
	d.verifier, _ = w.(Verifier)
	d.locator, _ = w.(Locator)
	if d.ttl <= 0 {
		d.ttl = DefaultTTL
	}
	if o.LossGuard == 0 {
		d.lossGuard = DefaultLossGuard
	}
	if d.probe == nil {
		d.probe = dialTCP
	}
	if d.permit == nil {
		d.permit = func(*Entry) bool { return true }
	}
	if d.lookup == nil {
		d.lookup = lookupHost
	}
	if o.RecordsOnly {
		d.recordsOnly = true
		d.lookup = func(context.Context, string) ([]netip.Addr, error) { return nil, errRecordsOnly }
	}
	if d.log == nil {
		d.log = zap.NewNop()
	}
	d.snapshot.Store(&Snapshot{superseded: make(chan struct{})})
	d.condition.Store(&condition{since: time.Now()})
	return d
}

// Snapshot returns the newest snapshot: one atomic load, never nil. It may be
// called from any goroutine, before, during and after Run.
func (d *Directory) Snapshot() *Snapshot { return d.snapshot.Load() }

// Synced returns a channel that is closed once the registry has been listed
// whole for the first time.
func (d *Directory) Synced() <-chan struct{} { return d.synced }

// Journal returns what became of the nodes. Whoever learns something about a node
// that the registry does not know, such as that it does not answer, may add to it.
func (d *Directory) Journal() *Journal { return &d.journal }

// Registry returns where the registry itself is, as far as it is known: a node that
// points there is none. What is returned is shared: read it only. When it changes
// there is a new snapshot.
func (d *Directory) Registry() []netip.AddrPort {
	if sockets := d.registry.Load(); sockets != nil {
		return *sockets
	}
	return nil
}

// A Rejection is a record that was not accepted.
type Rejection struct {
	// ID is the node's id as far as it could be read, Key the registry's own
	// name of the record, where it has one.
	ID, Key string
	// Err says why.
	Err error
	// Time is when the record was first read and rejected for this.
	Time time.Time
}

// Status is how a directory and its registry are.
type Status struct {
	// Connected says whether the registry is being watched right now, Since
	// from when that has been so.
	Connected bool
	Since     time.Time
	// Synced says whether the registry has been listed whole at least once.
	Synced bool
	// Nodes is how many nodes the newest snapshot holds.
	Nodes int
	// Held is how many of them lapsed with many others and are kept for as long
	// as they accept connections.
	Held int
	// Restored is how many of them are known from before the start, and have not
	// been heard since.
	Restored int
	// Revision is the registry's newest sequence number that was seen.
	Revision uint64
	// LastEvent is when the registry last reported something.
	LastEvent time.Time
	// LastError is why the registry was lost, or could not be found, last.
	LastError error
	// Restarts counts the watches that broke.
	Restarts uint64
	// Rejections are the records that are not accepted at present, sorted by key
	// and id; no more than 1000 are kept.
	Rejections []Rejection
}

// Status returns how things are. It may be called from any goroutine.
func (d *Directory) Status() Status {
	c, s := d.condition.Load(), d.Snapshot()
	status := Status{
		Connected:  c.connected,
		Since:      c.since,
		Synced:     s.Synced,
		Nodes:      len(s.nodes),
		Revision:   d.revision.Load(),
		LastError:  c.err,
		Restarts:   c.restarts,
		Rejections: c.rejections,
	}
	if at := d.lastEvent.Load(); at != 0 {
		status.LastEvent = processStart.Add(time.Duration(at))
	}
	for _, e := range s.nodes {
		switch e.doubt {
		case held:
			status.Held++
		case restored:
			status.Restored++
		}
	}
	return status
}

// Stale returns for how long the view could not be compared with the registry: 0
// while that is watched, and while there is no view.
func (d *Directory) Stale() time.Duration {
	c := d.condition.Load()
	switch {
	case c.connected:
		return 0
	case d.Snapshot().Synced:
		return time.Since(c.since)
	case !c.known.IsZero():
		return max(time.Since(c.known), 0)
	default:
		return 0
	}
}

// Run follows the registry until ctx ends, and returns the context's error. It
// must be called once. It outlives every failure of the registry: the last
// snapshot stays, leases are suspended, and the watch is started again, at first
// soon and then less often.
func (d *Directory) Run(ctx context.Context) error {
	l := &loop{
		Directory: d,
		messages:  make(chan message, 256),
		verified:  make(chan verdict, 1),
		nodes:     make(map[string]*tracked),
		keys:      make(map[string]*tracked),
		places:    make(places),
		changed:   make(map[string]*Entry),
		rejected:  make(map[string]rejection),
		guard:     newGuard(),
		names:     d.newNames(),
		warm:      d.newWarm(),
		settled:   stoppedTimer(),
		lostAt:    now(),
		backoff: &backoff.ExponentialBackOff{
			InitialInterval: firstRetry, MaxInterval: lastRetry,
			Multiplier: 2, RandomizationFactor: 0.5,
		},
		publications: rate.NewLimiter(snapshotRate, snapshotBurst),
		lines:        rate.NewLimiter(logRate, logRate),
		retry:        stoppedTimer(),
		expiry:       stoppedTimer(),
		overrideEnd:  stoppedTimer(),
		publication:  stoppedTimer(),
	}
	l.backoff.Reset()
	l.locateRegistry()
	l.load()
	return l.run(ctx)
}

// loop is the state of a directory that only Run's goroutine touches.
type loop struct {
	*Directory

	// The watch: at most one goroutine, which ends with a message.
	messages    chan message
	cancelWatch context.CancelCauseFunc // nil while none runs
	broken      bool                    // the running watch was given up; what it still says is ignored
	backoff     *backoff.ExponentialBackOff
	retry       *time.Timer
	listedAt    time.Duration // when the last listing was complete
	lostAt      time.Duration // when the last complete watch broke

	// The listing.
	listing   uint64  // counts the watches
	complete  uint64  // the last one whose listing was complete
	listed    bool    // the running watch has emitted Synced
	last      Listing // what the last complete listing proved
	everyNode bool    // there has been one
	before    uint64  // the newest revision before the running watch
	seen      uint64  // the newest revision in the running watch

	// The nodes, and the order in which their leases run out.
	nodes    map[string]*tracked
	keys     map[string]*tracked // by the key of their record, where it has one
	places   places
	room     room
	leases   leaseQueue
	expiry   *time.Timer
	verified chan verdict
	verifies bool // a verification is under way
	rejected map[string]rejection
	amended  bool // rejected differs from what Status shows

	decisions
	overrideEnd *time.Timer // the next one of them ends

	// Nodes that are heard again are not new: see join.
	relearns  bool
	relearned time.Duration

	guard
	names
	warm

	// The first listing is kept back for a moment, until what it shows is known.
	settled   *time.Timer
	impatient bool

	// What the next snapshot changes.
	changed      map[string]*Entry
	publication  *time.Timer
	publications *rate.Limiter
	awaited      bool // publication is set

	lines      *rate.Limiter
	suppressed int
}

// message is what a watch's goroutine says: an event, or how the watch ended.
type message struct {
	event Event
	ended error
}

// verdict answers a verification that began at a time.
type verdict struct {
	listing uint64
	began   time.Duration
	err     error
}

// tracked is a node and where its lease stands in the queue.
type tracked struct {
	entry    *Entry
	key      string
	revision uint64
	listing  uint64 // the last listing or watch that put it

	due   time.Duration // the queue's order; the real end may be later, never earlier
	index int

	doubt    doubt
	probe    uint64        // the question that waits for an answer, 0 if none does
	from     *grave        // what it was kept in, of a node that lapsed and is being asked
	unproven int           // how often in a row its probes were no evidence
	excess   int           // what it takes of the room
	admitted int           // what it took when there was room for that
	counted  counted       // as what it is counted
	alone    time.Duration // since when it is in doubt though most others are heard, 0 if it is not
	expired  bool          // its record ran out in the batch of events under way
	// It comes from a warm-start file.
	remembered bool
	// Why the running listing rejected its record, of one that is not in use yet.
	unread error

	// Since when it has its address, and who else has it.
	placed       time.Duration
	newer, older *tracked

	// Who wrote the record before the one who did last, and when that changed.
	rival    string
	replaced time.Duration
	fought   bool
}

// record names the node's record, by its id only where it has no key.
func (t *tracked) record() string { return recordName(t.key, t.entry.Node.ID) }

func (l *loop) run(ctx context.Context) error {
	l.watch(ctx)
	for {
		select {
		case <-ctx.Done():
			l.stop()
			return ctx.Err()
		case m := <-l.messages:
			l.receive(ctx, m)
			// What is already here belongs to the same snapshot.
			for range len(l.messages) {
				l.receive(ctx, <-l.messages)
			}
		case a := <-l.answers:
			l.hear(ctx, a)
			for range len(l.answers) {
				l.hear(ctx, <-l.answers)
			}
		case answer := <-l.resolver.found:
			l.learn(ctx, answer)
			for range len(l.resolver.found) {
				l.learn(ctx, <-l.resolver.found)
			}
		case f := <-l.reacher.found:
			l.onReach(ctx, f)
		case f := <-l.failures:
			l.onFailure(f)
		case m := <-l.loaded:
			l.remember(m)
		case <-l.restore:
			l.wanted = true
			l.recall()
		case <-l.redial.C:
			l.recallAgain()
		case <-l.save.C:
			l.write()
		case s := <-l.saved:
			l.written(s)
		case <-l.resolver.tick.C:
			l.resolver.refresh()
		case <-l.resolver.crowded.C:
		case <-l.locate.C:
			l.askLocation()
		case <-l.settled.C:
			l.impatient = true
		case <-l.retry.C:
			l.watch(ctx)
		case <-l.overrideEnd.C:
			l.applyOverrides()
		case <-l.expiry.C:
			l.checkLeases(ctx)
		case v := <-l.verified:
			l.judge(ctx, v)
		case <-l.publication.C:
			l.awaited = false
		}
		l.settle()
		l.dial(ctx)
		l.resolver.start(ctx)
		l.reacher.start(ctx)
		l.publish()
	}
}

// watch starts a watch. The one before has ended.
func (l *loop) watch(ctx context.Context) {
	ctx, l.cancelWatch = context.WithCancelCause(ctx)
	l.listing++
	l.listed, l.broken = false, false
	l.before, l.seen = l.revision.Load(), 0
	if !l.everyNode {
		// What a first listing said before it broke was never published, and the
		// next one knows the ages of the records anew.
		clear(l.nodes)
		clear(l.keys)
		clear(l.changed)
		clear(l.rejected)
		l.forgetOverdue()
		l.vacateAll()
		l.leases = nil
	}
	go func() {
		err := l.watcher.Watch(ctx, func(e Event) {
			select {
			case l.messages <- message{event: e}:
			case <-ctx.Done():
			}
		})
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		if err == nil {
			err = fmt.Errorf("%w: it ended without saying why", ErrBroken)
		}
		l.messages <- message{ended: err}
	}()
}

// stop ends the goroutines that run started, and waits for them.
func (l *loop) stop() {
	for _, t := range []*time.Timer{l.retry, l.expiry, l.publication, l.overrideEnd, l.settled} {
		t.Stop()
	}
	if l.cancelWatch != nil {
		l.cancelWatch(nil)
		for m := range l.messages {
			if m.ended != nil {
				break
			}
		}
	}
	if l.verifies {
		<-l.verified
	}
	l.stopDialling()
	l.stopResolving()
	l.stopRemembering()
}

// giveUp ends a watch that is worthless although it does not know.
func (l *loop) giveUp(err error) {
	if l.cancelWatch == nil || l.broken {
		return
	}
	l.broken = true
	l.cancelWatch(err)
	l.lose(err)
}

func (l *loop) receive(ctx context.Context, m message) {
	switch {
	case m.ended != nil:
		l.cancelWatch(nil)
		l.cancelWatch = nil
		if ctx.Err() != nil {
			return // it ended because everything does
		}
		if !l.broken {
			l.lose(m.ended)
		}
		l.retry.Reset(l.backoff.NextBackOff())
	case !l.broken:
		l.lastEvent.Store(int64(now()))
		l.apply(m.event)
	}
}

// lose notes that the registry cannot be seen any more. From here to the end of
// the next listing no lease runs out (guarantee 1 of the design): what cannot be
// seen is no evidence of death.
func (l *loop) lose(err error) {
	was := l.condition.Load()
	next := *was
	next.err = err
	if l.listed {
		l.lostAt = now()
		if l.lostAt-l.listedAt > lastRetry {
			// It worked for a while. A registry that breaks every watch at once
			// must not be listed twenty times a second.
			l.backoff.Reset()
		}
		next.connected, next.since = false, time.Now()
		next.restarts++
		l.journal.Add(Change{Type: ChangeDisconnected, Reason: err.Error()})
		l.log.Warn("lost the registry; the last known nodes stay in use",
			zap.Int("nodes", len(l.nodes)), zap.Error(err))
	} else if was.err == nil || was.err.Error() != err.Error() {
		// The same failure again is no news.
		l.log.Warn("cannot list the registry; retrying",
			zap.Int("nodes", len(l.nodes)), zap.Error(err))
	}
	l.listed = false
	l.condition.Store(&next)
	l.expiry.Stop()
}

func (l *loop) apply(e Event) {
	if e.Revision > l.seen {
		l.seen = e.Revision
		if l.listed {
			l.revision.Store(e.Revision)
		}
	}
	switch e.Type {
	case Put:
		if e.Delay > 0 {
			l.propagation.observe(e.Delay)
		}
		l.put(e)
	case Beat:
		t := l.nodes[e.ID]
		if t == nil && l.everyNode {
			t = l.revive(e.ID)
		}
		if t != nil {
			t.listing = l.listing
			l.trust(t)
			load := e.Load
			if math.IsNaN(load) || math.IsInf(load, 0) || load < 0 {
				load = t.entry.Load() // the node lives, whatever it says of its load
			}
			l.renew(t, load, now())
		}
	case Left:
		t := l.named(e)
		if t != nil && e.Instance != "" && e.Instance != t.entry.Node.Instance() {
			return // another process has taken the id, and is there
		}
		l.accept(e)
		l.forget(e)
		l.recant(e)
		if t != nil {
			l.remove(t, ChangeLeft, "its record was removed")
		}
	case Expired:
		l.accept(e)
		// In a listing the record may have run out because the registry was
		// away and nobody could renew it: the end of the listing decides.
		if t := l.named(e); t != nil && l.listed {
			t.expired = true
			l.expired = append(l.expired, t)
		}
	case Rejected:
		l.reject(e)
	case Synced:
		l.askLocation() // before the nodes are shown
		l.sync(e.Listing)
	case Overridden:
		l.setOverrides(e.Overrides)
	}
}

// named returns the node that was last put by the record that the event speaks
// of. Where records have keys, the key decides: a record that cannot be read may
// have no id, or a wrong one.
func (l *loop) named(e Event) *tracked {
	if e.Key != "" {
		return l.keys[e.Key]
	}
	if t := l.nodes[e.ID]; t != nil && t.key == "" {
		return t
	}
	return nil
}

// name notes by which record the node was put.
func (l *loop) name(t *tracked, key string) {
	if t.key == key {
		return
	}
	delete(l.keys, t.key)
	if t.key = key; key != "" {
		l.keys[key] = t
	}
}

func (l *loop) put(e Event) {
	l.forget(e)
	// A writer's clock that runs ahead must not lengthen its lease.
	heard := now() - max(e.Age, 0)
	t := l.nodes[e.Node.ID]
	if other := l.named(e); other != nil && other != t {
		l.remove(other, ChangeLeft, "its record was replaced by that of another node")
	}
	lease := e.Node.Lease()
	if lease == 0 {
		lease = l.ttl
	}
	moved := false // it announces this address for the first time
	switch {
	case t == nil:
		if e.Age >= lease {
			// Overdue by the registry's own clock. It comes back the moment it
			// is heard. Of a first listing all such records are looked at together.
			l.accept(e)
			if !l.everyNode && e.Age <= MaxLease {
				l.keepOverdue(l.track(e, lease, heard))
			}
			return
		}
		if err := l.full(&e.Node); err != nil {
			l.turnDown(e, err)
			return
		}
		l.accept(e)
		if g := l.graves.byID[e.Node.ID]; g != nil {
			l.graves.drop(g)
		}
		t = l.track(e, lease, heard)
		l.join(t.entry)
		l.insert(t)
		reason := ""
		if keys := leftOut(&e.Node); keys != "" {
			reason = "metadata left out, no texts: " + keys
		}
		l.note(ChangeSeen, t.entry, reason)
		moved = true
	case t.listing == l.listing && !l.listed && e.Revision < t.revision:
		// The node stands under two keys and the newer one was listed first.
		l.accept(e)
		return
	case e.Age >= lease && heard < time.Duration(t.entry.vitals.heard.Load()) && !sameRecord(&t.entry.Node, &e.Node):
		// The registry went back to an older state, in which the node was
		// something else, or somewhere. It was heard since, so what it said then
		// stands for as long as it has to be heard again; see sync.
		l.accept(e)
	default:
		changed := !sameRecord(&t.entry.Node, &e.Node) || t.entry.refused != nil
		if changed {
			if err := l.room.refusesGrowth(t, &e.Node); err != nil {
				l.turnDown(e, err)
				return
			}
		}
		l.accept(e)
		l.renew(t, e.Node.Load, heard)
		if now()-heard < lease {
			l.trust(t) // not so if a listing repeats what had run out
		}
		if changed {
			reason := difference(&t.entry.Node, &e.Node)
			if reason == "" {
				reason = "its record is accepted again"
			}
			l.watchFight(t, &e.Node)
			moved = t.entry.Node.Endpoint.Address() != e.Node.Endpoint.Address()
			l.vacate(t)
			l.replace(t, newEntry(e.Node, lease, t.entry.vitals).under(l.decisions.of(e.Node.ID)).in(t.doubt))
			l.occupy(t)
			l.requeue(t)
			l.change(e.Node.ID, t.entry)
			l.note(ChangeUpdated, t.entry, reason)
		}
	}
	l.name(t, e.Key)
	t.revision, t.listing = e.Revision, l.listing
	if moved {
		l.takePlace(t)
	}
	l.armExpiry()
}

// turnDown rejects a record that can be read.
func (l *loop) turnDown(e Event, err error) {
	e.ID, e.Err = e.Node.ID, err
	l.reject(e)
}

// insert puts a node into use, and is the only one who does: a node in use
//
//   - is as the operators say that are in force at that moment, whatever was known
//     when its entry was made;
//   - is found by its id, by the key of its record where it has one, by its address,
//     and by its host name, whose addresses complete its entry;
//   - has a lease that runs;
//   - is in the next snapshot.
func (l *loop) insert(t *tracked) {
	id, key := t.entry.Node.ID, t.key
	t.entry = t.entry.under(l.decisions.of(id)).in(t.doubt)
	l.nodes[id] = t
	t.key = ""
	l.name(t, key)
	l.occupy(t)
	t.due = t.entry.due()
	heap.Push(&l.leases, t)
	l.change(id, t.entry)
}

// track returns the node of a record, not in use.
func (l *loop) track(e Event, lease, heard time.Duration) *tracked {
	v := new(vitals)
	v.load.Store(math.Float64bits(e.Node.Load))
	v.heard.Store(int64(heard))
	v.renewed.Store(int64(heard))
	return &tracked{entry: newEntry(e.Node, lease, v), key: e.Key, revision: e.Revision, listing: l.listing}
}

// sameRecord reports whether two records say the same of the node, but for its load.
func sameRecord(a, b *Node) bool {
	return a.Endpoint == b.Endpoint && maps.Equal(a.Metadata, b.Metadata) && slices.Equal(a.LeftOut, b.LeftOut)
}

// renew notes that the node was heard, maybe some time ago: a listing repeats
// old records. The queue is not touched: a lease only ever moves later here, and
// checkLeases finds out.
func (l *loop) renew(t *tracked, load float64, heard time.Duration) {
	v := t.entry.vitals
	v.heard.Store(max(v.heard.Load(), int64(heard)))
	v.renewed.Store(max(v.renewed.Load(), int64(heard)))
	v.load.Store(math.Float64bits(load))
}

func (l *loop) requeue(t *tracked) {
	t.due = t.entry.due()
	heap.Fix(&l.leases, t.index)
}

func (l *loop) remove(t *tracked, why ChangeType, reason string) {
	delete(l.nodes, t.entry.Node.ID)
	l.name(t, "")
	l.vacate(t)
	l.calm(t)
	heap.Remove(&l.leases, t.index)
	l.change(t.entry.Node.ID, nil)
	l.note(why, t.entry, reason)
}

func (l *loop) reject(e Event) {
	if e.Err == nil {
		e.Err = fmt.Errorf("%w record: the backend gave no reason", ErrInvalid)
	}
	key := rejectionKey(e)
	was, stands := l.rejected[key]
	// The same bad record again, as with every heartbeat, is no news.
	known := stands && was.Err.Error() == e.Err.Error()
	t, final := l.named(e), errors.Is(e.Err, ErrForbidden)
	if final {
		l.forget(e)
		l.recant(e)
	} else if m := l.memory.byRecord[key]; m != nil {
		// Not every rejection is kept.
		m.unread, m.listing = e.Err, l.listing
	}
	switch {
	case t != nil && final:
		l.remove(t, ChangeRejected, e.Err.Error())
	case t != nil:
		l.refuse(t, e.Err)
		e.ID = t.entry.Node.ID
		fallthrough
	default:
		if !known && (stands || len(l.rejected) < maxRejections) {
			// Beyond those that are remembered nobody could tell what is news.
			l.noteRejection(e)
		}
	}
	if known {
		was.listing = l.listing
		l.rejected[key] = was
	} else if stands || len(l.rejected) < maxRejections {
		l.rejected[key] = rejection{
			Rejection: Rejection{ID: visible(e.ID), Key: visible(e.Key), Err: e.Err, Time: time.Now()},
			listing:   l.listing,
		}
		l.amended = true
	}
}

// refuse notes that the newest record of a node in use could not be read. It is
// listed, so it is not gone; but it was not understood either, and renews no lease.
func (l *loop) refuse(t *tracked, err error) {
	t.listing = l.listing
	if was := t.entry.refused; was != nil && was.Error() == err.Error() {
		return
	}
	next := *t.entry
	next.refused = err
	t.entry = &next
	l.change(next.Node.ID, t.entry)
}

// accept forgets that the record was rejected: it is good, or it is gone.
func (l *loop) accept(e Event) {
	if m := l.memory.byRecord[rejectionKey(e)]; m != nil {
		m.unread = nil
	}
	if key := rejectionKey(e); len(l.rejected) > 0 {
		before := len(l.rejected)
		delete(l.rejected, key)
		l.amended = l.amended || len(l.rejected) < before
	}
}

// rejection is a Rejection and the listing that showed it last.
type rejection struct {
	Rejection
	listing uint64
}

// rejectionKey names a record, by its id only where it has no key.
func rejectionKey(e Event) string { return recordName(e.Key, e.ID) }

func recordName(key, id string) string {
	switch {
	case key == "":
		return "\x00" + id
	case len(key) > maxKey:
		// It is kept for as long as the record is rejected, whoever made it up.
		sum := sha256.Sum256([]byte(key))
		return "\x00\x00" + string(sum[:])
	default:
		return key
	}
}

// maxKey is how long the key of a record may be before its hash stands for it.
const maxKey = 1 << 10

// showRejections makes the rejected records visible. While a listing is under
// way its end does it.
func (l *loop) showRejections() {
	if !l.listed || !l.amended {
		return
	}
	l.amended = false
	next := *l.condition.Load()
	next.rejections = make([]Rejection, 0, len(l.rejected))
	for _, key := range slices.Sorted(maps.Keys(l.rejected)) {
		next.rejections = append(next.rejections, l.rejected[key].Rejection)
	}
	l.condition.Store(&next)
}

// sync ends a listing: it decides about the nodes that the listing lacks.
func (l *loop) sync(listed Listing) {
	at := now()
	outage := at - l.lostAt
	first := !l.everyNode
	wiped := !first && (listed.Epoch != l.last.Epoch || listed.Revision < l.before)
	kept, removed := 0, 0
	for _, t := range l.nodes {
		if l.yield(t) {
			removed++
			continue
		}
		if t.listing != l.listing {
			// Guarantees 1 and 2 of the design: only a registry that lost
			// nothing, and in which the record cannot have run out for want of
			// a heartbeat, can show by silence that the node was removed.
			// Otherwise the node has one lease to be heard again. If the listing
			// before lacked it too, this one shows nothing new.
			//
			// What counts is not how long the registry was away but how long
			// the node has not been heard: its record's time began to run before.
			unheard := at - time.Duration(t.entry.vitals.heard.Load())
			if t.listing >= l.complete && !wiped && !listed.Partial &&
				unheard < t.entry.lease && (listed.Expiry == 0 || unheard < listed.Expiry) {
				l.remove(t, ChangeLeft, "it is not listed any more")
				removed++
				continue
			}
			kept++
		} else if first {
			continue
		}
		t.entry.vitals.renewed.Store(int64(at))
		l.requeue(t)
	}
	maps.DeleteFunc(l.rejected, func(_ string, r rejection) bool { return r.listing != l.listing })
	l.amended = true
	if wiped || listed.Partial {
		l.relearn(at)
	}
	l.last, l.everyNode, l.listed, l.complete = listed, true, true, l.listing
	l.seen = max(l.seen, listed.Revision)
	l.revision.Store(l.seen)
	l.listedAt = at
	if first {
		kept = l.endRestore(listed, at)
		l.judgeOverdue()
		l.settled.Reset(settleTime)
	}

	next := *l.condition.Load()
	next.connected, next.since = true, time.Now()
	l.condition.Store(&next)

	reason := fmt.Sprintf("listed, %d nodes", len(l.nodes))
	if !first {
		reason = fmt.Sprintf("back after %v, %d nodes, %d awaited, %d left",
			outage.Round(time.Millisecond), len(l.nodes), kept, removed)
	}
	if first {
		l.noteListing()
	}
	// It comes last: of a large listing the journal keeps only the end.
	l.journal.Add(Change{Type: ChangeConnected, Reason: reason})
	switch {
	case first:
		log := l.log
		if p, ok := l.watcher.(Pusher); ok {
			log = log.With(zap.String("changes_by", p.Push()))
		}
		log.Info("listed the registry", zap.Int("nodes", len(l.nodes)),
			zap.Int("rejected", len(l.rejected)), zap.Int("awaited", kept), zap.Duration("took", outage))
	case wiped:
		l.log.Warn("the registry is back and has lost data; nodes that it lacks have one lease to be heard again",
			zap.Int("nodes", len(l.nodes)), zap.Int("awaited", kept), zap.Duration("away", outage))
	default:
		l.log.Info("the registry is back", zap.Int("nodes", len(l.nodes)),
			zap.Int("awaited", kept), zap.Int("left", removed), zap.Duration("away", outage))
	}
	l.armExpiry()
}

// armExpiry sets the timer to the first lease that may run out.
func (l *loop) armExpiry() {
	if !l.listed || l.verifies || len(l.leases) == 0 {
		l.expiry.Stop()
		return
	}
	l.expiry.Reset(l.leases[0].due - now())
}

// checkLeases looks for leases that ran out. Before it believes that their nodes
// are gone it asks the registry to prove that it would have told.
func (l *loop) checkLeases(ctx context.Context) {
	if !l.listed || l.verifies {
		return
	}
	if !l.overdueBy(now()) {
		l.armExpiry()
		return
	}
	v := verdict{listing: l.listing, began: now()}
	if l.verifier == nil {
		l.judge(ctx, v)
		return
	}
	l.verifies = true
	go func() {
		ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
		defer cancel()
		v.err = l.verifier.Verify(ctx)
		l.verified <- v
	}()
}

// overdueBy brings the queue in order up to a time, and reports whether the lease
// of its head ran out by then.
func (l *loop) overdueBy(at time.Duration) bool {
	for len(l.leases) > 0 && l.leases[0].due <= at {
		t := l.leases[0]
		if t.entry.due() <= at {
			return true
		}
		l.requeue(t)
	}
	return false
}

// judge lets the leases lapse that had run out when a successful verification
// began.
func (l *loop) judge(ctx context.Context, v verdict) {
	l.verifies = false
	switch {
	case ctx.Err() != nil:
		// Everything ends, and so did the verification.
	case !l.listed || v.listing != l.listing:
		// The watch broke meanwhile; the next listing starts anew.
	case v.err != nil:
		l.giveUp(fmt.Errorf("%w: the registry did not show that the watch is alive: %w", ErrBroken, v.err))
	default:
		// What the verification proved delivered may still wait in the channel.
		for range len(l.messages) {
			l.receive(ctx, <-l.messages)
		}
		var lapsing []*tracked
		for l.listed && l.overdueBy(v.began) {
			t := l.leases[0]
			l.extend(t) // for as long as it takes to decide
			lapsing = append(lapsing, t)
		}
		l.lapse(lapsing, "its lease ran out")
	}
	l.armExpiry()
}

// change notes what the next snapshot shows of a node. Of one that no snapshot has
// shown there is nothing to be taken back: a listing that goes on and on must not
// leave a trace of each node that comes and goes in it.
func (l *loop) change(id string, e *Entry) {
	if e == nil && l.snapshot.Load().Node(id) == nil {
		delete(l.changed, id)
		return
	}
	l.changed[id] = e
}

// publish publishes what changed: at once after a quiet spell, else when the
// rate allows. The first listing is published whole; before it there is nothing to
// be seen but what is remembered.
func (l *loop) publish() {
	l.showRejections()
	old := l.snapshot.Load()
	if !l.everyNode {
		if len(l.recalled) > 0 && !l.awaited && !l.tooSoon() {
			l.show(old.succeed(l.recalled, false))
			clear(l.recalled)
		}
		return
	}
	if old.Synced && (l.awaited || len(l.changed) == 0 && !l.moved) {
		return
	}
	if !old.Synced && !l.impatient && (l.resolver.untried > 0 || l.reacher.busy() || len(l.waiting) > 0 || l.dialled > 0 || l.loading && l.decisions.known.IsZero()) {
		return
	}
	if old.Synced && l.tooSoon() {
		return
	}
	l.show(old.succeed(l.changed, true))
	clear(l.changed)
	l.moved = false
	if !old.Synced {
		close(l.synced)
	}
	l.keep()
}

// tooSoon reports whether a snapshot must wait, and then has publish called when it
// need not any more.
func (l *loop) tooSoon() bool {
	r := l.publications.Reserve()
	if r.Delay() == 0 {
		return false
	}
	l.awaited = true
	l.publication.Reset(r.Delay())
	r.Cancel()
	return true
}

// show makes a snapshot the current one.
func (l *loop) show(next *Snapshot) {
	old := l.snapshot.Swap(next)
	close(old.superseded)
}

// logLines are what a log says of a change.
var logLines = map[ChangeType]string{
	ChangeSeen:     "node joined",
	ChangeUpdated:  "node changed",
	ChangeLeft:     "node left",
	ChangeLapsed:   "node lapsed",
	ChangeHeld:     "node held",
	ChangeEjected:  "node ejected",
	ChangeRestored: "node restored",
	ChangeRejected: "node rejected",
}

// note is where every change of a node's standing is told: in the journal, which
// counts it, and in the log. What a first listing shows is told at its end, if it
// comes to one.
func (l *loop) note(why ChangeType, e *Entry, reason string) {
	if !l.everyNode {
		return
	}
	rejection := ""
	if why == ChangeRejected {
		rejection = RejectionReason(errors.New(reason))
	}
	l.journal.add(Change{Type: why, ID: e.Node.ID, Reason: reason, Entry: e}, rejection)
	if !l.logs() {
		return
	}
	fields := make([]zap.Field, 0, 6)
	if reason != "" {
		fields = append(fields, zap.String("reason", reason))
	}
	fields = append(fields, zap.String("node", e.Node.ID), zap.String("endpoint", e.Node.Endpoint.String()))
	if s := e.Node.Service(); s != "" {
		fields = append(fields, zap.String("service", s))
	}
	if e.state != StateUp && e.doubt == trusted {
		fields = append(fields, zap.String("state", string(e.state)))
	}
	l.log.Info(logLines[why], l.leftOut(fields)...)
}

// noteRejection is note for a record that never was a node. Listings repeat what
// is rejected, and the log need not.
func (l *loop) noteRejection(e Event) {
	if !l.everyNode {
		return
	}
	l.journal.add(Change{Type: ChangeRejected, ID: visible(e.ID), Reason: e.Err.Error()}, RejectionReason(e.Err))
	if l.listed && l.logs() {
		l.log.Info("record rejected", l.leftOut([]zap.Field{
			zap.String("id", visible(e.ID)), zap.String("key", visible(e.Key)), zap.Error(e.Err),
		})...)
	}
}

// noteListing is note for all that the first listing showed. Its nodes are sorted,
// and the log gets their number only.
func (l *loop) noteListing() {
	const reason = "it was listed when the registry was first seen"
	for _, key := range slices.Sorted(maps.Keys(l.rejected)) {
		r := l.rejected[key]
		l.journal.add(Change{Type: ChangeRejected, ID: r.ID, Reason: r.Err.Error(), Listed: true}, RejectionReason(r.Err))
	}
	for _, id := range slices.Sorted(maps.Keys(l.nodes)) {
		l.journal.Add(Change{Type: ChangeSeen, ID: id, Reason: reason, Entry: l.nodes[id].entry, Listed: true})
	}
}

// logs reports whether a line about a single node may be logged now. Of a storm
// the lines that may not are counted.
func (l *loop) logs() bool {
	if l.lines.Allow() {
		return true
	}
	l.suppressed++
	return false
}

// leftOut completes the fields of a line by how many were left out before it.
func (l *loop) leftOut(fields []zap.Field) []zap.Field {
	if l.suppressed > 0 {
		fields = append(fields, zap.Int("lines_left_out", l.suppressed))
		l.suppressed = 0
	}
	return fields
}

func stoppedTimer() *time.Timer {
	t := time.NewTimer(math.MaxInt64)
	t.Stop()
	return t
}

// leaseQueue is a heap.Interface ordered by due.
type leaseQueue []*tracked

func (q leaseQueue) Len() int           { return len(q) }
func (q leaseQueue) Less(i, j int) bool { return q[i].due < q[j].due }
func (q leaseQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *leaseQueue) Push(x any) {
	t := x.(*tracked)
	t.index = len(*q)
	*q = append(*q, t)
}

func (q *leaseQueue) Pop() any {
	old := *q
	t := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return t
}
