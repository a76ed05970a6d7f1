package natspubsub

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

// lagLimit is how long what has arrived may take to be emitted.
const lagLimit = time.Second

// Watch subscribes to what nodes say, asks all of them for their records, and
// emits what comes, until ctx ends or anything at all goes wrong. Then it returns
// an error that wraps [discovery.ErrBroken], or, if it could not begin, one that
// says why. The next Watch asks again.
//
// The listing is over, and Synced emitted,
//
//   - once answers have come and no further one for 100 ms, or for twice as long
//     as the first one took;
//   - or at once when the server says that nobody is there to answer;
//   - or when [Config].Listen has passed, in which every node has told that it
//     lives.
//
// Its [discovery.Listing] is always Partial: writers that do not answer are not
// in it, and their heartbeats do not tell where they serve. Waiting longer for
// them would be of no use: what names their endpoint is their next join, which
// comes whenever they start again, and is emitted whenever it comes. Where
// nobody answers the listing is empty, therefore, and says so right away.
//
// A heartbeat without a record is a Beat, whether or not the node is known here:
// a Directory may know it from before the connection broke, or the node lapsed, or
// from before it started. Its load is also kept until a join or a record names the
// endpoint, and then follows as a Beat, if it is not older than the record's lease.
//
// A node that says that it leaves is Left, unless the message names another instance
// than the record that was seen last: somebody else has taken the id, as when a
// container is replaced. For the same reason a heartbeat or an answer that says that
// the node drains counts only for the instance that was seen last. Messages that were
// dropped because emit blocked for too long break the watch.
func (r *Registry) Watch(ctx context.Context, emit func(discovery.Event)) error {
	w, err := r.begin(ctx)
	if err != nil {
		return cmp.Or(ctx.Err(), err)
	}
	defer w.close()
	defer r.watch.CompareAndSwap(w, nil)
	// Whoever hears that it is synced may verify it.
	return natslink.Broken(ctx, r.watching(), w.run(ctx, emit, func() { r.watch.Store(w) }))
}

// watching names what is watched, for errors.
func (r *Registry) watching() string { return fmt.Sprintf("watching %q", r.config.SubjectPrefix) }

// A watch is one call of Watch that has begun.
type watch struct {
	config *Config
	link   *natslink.Link
	// arrivals are what all subscriptions bring, in the order in which the server
	// sent it: a leave message must not overtake the answer before it.
	arrivals *queue
	// Three subscriptions and not one to <prefix>.*, which takes fewer rights,
	// and leaves query to those who answer: the server can then tell that there
	// are none.
	joins, heartbeats, leaves, answers *nats.Subscription

	asked time.Time
	ended chan struct{} // closed when Watch is about to return
}

// begin subscribes and asks.
func (r *Registry) begin(ctx context.Context) (*watch, error) {
	w := &watch{config: &r.config, arrivals: newQueue(), ended: make(chan struct{})}
	go w.arrivals.run() // until w.close
	err := r.do(ctx, r.watching(), func(ctx context.Context, link *natslink.Link) error {
		w.link = link
		inbox := link.NewInbox()
		return confirmed(ctx, link, r.config.watches(inbox), func(context.Context) error {
			for _, subscribe := range []struct {
				subject string
				to      **nats.Subscription
			}{
				{r.config.join(), &w.joins},
				{r.config.heartbeat(), &w.heartbeats},
				{r.config.leave(), &w.leaves},
				{inbox, &w.answers},
			} {
				subscription, err := link.ChanSubscribe(subscribe.subject, w.arrivals.in)
				if err != nil {
					return err
				}
				*subscribe.to = subscription
			}
			w.asked = time.Now()
			return link.PublishRequest(r.config.query(), inbox, nil)
		})
	})
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// watches is what concerns whoever watches, and is answered in an inbox.
func (c *Config) watches(inbox string) func(natslink.Operation, string) bool {
	return func(operation natslink.Operation, subject string) bool {
		switch subject {
		case c.join(), c.heartbeat(), c.leave(), inbox:
			return operation == natslink.Subscribe
		case c.query():
			return operation == natslink.Publish
		default:
			return false
		}
	}
}

func (w *watch) subscriptions() []*nats.Subscription {
	return []*nats.Subscription{w.joins, w.heartbeats, w.leaves, w.answers}
}

func (w *watch) close() {
	close(w.ended)
	for _, s := range w.subscriptions() {
		if s != nil {
			_ = s.Unsubscribe() // it may have gone with its connection
		}
	}
	w.arrivals.close()
}

// run emits what comes until the watch breaks. It calls synced before it emits that the
// listing is over.
func (w *watch) run(ctx context.Context, emit func(discovery.Event), synced func()) error {
	ctx, release := w.link.Guard(ctx, w.config.watches(w.answers.Subject))
	defer release()
	t, l := newTranslator(emit), newListing(w.asked, w.config.Listen)
	defer l.timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-l.timer.C:
			if !w.arrivals.idle() && time.Now().Before(l.deadline) {
				l.wait(stall) // it is we who are slow
				continue
			}
			if err := w.dropped(); err != nil {
				return err
			}
			l.over = true
			synced()
			emit(discovery.Event{Type: discovery.Synced, Listing: discovery.Listing{Partial: true}})
		case <-w.arrivals.overflow:
			return w.dropped()
		case a := <-w.arrivals.out:
			w.dispatch(a, t, l)
		}
	}
}

