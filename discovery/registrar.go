package discovery

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/google/uuid"
)

// Defaults of a Registrar.
const (
	DefaultHeartbeat = 10 * time.Second
	DefaultDrain     = 2 * time.Second
)

const (
	// leaveTimeout bounds what leaving takes beyond the drain, whatever the
	// registry does: at least half of it is left for the withdrawal.
	leaveTimeout = time.Second
	// callTimeout bounds one call of Ready, and one of the registry while the
	// Registrar runs: where no answer comes, nothing says that the next try would
	// not get one.
	callTimeout = 5 * time.Second
)

// RegistrarOptions are the settings of a Registrar. The zero value is ready to
// use.
type RegistrarOptions struct {
	// Heartbeat is how often the record is renewed. Default: DefaultHeartbeat.
	Heartbeat time.Duration
	// TTL is the node's lease, written into the record. Default: three
	// heartbeats.
	TTL time.Duration
	// Drain is how long the node is announced as draining before its record
	// goes, so that no proxy sends a request to a closed door. Where that is longer than
	// the lease, the record is renewed meanwhile. 0 is none. Default, for nil: DefaultDrain.
	Drain *time.Duration
	// Busy, where given, ends the drain as soon as it returns false, after DefaultDrain
	// at the earliest: before that other proxies may not have heard that the node drains.
	// Drain is how long that takes at most then. It is asked some times a second, by the
	// goroutine of Run, which waits for it: it must return at once.
	Busy func() bool
	// Load is asked for the node's load before each heartbeat, by the goroutine of Run,
	// which waits for it: it must return at once. A negative or not
	// finite value says that it is not known just now: then the last one that was
	// is announced, and before any was the load that the node carries, which is
	// also the default. Package systemload has the load of the machine.
	Load func() float64
	// Ready, where given, is asked before each heartbeat, by the goroutine of Run; while
	// it returns an error the node is not listed. Its context ends after the lease, and
	// after five seconds at most.
	Ready func(context.Context) error
	// OnHeartbeat, where given, is told how each heartbeat went, by the goroutine of
	// Run: nil, why the node is not ready, or the error of the announcer. It must not
	// block.
	OnHeartbeat func(error)
	// Logger is told at Info when the node is announced, drains and leaves; at Warn
	// why it cannot be announced, once for each reason, and that another process
	// announces it, too. There is nothing at other levels. Default: none.
	Logger *slog.Logger
}

// withDefaults returns the options as a Registrar uses them: with what is not given
// filled in.
func (o RegistrarOptions) withDefaults() RegistrarOptions {
	o.Heartbeat = cmp.Or(o.Heartbeat, DefaultHeartbeat)
	o.TTL = cmp.Or(o.TTL, 3*o.Heartbeat)
	o.Drain = cmp.Or(o.Drain, new(DefaultDrain))
	if o.OnHeartbeat == nil {
		o.OnHeartbeat = func(error) {}
	}
	o.Logger = cmp.Or(o.Logger, slog.New(slog.DiscardHandler))
	return o
}

// Validate reports, as an error that wraps [ErrInvalid], why [NewRegistrar] would not
// take the node with these options.
func (o RegistrarOptions) Validate(n Node) error {
	_, err := o.announced(n, uuid.Nil.String())
	return err
}

// announced returns the node as it is announced by an instance, or why it cannot be.
func (o RegistrarOptions) announced(n Node, instance string) (Node, error) {
	o = o.withDefaults()
	switch {
	case o.Heartbeat < 0:
		return n, fmt.Errorf("%w heartbeat %v: want more than 0s", ErrInvalid, o.Heartbeat)
	case o.TTL <= o.Heartbeat:
		return n, fmt.Errorf("%w ttl %v: want more than the heartbeat of %v, or the node lapses between two", ErrInvalid, o.TTL, o.Heartbeat)
	case o.TTL < MinLease || o.TTL > MaxLease:
		return n, fmt.Errorf("%w ttl %v: want %v to %v", ErrInvalid, o.TTL, MinLease, MaxLease)
	case *o.Drain < 0:
		return n, fmt.Errorf("%w drain %v: want 0s or more", ErrInvalid, *o.Drain)
	}
	n = n.with(KeyInstance, instance).with(KeyLease, o.TTL.String())
	// The record must have room for the last one, too.
	for _, n := range []Node{n, draining(n)} {
		if _, err := AppendRecord(nil, n, time.Time{}); err != nil {
			return n, err
		}
	}
	return n, nil
}

