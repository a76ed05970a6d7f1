package natskv

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// patrolInterval is how often a watch is compared with its bucket, give or
	// take a fifth.
	patrolInterval = 5 * time.Second
	// settle is how long something that was written may take to come through
	// the watch before that counts as broken, and doubt how long before the
	// consumer is asked.
	settle = time.Second
	doubt  = 100 * time.Millisecond
	// probeTimeout is for a ping, once the stream has gone silent.
	probeTimeout = time.Second
)

// Watch emits every record of the bucket, oldest first, then Synced, then
// changes as the server pushes them, until ctx ends or anything at all goes
// wrong. Then it returns an error that wraps [discovery.ErrBroken], or, if it
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
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
	err = r.run(ctx, w, emit)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if !errors.Is(err, discovery.ErrBroken) {
		err = fmt.Errorf("%w: %w", discovery.ErrBroken, err)
	}
	return fmt.Errorf("watching bucket %q: %w", r.config.Bucket, err)
}

// A watch is one call of Watch that has begun.
type watch struct {
	session *session
	feed    *feed
	info    *jetstream.StreamInfo // from before the feed was opened
	began   time.Duration         // how long it took to begin
	ended   chan struct{}         // closed when Watch is about to return
	fail    context.CancelCauseFunc
	clock   atomic.Pointer[time.Duration] // how far the server's is ahead, once known

	mu     sync.Mutex // guards what follows
	synced bool
	// reached is the stream sequence up to which everything was emitted, which
	// means something once the watch is synced; number is that of the last
	// message emitted.
	reached, number uint64
	busy            bool          // something is being emitted
	moved           chan struct{} // closed at the next progress, if somebody waits
}

