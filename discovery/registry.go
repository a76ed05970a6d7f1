package discovery

import (
	"context"
	"fmt"
	"io"
	"time"
)

// A Registry is the remote place where nodes are listed, behind one
// connection. Everything but Close may be called concurrently; Close comes
// last and ends the calls that are still under way.
type Registry interface {
	Watcher
	Announcer
	io.Closer

	// String names the registry for logs, metrics and people, such as
	// "nats_kv://10.0.0.5:4222/catga_nodes". It never contains a secret.
	fmt.Stringer
}

// A Watcher follows a registry.
type Watcher interface {
	// Watch emits what operators decided, where the registry keeps that (see
	// [Overrider]), every listed node, then Synced, then changes as they happen,
	// until ctx ends or the stream breaks; it always returns a non-nil error
	// (the context's, or why the stream broke, by one of the errors of this package
	// wherever one fits). It neither retries nor keeps
	// state: the Directory does both. It calls emit from one goroutine at a
	// time, never after it has returned, and emit may block. A call of Watch
	// that finds nobody there fails within seconds rather than wait.
	Watch(ctx context.Context, emit func(Event)) error
}

// A Verifier is a Watcher that can prove that its stream is alive. A
// Directory asks before it lets leases run out, so that a connection that died
// without a word (a packet filter, a paused server) is never taken for a dead
// fleet.
type Verifier interface {
	// Verify makes a round trip to the registry and returns nil only if the
	// current Watch has emitted everything that was written before the call.
	// It is called concurrently with Watch, ends with ctx, and fails at once
	// while nothing is being watched.
	Verify(ctx context.Context) error
}

// A ChangeSource is a Watcher that learns of changes in one of several ways, by what
// the server offers.
type ChangeSource interface {
	// Changes tells people how the newest Watch learns of changes, such as "stream"
	// or "poll". It may be called concurrently.
	Changes() string
}

// A Locator is a Watcher that learns of servers of the registry which its options
// do not name: those that Sentinels name, or that a cluster tells of itself.
type Locator interface {
	// Located returns where they are, as host:port, sorted. It returns at once and
	// may be called concurrently.
	Located() []string
}

// An Announcer writes a node's own record.
type Announcer interface {
	// Announce puts the node's record, in place of whichever stands there, and renews
	// its lease. It ends with ctx. It fails with [ErrInvalid] for a node that may not
	// be listed, and with [ErrUnreachable], [ErrCredentials], [ErrPermission],
	// [ErrUnsupported], [ErrNotFound] or [ErrFull] where one of those fits; the
	// record may stand all the same where there was no answer.
	Announce(ctx context.Context, n Node) error
	// Drain puts the node's record, which says that the node drains, in place of
	// the one that stands, if that is still the caller's own: its metadata names
	// the same instance as n does. It reports whether it was. A record that is not
	// there, or is somebody else's, is left as it is, without an error.
	//
	// To compare and to write is one step: what another process announces
	// meanwhile stands in the end, and is never covered for a moment. A registry
	// that keeps no records cannot compare; there the readers do, and Drain reports
	// true as long as it knows of no other record. It fails like Announce.
	Drain(ctx context.Context, n Node) (own bool, err error)
	// Withdraw removes the node's record, if that record is still the caller's
	// own, by the same rule and in one step as well. A record that is not there,
	// or is somebody else's, is left as it is, without an error. It fails like
	// Announce.
	Withdraw(ctx context.Context, n Node) error
}

// A Reader is an Announcer that can read one record. A Registrar looks by it
// whether another process announces the same node.
type Reader interface {
	// Record returns the record that stands for a node, the zero Node if there is
	// none or none that can be read. It never returns one that is older than what
	// was announced last by the same Reader. It fails like [Announcer].Announce, with
	// [ErrPermission] for writers that may not read.
	Record(ctx context.Context, id string) (Node, error)
}

