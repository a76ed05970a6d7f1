package redis

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	goredis "github.com/redis/go-redis/v9"
)

const (
	// A record must be absent from two looks at least this far apart before its
	// node counts as gone: the fleets in the wild replace a member of the set by
	// removing it and then adding a new one, in two steps. A key is replaced in
	// one, if the writer does not delete it first for no reason.
	absence    = 500 * time.Millisecond
	keyAbsence = 100 * time.Millisecond
	// What notifications ask for may use this part of the time at most: after a
	// look that took d, the next waits 9 d.
	rest = 9
	// A look that takes longer than this, or than four times the first one up to
	// the most, shows that the server was away meanwhile: heartbeats waited, and
	// keys ran out that nobody could renew.
	slowLook    = 500 * time.Millisecond
	slowestLook = 2 * time.Second
	// How many bytes of keys a look is asked for by name, which anybody may say who
	// can publish or write. A directory full of usual ones is half of it.
	maxWanted = 32 << 20
	keyRoom   = 64 // beside the key itself
	// How many entries one XREAD asks for: each may hold a record.
	streamCount = 250
	// How long one XREAD waits for changes.
	block = time.Second
	// How long a subscription may say nothing before it is asked, and then to
	// answer. A connection cut by a packet filter said nothing for 90 s.
	silence = 2 * time.Second
)

// A watch is one call of Watch. Its loop, on the goroutine of the caller, is the
// only one that emits and that touches the view; the goroutines around it only
// read from the server.
type watch struct {
	r     *Registry
	emit  func(discovery.Event)
	first time.Duration // what the slowest question of the listing took

	verifications chan *verification
	looked        chan lookResult
	entries       chan []goredis.XMessage // of the stream
	messages      chan *goredis.Message   // of subscriptions
	asks          chan func() request     // what goroutines find worth looking at; called by the loop
	failed        chan error              // a goroutine gave up
	overridden    bool                    // the stream says that the overrides changed
	told          bool                    // a subscription will say so
	ended         chan struct{}
	group         sync.WaitGroup
	closers       []func()
}

// A view is what a watch knows of the registry: enough to tell what changed.
type view interface {
	// follow subscribes to what the server offers to tell of changes.
	follow(ctx context.Context) error
	// list reads everything and emits it, and returns what Synced will say.
	// From there on changes are told.
	list(ctx context.Context) (discovery.Listing, error)
	// push names what tells of changes.
	push() string
	// look prepares to read what the request asks for. What it returns reads,
	// and runs beside the loop.
	look(q request) func(ctx context.Context) (any, error)
	// apply emits what a look found, and may ask for another after a while.
	apply(result any) (next request, after time.Duration, err error)
	// stream emits what entries of the stream say.
	stream(entries []goredis.XMessage) error
	// notified says what a notification makes worth looking at.
	notified(m *goredis.Message) request
	// current reports whether everything up to the last look was emitted.
	current() bool
}

// A request says what to look at. The zero value asks for nothing.
type request struct {
	whole bool            // everything
	some  bool            // what the view thinks is likely to have changed
	keys  map[string]bool // these
	size  int             // of them, in bytes
}

// requestFor returns a request for these keys.
func requestFor(keys ...string) (q request) {
	for _, key := range keys {
		q.want(key)
	}
	return q
}

// want adds a key. One for which there is no room counts as likely to have changed.
func (q *request) want(key string) {
	if q.keys[key] {
		return
	}
	if q.size += len(key) + keyRoom; q.size > maxWanted {
		q.some, q.size = true, q.size-len(key)-keyRoom
		return
	}
	if q.keys == nil {
		q.keys = make(map[string]bool)
	}
	q.keys[key] = true
}

func (q request) none() bool { return !q.whole && !q.some && len(q.keys) == 0 }

func (q *request) add(o request) {
	q.whole = q.whole || o.whole
	q.some = q.some || o.some
	for key := range o.keys {
		q.want(key)
	}
}

type lookResult struct {
	result any
	costly bool // more than what was known to have changed
	took   time.Duration
	step   time.Duration // what the slowest question to the server took
	err    error
}

type verification struct {
	look uint64 // the look that must be applied; 0 until it is known
	done chan error
}

