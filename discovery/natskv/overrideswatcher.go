package natskv

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A bucket of overrides that is not there yet is looked for every overridesInterval,
// and overridesPatience after something else went wrong.
const (
	overridesInterval = time.Second
	overridesPatience = 10 * time.Second
)

// An overridesWatcher follows the overrides beside the loop of a watch of the nodes: it
// leaves what it finds for the loop, which alone emits.
type overridesWatcher struct {
	session *session
	// found are the newest overrides, until the loop has taken them; changed holds a
	// token then.
	found   atomic.Pointer[map[string]discovery.Override]
	changed chan struct{}
	ready   chan struct{} // closed when the overrides are known, or known to be unknown
	known   sync.Once
	last    map[string]discovery.Override // what was left last; nil before the first
	ahead   time.Duration                 // how far the server's clock was then
}

func newOverridesWatcher(s *session) *overridesWatcher {
	return &overridesWatcher{session: s, changed: make(chan struct{}, 1), ready: make(chan struct{})}
}

// pending returns overrides that are to be emitted, nil if there are none.
func (o *overridesWatcher) pending() map[string]discovery.Override {
	if all := o.found.Swap(nil); all != nil {
		return *all
	}
	return nil
}

// offer leaves the overrides for the loop, if they differ from the last ones: also if
// that is because one of the clocks was set.
func (o *overridesWatcher) offer(all map[string]discovery.Override) {
	defer o.markReady()
	o.ahead = o.session.clock.Ahead()
	all = o.session.clock.Locally(all)
	if o.last != nil && maps.EqualFunc(o.last, all, discovery.Override.Equal) {
		return
	}
	o.last = all
	left := maps.Clone(all)
	o.found.Store(&left)
	select {
	case o.changed <- struct{}{}:
	default:
	}
}

// markReady tells that there is nothing to wait for any more.
func (o *overridesWatcher) markReady() { o.known.Do(func() { close(o.ready) }) }

// follow leaves the overrides for the loop whenever they change, until ctx ends.
// Whatever goes wrong, the last ones stand: nobody may be put back into service
// because a bucket cannot be read.
func (o *overridesWatcher) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := o.read(ctx)
		o.markReady()
		wait := overridesInterval
		if !errors.Is(err, jetstream.ErrStreamNotFound) && !errors.Is(err, discovery.ErrBroken) {
			wait = overridesPatience
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// read reads the bucket of overrides, and what changes in it, to the first
// irregularity.
func (o *overridesWatcher) read(ctx context.Context) error {
	ctx, release := o.session.guard(ctx, o.session.config.overrideNeeds(feedNeeds()...))
	defer release()
	l, err := o.list(ctx)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		o.offer(nil) // there are none, or it was removed, and with it what it said
	}
	if err != nil {
		return err
	}
	defer l.feed.close(ctx)
	for {
		idle := len(l.feed.messages) == 0
		if idle && time.Since(l.compared) > auditInterval {
			if err := l.compare(ctx, o.session); err != nil {
				return err
			}
		}
		if idle && l.listed && (l.changed || o.session.clock.Ahead() != o.ahead) {
			o.offer(l.all)
			l.changed = false
		}
		m, err := l.feed.next(ctx)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return fmt.Errorf("%w: %w", discovery.ErrBroken, err)
		case m != nil:
			l.apply(m)
		}
		if !l.listed {
			if l.listed, err = l.feed.complete(ctx, m); err != nil {
				return err
			}
		}
	}
}

// An overridesList is what is known of the bucket of overrides.
type overridesList struct {
	feed     *feed
	info     *jetstream.StreamInfo // from before the feed was opened
	all      map[string]discovery.Override
	listed   bool      // all that was there at first has come
	changed  bool      // something has come since all was left last
	reached  uint64    // up to which revision all is known
	compared time.Time // when it was compared with the bucket last
}

func (o *overridesWatcher) list(ctx context.Context) (*overridesList, error) {
	ctx, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	f, info, err := o.session.openOverrides(ctx)
	if err != nil {
		return nil, err
	}
	return &overridesList{
		feed: f, info: info, all: make(map[string]discovery.Override),
		listed: f.listed == 0, changed: true, compared: time.Now(),
	}, nil
}

func (l *overridesList) apply(m *message) {
	applyOverride(l.all, m)
	l.reached = max(l.reached, m.sequence)
	l.changed = true
}

// compare returns why the list is no longer to be trusted, nil if it agrees with the
// bucket. It is less strict than the audit of the nodes: a decision that comes late in a
// rare case does little harm.
func (l *overridesList) compare(ctx context.Context, s *session) error {
	l.compared = time.Now()
	now, err := s.overridesInfo(ctx)
	if err == nil {
		err = sameStream(l.info, now, l.reached)
	}
	if err != nil || now.State.LastSeq <= l.reached {
		return err
	}
	// It may no longer hold what was written last.
	done, err := l.feed.exhausted(ctx, l.feed.received)
	if err != nil {
		return err
	}
	if !done && len(l.feed.messages) == 0 {
		return fmt.Errorf("%w: the bucket is ahead of the watch", discovery.ErrBroken)
	}
	l.reached = now.State.LastSeq
	return nil
}
