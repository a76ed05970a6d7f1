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
	rest = 9
	// A look that takes longer than this, or than four times the first one up to
	// the most, shows that the server was away meanwhile: heartbeats waited, and
	// keys ran out that nobody could renew.
	slowLook    = 500 * time.Millisecond
	slowestLook = 2 * time.Second
)

// A watch is one call of Watch. Its loop runs on the goroutine of the caller.
type watch struct {
	feed
	view      view
	overrides *overridesView
	slowest   time.Duration // a question that takes longer shows that the server was away

	verifications chan *verification
	looked        chan looked
	ended         chan struct{}

	// Of the loop.
	pending request   // what the next look is for
	urgent  bool      // it does not wait for rested
	rested  time.Time // until then the server is left in peace
	looking bool      // a look is under way
	looks   uint64    // how many were started
	told    func() bool
	again   request   // what to look at later
	at      time.Time // when that is due; zero: there is nothing
	waiting []*verification
}

// looked is what became of a look.
type looked struct {
	sight
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
		looked:        make(chan looked, 1),
		ended:         make(chan struct{}),
	}
}

// list emits the overrides and everything that is listed.
func (w *watch) list(ctx context.Context, v view, o *overrides) (discovery.Listing, error) {
	w.view = v
	if err := v.follow(ctx); err != nil {
		return discovery.Listing{}, err
	}
	var err error
	if w.overrides, err = o.list(ctx, &w.feed); err != nil {
		return discovery.Listing{}, err
	}
	// What changes before the listing is read is not told of after it.
	w.pending.overrides = true
	listing, took, err := v.list(ctx)
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
			// A look that is under way may have read already.
			q.look = w.looks + 1
			w.waiting = append(w.waiting, q)
			w.pending.add(request{whole: true})
			w.urgent = true
		case l := <-w.looked:
			if err := w.apply(l); err != nil {
				return broken(err)
			}
		case takeIn := <-w.found:
			q, err := takeIn()
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

// start starts what is due, and returns when something will be: the zero time if
// nothing is before something else happens.
func (w *watch) start(ctx context.Context) (due time.Time) {
	if w.pending.overrides && w.overrides.look(ctx) {
		w.pending.overrides = false
	}
	now := time.Now()
	if !w.at.IsZero() && !now.Before(w.at) {
		w.pending.add(w.again)
		w.again, w.at = request{}, time.Time{}
	}
	due = w.at
	switch {
	case w.looking || w.pending.none():
	case w.urgent || !now.Before(w.rested):
		w.look(ctx)
	case due.IsZero() || w.rested.Before(due):
		due = w.rested
	}
	return due
}

// look starts a look for what is pending.
func (w *watch) look(ctx context.Context) {
	q := w.pending
	w.pending, w.urgent = request{overrides: q.overrides}, false
	w.looking = true
	w.looks++
	read := w.view.look(q)
	w.group.Go(func() {
		began := time.Now()
		s, err := read(ctx)
		w.looked <- looked{s, q.whole || q.some, time.Since(began), err}
	})
}

// apply takes in what a look has read.
func (w *watch) apply(l looked) error {
	w.looking = false
	if l.costly {
		w.rested = time.Now().Add(min(rest*l.took, w.client.config.Poll))
	}
	if l.err != nil {
		return l.err
	}
	if l.slowest > w.slowest {
		return fmt.Errorf("%w: the server took %v to answer", discovery.ErrBroken, l.slowest.Round(time.Millisecond))
	}
	q, err := l.sight.apply()
	if err != nil {
		return err
	}
	if !q.none() {
		w.again.add(q)
		if at := time.Now().Add(q.after); w.at.IsZero() || at.Before(w.at) {
			w.at = at
		}
	}
	w.told = l.told
	w.verified()
	return nil
}

// verified lets those go who wait for a look that was applied.
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

// verify waits for a look that begins now. It may be called by anybody.
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