// with returns the node with one pair of metadata more, in a map of its own.
func (n Node) with(key, value string) Node {
	n.Metadata = maps.Clone(n.Metadata)
	if n.Metadata == nil {
		n.Metadata = make(map[string]string, 2)
	}
	n.Metadata[key] = value
	return n
}

// A Registrar keeps one node listed in a registry: it announces, renews, and
// withdraws. It never gives up. Where the announcer is a [Reader], it says once when
// another process announces the same node, and goes on.
type Registrar struct {
	announcer Announcer
	reader    Reader // nil if the announcer is none
	instance  string

	standing standing    // of Run
	others   otherWriter // of Run
	loads    loads       // of Run

	mu      sync.Mutex // guards node and options; nothing is called under it
	node    Node
	options RegistrarOptions
	updated chan struct{} // holds at most one token
}

// NewRegistrar returns a Registrar for a node, not yet announced. It completes
// the node's metadata with the lease and with a token of its own (the key
// "instance"), by which it recognises its record. The error wraps [ErrInvalid]; see
// [RegistrarOptions.Validate]. An announcer that is nil is invalid as well.
func NewRegistrar(a Announcer, n Node, o RegistrarOptions) (*Registrar, error) {
	if a == nil {
		return nil, fmt.Errorf("%w announcer: want one that is not nil", ErrInvalid)
	}
	r := &Registrar{announcer: a, instance: uuid.NewString(), updated: make(chan struct{}, 1)}
	r.reader, _ = As[Reader](a)
	if err := r.Update(n, o); err != nil {
		return nil, err
	}
	<-r.updated
	return r, nil
}

// Instance returns the token that this Registrar writes into its records.
func (r *Registrar) Instance() string { return r.instance }

// Update changes what is announced, at once if the Registrar runs. The id must
// stay the same. The error wraps [ErrInvalid], and then nothing changes. It may
// be called from any goroutine. The node's metadata stays the caller's.
func (r *Registrar) Update(n Node, o RegistrarOptions) error {
	n, err := o.announced(n, r.instance)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.node.ID != "" && n.ID != r.node.ID {
		return fmt.Errorf("%w update: the node's id is %q and cannot become %q", ErrInvalid, r.node.ID, n.ID)
	}
	r.node, r.options = n, o.withDefaults()
	select {
	case r.updated <- struct{}{}:
	default:
	}
	return nil
}

func (r *Registrar) current() (Node, RegistrarOptions) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.node, r.options
}

// Run keeps the node listed until ctx ends. Then it announces the node as
// draining, waits for the drain, removes the record if it is still its own, and
// returns nil, or why the record could not be removed. Beyond the drain this
// takes at most a second. Where another process has written the record since, as
// when a container is replaced, that record is left as it is.
//
// Run must be called once: a second call would leave the node's record to whichever ends
// last. What the announcer fails with is not returned but retried, at first soon and then
// less often; see [RegistrarOptions].OnHeartbeat and Logger.
func (r *Registrar) Run(ctx context.Context) error {
	s := &r.standing
	s.retry = newBackOff()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return r.leave(context.WithoutCancel(ctx))
		case <-r.updated:
		case <-timer.C:
		}
		if ctx.Err() != nil {
			continue // a select takes any case that is ready; this one comes first
		}
		node, options := r.current()
		if s.listed {
			r.others.check(ctx, r.reader, node, options)
		}
		err := r.beat(ctx, node, options)
		if ctx.Err() == nil {
			options.OnHeartbeat(err)
		}
		switch {
		case err == nil:
			if s.failure != nil || !s.listed {
				r.others.unreadable = false // what was forbidden may be allowed by now
			}
			s.succeeded(node, options.Logger)
			timer.Reset(spread(options.Heartbeat))
		case ctx.Err() != nil:
			// The next turn leaves. What was under way may have arrived.
			s.uncertain = s.uncertain || !unready(err)
		default:
			s.failed(err, node, options.Logger)
			timer.Reset(min(s.retry.NextBackOff(), spread(options.Heartbeat)))
		}
	}
}

