package redis

import (
	"context"
	"fmt"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// What notifications ask for may use this part of the time at most: after a
	// look that took d, the next waits 9 d.
	restFactor = 9
	// A look that takes longer than this, or than four times the first one up to
	// the most, shows that the server was away meanwhile: heartbeats waited, and
	// keys ran out that nobody could renew.
	slowLook    = 500 * time.Millisecond
	slowestLook = 2 * time.Second
)

// A watch is one call of Watch: a loop on the goroutine of the caller, which alone
// emits and changes what is known, and goroutines around it that read from the server.
//
//	Registry ── watch ─┬─ view: a setView or a keysView ─┬─ feed ── client
//	                   └─ overridesView ─────────────────┘
//
// A change becomes an event in these steps:
//
//  1. The server tells of it (by a subscription or the stream of changes), or a poll,
//     a scan or a verification is due: the feed brings that to the loop.
//  2. The view says what is worth looking at; requests add up while a look is under way
//     and while the server has a rest.
//  3. The view prepares a look, a goroutine reads what it needs.
//  4. The loop applies what was read: the view compares it with what it knows, and emits
//     the difference. An entry of the stream holds the record and is applied at once.
type watch struct {
	feed
	view      view
	overrides *overridesView
	slowest   time.Duration // a question that takes longer shows that the server was away

	verifications chan *verification
	finished      chan finishedLook
	ended         chan struct{}

	// Of the loop.
	pending   request     // what the next look is for
	urgent    bool        // it does not wait for restUntil
	restUntil time.Time   // until then the server is left in peace
	looking   bool        // a look is under way
	looks     uint64      // how many were started
	told      func() bool // of the look that was applied last
	later     request     // what to look at later
	laterAt   time.Time   // when that is due; zero: there is nothing
	waiting   []*verification
}

// A finishedLook is what became of a look.
type finishedLook struct {
	lookResult
	costly bool // more than what was known to have changed
	took   time.Duration
	err    error
}

// A verification waits for a look that began after it.
type verification struct {
	look uint64 // the number of that look; 0 until it is known
	done chan struct{}
}

func newWatch(c *client, emit func(discovery.Event)) *watch {
	return &watch{
		feed: feed{
			client: c, emit: emit,
			found:    make(chan func() (request, error)),
			messages: make(chan *goredis.Message, 256),
			failed:   make(chan error, 8),
		},
		verifications: make(chan *verification),
		finished:      make(chan finishedLook, 1),
		ended:         make(chan struct{}),
	}
}

// list emits the overrides and everything that is listed.
func (w *watch) list(ctx context.Context, o *overrides) (discovery.Listing, error) {
	if err := w.view.follow(ctx); err != nil {
		return discovery.Listing{}, err
	}
	var err error
	if w.overrides, err = o.list(ctx, &w.feed); err != nil {
		return discovery.Listing{}, err
	}
	// What changes before the listing is read is not told of after it.
	w.pending.overrides = true
	listing, took, err := w.view.list(ctx)
	w.slowest = max(slowLook, min(4*took, slowestLook))
	return listing, err
}

// run follows changes until the watch breaks.
func (w *watch) run(ctx context.Context) error {
	poll := time.NewTicker(w.client.config.Poll)
	defer poll.Stop()
	wake := time.NewTimer(time.Hour) // a look is due
	defer wake.Stop()
	for {
		if due := w.start(ctx); !due.IsZero() {
			wake.Reset(time.Until(due))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-w.client.closing:
			return errClosed
		case err := <-w.failed:
			return broken(err)
		case <-wake.C:
		case <-poll.C:
			w.pending.add(request{some: true, overrides: true})
			w.urgent = true
		case q := <-w.verifications:
			// A look that is under way may have read before.
			q.look = w.looks + 1
			w.waiting = append(w.waiting, q)
			w.pending.add(request{whole: true})
			w.urgent = true
		case l := <-w.finished:
			if err := w.apply(l); err != nil {
				return broken(err)
			}
		case apply := <-w.found:
			q, err := apply()
			if err != nil {
				return broken(err)
			}
			w.pending.add(q)
			w.verified()
		case m := <-w.messages:
			w.pending.add(w.view.notified(m))
			for range len(w.messages) {
				w.pending.add(w.view.notified(<-w.messages))
			}
		}
	}
}

// start starts to read what is due, and returns when something more will be, the zero
// time if nothing is known to be.
func (w *watch) start(ctx context.Context) (due time.Time) {
	if w.pending.overrides && w.overrides.look(ctx) {
		w.pending.overrides = false
	}
	now := time.Now()
	if !w.laterAt.IsZero() && !now.Before(w.laterAt) {
		w.pending.add(w.later)
		w.later, w.laterAt = request{}, time.Time{}
	}
	due = w.laterAt
	switch {
	case w.looking || w.pending.none():
	case w.urgent || !now.Before(w.restUntil):
		q := w.pending
		w.pending, w.urgent = request{overrides: q.overrides}, false
		w.look(ctx, q)
	case w.pending.soon:
		// A look at everything that is pending as well goes on waiting.
		q := request{some: true, gaps: w.pending.gaps}
		w.pending.some, w.pending.gaps, w.pending.soon = false, false, false
		w.look(ctx, q)
	case due.IsZero() || w.restUntil.Before(due):
		due = w.restUntil
	}
	return due
}

// look starts a look for what the request asks for.
func (w *watch) look(ctx context.Context, q request) {
	w.looking = true
	w.looks++
	read := w.view.look(q)
	w.group.Go(func() {
		began := time.Now()
		s, err := read(ctx)
		w.finished <- finishedLook{s, q.whole || q.some, time.Since(began), err}
	})
}

// apply lets the view apply what a look has read. A look that failed, or for which a
// question took too long, breaks the watch.
func (w *watch) apply(l finishedLook) error {
	w.looking = false
	if now := time.Now(); l.costly {
		// One that did not wait for the rest to end adds to it.
		rest := max(w.restUntil.Sub(now), 0) + restFactor*l.took
		w.restUntil = now.Add(min(rest, w.client.config.Poll))
	}
	if l.err != nil {
		return l.err
	}
	if l.slowest > w.slowest {
		return fmt.Errorf("%w: the server took %v to answer", discovery.ErrBroken, l.slowest.Round(time.Millisecond))
	}
	q, err := l.lookResult.apply()
	if err != nil {
		return err
	}
	if !q.none() {
		w.later.add(q)
		if at := time.Now().Add(q.after); w.laterAt.IsZero() || at.Before(w.laterAt) {
			w.laterAt = at
		}
	}
	w.told = l.told
	w.verified()
	return nil
}

// verified answers the verifications whose look was applied, once the stream has told
// all that it found.
func (w *watch) verified() {
	if w.told != nil && !w.told() {
		return
	}
	kept := w.waiting[:0]
	for _, q := range w.waiting {
		if q.look < w.looks || q.look == w.looks && !w.looking {
			close(q.done)
		} else {
			kept = append(kept, q)
		}
	}
	w.waiting = kept
}

// verify waits until a look that begins now was applied. It may be called concurrently
// with the loop.
func (w *watch) verify(ctx context.Context) error {
	q := &verification{done: make(chan struct{})}
	for asked := w.verifications; ; asked = nil {
		select {
		case asked <- q:
		case <-q.done:
			return nil
		case <-w.ended:
			return fmt.Errorf("%w: the watch ended", discovery.ErrBroken)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
