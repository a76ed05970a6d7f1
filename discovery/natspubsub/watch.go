package natspubsub

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

const (
	// stall is how long no further answer may come before the answers to a query
	// count as complete: 200 nodes take 5 to 17 ms.
	stall = 100 * time.Millisecond
	// maxAside is how many nodes may be heard of whose endpoint nobody has told.
	maxAside = 10_000
	// settle is how long what has arrived may take to be emitted.
	settle = time.Second
)

// statusNoResponders is what the server itself answers to a request that nobody
// subscribes to.
const statusNoResponders = "503"

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
// from before it started. Its load is also kept
// aside until a join or a record names the endpoint, and then follows as a Beat,
// if it is not older than the record's lease.
//
// A node that says goodbye is Left, unless the goodbye names another instance
// than the record that was seen last: somebody else has taken the id, as when a
// container is replaced. For the same reason a heartbeat or an answer that says that
// the node drains counts only for the instance that was seen last. Messages that were dropped because emit
// blocked for too long break the watch.
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
	return fmt.Errorf("watching %q: %w", r.config.SubjectPrefix, err)
}

// A watch is one call of Watch that has begun.
type watch struct {
	session *session
	// arrivals are what all subscriptions bring, in the order in which the server
	// sent it: a goodbye must not overtake the answer before it.
	arrivals *queue
	// Three subscriptions and not one to <prefix>.*, which takes fewer rights,
	// and leaves query to those who answer: the server can then tell that there
	// are none.
	joins, heartbeats, leaves, answers *nats.Subscription

	asked time.Time
	ended chan struct{} // closed when Watch is about to return

	mu    sync.Mutex // guards marks
	marks map[*nats.Msg]chan struct{}
}

