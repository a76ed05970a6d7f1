package discovery

import (
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
	// goes, so that no proxy sends a request to a closed door. Default:
	// DefaultDrain; negative: none.
	Drain time.Duration
	// Load is asked for the node's load before each heartbeat. A negative or not
	// finite value says that it is not known just now: then the last one that was
	// is announced, and before any was the load that the node carries, which is
	// also the default.
	Load func() float64
	// Ready, where given, is asked before each heartbeat; while it returns an
	// error the node is not listed.
	Ready func(context.Context) error
	// OnHeartbeat, where given, is told how each heartbeat went. It must not block.
	OnHeartbeat func(error)
	// Logger is told at Info when the node is announced, drains and leaves; at Warn
	// why it cannot be announced, once for each reason, and that another process
	// announces it, too. There is nothing at other levels. Default: none.
	Logger *slog.Logger
}

func (o RegistrarOptions) withDefaults() RegistrarOptions {
	if o.Heartbeat <= 0 {
		o.Heartbeat = DefaultHeartbeat
	}
	if o.TTL <= 0 {
		o.TTL = 3 * o.Heartbeat
	}
	if o.Drain == 0 {
		o.Drain = DefaultDrain
	}
	o.Drain = max(o.Drain, 0)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// A Registrar keeps one node listed in a registry: it announces, renews, and
// withdraws. It never gives up. Where the announcer is a [Reader], it says once when
// another process announces the same node, and goes on.
type Registrar struct {
	announcer Announcer
	instance  string

	rivalry rivalry // of Run
	loads   loads   // of Run

	mu      sync.Mutex // guards node and options; nothing is called under it
	node    Node
	options RegistrarOptions
	updated chan struct{} // holds at most one token
}

// NewRegistrar returns a Registrar for a node, not yet announced. It completes
// the node's metadata with the lease and with a token of its own (the key
// "instance"), by which it recognises its record. The error wraps [ErrInvalid].
func NewRegistrar(a Announcer, n Node, o RegistrarOptions) (*Registrar, error) {
	r := &Registrar{announcer: a, instance: uuid.NewString(), updated: make(chan struct{}, 1)}
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
// be called from any goroutine.
func (r *Registrar) Update(n Node, o RegistrarOptions) error {
	o = o.withDefaults()
	if o.TTL <= o.Heartbeat {
		return fmt.Errorf("%w ttl %v: want more than the heartbeat of %v, or the node lapses between two", ErrInvalid, o.TTL, o.Heartbeat)
	}
	if o.TTL < MinLease || o.TTL > MaxLease {
		return fmt.Errorf("%w ttl %v: want %v to %v", ErrInvalid, o.TTL, MinLease, MaxLease)
	}
	n.Metadata = maps.Clone(n.Metadata)
	if n.Metadata == nil {
		n.Metadata = make(map[string]string, 2)
	}
	n.Metadata[KeyInstance] = r.instance
	n.Metadata[KeyLease] = o.TTL.String()
	// The record must have room for the last one, too.
	for _, n := range []Node{n, draining(n)} {
		if _, err := AppendRecord(nil, n, time.Time{}); err != nil {
			return err
		}
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	if r.node.ID != "" && n.ID != r.node.ID {
		return fmt.Errorf("%w update: the node's id is %q and cannot become %q", ErrInvalid, r.node.ID, n.ID)
	}
	r.node, r.options = n, o
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
// when a container is replaced, that record is left as it is. Run must be called
// once.
func (r *Registrar) Run(ctx context.Context) error {
	var (
		listed  bool  // the record stands, as far as is known
		doubt   bool  // it may stand: an announcement that failed may have arrived
		failure error // why it does not, as it was told last
		failing time.Time
		retry   = &backoff.ExponentialBackOff{
			InitialInterval: firstRetry, MaxInterval: lastRetry,
			Multiplier: 2, RandomizationFactor: 0.5,
		}
		timer = time.NewTimer(0)
	)
	defer timer.Stop()
	retry.Reset()
	for {
		select {
		case <-ctx.Done():
			return r.leave(context.WithoutCancel(ctx), listed, doubt)
		case <-r.updated:
		case <-timer.C:
		}
		if ctx.Err() != nil {
			continue // a select takes any case that is ready; this one comes first
		}
		node, options := r.current()
		log := options.Logger
		if listed {
			r.rivalry.look(ctx, r.announcer, r.instance, node, options)
		}
		err := r.beat(ctx, node, options, listed || doubt)
		if options.OnHeartbeat != nil && ctx.Err() == nil {
			options.OnHeartbeat(err)
		}
		switch {
		case err == nil:
			switch {
			case failure != nil && !failing.IsZero():
				log.Info("announced again", "node", node.ID, "after", time.Since(failing))
			case !listed:
				log.Info("announced", "node", node.ID, "endpoint", node.Endpoint.String())
			}
			if failure != nil || !listed {
				r.rivalry.blind = false // what was forbidden may be allowed by now
			}
			listed, doubt, failure = true, false, nil
			retry.Reset()
			timer.Reset(spread(options.Heartbeat))
		case ctx.Err() != nil:
			// The next turn leaves. What was under way may have arrived.
			var unready notReadyError
			doubt = doubt || !errors.As(err, &unready)
		default:
			var unready notReadyError
			if doubt = !errors.As(err, &unready); !doubt {
				listed = false
			}
			if failure == nil || failure.Error() != err.Error() {
				log.Warn("cannot announce; retrying", "node", node.ID, "error", err)
			}
			if failure == nil {
				failing = time.Now()
			}
			failure = err
			timer.Reset(min(retry.NextBackOff(), spread(options.Heartbeat)))
		}
	}
}

// beat renews the record once, or removes it, if it may stand, while the node is
// not ready.
func (r *Registrar) beat(ctx context.Context, n Node, o RegistrarOptions, stands bool) error {
	if o.Ready != nil {
		readyCtx, cancel := context.WithTimeout(ctx, min(callTimeout, o.TTL))
		err := o.Ready(readyCtx)
		cancel()
		if err != nil {
			if ctx.Err() != nil {
				return notReadyError{ctx.Err()}
			}
			if stands {
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
func (r *Registrar) leave(ctx context.Context, listed, doubt bool) error {
	n, o := r.current()
	ctx, cancel := context.WithTimeout(ctx, o.Drain+leaveTimeout)
	defer cancel()
	if o.Drain > 0 && (listed || doubt) {
		wait := time.NewTimer(o.Drain)
		defer wait.Stop()
		drainCtx, cancel := context.WithTimeout(ctx, max(leaveTimeout/2, o.Drain))
		own, err := r.announcer.Drain(drainCtx, draining(n))
		cancel()
		switch {
		case err == nil && own:
			o.Logger.Info("draining", "node", n.ID, "for", o.Drain)
		case err == nil && listed:
			o.Logger.Info("leaving the record as it is: it is gone, or another process has taken the id", "node", n.ID)
		case err != nil && listed:
			o.Logger.Warn("cannot announce that the node drains", "node", n.ID, "error", err)
		}
		if listed || own {
			// Also where it was not announced: the requests that are under way
			// have the same right to end.
			<-wait.C
		}
	}
	// Also where it was not listed: a failed announcement may still have arrived.
	err := r.withdraw(ctx, n)
	if err == nil && listed {
		o.Logger.Info("left", "node", n.ID)
	}
	return err
}

// draining returns the node as it is announced before it leaves.
func draining(n Node) Node {
	n.Metadata = maps.Clone(n.Metadata)
	n.Metadata[KeyState] = string(StateDraining)
	return n
}

func (r *Registrar) withdraw(ctx context.Context, n Node) error {
	if err := r.announcer.Withdraw(ctx, n); err != nil {
		return fmt.Errorf("removing the record of node %q, which now lapses instead: %w", n.ID, err)
	}
	return nil
}

// notReadyError says that the node is well announced as absent.
type notReadyError struct{ error }

func (e notReadyError) Error() string { return "not ready: " + e.error.Error() }
func (e notReadyError) Unwrap() error { return e.error }

// spread takes up to a tenth off a period, so that the heartbeats of a fleet
// that started at once drift apart.
func spread(d time.Duration) time.Duration {
	return d - time.Duration(rand.Int64N(int64(d)/10+1))
}
