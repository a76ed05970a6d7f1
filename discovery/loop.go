package discovery

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/time/rate"
)

const (
	// The wait before a watch is started again grows from the first to the
	// second, both give or take half.
	firstRetry = 50 * time.Millisecond
	lastRetry  = 3 * time.Second
)

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

	table    table
	expiry   *time.Timer
	verifies tasks[verdict] // at most one
	rejected map[string]rejection
	amended  bool // rejected differs from what Status shows

	decisions
	overrideEnd *time.Timer // the next one of them ends

	// Nodes that are heard again are not new: see join.
	relearns  bool
	relearned time.Duration

	prober prober
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
		case a := <-l.prober.done:
			for a := range l.prober.take(a) {
				if ctx.Err() == nil {
					a.deliver()
				}
			}
		case found := <-l.resolver.done:
			for found := range l.resolver.take(found) {
				l.learn(ctx, found)
			}
		case f := <-l.reacher.done:
			for f := range l.reacher.take(f) {
				l.onReach(ctx, f)
			}
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
		case v := <-l.verifies.done:
			for v := range l.verifies.take(v) {
				l.judge(ctx, v)
			}
		case <-l.publication.C:
			l.awaited = false
		}
		l.settle()
		l.prober.dialWaiting(ctx, len(l.table.nodes))
		l.resolver.lookUpWaiting(ctx)
		l.reacher.tryWaiting(ctx)
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
		l.table = newTable()
		clear(l.changed)
		clear(l.rejected)
		l.forgetOverdue()
		l.resolver.leaveAll()
		l.census = newCensus()
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
	l.verifies.wait()
	l.prober.wait()
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
			"nodes", len(l.table.nodes), "error", err)
	} else if was.err == nil || was.err.Error() != err.Error() {
		// The same failure again is no news.
		l.log.Warn("cannot list the registry; retrying",
			"nodes", len(l.table.nodes), "error", err)
	}
	l.listed = false
	l.condition.Store(&next)
	l.expiry.Stop()
}

func stoppedTimer() *time.Timer {
	t := time.NewTimer(math.MaxInt64)
	t.Stop()
	return t
}
