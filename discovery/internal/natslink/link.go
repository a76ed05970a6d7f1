package natslink

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A Link is one dialled connection, from the time a server let us in until it
// is lost. It never comes back: [Conn.Get] dials the next one.
type Link struct {
	*nats.Conn

	address address
	inboxes string // what the subjects of our own answers begin with
	lost    chan struct{}

	mu      sync.Mutex // guards what follows; no callback runs under it
	why     error      // why it was, or is about to be, lost
	denied  error      // the last permission that was refused
	guards  map[*guard]struct{}
	handled error         // the last error that onError has done with
	more    chan struct{} // closed when it is done with the next one
}

// An Operation is what a server may refuse.
type Operation string

// The operations, as a message spells them before the subject.
const (
	Publish   Operation = "publish to"
	Subscribe Operation = "subscribe to"
)

// A guard ends an operation that the connection will not let succeed.
type guard struct {
	concerns func(operation Operation, subject string) bool
	cancel   context.CancelCauseFunc
}

func newLink(a address, inboxes string) *Link {
	return &Link{
		address: a, inboxes: inboxes, lost: make(chan struct{}),
		guards: make(map[*guard]struct{}), more: make(chan struct{}),
	}
}

// attach completes the link. Handlers of the client may run before it.
func (l *Link) attach(nc *nats.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.Conn = nc
}

// Address names the server, without user info.
func (l *Link) Address() string { return l.address.String() }

// IsInbox reports whether a subject is one on which clients of NATS take answers:
// ours, others' under a prefix as the documentation of NATS recommends it
// (_INBOX_<user>), and those that servers make for another account.
func (l *Link) IsInbox(subject string) bool {
	return strings.HasPrefix(subject, nats.InboxPrefix) || strings.HasPrefix(subject, "_INBOX_") || strings.HasPrefix(subject, "_R_.") ||
		strings.HasPrefix(subject, l.inboxes)
}

// Lost is closed when the connection is lost, or was closed.
func (l *Link) Lost() <-chan struct{} { return l.lost }

// Err returns why the connection was lost, as an error that wraps one of those
// of package discovery; nil while it stands.
func (l *Link) Err() error {
	select {
	case <-l.lost:
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.why
	default:
		return nil
	}
}

// Denied returns the last permission that the server refused, as an error that
// wraps [discovery.ErrPermission] and names the subject; nil if it refused none.
func (l *Link) Denied() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.denied
}

// Guard returns a context that also ends, with the reason as its cause, when
// the link is lost, or when the server refuses an operation on a subject that
// concerns the caller. A server that denies a permission answers nothing to the
// request itself: without a guard every such request waits for its deadline, and then
// cannot say why. cancel releases the guard.
func (l *Link) Guard(ctx context.Context, concerns func(operation Operation, subject string) bool) (guarded context.Context, cancel context.CancelFunc) {
	guarded, cancelCause := context.WithCancelCause(ctx)
	g := &guard{concerns: concerns, cancel: cancelCause}
	l.mu.Lock()
	select {
	case <-l.lost:
		why := l.why
		l.mu.Unlock()
		cancelCause(why)
		return guarded, func() {}
	default:
	}
	l.guards[g] = struct{}{}
	l.mu.Unlock()
	return guarded, func() {
		l.mu.Lock()
		delete(l.guards, g)
		l.mu.Unlock()
		cancelCause(nil)
	}
}

// Probe sends a ping and waits for the answer. If none comes before ctx ends,
// the link is dropped: a connection that died without a word is to be dialled
// anew, not waited for. It returns why, or nil.
func (l *Link) Probe(ctx context.Context) error {
	err := l.Conn.FlushWithContext(ctx)
	if err == nil {
		return nil
	}
	why := fmt.Errorf("%w: %s does not answer", discovery.ErrUnreachable, l.Address())
	if errors.Is(err, context.DeadlineExceeded) {
		l.drop(why)
	}
	return why
}

