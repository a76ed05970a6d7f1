package natspubsub

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
)

// explain turns the error of an operation into one that wraps an error of
// package discovery where one fits, and says what would help. ctx is the guarded
// context of the operation, parent that of the caller.
func explain(parent, ctx context.Context, link *natsconn.Link, err error) error {
	if isDiscovery(err) {
		return err
	}
	if errors.Is(err, nats.ErrConnectionClosed) {
		// The client says so before it tells why.
		<-link.Lost()
		return link.Err()
	}
	if ctx.Err() != nil {
		if cause := context.Cause(ctx); isDiscovery(cause) {
			return cause
		}
		if errors.Is(parent.Err(), context.Canceled) {
			return parent.Err()
		}
		return fmt.Errorf("%w: no answer in time from %s: %w", discovery.ErrUnreachable, link.Address(), ctx.Err())
	}
	if errors.Is(err, nats.ErrMaxPayload) {
		return fmt.Errorf("%w record: it is larger than the server takes: %w", discovery.ErrInvalid, err)
	}
	return err
}

// isDiscovery reports whether an error is explained already.
func isDiscovery(err error) bool {
	for _, sentinel := range []error{
		discovery.ErrUnreachable, discovery.ErrCredentials, discovery.ErrPermission, discovery.ErrUnsupported,
		discovery.ErrNotFound, discovery.ErrFull, discovery.ErrInvalid, discovery.ErrBroken,
	} {
		if errors.Is(err, sentinel) {
			return true
		}
	}
	return false
}