// A Historian is a Registry that remembers past records.
type Historian interface {
	// History returns up to limit of the node's last revisions, newest first;
	// a node never heard of has none. A limit of 0 means all there are. It fails like
	// [Announcer].Announce, with [ErrUnsupported] where nothing past is kept.
	History(ctx context.Context, id string, limit int) ([]Revision, error)
}

// A Revision is one past record of a node.
type Revision struct {
	// Number orders the revisions of one registry.
	Number uint64
	// Time is when the registry stored it, by the registry's clock.
	Time time.Time
	// Type is Put, Left, Expired or Rejected.
	Type EventType
	// Node is the record, for Put.
	Node Node
	// Err is why the record was rejected, for Rejected.
	Err error
}

// EventType says what a registry reported.
type EventType uint8

const (
	// Put: a record was listed or written.
	Put EventType = iota + 1
	// Beat: the node lives and its record is unchanged but for the load. Only
	// registries whose heartbeats do not carry the record emit it. A node that has
	// lapsed is in use again, by the record that it had.
	Beat
	// Left: somebody removed the record.
	Left
	// Expired: the registry let the record run out.
	Expired
	// Rejected: a record could not be accepted. Whether that costs its node more
	// than the update depends on why; see [ErrForbidden].
	Rejected
	// Synced: everything that was listed has been emitted.
	Synced
	// Overridden: the operator's overrides, all of them, in place of what was
	// emitted before, also by an earlier Watch. See [Overrider].
	Overridden
)

var eventTypes = [...]string{
	Put: "put", Beat: "beat", Left: "left", Expired: "expired", Rejected: "rejected", Synced: "synced", Overridden: "overridden",
}

// String returns the name of the type in lower case.
func (t EventType) String() string {
	if int(t) < len(eventTypes) && t > 0 {
		return eventTypes[t]
	}
	return fmt.Sprintf("EventType(%d)", uint8(t))
}

// An Event is one thing that a registry reported.
type Event struct {
	// Type says which of the other fields mean something.
	Type EventType

	// ID is the node's id; for Rejected the best guess, which may be "".
	ID string

	// Key is the registry's own name of the record, where one node may stand
	// under several (a KV key); else "". A removal counts only if it names the
	// key under which the node was last put.
	Key string

	// Node is the record, for Put. Nobody changes its metadata once it is emitted: they
	// may be shared with other events, see [Parser].
	Node Node

	// Load is the node's load, for Beat; NaN where that is not known.
	Load float64

	// Age is how old the record is by the registry's own clock, for a Put that
	// is part of a listing; 0 where the registry does not know.
	Age time.Duration

	// Delay is how long the record was on its way from the registry's storage, for
	// a Put that is not part of a listing; 0 where the registry's clock does not
	// show it.
	Delay time.Duration

	// Revision is the registry's sequence number of the change, or 0.
	Revision uint64

	// Instance is whose record was removed, for Left, where the registry tells; else
	// "". The record of another instance is not concerned.
	Instance string

	// Err is why the record was rejected, for Rejected.
	Err error

	// Listing describes the listing that just ended, for Synced.
	Listing Listing

	// Overrides are by the node's id, for Overridden. They belong to the receiver.
	Overrides map[string]Override
}

// A Listing tells how much a complete listing proves.
type Listing struct {
	// Epoch identifies the registry's data; another one means that the
	// registry was recreated. "" means that the registry cannot tell.
	Epoch string

	// Revision is the registry's newest sequence number. A smaller one than
	// before, in the same epoch, means that the registry lost data.
	Revision uint64

	// Expiry is how long the registry itself keeps a record that nobody
	// renews; 0 means for ever.
	Expiry time.Duration

	// Partial says that a node that was not listed may well be there, as on a
	// registry without persistence.
	Partial bool

	// Advice says what is amiss with how the registry is set up, and what mends it,
	// as a sentence for whoever runs it; "" means nothing. It is logged once.
	Advice string
}