// standing is what a Registrar knows of its record.
type standing struct {
	listed    bool  // it stands, as far as is known
	uncertain bool  // it may stand: an announcement that failed may have arrived
	failure   error // why it could not be announced, as it was told last
	failing   time.Time
	retry     *backoff.ExponentialBackOff
}

// succeeded notes that the record was renewed.
func (s *standing) succeeded(n Node, log *slog.Logger) {
	switch {
	case s.failure != nil:
		log.Info("announced again", "node", n.ID, "after", time.Since(s.failing))
	case !s.listed:
		log.Info("announced", "node", n.ID, "endpoint", n.Endpoint.String())
	}
	s.listed, s.uncertain, s.failure = true, false, nil
	s.retry.Reset()
}

// failed notes why the record was not renewed. The same reason again is no news.
func (s *standing) failed(err error, n Node, log *slog.Logger) {
	if s.uncertain = !unready(err); !s.uncertain {
		s.listed = false
	}
	if s.failure == nil || s.failure.Error() != err.Error() {
		log.Warn("cannot announce; retrying", "node", n.ID, "error", err)
	}
	if s.failure == nil {
		s.failing = time.Now()
	}
	s.failure = err
}

// beat renews the record once, or removes it, if it may stand, while the node is
// not ready.
func (r *Registrar) beat(ctx context.Context, n Node, o RegistrarOptions) error {
	if o.Ready != nil {
		readyCtx, cancel := context.WithTimeout(ctx, min(callTimeout, o.TTL))
		err := o.Ready(readyCtx)
		cancel()
		if err != nil {
			if ctx.Err() != nil {
				return notReadyError{ctx.Err()}
			}
			if r.standing.listed || r.standing.uncertain {
				withdrawCtx, cancel := context.WithTimeout(ctx, callTimeout)
				werr := r.announcer.Withdraw(withdrawCtx, n)
				cancel()
				if werr != nil {
					return errors.Join(err, werr)
				}
			}
			return notReadyError{err}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, min(callTimeout, max(o.TTL, time.Second)))
	defer cancel()
	if o.Load != nil {
		n.Load = r.loads.next(o.Load(), n, o.Logger)
	}
	return r.announcer.Announce(ctx, n)
}

// loads are the figures that a node's function has given for its load.
type loads struct {
	last    float64 // the last one that was a load
	known   bool    // there was one
	missing bool    // the newest was none, which has been told
}

// next returns the load to announce where the function has given v. To announce 0
// for a load that is not known would make the node look idler than any other.
func (l *loads) next(v float64, n Node, log *slog.Logger) float64 {
	if good := v >= 0 && !math.IsInf(v, 0); good {
		if l.missing {
			log.Info("the node's load is known again", "node", n.ID, "load", v)
		}
		*l = loads{last: v, known: true}
		return v
	}
	load := n.Load
	if l.known {
		load = l.last
	}
	if !l.missing {
		log.Warn("the node's load is no number of 0 or more; announcing another until it is",
			"node", n.ID, "announced", load, "announced_before", l.known)
	}
	l.missing = true
	return load
}

// leave takes the node out of service in the order that costs no request, and
// touches no record but its own: another process may have taken the id meanwhile,
// as when a container is replaced.
func (r *Registrar) leave(ctx context.Context) error {
	n, o := r.current()
	drain, listed := *o.Drain, r.standing.listed
	ctx, cancel := context.WithTimeout(ctx, drain+leaveTimeout)
	defer cancel()
	if drain > 0 && (listed || r.standing.uncertain) {
		wait, least := time.NewTimer(drain), time.NewTimer(DefaultDrain)
		defer wait.Stop()
		defer least.Stop()
		announcing := drain
		if o.Busy != nil {
			announcing = min(drain, DefaultDrain) // it may have nothing more to do after that
		}
		drainCtx, cancel := context.WithTimeout(ctx, max(leaveTimeout/2, announcing))
		own, err := r.announcer.Drain(drainCtx, draining(n))
		cancel()
		switch {
		case err == nil && own:
			log := o.Logger.With("node", n.ID, "for", drain)
			if o.Busy != nil {
				log = o.Logger.With("node", n.ID, "until_idle", true, "for_at_most", drain)
			}
			log.Info("draining")
		case err == nil && listed:
			o.Logger.Info("leaving the record as it is: it is gone, or another process has taken the id", "node", n.ID)
		case err != nil && listed:
			o.Logger.Warn("cannot announce that the node drains", "node", n.ID, "error", err)
		}
		if listed || own {
			// Also where it was not announced: the requests that are under way
			// have the same right to end.
			o.awaitIdle(least.C, wait.C, func() { r.redrain(ctx, n, o) })
		}
	}
	if o.Busy != nil { // the drain may have ended early
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, leaveTimeout)
		defer cancel()
	}
	// Also where it was not listed: a failed announcement may still have arrived.
	if err := r.announcer.Withdraw(ctx, n); err != nil {
		return fmt.Errorf("removing the record of node %q, which now lapses instead: %w", n.ID, err)
	}
	if listed {
		o.Logger.Info("left", "node", n.ID)
	}
	return nil
}