// begin subscribes and asks.
func (r *Registry) begin(ctx context.Context) (*watch, error) {
	w := &watch{arrivals: newQueue(), ended: make(chan struct{}), marks: make(map[*nats.Msg]chan struct{})}
	go w.arrivals.run() // until w.close
	what := fmt.Sprintf("watching %q", r.config.SubjectPrefix)
	err := r.do(ctx, what, func(ctx context.Context, s *session) error {
		w.session = s
		inbox := s.link.NewInbox()
		return s.ask(ctx, r.watching(inbox), func(context.Context) error {
			for _, subscribe := range []struct {
				subject string
				to      **nats.Subscription
			}{
				{r.config.join(), &w.joins},
				{r.config.heartbeat(), &w.heartbeats},
				{r.config.leave(), &w.leaves},
				{inbox, &w.answers},
			} {
				subscription, err := s.link.ChanSubscribe(subscribe.subject, w.arrivals.in)
				if err != nil {
					return err
				}
				*subscribe.to = subscription
			}
			w.asked = time.Now()
			return s.link.PublishRequest(r.config.query(), inbox, nil)
		})
	})
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// watching is what the guard of a watch is concerned with.
func (r *Registry) watching(inbox string) func(natslink.Operation, string) bool {
	return func(operation natslink.Operation, subject string) bool {
		switch subject {
		case r.config.join(), r.config.heartbeat(), r.config.leave(), inbox:
			return operation == natslink.Subscribe
		case r.config.query():
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

// run emits what comes until the watch breaks.
func (r *Registry) run(parent context.Context, w *watch, emit func(discovery.Event)) error {
	ctx, release := w.session.link.GuardOperation(parent, r.watching(w.answers.Subject))
	defer release()
	defer func() {
		r.mu.Lock()
		if r.watch == w {
			r.watch = nil
		}
		r.mu.Unlock()
		w.close()
	}()

	var (
		t        = newTranslator(emit)
		records  discovery.Parser
		synced   bool
		patience time.Duration // how long the next answer may take; 0 until the first
		deadline = w.asked.Add(r.config.Listen)
		pause    = time.NewTimer(r.config.Listen)
	)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-pause.C:
			if !w.arrivals.idle() && time.Now().Before(deadline) {
				// It is we who are slow.
				pause.Reset(min(stall, time.Until(deadline)))
				continue
			}
			if err := w.dropped(); err != nil {
				return err
			}
			synced = true
			// Before Synced is emitted: whoever hears that may verify.
			r.mu.Lock()
			r.watch = w
			r.mu.Unlock()
			emit(discovery.Event{Type: discovery.Synced, Listing: discovery.Listing{Partial: true}})
		case <-w.arrivals.overflow:
			return w.dropped()
		case a := <-w.arrivals.out:
			switch {
			case a.mark != nil:
				w.reach(a.mark)
			case a.tooLarge > 0:
				t.tooLarge(a.tooLarge)
			case a.subscription == w.leaves:
				t.leave(a.data)
			case a.subscription == w.heartbeats:
				t.beat(parseHeartbeat(a.data, &records))
			case a.subscription == w.joins:
				t.take(parseRecord(a.data, &records))
			case a.noResponders:
				if !synced {
					pause.Reset(0)
				}
			default:
				if len(a.data) > 0 {
					t.beat(parseRecord(a.data, &records))
				}
				if !synced {
					if patience == 0 {
						// Who is far away answers late.
						patience = max(stall, 2*time.Since(w.asked))
					}
					pause.Reset(min(patience, time.Until(deadline)))
				}
			}
		}
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

// A translator emits what messages mean. It is used by one goroutine.
type translator struct {
	emit func(discovery.Event)
	// instances are those of the records that were seen last, by id.
	instances *memory[string]
	// aside are heartbeats of nodes that no record has named yet, by id.
	aside *memory[heartbeat]
}

type heartbeat struct {
	load  float64
	heard time.Time
}

func newTranslator(emit func(discovery.Event)) *translator {
	return &translator{
		emit:      emit,
		instances: newMemory[string](discovery.MaxNodes),
		aside:     newMemory[heartbeat](maxAside),
	}
}

// beat emits what a heartbeat or an answer says. What leaves must not cover the
// record of the one that has come in its place.
func (t *translator) beat(e discovery.Event) {
	if e.Type == discovery.Put && e.Node.State() == discovery.StateDraining && t.replaced(e.ID, e.Node.Instance()) {
		return
	}
	t.take(e)
}

// replaced reports whether an instance of a node, if it says which it is, is another
// one than that whose record was seen last.
func (t *translator) replaced(id, instance string) bool {
	last, known := t.instances.recall(id)
	return known && instance != "" && instance != last
}

// take emits what a record or a heartbeat says.
func (t *translator) take(e discovery.Event) {
	t.emit(e)
	switch e.Type {
	case discovery.Put:
		t.instances.note(e.ID, e.Node.Instance())
		if h, found := t.aside.recall(e.ID); found {
			t.aside.forget(e.ID)
			if time.Since(h.heard) < e.Node.LeaseOr(discovery.DefaultTTL) {
				t.emit(discovery.Event{Type: discovery.Beat, ID: e.ID, Load: h.load})
			}
		}
	case discovery.Beat:
		if _, known := t.instances.recall(e.ID); !known {
			t.aside.note(e.ID, heartbeat{e.Load, time.Now()})
		}
	case discovery.Rejected:
		// Whoever says goodbye next: it is not the one whose record stood there.
		t.instances.forget(e.ID)
	}
}

// tooLarge emits that there was a message which nobody reads.
func (t *translator) tooLarge(size int) {
	t.take(discovery.Event{Type: discovery.Rejected, Err: discovery.Invalidf(discovery.FaultRecord, "record: %d bytes, want at most %d",
		size, discovery.MaxRecord)})
}

// leave emits what a goodbye says.
func (t *translator) leave(data []byte) {
	f, err := parseFarewell(data)
	if err != nil {
		// Without an id: a goodbye that cannot be read is nobody's.
		t.emit(discovery.Event{Type: discovery.Rejected, Err: err})
		return
	}
	if t.replaced(f.NodeID, f.Instance) {
		return
	}
	t.instances.forget(f.NodeID)
	t.aside.forget(f.NodeID)
	// A directory may know the node from an earlier watch.
	t.emit(discovery.Event{Type: discovery.Left, ID: f.NodeID, Instance: f.Instance})
}

// Verify makes a round trip to the server, which sends what it has for us before
// it answers, and waits up to a second until the watch has emitted that. It fails
// with [discovery.ErrBroken] if there is no watch, its listing is not over, or it
// lags, and otherwise as every call does.
//
// In a cluster of servers it proves the connection to one of them.
func (r *Registry) Verify(ctx context.Context) error {
	r.mu.Lock()
	w := r.watch
	r.mu.Unlock()
	what := fmt.Sprintf("verifying the watch of %q", r.config.SubjectPrefix)
	if w == nil {
		return fmt.Errorf("%s: %w: there is none", what, discovery.ErrBroken)
	}
	bounded, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	nothing := func(natslink.Operation, string) bool { return false }
	if err := w.session.ask(bounded, nothing, func(context.Context) error { return nil }); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err := w.emitted(bounded); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// emitted waits until everything that has arrived is emitted: it puts a mark
// behind that.
func (w *watch) emitted(ctx context.Context) error {
	patience, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	mark, reached := new(nats.Msg), make(chan struct{})
	w.mu.Lock()
	w.marks[mark] = reached
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.marks, mark)
	}()
	waiting := w.arrivals.in
	for {
		select {
		case waiting <- mark:
			waiting = nil
		case <-reached:
			return w.dropped()
		case <-w.ended:
			return fmt.Errorf("%w: the watch has ended", discovery.ErrBroken)
		case <-patience.Done():
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("%w: the watch has not got to what was written", discovery.ErrBroken)
		}
	}
}

// reach tells who put the mark that everything before it is emitted.
func (w *watch) reach(mark *nats.Msg) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if reached := w.marks[mark]; reached != nil {
		close(reached)
		delete(w.marks, mark)
	}
}