// Confirm makes a round trip and returns when the server has done what was asked
// of it before, and when every guard that it refused something has ended. It fails
// when ctx ends, or when the link is lost. A link on which nothing comes back within
// three seconds is dropped, so that the next call dials instead of waiting as well.
// It says nothing of what was refused; see [Link.Guard].
func (l *Link) Confirm(ctx context.Context) error {
	first, cancel := context.WithTimeout(ctx, roundTrip)
	defer cancel()
	err := l.confirm(first)
	if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
		return err
	}
	second, cancel := context.WithTimeout(ctx, lastRoundTrip)
	defer cancel()
	if err := l.Probe(second); err != nil {
		return err
	}
	return l.confirm(ctx)
}

// confirm is one try of Confirm. The client hands refusals on in the background, so
// that a flush alone may return before they have ended their guards.
func (l *Link) confirm(ctx context.Context) error {
	if err := l.Conn.FlushWithContext(ctx); err != nil {
		return err
	}
	for {
		l.mu.Lock()
		handled, more := l.handled, l.more
		l.mu.Unlock()
		// What the server refused came before its answer, and stands here.
		// Refusals are handled in order, so the last one is enough. It is read
		// second: what differs from the one that was handled is then newer than
		// that, and will be handled yet.
		last := l.Conn.LastError()
		if !errors.Is(last, nats.ErrPermissionViolation) || last == handled {
			return nil
		}
		select {
		case <-more:
		case <-l.lost:
			return l.Err()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// drop closes the connection and gives the reason, unless it has one already.
func (l *Link) drop(why error) {
	l.fail(why)
	l.Conn.Close()
}

// fail sets the reason why the link is about to be lost; the first one counts.
func (l *Link) fail(why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.why = cmp.Or(l.why, why)
}

// onClosed runs once, when the client has given up the connection.
func (l *Link) onClosed(nc *nats.Conn) {
	cause := "it was closed"
	if err := nc.LastError(); err != nil {
		cause, _ = describe(err)
	}
	l.fail(fmt.Errorf("%w: lost the connection to %s: %s", discovery.ErrUnreachable, l.Address(), cause))
	l.mu.Lock()
	why := l.why
	guards := l.guards
	l.guards = nil
	close(l.lost)
	l.mu.Unlock()
	for g := range guards {
		g.cancel(why)
	}
}

// onError takes what the server says outside of any answer.
func (l *Link) onError(nc *nats.Conn, _ *nats.Subscription, err error) {
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.handled = err
		close(l.more)
		l.more = make(chan struct{})
	}()
	if isAuth(err) {
		// The server closes the connection next, without repeating the reason.
		l.fail(fmt.Errorf("%w: %s: %s", discovery.ErrCredentials, l.Address(), authText(err)))
		return
	}
	if !errors.Is(err, nats.ErrPermissionViolation) {
		return
	}
	operation, subject := violation(err)
	denied := fmt.Errorf("%w to %s %q", discovery.ErrPermission, operation, subject)
	l.mu.Lock()
	l.denied = denied
	guards := slices.Collect(maps.Keys(l.guards))
	l.mu.Unlock()
	if operation == Subscribe && strings.HasPrefix(subject, l.inboxes) && strings.HasSuffix(subject, ".*") {
		// All answers to requests come through one subscription that is made
		// once, so that no request works on this connection, nor ever will: the
		// next one may have been given the right meanwhile. (An inbox of its own
		// has no wildcard, and concerns only whoever made it.)
		l.fail(fmt.Errorf("%w, on which answers come; if the user may subscribe to inboxes of another prefix, set inbox_prefix", denied))
		nc.Close()
		return
	}
	for _, g := range guards {
		if g.concerns(operation, subject) {
			g.cancel(denied)
		}
	}
}

// violation takes the subject out of a message like
// Permissions Violation for Publish to "orders.>".
func violation(err error) (operation Operation, subject string) {
	text := err.Error()
	operation = Publish
	if strings.Contains(text, "Subscription") {
		operation = Subscribe
	}
	if _, after, found := strings.Cut(text, `"`); found {
		subject, _, _ = strings.Cut(after, `"`)
	}
	return operation, subject
}