// busyEvery is how often Busy is asked.
const busyEvery = 200 * time.Millisecond

// awaitIdle returns when the drain is over: not before the least, and at the end at the
// latest. Where it may take longer than the record stands, it has that renewed.
func (o RegistrarOptions) awaitIdle(least, end <-chan time.Time, renew func()) {
	var due <-chan time.Time // nil, which blocks: a record stands for longer than the drain
	if *o.Drain >= o.TTL {
		beat := time.NewTicker(spread(o.Heartbeat))
		defer beat.Stop()
		due = beat.C
	}
	if o.Busy == nil {
		least = nil
	}
	for {
		select {
		case <-end:
			return
		case <-due:
			renew()
		case <-least:
			if !o.Busy() {
				return
			}
			least = time.After(busyEvery)
		}
	}
}

// redrain announces once more that the node drains. It takes no longer than what is left
// of leaving can spare; what fails is tried again with the next heartbeat.
func (r *Registrar) redrain(ctx context.Context, n Node, o RegistrarOptions) {
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout/2)
	defer cancel()
	if _, err := r.announcer.Drain(ctx, draining(n)); err != nil {
		o.Logger.Warn("cannot renew the record while the node drains", "node", n.ID, "error", err)
	}
}

// draining returns the node as it is announced before it leaves.
func draining(n Node) Node { return n.with(KeyState, string(StateDraining)) }

// notReadyError says that the node is well announced as absent.
type notReadyError struct{ error }

func (e notReadyError) Error() string { return "not ready: " + e.error.Error() }
func (e notReadyError) Unwrap() error { return e.error }

func unready(err error) bool {
	_, is := errors.AsType[notReadyError](err)
	return is
}

// spread takes up to a tenth off a period, so that the heartbeats of a fleet
// that started at once drift apart.
func spread(d time.Duration) time.Duration {
	return d - time.Duration(rand.Int64N(int64(d)/10+1))
}
