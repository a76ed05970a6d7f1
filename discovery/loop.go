package discovery

import (
	"context"
	"log/slog"
	"math"
	"time"
)

// loop is the state of a directory that only Run's goroutine touches: the parts, which
// do not know it, and what an event means to several of them at once. See Directory.
type loop struct {
	dir *Directory // what others read
	log *slog.Logger

	watch      supervisor
	table      table
	overrides  overrides
	rejections rejections
	hosts      *hostTable
	publisher  publisher
	reporter   reporter
	location   location
	resolver   *resolver
	reacher    *reacher
	prober     *prober
	suspicion  *suspicion
	saver      *saver
	restorer   *restorer

	expiry  *time.Timer // when the first lease may run out
	expired []*tracked  // whose records ran out in the registry, in this batch of events

	// Nodes that are heard again are not new: see join.
	relearns  bool
	relearned time.Duration
}

func newLoop(d *Directory) *loop {
	o, dialer := &d.options, newDialer(d.options)
	locator, _ := As[Locator](d.watcher)
	l := &loop{
		dir:        d,
		log:        o.Logger,
		watch:      newSupervisor(d.watcher, &d.revision),
		table:      newTable(),
		overrides:  overrides{end: stoppedTimer()},
		rejections: newRejections(),
		reporter:   newReporter(&d.journal, o.Logger),
		location:   newLocation(o.Addresses, locator),
		resolver:   newResolver(dialer.lookup),
		reacher:    newReacher(dialer),
		prober:     newProber(dialer),
		suspicion:  newSuspicion(*o.LossGuard, dialer.allows),
		saver:      newSaver(o.WarmStart, o.Logger),
		expiry:     stoppedTimer(),
	}
	l.hosts = newHostTable(func() bool { return l.watch.listed }, d.certificates.has)
	if !l.saver.loading() {
		d.certificates.load(nil)
	}
	l.hosts.setRules(d.hostRules.Load())
	l.publisher = newPublisher(&d.snapshot, d.synced, &d.charged, l.hosts)
	l.restorer = newRestorer(l.prober, o.TTL, l.overrides.of, l.publisher.restore, &d.journal)
	l.resolver.pin(l.location.names())
	l.locateRegistry()
	return l
}

// run owns the state until ctx ends. Whatever happens, what comes of it is looked at once
// at the end of the turn.
func (l *loop) run(ctx context.Context) error {
	l.startWatch(ctx)
	for {
		select {
		case <-ctx.Done():
			l.stop()
			return ctx.Err()
		case m := <-l.watch.messages:
			l.receive(ctx, m)
			l.receiveWaiting(ctx) // it belongs to the same snapshot
		case r := <-l.prober.done:
			l.prober.take(r, func(r answer) { l.onProbe(ctx, r) })
		case r := <-l.resolver.done:
			l.resolver.take(r, func(r lookup) { l.onLookup(ctx, r) })
		case r := <-l.reacher.done:
			l.reacher.take(r, func(r reached) { l.onReach(ctx, r) })
		case r := <-l.watch.verifications.done:
			l.watch.verifications.take(r, func(r verification) { l.onVerify(ctx, r) })
		case r := <-l.saver.loads.done:
			l.saver.loads.take(r, l.onLoad)
		case r := <-l.saver.saves.done:
			l.saver.saves.take(r, l.saver.saved)
		case <-l.dir.rulesSet:
			l.hosts.setRules(l.dir.hostRules.Load())
		case <-l.dir.certificates.changed:
			l.saveCertificates()
		case <-l.hosts.wake.C:
			l.hosts.woken()
		case f := <-l.dir.failures:
			l.onFailure(f)
		case <-l.dir.restore:
			l.restorer.wanted = true
			l.beginRestore()
		case <-l.restorer.timer.C:
			l.restorer.probeDue()
		case <-l.saver.timer.C:
			l.saver.save(l.watch.listed, l.savedList)
		case <-l.resolver.tick.C:
			l.resolver.refresh()
		case <-l.resolver.crowded.C:
		case <-l.location.again.C:
			l.askLocation()
		case <-l.publisher.wake.C:
		case <-l.watch.retry.C:
			l.startWatch(ctx)
		case <-l.overrides.end.C:
			l.applyOverrides()
		case <-l.expiry.C:
		}
		l.lapseExpired()
		l.prober.dialWaiting(ctx, len(l.table.nodes))
		l.resolver.lookUpWaiting(ctx)
		l.reacher.tryWaiting(ctx)
		l.checkLeases(ctx)
		l.publish()
	}
}

