package discovery

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"
)

// DefaultTTL is the lease of a node whose record names none.
const DefaultTTL = 30 * time.Second

// MaxNodes is how many nodes a directory holds; records of further ones are
// rejected.
const MaxNodes = 100_000

// Options are the settings of a Directory. The zero value is ready to use.
type Options struct {
	// TTL is the lease of nodes whose record names none. Default: DefaultTTL.
	TTL time.Duration
	// LossGuard is the share of the nodes, of all or of a service, in percent,
	// beyond which those that lapse within one lease are suspect, as are the last
	// nodes of a service: each is dialled then, and stays for as long as it accepts
	// connections, unless most others are heard again for a lease. Default:
	// DefaultLossGuard, for nil; 0 turns it off.
	LossGuard *int
	// Probe dials the address of a node, IP:port, and returns nil if a connection
	// is accepted. Suspect nodes are dialled, and where a host name stands for several
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
	// Logger is told at Info of nodes that come, change and go, of rejected records,
	// and of a registry that is listed, or is back; at Warn of a registry that is lost
	// or cannot be listed, of nodes that lapse together, and of whatever else is for
	// people to mend. There is nothing at other levels. Of lines about single nodes
	// there are at most 20 a second. Default: none.
	Logger *slog.Logger
}

// A Directory is this process's live view of one registry. One goroutine, Run's loop,
// owns all that changes; everybody else reads the snapshot that it published last.
//
//	beside the loop                    the loop                       readers
//
//	               messages  +-------------------------------+
//	Watcher.Watch ----(1)--->| supervisor                    |
//	Verifier.Verify <------->|     |                         |
//	                         |    (2) put, reject, sync      |
//	                         |     |                         |
//	                         |     +--- rejections           |
//	                         |     +--- overrides            |
//	                         |     v                         |
//	                         | (3) table                     |
//	lookups <-----(4)------->|     +--- resolver, location   |
//	connections <-(4)------->|     +--- reacher              |
//	connections <----------->|     +--- suspicion, prober    |
//	file <------------------>|     +--- restorer, saver      |
//	                         |     |                         |
//	                         |    (5)                        |
//	                         |     +--- publisher ------(6)--+--> Snapshot, Superseded, Synced
//	                         |     |       +--- host table   |
//	                         |     +--- reporter ------------+--> Journal, log
//	                         +-------------------------------+
//
// The loop knows the parts, and none of them knows the loop. What takes time runs beside
// it and comes back through a channel. This is the way of a record:
//
//  1. The watch emits it. The channel is short: a busy loop holds up the watch.
//  2. The loop compares it with what is known of its node: it is new, the same, another,
//     an older one, overdue, or too large. One that is rejected is remembered.
//  3. The node enters the table, or has another entry there, with what operators have
//     set. The table finds it by its id, its record, its address, and the end of its
//     lease.
//  4. What its host name stands for, and which of those addresses answers, is asked
//     beside the loop and completes the entry when it is known.
//  5. The change is noted for the next snapshot, the journal and the log.
//  6. After each batch of events the publisher makes a snapshot, unless the last one was
//     too dear to be followed already. It shares with that one what did not change.
//
// A node goes when its record says so, when a whole listing proves that it was removed, or
// when its lease runs out. Before that counts the registry has to prove that the watch is
// alive, and where too many run out at once the suspicion has the nodes dialled.
type Directory struct {
	watcher Watcher
	options Options // with the defaults

	registry  atomic.Pointer[[]netip.AddrPort]
	snapshot  atomic.Pointer[Snapshot]
	condition atomic.Pointer[condition]
	lastEvent atomic.Int64 // since processStart; 0 before the first
	revision  atomic.Uint64
	charged   atomic.Int64 // see Charge
	synced    chan struct{}
	journal   Journal

	certificates *certificates

	hostRules   atomic.Pointer[HostRules]
	rulesSet    chan struct{} // holds at most one token
	restore     chan struct{} // holds at most one token
	failures    chan failure
	propagation propagation
}

// condition is what Status shows and the snapshot does not. It never changes.
type condition struct {
	Status
	known      time.Time     // of a restored list: when it was known to be current
	superseded chan struct{} // closed when there is a newer condition
}

// setCondition makes a changed condition the current one. Only Run calls it.
func (d *Directory) setCondition(change func(*condition)) {
	last := d.condition.Load()
	next := *last
	next.superseded = make(chan struct{})
	change(&next)
	d.condition.Store(&next)
	close(last.superseded)
}

