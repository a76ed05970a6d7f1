package discovery

import (
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

const (
	// A storm of changes publishes at most this many snapshots a second. The
	// burst lets what follows a quiet spell through at once, and the two add up
	// to 20 in any one second.
	snapshotRate  = 16
	snapshotBurst = 4

	// firstGrace is for how long a first listing is kept back while its host names
	// are being resolved and its overdue nodes dialled.
	firstGrace = 500 * time.Millisecond
)

// publisher collects what changes and publishes it in the next snapshot: at once after
// a quiet spell, else when the rate allows. The first listing is published whole; before
// it there is nothing to be seen but restored nodes.
type publisher struct {
	snapshot *atomic.Pointer[Snapshot]
	synced   chan struct{} // closed with the first snapshot of a whole listing

	changed  map[string]*Entry // by id, nil for nodes that are gone
	restored map[string]*Entry // the same, for snapshots before the first listing
	other    bool              // something changed that is beside the nodes

	limiter  *rate.Limiter
	wake     *time.Timer   // when publish is to be called again at the latest
	graceEnd time.Duration // when the first listing is published, whatever is unknown of it
}

func newPublisher(snapshot *atomic.Pointer[Snapshot], synced chan struct{}) publisher {
	return publisher{
		snapshot: snapshot, synced: synced,
		changed: make(map[string]*Entry), restored: make(map[string]*Entry),
		limiter: rate.NewLimiter(snapshotRate, snapshotBurst),
		wake:    stoppedTimer(),
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

// publishRestored publishes the restored nodes that changed.
func (p *publisher) publishRestored() {
	if len(p.restored) > 0 && !p.tooSoon() {
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
	case !first && (len(p.changed) == 0 && !p.other || p.tooSoon()):
		return false
	}
	p.show(p.changed, true)
	p.other = false
	if first {
		close(p.synced)
	}
	return true
}

// tooSoon reports whether a snapshot must wait.
func (p *publisher) tooSoon() bool {
	r := p.limiter.Reserve()
	if r.Delay() == 0 {
		return false
	}
	p.wake.Reset(r.Delay())
	r.Cancel()
	return true
}

// show makes the snapshot with these changes the current one.
func (p *publisher) show(changed map[string]*Entry, synced bool) {
	old := p.snapshot.Load()
	p.snapshot.Store(old.succeed(changed, synced))
	close(old.superseded)
	clear(changed)
}
