// Package natspubsub keeps a registry on subjects of core NATS: nodes say that
// they join, that they live and that they leave, and whoever listens then knows.
// The servers keep nothing.
//
//	<prefix>.join       a record
//	<prefix>.heartbeat  {"nodeId","load","timestamp"}, or a record
//	<prefix>.leave      {"NodeId"}; ours name the instance as well
//	<prefix>.query      a request; each node answers with its record
//
// Our own heartbeats carry the record, and our own nodes answer queries, so that
// whoever starts late learns of them within milliseconds. Writers that do
// neither are learnt of when they join; see [Registry.Watch].
//
// To watch takes the right to subscribe to join, heartbeat, leave and
// _INBOX.> or the inbox prefix that is configured, and to publish to query; to
// announce, that to publish to join, heartbeat and leave. To answer queries takes
// the right to subscribe to query and to publish to the inboxes of those who ask,
// which begin with _INBOX or with our own inbox prefix; without it a node is listed
// all the same, and late listeners learn of it by its next heartbeat.
package natspubsub

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

// operationTimeout bounds one call, the dialling included.
const operationTimeout = 5 * time.Second

// A Registry is one subject prefix behind one connection. Beside [discovery.Registry]
// it implements [discovery.Verifier] and [discovery.Locator]. It is no
// [discovery.Historian], [discovery.Reader] or [discovery.Overrider]: nobody keeps
// anything. Everything but Close may be called concurrently.
//
// Each call may fail with ErrUnreachable, ErrCredentials or ErrPermission of package
// discovery, with ErrInvalid for an id or a record that is none, and with the context's
// error; it lasts five seconds at most. Its methods say what else they return.
type Registry struct {
	config Config // resolved
	conn   *natslink.Conn
	watch  atomic.Pointer[watch] // the one that is synced

	own       *ownRecords
	responder responder
}

// Open returns the registry that config names. It does not connect: the first
// call that needs the connection does. The error is that of [Config.Resolve].
func Open(config Config) (*Registry, error) {
	config, err := config.Resolve()
	if err != nil {
		return nil, err
	}
	conn, err := natslink.New(config.conn())
	if err != nil {
		return nil, err
	}
	own := newOwnRecords()
	return &Registry{
		config:    config,
		conn:      conn,
		own:       own,
		responder: responder{subject: config.query(), own: own},
	}, nil
}

// String names the prefix and the servers, and no secret.
func (r *Registry) String() string { return r.config.String() }

// Close closes the connection, which ends every call that is under way, and
// stops answering.
func (r *Registry) Close() error {
	r.responder.close()
	err := r.conn.Close()
	r.responder.wait()
	return err
}

// Located returns the servers that the cluster has told of beside those
// configured, as host:port.
func (r *Registry) Located() []string { return r.conn.Located() }

// Announce says that the node has joined, the first time on a connection, and
// then that it lives, with its record each time. It returns when the server has
// taken the message; whether anybody hears it, nobody knows. From then on the
// Registry answers queries with the record until the node is withdrawn or its
// lease runs out, also on later connections.
func (r *Registry) Announce(ctx context.Context, n discovery.Node) error {
	return r.announce(ctx, fmt.Sprintf("announcing node %q", n.ID), n, false)
}

// Drain says that the node lives and drains, in a heartbeat with its record. Nobody
// keeps records with which that could be compared, so listeners of our kind do it:
// they let it count only if the record that they saw last is of the same instance;
// see [Registry.Watch]. Where this very Registry announces the id for another
// instance, nothing is sent and false is returned.
func (r *Registry) Drain(ctx context.Context, n discovery.Node) (own bool, err error) {
	err = r.announce(ctx, fmt.Sprintf("announcing that node %q drains", n.ID), n, true)
	if errors.Is(err, errTaken) {
		return false, nil
	}
	return err == nil, err
}

// errTaken: the id is announced here for another instance.
var errTaken = errors.New("another instance has taken the id")

// announce publishes the node's record. Where the node drains it fails with errTaken if
// the id is announced here for another instance.
func (r *Registry) announce(ctx context.Context, what string, n discovery.Node, drains bool) error {
	now := time.Now()
	announced, err := newRecord(n, now)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if drains && r.own.takenFrom(n.ID, announced.instance) {
		return errTaken
	}
	return r.do(ctx, what, func(ctx context.Context, link *natslink.Link) error {
		subject, message := r.config.join(), announced.data
		if drains || r.own.joined(n.ID, link) { // with a join a node comes rather than goes
			subject, message = r.config.heartbeat(), appendHeartbeat(nil, announced.data, now)
		}
		return r.publish(ctx, link, n.ID, announced, subject, message, drains)
	})
}

