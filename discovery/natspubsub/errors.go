package natspubsub

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

// explain turns the error of an operation into one that wraps an error of
// package discovery where one fits, and says what would help. ctx is the guarded
// context of the operation, parent that of the caller.
func explain(parent, ctx context.Context, link *natslink.Link, err error) error {
	if done, err := link.Explain(parent, ctx, err); done {
		return err
	}
	if errors.Is(err, nats.ErrMaxPayload) {
		return fmt.Errorf("%w record: it is larger than the server takes: %w", discovery.ErrInvalid, err)
	}
	return err
}
