package discovery

import (
	"sync/atomic"
	"time"
)

const (
	// From one snapshot to the next it takes so many times what the first one cost, with
	// what was made of it: 5 % of one core go into snapshots, however fast changes come.
	costFactor = 20
	// A change never waits for longer. It is what a snapshot costs that takes 2.5 ms,
	// which no fleet of 10,000 needs; beyond that it matters more to know where nodes
	// are than what that costs, and 20 snapshots a second were always borne.
	maxWait = 50 * time.Millisecond
	// What the memory of a snapshot costs that has to be collected again, for each of its
	// nodes. It also bounds the rate where the clock is too coarse to show what was spent.
	collectCost = 10 * time.Nanosecond

	// After a quiet spell so much of what snapshots have to wait for is forgiven, which is
	// nothing to a large fleet, and lets some changes of a small one through at once.
	credit = time.Millisecond

	// firstGrace is for how long a first listing is kept back while its host names
	// are being resolved and its overdue nodes dialled.
	firstGrace = 500 * time.Millisecond
)

// publisher collects what changes and publishes it in the next snapshot: at once after
// a quiet spell, else when the last one has been paid, see tooSoon. The first listing is
// published whole; before it there is nothing to be seen but restored nodes.
type publisher struct {
	snapshot *atomic.Pointer[Snapshot]
	synced   chan struct{} // closed with the first snapshot of a whole listing

	changed  map[string]*Entry // by id, nil for nodes that are gone
	restored map[string]*Entry // the same, for snapshots before the first listing
	hosts    *hostTable
	other    bool // something changed that is beside the nodes

	published time.Duration                       // when the last snapshot was begun
	paid      time.Duration                       // until when the snapshots so far take no more than their share
	charged   *atomic.Int64                       // what was made of the last one since took
	took      func(since time.Time) time.Duration // time.Since, but in tests

	wake     *time.Timer   // when publish is to be called again at the latest
	graceEnd time.Duration // when the first listing is published, whatever is unknown of it
}

func newPublisher(snapshot *atomic.Pointer[Snapshot], synced chan struct{}, charged *atomic.Int64, hosts *hostTable) publisher {
	return publisher{
		snapshot: snapshot, synced: synced, hosts: hosts,
		changed: make(map[string]*Entry), restored: make(map[string]*Entry),
		published: now(), paid: now() - credit, charged: charged, took: time.Since,
		wake: stoppedTimer(),
	}
}

// change notes what the next snapshot shows of a node, nil if it is gone. Of one that no
// snapshot has shown there is nothing to be taken back: a listing that goes on and on
// must not leave a trace of each node that comes and goes in it.
func (p *publisher) change(id string, e *Entry) {
	if e == nil && p.snapshot.Load().Node(id) == nil {
		delete(p.changed, id)
		return
	}
	p.changed[id] = e
}

// restore notes how a restored node is shown before the first listing, nil if it is gone.
func (p *publisher) restore(id string, e *Entry) { p.restored[id] = e }

// endRestored takes back what the restored nodes had shown, but for those that the first
// listing shows.
func (p *publisher) endRestored() {
	for id := range p.restored {
		if p.changed[id] == nil {
			p.change(id, nil)
		}
	}
	clear(p.restored)
}

// startGrace bounds for how long the first listing, which has ended, is kept back.
func (p *publisher) startGrace() {
	p.graceEnd = now() + firstGrace
	p.wake.Reset(firstGrace)
}

// publishRestored publishes the restored nodes that changed, and the hosts that are
// remembered.
func (p *publisher) publishRestored() {
	hosts := p.hosts.pending && (p.hosts.remembers() || len(p.snapshot.Load().nodes) > 0)
	if (len(p.restored) > 0 || hosts) && !p.tooSoon() {
		p.show(p.restored, false)
	}
}

// publish publishes what changed, and reports whether it did. A first listing waits, within
// bounds, until everything is known that belongs to it.
func (p *publisher) publish(known bool) bool {
	first := !p.snapshot.Load().Synced
	switch {
	case first && !known && now() < p.graceEnd:
		return false
	case !first && (len(p.changed) == 0 && !p.other && !p.hosts.pending || p.tooSoon()):
		return false
	}
	p.show(p.changed, true)
	p.other = false
	if first {
		close(p.synced)
	}
	return true
}

// tooSoon reports whether a snapshot must wait: the last one is not paid yet. What others
// make of snapshots, such as the sources of requests a choice of nodes, is most of the
// cost and known to them alone. They charge it when they have done so, which may be
// after this was asked for the first time.
func (p *publisher) tooSoon() bool {
	due := p.paid + costFactor*time.Duration(p.charged.Load())
	wait := min(due, p.published+maxWait) - now()
	if wait <= 0 {
		return false
	}
	p.wake.Reset(wait)
	return true
}

// show makes the snapshot with these changes the current one.
func (p *publisher) show(changed map[string]*Entry, synced bool) {
	p.published = now()
	p.paid = min(max(p.paid+costFactor*time.Duration(p.charged.Swap(0)), p.published-credit), p.published)
	began := time.Now()
	old := p.snapshot.Load()
	next := old.succeed(changed, synced)
	next.hosts = p.hosts.apply(changed, next.nodes)
	p.snapshot.Store(next)
	close(old.superseded)
	clear(changed)
	p.paid += costFactor * (p.took(began) + collectCost*time.Duration(len(next.nodes)))
}
