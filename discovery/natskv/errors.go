package natskv

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Error codes of the server that the client has no name for (server/errors.json
// of nats-server).
const (
	codeAccountResources = 10002 // resource limits exceeded for account
	codeNoPeers          = 10005 // no suitable peers for placement
	codeClusterAway      = 10008 // JetStream system temporarily unavailable
	codeResources        = 10023 // insufficient resources
	codeMaxConsumers     = 10026
	codeMaxStreams       = 10027
	codeMemory           = 10028 // insufficient memory resources available
	codeStorage          = 10047 // insufficient storage resources available
	codeReplicas         = 10074 // replicas > 1 not supported in non-clustered mode
	codeStoreFailed      = 10077 // with the store's own reason
	codeMaxBytesRequired = 10113 // account requires a stream config to have max bytes set
	codeNoTier           = 10120 // no JetStream default or applicable tiered limit present
	codeMaxStreamBytes   = 10122 // stream max bytes exceeds account limit
)

// explain turns the error of an operation into one that wraps an error of
// package discovery where one fits, and says what would help. ctx is the guarded
// context of the operation, parent that of the caller.
func (s *session) explain(parent, ctx context.Context, err error) error {
	if errors.Is(err, jetstream.ErrConnectionClosed) {
		err = nats.ErrConnectionClosed
	}
	if known := s.link.Explain(parent, ctx, err); known != nil {
		return known
	}

	wrap := func(sentinel error, format string, args ...any) error {
		return fmt.Errorf("%w: %s: %w", sentinel, fmt.Sprintf(format, args...), err)
	}
	switch {
	case errors.Is(err, errSilent):
		return wrap(discovery.ErrUnreachable, "%s stopped answering", s.link.Address())
	case errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		return wrap(discovery.ErrUnsupported, "JetStream is not enabled for this account")
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, nats.ErrNoResponders):
		if s.config.Domain != "" {
			return wrap(discovery.ErrUnsupported, "there is no JetStream in domain %q, or none at all", s.config.Domain)
		}
		return wrap(discovery.ErrUnsupported, "JetStream is not enabled on %s; start the server with -js", s.link.Address())
	case errors.Is(err, jetstream.ErrNoStreamResponse):
		return wrap(discovery.ErrUnreachable, "nobody stores what is written to bucket %q", s.config.Bucket)
	case errors.Is(err, jetstream.ErrBucketNotFound), errors.Is(err, jetstream.ErrStreamNotFound):
		return wrap(discovery.ErrNotFound, "bucket %q does not exist", s.config.Bucket)
	case errors.Is(err, jetstream.ErrStreamMessageExceedsMaximum), errors.Is(err, nats.ErrMaxPayload):
		return wrap(discovery.ErrInvalid, "record: it is larger than bucket %q or the server takes", s.config.Bucket)
	}
	var api *jetstream.APIError
	if !errors.As(err, &api) {
		return err
	}
	switch int(api.ErrorCode) {
	case codeClusterAway:
		return wrap(discovery.ErrUnreachable, "the cluster has no leader")
	case codeStoreFailed:
		if text := strings.ToLower(api.Description); !strings.Contains(text, "maximum") && !strings.Contains(text, "exceeded") &&
			!strings.Contains(text, "no space") {
			return err
		}
		return wrap(discovery.ErrFull, "bucket %q; raise its max_bytes or lower its history", s.config.Bucket)
	case codeNoTier:
		return wrap(discovery.ErrUnsupported, "the account allows no consumer of bucket %q; allow it streams of as many replicas as that has", s.config.Bucket)
	case codeStorage, codeMemory, codeResources, codeAccountResources:
		return wrap(discovery.ErrFull, "JetStream has no room for bucket %q; raise the limits of the server or the account, or lower max_bytes", s.config.Bucket)
	case codeMaxStreams:
		return wrap(discovery.ErrFull, "the account may have no more buckets")
	case codeMaxConsumers:
		return wrap(discovery.ErrFull, "bucket %q may have no more watchers", s.config.Bucket)
	}
	return err
}
