package discovery

const (
	// A storm of changes publishes at most this many snapshots a second. The
	// burst lets what follows a quiet spell through at once, and the two add up
	// to 20 in any one second.
	snapshotRate  = 16
	snapshotBurst = 4
)

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
	if !old.Synced && !l.impatient && (l.resolver.untried > 0 || l.reacher.busy() || l.prober.busy() || l.loading && l.decisions.known.IsZero()) {
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
