package outlier

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// sparedFor is for how long a node that would be one too many is not judged again.
	sparedFor = time.Second
	// countFor is for how long a count of nodes is good if there is no other snapshot.
	countFor = time.Second
	// reviewEvery is how often the ejected nodes are held against the others, which may
	// have become unhealthy.
	reviewEvery = time.Second

	// Publishing makes the users choose anew among the nodes, and takes 5 % of one core at
	// most, as snapshots do; an ejection waits for no longer than mostWait.
	costFactor = 20
	mostWait   = 50 * time.Millisecond
)

// A Detector ejects the outliers among the nodes of a directory. Requests are counted in
// their own goroutines, without a lock; a node becomes an outlier in that of the request
// which makes it one. Run lets nodes in again. Every method may be called from any
// goroutine.
type Detector struct {
	directory *discovery.Directory
	options   Options
	lines     *rate.Limiter
	beyond    rate.Sometimes // lines that more nodes fail than may be ejected

	count   atomic.Int64 // of ejected nodes
	version atomic.Uint64
	cost    atomic.Int64 // of taking up a version, as it was last
	counted atomic.Pointer[counts]
	ended   atomic.Bool
	woken   chan struct{} // has room for one

	mu          sync.Mutex // guards what follows; nothing else happens under it
	ejected     []*record
	published   time.Time
	pending     bool // there is something that the version does not show yet
	subscribers map[*func(*discovery.Entry) bool]struct{}
}

// counts are how many nodes there are of each group, as of one snapshot.
type counts struct {
	snapshot *discovery.Snapshot
	at       time.Time
	nodes    map[string]int
}

// New returns a detector, which needs Run.
func New(directory *discovery.Directory, options Options) *Detector {
	return &Detector{
		directory: directory, options: options,
		lines:       rate.NewLimiter(20, 20),
		beyond:      rate.Sometimes{Interval: time.Minute},
		woken:       make(chan struct{}, 1),
		subscribers: make(map[*func(*discovery.Entry) bool]struct{}),
	}
}

// Subscribe has those nodes counted that could serve but for being ejected, until cancel
// is called: of them MaxEjected may be ejected. serves is called without a lock.
func (d *Detector) Subscribe(serves func(*discovery.Entry) bool) (cancel func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.subscribers[&serves] = struct{}{}
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.subscribers, &serves)
	}
}

// Version returns a number that grows when the ejected nodes are others.
func (d *Detector) Version() uint64 { return d.version.Load() }

// Charge tells what it took to take up a version, which limits how often there is another.
func (d *Detector) Charge(took time.Duration) { d.cost.Store(int64(took)) }

// Ejected reports whether the node is ejected.
func (d *Detector) Ejected(e *discovery.Entry) bool { return d.Of(e) != nil }

// Of returns the ejection of the node, nil if it is in use.
func (d *Detector) Of(e *discovery.Entry) *Ejection {
	if d.count.Load() == 0 {
		return nil
	}
	if r := d.find(e); r != nil {
		return r.ejection.Load()
	}
	return nil
}

// Back returns for how long the node is in use again after it was ejected, false if it
// never was.
func (d *Detector) Back(e *discovery.Entry) (time.Duration, bool) {
	if r := d.find(e); r != nil {
		if since := r.since.Load(); since != 0 {
			return d.options.Now() - time.Duration(since), true
		}
	}
	return 0, false
}

// Succeeded counts a request to the node that was sent at a time, and answered by now, both
// by the clock of the options.
func (d *Detector) Succeeded(e *discovery.Entry, sent, now time.Duration) {
	r := d.record(e)
	if r == nil || r.ejection.Load() != nil || int64(sent) < r.since.Load() {
		return
	}
	if r.inRow.Load() != 0 {
		r.inRow.Store(0)
	}
	if d.options.Percent > 0 {
		r.recent.Add(now, d.options.Window, 1, 0)
	}
}