// Watch emits every listed node, then Synced, then changes, as
// [discovery.Watcher] says. Its error wraps [discovery.ErrBroken] where the
// stream broke after the listing, else one of those of Announce.
func (r *Registry) Watch(ctx context.Context, emit func(discovery.Event)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	w := &watch{
		r: r, emit: emit,
		verifications: make(chan *verification),
		looked:        make(chan lookResult, 1),
		entries:       make(chan []goredis.XMessage),
		messages:      make(chan *goredis.Message, 256),
		asks:          make(chan func() request),
		failed:        make(chan error, 8),
		ended:         make(chan struct{}),
	}
	defer func() {
		r.watching.CompareAndSwap(w, nil)
		close(w.ended)
		cancel()
		for _, c := range w.closers {
			c()
		}
		w.group.Wait()
	}()
	err := w.run(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if cluster, ok := r.commands.(*goredis.ClusterClient); ok {
		// The next watch must not ask the servers of yesterday.
		cluster.ReloadState(ctx)
	}
	return fmt.Errorf("watching %s: %w", r, err)
}

func (w *watch) run(ctx context.Context) error {
	r := w.r
	v, err := r.layout.watch(ctx, w)
	if err != nil {
		return err
	}
	if err := v.follow(ctx); err != nil {
		return err
	}
	o := &overrides{w: w, found: make(chan overridesRead, 1)}
	if err := o.list(ctx); err != nil {
		return err
	}
	listing, err := v.list(ctx)
	if err != nil {
		return err
	}
	push := v.push()
	r.push.Store(&push)
	r.watching.Store(w)
	if r.config.Mode != ModeSingle {
		w.group.Go(func() { w.locate(ctx) })
	}
	w.emit(discovery.Event{Type: discovery.Synced, Listing: listing})

	var (
		pending request   // what the next look is for
		looking bool      // one is under way
		looks   uint64    // how many were started
		after   time.Time // no look before this, unless it is urgent
		urgent  bool      //
		waiting []*verification
		poll    = time.NewTimer(r.config.Poll)
		wake    = time.NewTimer(time.Hour) // a look is due, or again is
		again   request
		at      time.Time // when again is due; zero: there is none
	)
	defer poll.Stop()
	defer wake.Stop()
	verified := func() {
		if !v.current() {
			return
		}
		kept := waiting[:0]
		for _, q := range waiting {
			if q.look < looks || q.look == looks && !looking {
				q.done <- nil
			} else {
				kept = append(kept, q)
			}
		}
		waiting = kept
	}
	for {
		now := time.Now()
		if !at.IsZero() && !now.Before(at) {
			pending.add(again)
			again, at = request{}, time.Time{}
		}
		due := !pending.none() && !looking
		if due && (urgent || !now.Before(after)) {
			q := pending
			pending, looking, urgent, due = request{}, true, false, false
			looks++
			w.look(ctx, v.look(q), q.whole || q.some)
		}
		next := at
		if due && (next.IsZero() || after.Before(next)) {
			next = after
		}
		if !next.IsZero() {
			wake.Reset(time.Until(next))
		}

		o.due = o.due || w.overridden
		w.overridden = false
		o.read(ctx)

		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-r.closing:
			return errClosed
		case err := <-w.failed:
			return broken(err)
		case read := <-o.found:
			o.apply(read)
		case <-wake.C:
		case <-poll.C:
			poll.Reset(r.config.Poll)
			pending.add(request{some: true})
			urgent = true
			o.due = true
		case q := <-w.verifications:
			// A look that is under way may have read already.
			q.look = looks + 1
			waiting = append(waiting, q)
			pending.add(request{whole: true})
			urgent = true
		case result := <-w.looked:
			looking = false
			if result.costly {
				after = time.Now().Add(min(rest*result.took, r.config.Poll))
			}
			if result.err != nil {
				return broken(result.err)
			}
			if result.step > max(slowLook, min(4*w.first, slowestLook)) {
				return fmt.Errorf("%w: the server took %v to answer", discovery.ErrBroken, result.step.Round(time.Millisecond))
			}
			q, wait, err := v.apply(result.result)
			if err != nil {
				return broken(err)
			}
			if !q.none() {
				again.add(q)
				if t := time.Now().Add(wait); at.IsZero() || t.Before(at) {
					at = t
				}
			}
			verified()
		case f := <-w.asks:
			pending.add(f())
		case entries := <-w.entries:
			if err := v.stream(entries); err != nil {
				return broken(err)
			}
			verified()
		case m := <-w.messages:
			notified := func(m *goredis.Message) {
				if o.tells(m) {
					o.due = true
				} else {
					pending.add(v.notified(m))
				}
			}
			notified(m)
			for range len(w.messages) {
				notified(<-w.messages)
			}
		}
	}
}

func (w *watch) look(ctx context.Context, read func(context.Context) (any, error), costly bool) {
	w.group.Go(func() {
		began := time.Now()
		result, err := read(ctx)
		took := time.Since(began)
		w.looked <- lookResult{result, costly, took, slowest(result, took), err}
	})
}

// list reads everything for the listing.
func (w *watch) list(ctx context.Context, v view) (any, error) {
	began := time.Now()
	result, err := v.look(request{whole: true})(ctx)
	w.first = slowest(result, time.Since(began))
	return result, err
}

// slowest returns what the slowest question to the server took: a look that asks
// many takes long although each is answered at once.
func slowest(result any, took time.Duration) time.Duration {
	if r, ok := result.(interface{ slowest() time.Duration }); ok {
		return r.slowest()
	}
	return took
}

// ask lets the loop look at something. It reports false if the watch has ended.
func (w *watch) ask(ctx context.Context, f func() request) bool {
	select {
	case w.asks <- f:
		return true
	case <-ctx.Done():
		return false
	}
}