// NewDirectory returns a Directory of the registry that the watcher follows. It
// is empty until Run.
func NewDirectory(w Watcher, o Options) *Directory {
	if o.TTL <= 0 {
		o.TTL = DefaultTTL
	}
	o.LossGuard = cmp.Or(o.LossGuard, new(DefaultLossGuard))
	o.Logger = cmp.Or(o.Logger, slog.New(slog.DiscardHandler))
	d := &Directory{
		watcher:  w,
		options:  o,
		synced:   make(chan struct{}),
		rulesSet: make(chan struct{}, 1),
		restore:  make(chan struct{}, 1),

		certificates: newCertificates(),
		failures:     make(chan failure, 256),
	}
	d.registry.Store(new([]netip.AddrPort))
	d.snapshot.Store(&Snapshot{superseded: make(chan struct{})})
	d.condition.Store(&condition{Status: Status{Since: time.Now()}, superseded: make(chan struct{})})
	return d
}

// Snapshot returns the newest snapshot: one atomic load, never nil. It may be
// called from any goroutine, before, during and after Run.
func (d *Directory) Snapshot() *Snapshot { return d.snapshot.Load() }

// Charge tells how long it took to make something of the newest snapshot, such as what
// requests choose from. All snapshots, with what was made of them, take 5 % of one core at
// most, so that the next change waits for 20 times as long, but for no more than 50 ms.
// It may be called from any goroutine, and never blocks.
func (d *Directory) Charge(took time.Duration) { d.charged.Add(int64(min(max(took, 0), time.Second))) }

// Synced returns a channel that is closed once the registry has been listed
// whole for the first time.
func (d *Directory) Synced() <-chan struct{} { return d.synced }

// AwaitListing returns nil once the registry has been listed whole for the first time,
// and before that the error of an attempt to do so, if one has failed: Run tries
// again. When ctx ends it returns the error of that. It may be called from any
// goroutine.
func (d *Directory) AwaitListing(ctx context.Context) error {
	for {
		c := d.condition.Load()
		select {
		case <-d.synced:
			return nil
		default:
		}
		if c.LastError != nil {
			return c.LastError
		}
		select {
		case <-d.synced:
		case <-c.superseded:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// SetHostRules has the directory look at the hosts that nodes announce, by these rules
// from the next snapshot on, which comes soon; see [Snapshot.Hosts]. Nil, as before the
// first call, has it look at none. It may be called from any goroutine, at any time, and
// returns at once; the last call counts.
func (d *Directory) SetHostRules(r *HostRules) {
	d.hostRules.Store(r)
	select {
	case d.rulesSet <- struct{}{}:
	default:
	}
}

// Journal returns what became of the nodes. Whoever learns something about a node
// that the registry does not know, such as that it does not answer, may add to it.
func (d *Directory) Journal() *Journal { return &d.journal }

// RegistryAddresses returns where the registry itself is, as far as it is known: a node
// that points there is none. What is returned is shared: read it only. When it changes
// there is a new snapshot.
func (d *Directory) RegistryAddresses() []netip.AddrPort { return *d.registry.Load() }

// A Rejection is a record that was not accepted.
type Rejection struct {
	// ID is the node's id as far as it could be read, Key the registry's own
	// name of the record, where it has one.
	ID, Key string
	// Err says why.
	Err error
	// Time is when the record was first read and rejected for this.
	Time time.Time

	watch uint64 // the last one that showed it
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
	status, s := d.condition.Load().Status, d.Snapshot()
	status.Synced, status.Nodes, status.Restored, status.Revision = s.Synced, len(s.nodes), s.restored, d.revision.Load()
	if at := d.lastEvent.Load(); at != 0 {
		status.LastEvent = processStart.Add(time.Duration(at))
	}
	return status
}

// Stale returns for how long the view could not be compared with the registry: 0
// while that is watched, and while there is no view.
func (d *Directory) Stale() time.Duration {
	c := d.condition.Load()
	switch {
	case c.Connected:
		return 0
	case d.Snapshot().Synced:
		return time.Since(c.Since)
	case !c.known.IsZero():
		return max(time.Since(c.known), 0)
	default:
		return 0
	}
}

// Run follows the registry until ctx ends, and returns the context's error once all that
// it has started has ended. It outlives every failure of the registry: the last
// snapshot stays, leases are suspended, and the watch is started again, at first
// soon and then less often; Status and the log say why.
//
// Run must be called once: a second call would publish another view over the first
// one's.
func (d *Directory) Run(ctx context.Context) error {
	return newLoop(d).run(ctx)
}