// Failed counts a request that failed, and ejects the node if that makes it an outlier.
func (d *Detector) Failed(e *discovery.Entry, sent, now time.Duration, f Failure) {
	r := d.record(e)
	if r == nil || r.ejection.Load() != nil || int64(sent) < r.since.Load() {
		return
	}
	inRow := int(r.inRow.Add(1))
	if d.options.Percent > 0 {
		r.recent.Add(now, d.options.Window, 1, 1)
	}
	if int64(now) < r.spared.Load() {
		return
	}
	if cause := d.cause(r, now, inRow, f); cause != "" {
		d.eject(r, e, cause)
	}
}

// cause says in words what makes the node an outlier, "" if it is none.
func (d *Detector) cause(r *record, now time.Duration, inRow int, last Failure) string {
	o := &d.options
	if inRow >= o.Errors {
		return fmt.Sprintf("%d errors in a row, the last one: %s", inRow, last)
	}
	if o.Percent == 0 {
		return ""
	}
	requests, failures := r.recent.Sum(now, o.Window)
	if requests < o.Requests || failures*100 < requests*o.Percent {
		return ""
	}
	return fmt.Sprintf("%d of %d requests in %v failed, the last one: %s", failures, requests, o.Window, last)
}

// eject ejects a node, unless that would be one too many.
func (d *Detector) eject(r *record, e *discovery.Entry, cause string) {
	group := d.group(e)
	nodes := d.nodes(d.directory.Snapshot())[group]
	ejection := d.admit(r, group, nodes, cause)
	if ejection == nil {
		if r.ejection.Load() == nil {
			r.spared.Store(int64(d.options.Now() + sparedFor))
			d.beyond.Do(func() {
				d.options.Logger.Warn("more nodes fail than may be ejected; they stay in use",
					slog.String("node", r.id), slog.String("because", cause), slog.Int("nodes", nodes), slog.Int("max_ejected", d.options.Most(nodes)))
			})
		}
		return
	}
	d.wake()
	d.options.Count(e)
	lasts := ejection.Until.Sub(ejection.Since)
	d.tell(r, discovery.ChangeEjected, fmt.Sprintf("its requests fail: %s; ejected for %v, %s", cause, lasts, ejection.Count()))
	if d.lines.Allow() {
		d.options.Logger.Warn("node is ejected", slog.String("node", r.id), slog.String("address", r.address),
			slog.String("because", cause), slog.Duration("for", lasts), slog.Int("times_in_a_row", ejection.Times))
	}
}

// admit makes the node one of the ejected ones of its group, which has so many nodes, and
// returns its ejection; nil if that would be one too many, or it is one already.
func (d *Detector) admit(r *record, group string, nodes int, cause string) *Ejection {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended.Load() || r.ejection.Load() != nil {
		return nil
	}
	already := 0
	for _, other := range d.ejected {
		if other.group == group {
			already++
		}
	}
	if already >= d.options.Most(nodes) {
		return nil
	}
	// A time for which it behaved takes back one time for which it did not.
	if since := r.since.Load(); since != 0 {
		behaved := int((d.options.Now() - time.Duration(since)) / d.options.Eject)
		r.times = max(0, r.times-behaved)
	}
	now := time.Now()
	ejection := &Ejection{Cause: cause, Since: now, Until: now.Add(d.options.lasts(r.times)), Times: r.times + 1}
	r.times++
	r.group = group
	r.ejection.Store(ejection)
	d.ejected = append(d.ejected, r)
	d.count.Store(int64(len(d.ejected)))
	d.publish(now)
	return ejection
}

// group returns whose nodes are counted together with the node.
func (d *Detector) group(e *discovery.Entry) string {
	if d.options.ByService {
		return e.Node.Service()
	}
	return ""
}

// nodes returns how many nodes of each group could serve but for being ejected.
func (d *Detector) nodes(snapshot *discovery.Snapshot) map[string]int {
	if c := d.counted.Load(); c != nil && c.snapshot == snapshot && time.Since(c.at) < countFor {
		return c.nodes
	}
	d.mu.Lock()
	subscribers := slices.Collect(maps.Keys(d.subscribers))
	d.mu.Unlock()
	c := &counts{snapshot: snapshot, at: time.Now(), nodes: make(map[string]int)}
	for _, e := range snapshot.Nodes() {
		if slices.ContainsFunc(subscribers, func(serves *func(*discovery.Entry) bool) bool { return (*serves)(e) }) {
			c.nodes[d.group(e)]++
		}
	}
	d.directory.Charge(time.Since(c.at))
	d.counted.Store(c)
	return c.nodes
}