// begin finds the bucket and opens the feed.
func (r *Registry) begin(ctx context.Context) (*watch, error) {
	w := &watch{ended: make(chan struct{})}
	what := fmt.Sprintf("watching bucket %q", r.config.Bucket)
	started := time.Now()
	err := r.do(ctx, what, feedNeeds(), func(ctx context.Context, s *session) error {
		info, err := r.ensure(ctx, s)
		if err != nil {
			return err
		}
		w.session = s
		w.feed, w.info, err = r.openWhole(ctx, s, info)
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
func (r *Registry) openWhole(ctx context.Context, s *session, info *jetstream.StreamInfo) (*feed, *jetstream.StreamInfo, error) {
	for began := time.Now(); ; {
		f, err := s.open(ctx, info, jetstream.DeliverLastPerSubjectPolicy, "")
		if err != nil || f.listed >= info.State.NumSubjects || time.Since(began) > settle {
			return f, info, err
		}
		f.close(ctx)
		select {
		case <-time.After(interestWait):
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
		// What was missed may have expired meanwhile.
		if info, err = r.ensure(ctx, s); err != nil {
			return nil, nil, err
		}
	}
}

// run reads the feed until it breaks.
func (r *Registry) run(parent context.Context, w *watch, emit func(discovery.Event)) error {
	ctx, release := w.session.link.Guard(parent, w.session.concerns(append(feedNeeds(), "STREAM.INFO.")))
	defer release()
	ctx, w.fail = context.WithCancelCause(ctx)
	defer w.fail(nil)

	r.mu.Lock()
	r.watch = w
	r.mu.Unlock()
	var patrol sync.WaitGroup
	patrol.Go(func() { r.patrol(ctx, w) })
	overseer := newOverseer(r, w.session)
	patrol.Go(func() { overseer.follow(ctx) })
	defer func() {
		r.mu.Lock()
		if r.watch == w {
			r.watch = nil
		}
		r.mu.Unlock()
		close(w.ended)
		w.fail(nil)
		patrol.Go(func() { w.feed.close(parent) }) // while the overseer closes its own
		patrol.Wait()
	}()

	finish := func() { // the listing
		listing := discovery.Listing{
			Epoch:    w.info.Created.UTC().Format(time.RFC3339Nano),
			Revision: w.info.State.LastSeq,
			Expiry:   w.info.Config.MaxAge,
		}
		emit(discovery.Event{Type: discovery.Synced, Revision: listing.Revision, Listing: listing})
		w.sync(w.info.State.LastSeq)
	}
	tell := func() {
		if all := overseer.take(); all != nil {
			w.setBusy(true)
			emit(discovery.Event{Type: discovery.Overridden, Overrides: all})
			w.setBusy(false)
		}
	}
	// The records are on their way meanwhile, but none is emitted before it is
	// known what operators decided.
	if err := w.feed.ask(); err != nil {
		return err
	}
	select {
	case <-overseer.ready:
	case <-time.After(min(max(overridesWait, 4*w.began), overridesWaitMax)):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	tell()
	w.feed.wake = overseer.wake
	synced := w.feed.listed == 0
	if synced {
		finish()
	}
	// Others may write a key that means another id than ours would; whoever
	// removes it later does not say which.
	foreign := make(map[string]string)
	var records discovery.Parser
	for {
		m, err := w.feed.next(ctx)
		if errors.Is(err, errWoken) {
			tell()
			continue
		}
		if errors.Is(err, errSilent) {
			return w.silent(ctx)
		}
		if err != nil {
			return err
		}
		if m == nil {
			if synced {
				continue
			}
			// What was to be listed may have expired before it was sent.
			if synced, err = w.feed.exhausted(ctx, w.feed.received); err != nil {
				return r.explain(parent, ctx, w.session.link, err)
			}
			if synced {
				finish()
			}
			continue
		}
		w.setBusy(true)
		event := r.config.event(m, &records)
		switch {
		case event.Type == discovery.Put:
			if event.ID != r.config.idOf(event.Key) {
				foreign[event.Key] = event.ID
			} else {
				delete(foreign, event.Key)
			}
			if !synced && !w.info.TimeStamp.IsZero() {
				event.Age = max(w.info.TimeStamp.Sub(m.time), 0)
			}
			if ahead := w.clock.Load(); synced && ahead != nil {
				event.Delay = max(time.Since(m.time.Add(-*ahead)), 1)
			}
		case foreign[event.Key] != "":
			event.ID = foreign[event.Key]
			delete(foreign, event.Key)
		}
		emit(event)
		w.advance(m)
		if !synced && (m.number >= w.feed.listed || m.pending == 0) {
			synced = true
			finish()
		}
	}
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

func (w *watch) setBusy(on bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.busy = on
}

func (w *watch) advance(m *message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.busy = false
	w.reached = max(w.reached, m.sequence)
	w.number = m.number
	w.wake()
}

func (w *watch) sync(reached uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.synced = true
	w.reached = max(w.reached, reached)
	w.wake()
}

func (w *watch) wake() {
	if w.moved != nil {
		close(w.moved)
		w.moved = nil
	}
}

// Progress of a watch, at one moment.
type progress struct {
	synced          bool
	busy            bool
	reached, number uint64
	moved           <-chan struct{} // closed at the next progress
}

func (w *watch) progress() progress {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.moved == nil {
		w.moved = make(chan struct{})
	}
	return progress{w.synced, w.busy, w.reached, w.number, w.moved}
}

// Verify asks the bucket whether it is still the one that is watched, and waits
// up to a second until the watch has emitted what was written to it before. It
// fails with [discovery.ErrBroken] if there is no watch or it lags, and
// otherwise as every call does.
func (r *Registry) Verify(ctx context.Context) error {
	r.mu.Lock()
	w := r.watch
	r.mu.Unlock()
	what := fmt.Sprintf("verifying the watch of bucket %q", r.config.Bucket)
	if w == nil {
		return fmt.Errorf("%s: %w: there is none", what, discovery.ErrBroken)
	}
	bounded, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	guarded, release := w.session.link.Guard(bounded, w.session.concerns([]string{"STREAM.INFO.", "CONSUMER.INFO."}))
	defer release()
	if err := r.compare(guarded, w); err != nil {
		return fmt.Errorf("%s: %w", what, r.explain(ctx, guarded, w.session.link, err))
	}
	return nil
}

var (
	errLag   = fmt.Errorf("%w: the watch has not got what was written", discovery.ErrBroken)
	errEnded = fmt.Errorf("%w: the watch has ended", discovery.ErrBroken)
)

// compare returns nil if the watch has emitted everything that the bucket holds
// by now. It fails the watch if it is proven that it never will.
func (r *Registry) compare(ctx context.Context, w *watch) error {
	before := w.progress()
	asked := time.Now()
	stream, err := w.session.js.Stream(ctx, w.feed.stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		err = fmt.Errorf("%w: the bucket was deleted", discovery.ErrBroken)
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
		w.clock.Store(&ahead)
	}
	switch {
	case !info.Created.Equal(w.info.Created):
		err = fmt.Errorf("%w: the bucket was recreated", discovery.ErrBroken)
	case info.State.LastSeq < max(before.reached, w.info.State.LastSeq):
		err = fmt.Errorf("%w: the bucket went back from revision %d to %d, it lost data",
			discovery.ErrBroken, max(before.reached, w.info.State.LastSeq), info.State.LastSeq)
	}
	if err != nil {
		w.fail(err)
		return err
	}

	patience, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	for timer := time.NewTimer(doubt); ; {
		p := w.progress()
		if p.synced && p.reached >= info.State.LastSeq {
			timer.Stop()
			return nil
		}
		select {
		case <-p.moved:
		case <-w.ended:
			return errEnded
		case <-timer.C:
			// The bucket may hold what is none of the watch's, or no longer hold
			// what was written: only the consumer knows that nothing is due.
			exhausted, err := w.feed.exhausted(patience, p.number)
			if p.synced && err == nil && exhausted {
				w.sync(info.State.LastSeq)
				return nil
			}
			timer.Reset(doubt)
		case <-patience.Done():
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return errLag
		}
	}
}

// patrol compares the watch with its bucket from time to time, and fails it if
// they do not agree.
func (r *Registry) patrol(ctx context.Context, w *watch) {
	silent := false
	for {
		interval := patrolInterval + time.Duration((rand.Float64()-0.5)*0.4*float64(patrolInterval))
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return
		}
		before := w.progress()
		if !before.synced {
			continue
		}
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, patrolInterval/2)
			defer cancel()
			return r.compare(ctx, w)
		}()
		switch after := w.progress(); {
		case ctx.Err() != nil:
			return
		case err == nil:
			silent = false
		case errors.Is(err, errLag):
			if after.busy || after.number != before.number || len(w.feed.messages) > 0 {
				continue // it is we who are slow
			}
			w.fail(err)
			return
		case errors.Is(err, discovery.ErrBroken):
			w.fail(err)
			return
		case silent:
			// Heartbeats come from the server that has the consumer. If the
			// bucket itself says nothing, that one may be cut off from the rest.
			w.fail(fmt.Errorf("%w: the bucket does not answer: %w", discovery.ErrBroken, err))
			return
		default:
			silent = true
		}
	}
}
