package discovery

import (
	"cmp"
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	// The wait before a watch is started again grows from the first to the second,
	// both give or take half.
	firstRetry = 50 * time.Millisecond
	lastRetry  = 3 * time.Second

	// A registry that takes longer than this to prove that the watch is alive is ill,
	// and an ill registry is no evidence that a node is dead.
	verifyTimeout = time.Second
)

// supervisor runs the watch of a registry, in one goroutine at a time, and starts it again
// after it broke. It knows how far the registry has been listed:
//
//   - listed: the running watch has emitted Synced, and from then on all that happens;
//   - lastListed: the last watch that did so, 0 if there was none. Before there was one
//     (listedOnce) nothing that the registry says is published. Readers see it by
//     Snapshot.Synced as soon as the first listing is published, see publisher.
type supervisor struct {
	watcher  Watcher
	messages chan message            // what the watch says
	cancel   context.CancelCauseFunc // nil while none runs
	broken   bool                    // the running watch was given up; what it still says is ignored
	backoff  *backoff.ExponentialBackOff
	retry    *time.Timer

	verifier      Verifier            // nil if the registry is none
	verifications tasks[verification] // at most one

	number     uint64 // counts the watches
	listed     bool
	lastListed uint64
	last       Listing       // what the listing of that one proved
	listedAt   time.Duration // when it was complete
	lostAt     time.Duration // when the last one that listed broke

	revision *atomic.Uint64 // the newest of all whole listings, and of what followed them
	seen     uint64         // the newest one in the running watch
}

// message is what a watch's goroutine says: an event, or how the watch ended.
type message struct {
	event Event
	ended error
}

// verification is how the proof went that a watch is alive.
type verification struct {
	watch uint64
	began time.Duration
	err   error
}

func newSupervisor(w Watcher, revision *atomic.Uint64) supervisor {
	s := supervisor{
		watcher:       w,
		messages:      make(chan message, 256),
		backoff:       newBackOff(),
		retry:         stoppedTimer(),
		verifications: newTasks[verification](1),
		lostAt:        now(),
		revision:      revision,
	}
	s.verifier, _ = As[Verifier](w)
	return s
}

// newBackOff returns the waits between tries of what the registry refuses or does not
// answer.
func newBackOff() *backoff.ExponentialBackOff {
	b := &backoff.ExponentialBackOff{
		InitialInterval: firstRetry, MaxInterval: lastRetry,
		Multiplier: 2, RandomizationFactor: 0.5,
	}
	b.Reset()
	return b
}

// listedOnce reports whether the registry has been listed whole.
func (s *supervisor) listedOnce() bool { return s.lastListed != 0 }

// start starts a watch. The one before has ended.
func (s *supervisor) start(ctx context.Context) {
	ctx, s.cancel = context.WithCancelCause(ctx)
	s.number++
	s.listed, s.broken = false, false
	s.seen = 0
	go func() {
		err := s.watcher.Watch(ctx, func(e Event) {
			select {
			case s.messages <- message{event: e}:
			case <-ctx.Done():
			}
		})
		s.messages <- message{ended: cmp.Or(context.Cause(ctx), err, fmt.Errorf("%w: it ended without saying why", ErrBroken))}
	}()
}

// verify has the registry prove that the running watch has emitted everything up to now.
// Without a Verifier it is taken for granted.
func (s *supervisor) verify(ctx context.Context) {
	v := verification{watch: s.number, began: now()}
	s.verifications.start(func() verification {
		if s.verifier != nil {
			ctx, cancel := context.WithTimeout(ctx, verifyTimeout)
			defer cancel()
			v.err = s.verifier.Verify(ctx)
		}
		return v
	})
}

// giveUp ends a watch that is worthless although it does not know. It reports false if
// there is none.
func (s *supervisor) giveUp(err error) bool {
	if s.cancel == nil || s.broken {
		return false
	}
	s.broken = true
	s.cancel(err)
	return true
}

// ended notes that the watch's goroutine has ended.
func (s *supervisor) ended() {
	s.cancel(nil)
	s.cancel = nil
}

// startLater has start called after a while.
func (s *supervisor) startLater() { s.retry.Reset(s.backoff.NextBackOff()) }

// lose notes that the running watch broke, and reports whether it had listed.
func (s *supervisor) lose() bool {
	if !s.listed {
		return false
	}
	s.listed, s.lostAt = false, now()
	if s.lostAt-s.listedAt > lastRetry {
		// It worked for a while. A registry that breaks every watch at once must not
		// be listed twenty times a second.
		s.backoff.Reset()
	}
	return true
}

// observe takes up the revision of an event.
func (s *supervisor) observe(revision uint64) {
	if revision > s.seen {
		s.seen = revision
		if s.listed {
			s.revision.Store(revision)
		}
	}
}

// wiped reports whether the registry has lost data since it was listed last.
func (s *supervisor) wiped(l Listing) bool {
	return s.listedOnce() && (l.Epoch != s.last.Epoch || l.Revision < s.revision.Load())
}

// complete notes that the running watch has listed the registry.
func (s *supervisor) complete(l Listing, at time.Duration) {
	s.last, s.listed, s.lastListed, s.listedAt = l, true, s.number, at
	s.seen = max(s.seen, l.Revision)
	s.revision.Store(s.seen)
}

// stop ends the watch and waits for its goroutine, and for a verification.
func (s *supervisor) stop() {
	defer s.verifications.wait()
	if s.cancel == nil {
		return
	}
	s.cancel(nil)
	for m := range s.messages {
		if m.ended != nil {
			return
		}
	}
}