// publish makes the version another one, if the last one has been paid, and otherwise has
// Run do it. The caller holds the lock.
func (d *Detector) publish(now time.Time) {
	d.pending = now.Sub(d.published) < d.wait()
	if !d.pending {
		d.published = now
		d.version.Add(1)
	}
}

func (d *Detector) wait() time.Duration {
	return min(costFactor*time.Duration(d.cost.Load()), mostWait)
}

func (d *Detector) wake() {
	select {
	case d.woken <- struct{}{}:
	default:
	}
}

// tell notes in the journal what became of a node.
func (d *Detector) tell(r *record, t discovery.ChangeType, reason string) {
	d.directory.Journal().Add(discovery.Change{Type: t, ID: r.id, Reason: reason, Entry: d.directory.Snapshot().Node(r.id)})
}

// Run lets nodes in again when their time is over, until ctx ends. It is called once.
func (d *Detector) Run(ctx context.Context) {
	defer d.end()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		snapshot := d.directory.Snapshot()
		timer.Reset(d.review(snapshot))
		var superseded <-chan struct{} // of interest while nodes are ejected
		if d.count.Load() > 0 {
			superseded = snapshot.Superseded()
		}
		select {
		case <-ctx.Done():
			return
		case <-superseded:
		case <-d.woken:
		case <-timer.C:
		}
	}
}

// end lets go of all ejections. Nobody asks for them any more.
func (d *Detector) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ended.Store(true)
	d.ejected = nil
	d.count.Store(0)
}

// A readmission is a node that is ejected no more, and why.
type readmission struct {
	record *record
	why    string
	gone   bool // there is no such node to be told of
}

// review lets the nodes in that may come back, and returns when it must be called next.
func (d *Detector) review(snapshot *discovery.Snapshot) time.Duration {
	if d.count.Load() == 0 {
		return time.Hour
	}
	nodes := d.nodes(snapshot)
	readmitted, next := d.readmit(snapshot, nodes)
	for _, b := range readmitted {
		if b.gone {
			continue
		}
		d.tell(b.record, discovery.ChangeRestored, b.why)
		if d.lines.Allow() {
			d.options.Logger.Info("node is not ejected any more", slog.String("node", b.record.id), slog.String("address", b.record.address), slog.String("because", b.why))
		}
	}
	return next
}

// readmit takes the nodes out of the ejected ones that may come back.
func (d *Detector) readmit(snapshot *discovery.Snapshot, nodes map[string]int) (back []readmission, next time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	next = time.Hour
	// Where there are too many, those stay that were ejected last.
	left := make(map[string]int)
	slices.SortStableFunc(d.ejected, func(a, b *record) int { return b.ejection.Load().Since.Compare(a.ejection.Load().Since) })
	d.ejected = slices.DeleteFunc(d.ejected, func(r *record) bool {
		ejection := r.ejection.Load()
		e := snapshot.Node(r.id)
		b := readmission{record: r}
		switch {
		case e == nil:
			b.gone = true
		case !d.is(r, e):
			b.why = "it is another process, or elsewhere, than the one that was ejected"
		case !now.Before(ejection.Until):
			b.why = fmt.Sprintf("its ejection is over, after %v", now.Sub(ejection.Since).Round(time.Millisecond))
		case left[r.group] >= d.options.Most(nodes[r.group]):
			b.why = "fewer nodes may be ejected now, because there are fewer"
		default:
			left[r.group]++
			next = min(next, reviewEvery, ejection.Until.Sub(now))
			return false
		}
		r.inRow.Store(0)
		r.recent.Clear()
		r.since.Store(int64(max(d.options.Now(), 1)))
		r.ejection.Store(nil)
		back = append(back, b)
		return true
	})
	d.count.Store(int64(len(d.ejected)))
	if len(back) > 0 || d.pending {
		d.publish(now)
	}
	if d.pending {
		next = min(next, max(d.published.Add(d.wait()).Sub(now), 0))
	}
	return back, next
}