// startWatch starts a watch. The one before has ended.
func (l *loop) startWatch(ctx context.Context) {
	l.watch.start(ctx)
	if l.watch.listedOnce() {
		return
	}
	// What a first listing said before it broke was never published, and the next one
	// knows the ages of the records anew.
	l.table = newTable()
	l.rejections = newRejections()
	clear(l.publisher.changed)
	l.resolver.leaveAll()
	l.suspicion.reset()
}

// receive takes in what the watch says.
func (l *loop) receive(ctx context.Context, m message) {
	switch {
	case m.ended != nil:
		l.watch.ended()
		if ctx.Err() != nil {
			return // it ended because everything does
		}
		if !l.watch.broken {
			l.lose(m.ended)
		}
		l.watch.startLater()
	case !l.watch.broken:
		l.dir.lastEvent.Store(int64(now()))
		l.apply(&m.event)
	}
}

// receiveWaiting takes in what waits in the channel.
func (l *loop) receiveWaiting(ctx context.Context) {
	for range len(l.watch.messages) {
		l.receive(ctx, <-l.watch.messages)
	}
}

// onProbe gives whoever asked the answer to a probe.
func (l *loop) onProbe(ctx context.Context, a answer) {
	if ctx.Err() == nil {
		a.deliver()
	}
}

// giveUp ends a watch that is worthless although it does not know.
func (l *loop) giveUp(err error) {
	if l.watch.giveUp(err) {
		l.lose(err)
	}
}

// lose notes that the registry cannot be seen any more. From here to the end of
// the next listing no lease runs out (guarantee 1 of the design): what cannot be
// seen is no evidence of death.
func (l *loop) lose(err error) {
	lost, was := l.watch.lose(), l.dir.condition.Load().LastError
	l.dir.setCondition(func(c *condition) {
		c.LastError = err
		if lost {
			c.Connected, c.Since = false, time.Now()
			c.Restarts++
		}
	})
	switch {
	case lost:
		l.dir.journal.Add(Change{Type: ChangeDisconnected, Reason: err.Error()})
		l.log.Warn("lost the registry; the last known nodes stay in use",
			"nodes", len(l.table.nodes), "error", err)
	case was == nil || was.Error() != err.Error(): // the same failure again is no news
		l.log.Warn("cannot list the registry; retrying", "nodes", len(l.table.nodes), "error", err)
	}
}

// publish publishes what changed, and has the list saved then.
func (l *loop) publish() {
	if l.watch.listed && l.rejections.changed { // a listing that is under way shows them at its end
		l.rejections.changed = false
		l.dir.setCondition(func(c *condition) { c.Rejections = l.rejections.all() })
	}
	if !l.watch.listedOnce() {
		l.publisher.publishRestored()
	} else if l.publisher.publish(!l.awaitsAnswers()) {
		l.saver.changed()
		for _, n := range l.hosts.takeNews() {
			l.reporter.host(&n)
		}
	}
}

// awaitsAnswers reports whether something is being found out that belongs to a first
// listing: what host names stand for, who of the overdue accepts connections, what
// operators had decided, and whose the hosts were.
func (l *loop) awaitsAnswers() bool {
	return l.resolver.untried > 0 || l.reacher.busy() || l.prober.busy() ||
		l.saver.loading() && (l.overrides.known.IsZero() || l.hosts.used())
}

// stop ends the goroutines that run started, and waits for them.
func (l *loop) stop() {
	l.watch.stop()
	l.prober.wait()
	l.resolver.stop()
	l.reacher.wait()
	l.hosts.wake.Stop()
	select {
	case <-l.dir.certificates.changed:
		l.saveCertificates()
	default:
	}
	l.saver.stop(l.watch.listed, l.savedList)
}

// saveCertificates has the list saved, once there is one that may replace what is saved.
func (l *loop) saveCertificates() {
	if l.watch.listedOnce() {
		l.saver.changed()
	}
}

func stoppedTimer() *time.Timer {
	t := time.NewTimer(math.MaxInt64)
	t.Stop()
	return t
}
