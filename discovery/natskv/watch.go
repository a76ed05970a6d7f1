package natskv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

const (
	// wholeWait is how long a consumer is looked for that lists the whole bucket.
	wholeWait = time.Second
	// probeTimeout is for a ping, once the stream has gone silent.
	probeTimeout = time.Second
	// A listing of the nodes waits for the overrides for four times as long as it
	// took to begin, which are as many questions, within these bounds.
	overridesWait    = time.Second
	overridesWaitMax = 10 * time.Second
)

// Watch emits what operators have decided, every record of the bucket, oldest first,
// then Synced, then changes as the server pushes them, until ctx ends or anything at
// all goes wrong. Then it returns an error that wraps [discovery.ErrBroken], or, if it
// could not begin, one that says why.
//
// It does not use the client's own watch of a bucket, which resumes by itself:
// late (14 to 18 s after a restart of the server), and in some cases never,
// without a word (bucket recreated, or restored from an older store). Here every
// irregularity ends the watch: a lost connection, two missing heartbeats, a gap
// in the consumer's sequence, a consumer that was deleted; and, since all of
// that can look fine on a dead stream, every five seconds the bucket itself is
// asked whether it is the same one and whether the watch has got as far as it.
//
// A removal is Left, a record that the bucket let expire is Expired, also where
// they are part of the listing.
func (r *Registry) Watch(ctx context.Context, emit func(discovery.Event)) error {
	w, err := r.begin(ctx)
	if err != nil {
		return cmp.Or(ctx.Err(), err)
	}
	failing, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	w.fail = fail
	r.watch.Store(w)
	defer r.watch.CompareAndSwap(w, nil)
	return natslink.Broken(ctx, r.watching(), w.run(failing, emit))
}

// watching names what is watched, for errors.
func (r *Registry) watching() string { return fmt.Sprintf("watching bucket %q", r.config.Bucket) }

// A watch is one call of Watch that has begun. Its loop alone emits: beside it run an
// audit, and a watcher of the overrides that leaves what it finds for the loop.
type watch struct {
	session   *session
	feed      *feed
	info      *jetstream.StreamInfo // from before the feed was opened
	began     time.Duration         // how long it took to begin
	overrides *overridesWatcher
	fail      context.CancelCauseFunc // ends the watch
	ended     chan struct{}           // closed when Watch is about to return

	progress progress
	ahead    atomic.Pointer[time.Duration] // how far the server's clock is ahead, once known

	// What follows belongs to the loop.
	emit    func(discovery.Event)
	listed  bool // Synced was emitted
	records discovery.Parser
	foreign foreignKeys
}

// begin finds the bucket and opens the feed.
func (r *Registry) begin(ctx context.Context) (*watch, error) {
	w := &watch{ended: make(chan struct{}), foreign: newForeignKeys()}
	started := time.Now()
	err := r.do(ctx, r.watching(), nil, feedNeeds(), func(ctx context.Context, s *session) (err error) {
		w.session, w.overrides = s, newOverridesWatcher(s)
		w.feed, w.info, err = s.openWhole(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	w.began = time.Since(started)
	return w, nil
}

// openWhole opens a feed that lists what the bucket holds. A consumer may come to
// stand on a member of a cluster that has not heard of every key yet, and would
// list too few; then another one is tried, for a second at most. It returns the
// bucket as it was before.
func (s *session) openWhole(ctx context.Context) (*feed, *jetstream.StreamInfo, error) {
	for began := time.Now(); ; {
		// Each time anew: what was missed may have expired meanwhile.
		info, err := s.ensure(ctx)
		if err != nil {
			return nil, nil, err
		}
		f, err := s.openFeed(ctx, info, jetstream.DeliverLastPerSubjectPolicy, "")
		if err != nil || f.listed >= info.State.NumSubjects || time.Since(began) > wholeWait {
			return f, info, err
		}
		f.close(ctx)
		select {
		case <-time.After(interestWait):
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
	}
}

// run reads the feed until it breaks.
func (w *watch) run(parent context.Context, emit func(discovery.Event)) error {
	ctx, release := w.session.guard(parent, append(feedNeeds(), "STREAM.INFO."))
	defer release()
	w.emit = emit
	var beside sync.WaitGroup
	beside.Go(func() { w.audit(ctx) })
	beside.Go(func() { w.overrides.follow(ctx) })
	defer func() {
		close(w.ended)
		w.fail(nil)
		beside.Go(func() { w.feed.close(parent) }) // while the overrides' is closed
		beside.Wait()
	}()

	if err := w.awaitOverrides(ctx); err != nil {
		return err
	}
	w.emitOverrides()
	if w.feed.listed == 0 {
		w.finishListing()
	}
	w.feed.wake = w.overrides.changed
	for {
		m, err := w.feed.next(ctx)
		switch {
		case errors.Is(err, errWoken):
			w.emitOverrides()
			continue
		case errors.Is(err, errSilent):
			return w.silent(ctx)
		case err != nil:
			return err
		case m != nil:
			w.emitRecord(m)
		}
		if w.listed {
			continue
		}
		done, err := w.feed.complete(ctx, m)
		if err != nil {
			return w.session.explain(parent, ctx, err)
		}
		if done {
			w.finishListing()
		}
	}
}

// awaitOverrides waits until it is known what operators have decided, and not for
// long: no node is to be listed before. The records are on their way meanwhile.
func (w *watch) awaitOverrides(ctx context.Context) error {
	if err := w.feed.ask(); err != nil {
		return err
	}
	select {
	case <-w.overrides.ready:
	case <-time.After(min(max(overridesWait, 4*w.began), overridesWaitMax)):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// emitOverrides emits what operators have decided, if it is something new.
func (w *watch) emitOverrides() {
	if all := w.overrides.pending(); all != nil {
		w.progress.emitting(true)
		w.emit(discovery.Event{Type: discovery.Overridden, Overrides: all})
		w.progress.emitting(false)
	}
}

// finishListing emits that everything which was in the bucket at first has been.
func (w *watch) finishListing() {
	w.listed = true
	listing := discovery.Listing{
		Epoch:    w.info.Created.UTC().Format(time.RFC3339Nano),
		Revision: w.info.State.LastSeq,
		Expiry:   w.info.Config.MaxAge,
		Advice:   w.session.config.advice(&w.info.Config),
	}
	w.emit(discovery.Event{Type: discovery.Synced, Revision: listing.Revision, Listing: listing})
	w.progress.sync(listing.Revision)
}

// emitRecord emits what a message says.
func (w *watch) emitRecord(m *message) {
	w.progress.emitting(true)
	event := w.session.config.event(m, &w.records)
	w.foreign.resolve(&event, w.session.config.idOf(event.Key))
	if event.Type == discovery.Put {
		if !w.listed && !w.info.TimeStamp.IsZero() {
			event.Age = max(w.info.TimeStamp.Sub(m.time), 0)
		}
		if ahead := w.ahead.Load(); w.listed && ahead != nil {
			event.Delay = max(time.Since(m.time.Add(-*ahead)), 1)
		}
	}
	w.emit(event)
	w.progress.advance(m)
}

// silent finds out whether it is the connection that says nothing more.
func (w *watch) silent(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	if err := w.session.link.Probe(ctx); err != nil {
		return err
	}
	return errSilent
}