// dispatch emits what has arrived, by where it came.
func (w *watch) dispatch(a arrival, t *translator, l *listing) {
	switch {
	case a.mark != nil:
		close(a.mark)
	case a.tooLarge > 0:
		t.tooLarge(a.tooLarge)
	case a.subscription == w.leaves:
		t.leave(a.data)
	case a.subscription == w.heartbeats:
		t.heartbeat(a.data)
	case a.subscription == w.joins:
		t.join(a.data)
	case a.noResponders:
		l.wait(0)
	default:
		if len(a.data) > 0 {
			t.answer(a.data)
		}
		l.answered()
	}
}

// dropped reports whether a message was lost because too many were waiting.
func (w *watch) dropped() error {
	if n := w.arrivals.dropped.Load(); n > 0 {
		return fmt.Errorf("%w: %d messages were dropped, the last on %q, because too many were waiting (at most %d, of %d MiB)",
			discovery.ErrBroken, n, w.arrivals.lastDropped.Load().Subject, maxPending, maxPendingBytes>>20)
	}
	for _, s := range w.subscriptions() {
		// An error says that the subscription is closed, and so is the link.
		if n, err := s.Dropped(); err == nil && n > 0 {
			return fmt.Errorf("%w: %d messages on %q were dropped, because %d were waiting",
				discovery.ErrBroken, n, s.Subject, maxPending)
		}
	}
	return nil
}

// Verify makes a round trip to the server, which sends what it has for us before
// it answers, and waits up to a second until the watch has emitted that. It fails
// with [discovery.ErrBroken] if there is no watch, its listing is not over, or it
// lags. Of several watches it asks the one whose listing was over last.
//
// In a cluster of servers it proves the connection to one of them.
func (r *Registry) Verify(ctx context.Context) error {
	what := fmt.Sprintf("verifying the watch of %q", r.config.SubjectPrefix)
	w := r.watch.Load()
	if w == nil {
		return fmt.Errorf("%s: %w: there is none", what, discovery.ErrBroken)
	}
	bounded, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	nothing := func(natslink.Operation, string) bool { return false }
	err := confirmed(bounded, w.link, nothing, func(context.Context) error { return nil })
	if err == nil {
		err = w.emitted(bounded)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// emitted waits until everything that has arrived is emitted: it puts a mark
// behind that.
func (w *watch) emitted(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, lagLimit)
	defer cancel()
	mark, marks := make(chan struct{}), w.arrivals.marks
	for {
		select {
		case marks <- mark:
			marks = nil
		case <-mark:
			return w.dropped()
		case <-w.ended:
			return fmt.Errorf("%w: the watch has ended", discovery.ErrBroken)
		case <-bounded.Done():
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("%w: the watch has not got to what was written", discovery.ErrBroken)
		}
	}
}
