package natskv

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// auditInterval is how often a watch is compared with its bucket, give or
	// take a fifth.
	auditInterval = 5 * time.Second
	// lagLimit is how long something that was written may take to come through
	// the watch before that counts as broken, and askAfter how long before the
	// consumer is asked.
	lagLimit = time.Second
	askAfter = 100 * time.Millisecond
)

var (
	errLag   = fmt.Errorf("%w: the watch has not got what was written", discovery.ErrBroken)
	errEnded = fmt.Errorf("%w: the watch has ended", discovery.ErrBroken)
)

// Verify asks the bucket whether it is still the one that is watched, and waits
// up to a second until the watch has emitted what was written to it before. It
// fails with [discovery.ErrBroken] if there is no watch or it lags. Of several watches
// it asks the newest.
func (r *Registry) Verify(ctx context.Context) error {
	what := fmt.Sprintf("verifying the watch of bucket %q", r.config.Bucket)
	w := r.watch.Load()
	if w == nil {
		return fmt.Errorf("%s: %w: there is none", what, discovery.ErrBroken)
	}
	bounded, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	if err := w.session.do(ctx, bounded, []string{"CONSUMER.INFO."}, w.compare); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// audit compares the watch with its bucket from time to time, and fails it if
// they do not agree.
func (w *watch) audit(ctx context.Context) {
	unanswered := false
	for {
		interval := auditInterval + time.Duration((rand.Float64()-0.5)*0.4*float64(auditInterval))
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return
		}
		before, _ := w.progress.now()
		if !before.synced {
			continue
		}
		bounded, cancel := context.WithTimeout(ctx, auditInterval/2)
		err := w.compare(bounded)
		cancel()
		switch after, _ := w.progress.now(); {
		case ctx.Err() != nil:
			return
		case err == nil:
			unanswered = false
		case errors.Is(err, errLag) && (after.busy || after.number != before.number || len(w.feed.messages) > 0):
			// It is we who are slow.
		case errors.Is(err, discovery.ErrBroken):
			w.fail(err)
			return
		case unanswered:
			// Heartbeats come from the server that has the consumer. If the
			// bucket itself says nothing, that one may be cut off from the rest.
			w.fail(fmt.Errorf("%w: the bucket does not answer: %w", discovery.ErrBroken, err))
			return
		default:
			unanswered = true
		}
	}
}

// compare returns nil if the watch has emitted everything that the bucket holds
// by now. It fails the watch if it is proven that it never will.
func (w *watch) compare(ctx context.Context) error {
	before, _ := w.progress.now()
	asked := time.Now()
	stream, err := w.session.js.Stream(ctx, w.info.Config.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		err = fmt.Errorf("%w: the bucket was deleted", discovery.ErrBroken)
	}
	if err == nil {
		err = sameStream(w.info, stream.CachedInfo(), before.reached)
	}
	if errors.Is(err, discovery.ErrBroken) {
		w.fail(err)
	}
	if err != nil {
		return err
	}
	info := stream.CachedInfo()
	if !info.TimeStamp.IsZero() {
		// The server looked at its clock somewhere on the round trip.
		took := time.Since(asked)
		ahead := info.TimeStamp.Sub(asked.Add(took / 2))
		w.ahead.Store(&ahead)
	}
	return w.reach(ctx, info.State.LastSeq)
}

// sameStream returns nil if a stream is still the one that it was before, and holds
// all that was read of it; otherwise an error that wraps [discovery.ErrBroken].
func sameStream(before, now *jetstream.StreamInfo, reached uint64) error {
	reached = max(reached, before.State.LastSeq)
	switch {
	case !now.Created.Equal(before.Created):
		return fmt.Errorf("%w: the bucket was recreated", discovery.ErrBroken)
	case now.State.LastSeq < reached:
		return fmt.Errorf("%w: the bucket went back from revision %d to %d, it lost data",
			discovery.ErrBroken, reached, now.State.LastSeq)
	}
	return nil
}

// reach waits up to a second until the watch has emitted everything up to a revision.
func (w *watch) reach(ctx context.Context, revision uint64) error {
	bounded, cancel := context.WithTimeout(ctx, lagLimit)
	defer cancel()
	ask := time.NewTicker(askAfter)
	defer ask.Stop()
	for {
		at, moved := w.progress.now()
		if at.synced && at.reached >= revision {
			return nil
		}
		select {
		case <-moved:
		case <-w.ended:
			return errEnded
		case <-ask.C:
			// The bucket may hold what is none of the watch's, or no longer hold
			// what was written: only the consumer knows that nothing is due.
			exhausted, err := w.feed.exhausted(bounded, at.number)
			if at.synced && err == nil && exhausted {
				w.progress.sync(revision)
				return nil
			}
		case <-bounded.Done():
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return errLag
		}
	}
}