// Verify proves that the newest watch has emitted everything that was written
// before the call, by one more look.
func (r *Registry) Verify(ctx context.Context) error {
	w := r.watching.Load()
	if w == nil {
		return fmt.Errorf("%w: nothing is being watched", discovery.ErrBroken)
	}
	ended := fmt.Errorf("%w: the watch ended", discovery.ErrBroken)
	q := &verification{done: make(chan error, 1)}
	select {
	case w.verifications <- q:
	case <-w.ended:
		return ended
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-q.done:
		return err
	case <-w.ended:
		return ended
	case <-ctx.Done():
		return ctx.Err()
	}
}

// fail ends the watch.
func (w *watch) fail(err error) {
	select {
	case w.failed <- err:
	default:
	}
}

// read starts to read the stream after an id, on a connection of its own: what
// blocks cannot be interrupted but by closing it.
func (w *watch) read(ctx context.Context, client *goredis.Client, key, id string) {
	w.group.Go(func() {
		for {
			// The library's own limit for a blocked read is ten seconds more.
			readCtx, cancel := context.WithTimeout(ctx, block+readTimeout)
			streams, err := client.XRead(readCtx, &goredis.XReadArgs{
				Streams: []string{key, id}, Count: streamCount, Block: block,
			}).Result()
			cancel()
			switch {
			case ctx.Err() != nil:
				return
			case err == goredis.Nil:
				continue
			case err != nil:
				w.fail(fmt.Errorf("reading the stream of changes: %w", explain(err)))
				return
			}
			entries := streams[0].Messages
			id = entries[len(entries)-1].ID
			select {
			case w.entries <- entries:
			case <-ctx.Done():
				return
			}
		}
	})
}

// offered tells a server that does not offer something from one that is ill: a
// watch must not do without for ever because of a moment.
func offered(err error) (bool, error) {
	if errors.Is(err, discovery.ErrPermission) || errors.Is(err, discovery.ErrUnsupported) {
		return false, nil
	}
	return err == nil, err
}

// notifies reports whether the server publishes keyspace notifications of the
// given classes. Where CONFIG is forbidden it cannot be known, so no.
func (r *Registry) notifies(ctx context.Context, client *goredis.Client, classes string) (bool, error) {
	var flags string
	err := r.do(ctx, func(ctx context.Context) error {
		answer, err := client.ConfigGet(ctx, "notify-keyspace-events").Result()
		flags = answer["notify-keyspace-events"]
		return err
	})
	if ok, err := offered(err); !ok {
		return false, err
	}
	if !strings.Contains(flags, "K") {
		return false, nil
	}
	for _, class := range classes {
		if !strings.ContainsRune(flags, class) && !strings.Contains(flags, "A") {
			return false, nil
		}
	}
	return true, nil
}

// closeWith closes what may block when the watch ends, and does not wait for
// the watch to notice: a call that is under way is what keeps it from noticing.
func (w *watch) closeWith(ctx context.Context, c io.Closer) {
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	w.closers = append(w.closers, func() {
		if stop() {
			_ = c.Close()
		}
	})
}

// A subscriber is a client that can be subscribed to nothing yet.
type subscriber interface {
	PSubscribe(ctx context.Context, channels ...string) *goredis.PubSub
}

// subscribe receives notifications until the watch ends, and returns once the
// server has confirmed that it sends them. A subscription that breaks ends the
// watch: what was published meanwhile is lost.
func (w *watch) subscribe(ctx context.Context, client subscriber, pattern bool, channels ...string) error {
	s := client.PSubscribe(ctx) // dials nothing yet
	w.closeWith(ctx, s)
	err := w.r.do(ctx, func(ctx context.Context) error {
		subscribe := s.Subscribe
		if pattern {
			subscribe = s.PSubscribe
		}
		if err := subscribe(ctx, channels...); err != nil {
			return err
		}
		for range channels {
			m, err := s.ReceiveTimeout(ctx, readTimeout)
			if _, ok := m.(*goredis.Subscription); err == nil && !ok {
				err = fmt.Errorf("it answered %T", m)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		_ = s.Close()
		return fmt.Errorf("subscribing to notifications: %w", err)
	}
	w.group.Go(func() {
		asked := false
		for {
			m, err := s.ReceiveTimeout(ctx, silence)
			if ctx.Err() != nil {
				return
			}
			switch {
			case err == nil:
				asked = false
			case !asked && isTimeout(err):
				asked = true
				err = s.Ping(ctx)
			}
			if err != nil {
				w.fail(fmt.Errorf("subscribed to notifications: %w", explain(err)))
				return
			}
			switch m := m.(type) {
			case *goredis.Message:
				select {
				case w.messages <- m:
				case <-ctx.Done():
					return
				}
			case *goredis.Subscription:
				// Only a new connection is confirmed again.
				w.fail(fmt.Errorf("%w: the subscription to notifications was interrupted", discovery.ErrBroken))
				return
			}
		}
	})
	return nil
}