// publish publishes a message about a record of ours, with which queries are answered
// from then on. With ownerOnly it fails with errTaken where the id is another
// instance's.
func (r *Registry) publish(ctx context.Context, link *natslink.Link, id string, announced *record, subject string, message []byte, ownerOnly bool) error {
	var before *record
	err := confirmed(ctx, link, publishes(subject), func(ctx context.Context) error {
		unlock, err := r.own.lock(ctx)
		if err != nil {
			return err
		}
		defer unlock()
		if ownerOnly && r.own.takenFrom(id, announced.instance) {
			return errTaken
		}
		before = r.own.put(id, announced)
		// First, so that whoever asks too early for this is told by the join.
		if err := r.responder.serve(link); err != nil {
			return err
		}
		return link.Publish(subject, message)
	})
	if err != nil {
		r.own.revert(id, announced, before)
	} else {
		r.own.confirm(id, announced, link)
	}
	return err
}

// Withdraw says that the node leaves. The message names the instance, and
// listeners of our kind let it count only if the record that they saw last is
// that instance's; others know no instances. Where this very Registry announces
// the id for another instance, nothing is sent.
func (r *Registry) Withdraw(ctx context.Context, n discovery.Node) error {
	what := fmt.Sprintf("withdrawing node %q", n.ID)
	if err := discovery.ValidateID(n.ID); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	// Whether or not anybody can be told: nobody is to be told otherwise.
	if !r.own.drop(n.ID, n.Instance()) {
		return nil
	}
	message, err := json.Marshal(leaveMessage{NodeID: n.ID, Instance: n.Instance()})
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return r.do(ctx, what, func(ctx context.Context, link *natslink.Link) error {
		return confirmed(ctx, link, publishes(r.config.leave()), func(ctx context.Context) error {
			unlock, err := r.own.lock(ctx)
			if err != nil {
				return err
			}
			defer unlock()
			// Somebody may have announced the id meanwhile.
			if !r.own.drop(n.ID, n.Instance()) {
				return nil
			}
			return link.Publish(r.config.leave(), message)
		})
	})
}

// do runs f on the connection, for five seconds at most.
func (r *Registry) do(ctx context.Context, what string, f func(context.Context, *natslink.Link) error) error {
	bounded, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	link, err := r.connect(bounded)
	if err == nil {
		err = f(bounded, link)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// connect returns the connection as it stands. What was announced on the one before
// is answered with on this one.
func (r *Registry) connect(ctx context.Context) (*natslink.Link, error) {
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	link, err := r.conn.Get(ctx)
	if err != nil || r.own.none() {
		return link, err
	}
	if err := r.responder.serve(link); err != nil {
		return nil, explain(ctx, ctx, link, err)
	}
	return link, nil
}

// confirmed runs f, which publishes and subscribes, and returns when the server has
// done that, or why it refused what the caller is concerned with.
func confirmed(ctx context.Context, link *natslink.Link, concerns func(natslink.Operation, string) bool, f func(context.Context) error) error {
	guarded, release := link.Guard(ctx, concerns)
	defer release()
	err := f(guarded)
	if err == nil {
		err = link.Confirm(guarded)
	}
	if err == nil && guarded.Err() != nil {
		err = context.Cause(guarded)
	}
	if err != nil {
		return explain(ctx, guarded, link, err)
	}
	return nil
}

// publishes is what concerns whoever publishes one message.
func publishes(subject string) func(natslink.Operation, string) bool {
	return func(operation natslink.Operation, refused string) bool {
		return operation == natslink.Publish && refused == subject
	}
}

// explain turns the error of an operation into one that wraps an error of
// package discovery where one fits, and says what would help. ctx is the guarded
// context of the operation, parent that of the caller.
func explain(parent, ctx context.Context, link *natslink.Link, err error) error {
	if known := link.Explain(parent, ctx, err); known != nil {
		return known
	}
	if errors.Is(err, nats.ErrMaxPayload) {
		return fmt.Errorf("%w record: it is larger than the server takes: %w", discovery.ErrInvalid, err)
	}
	return err
}

// Interface guards
var (
	_ discovery.Registry = (*Registry)(nil)
	_ discovery.Verifier = (*Registry)(nil)
	_ discovery.Locator  = (*Registry)(nil)
)
