package natskv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// History returns the revisions that the bucket still holds of the node, newest
// first, whichever form of key they stand under. A node that was never heard of
// has none, and so has every node of a bucket that does not exist but may be
// created.
func (r *Registry) History(ctx context.Context, id string, limit int) ([]discovery.Revision, error) {
	var revisions []discovery.Revision
	err := r.do(ctx, fmt.Sprintf("reading the history of node %q", id), discovery.ValidateID(id), feedNeeds(), func(ctx context.Context, s *session) error {
		info, err := s.stream(ctx)
		if errors.Is(err, jetstream.ErrStreamNotFound) && !r.config.NoCreate {
			return nil
		}
		if err != nil {
			return err
		}
		for _, key := range r.config.keysOf(id) {
			of, err := s.revisions(ctx, info, key, id)
			if err != nil {
				return err
			}
			revisions = append(revisions, of...)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(revisions, func(a, b discovery.Revision) int { return cmp.Compare(b.Number, a.Number) })
	if limit > 0 && len(revisions) > limit {
		revisions = revisions[:limit]
	}
	return revisions, nil
}

// revisions reads those of one key.
func (s *session) revisions(ctx context.Context, info *jetstream.StreamInfo, key, id string) ([]discovery.Revision, error) {
	f, err := s.openFeed(ctx, info, jetstream.DeliverAllPolicy, key)
	if err != nil {
		return nil, err
	}
	defer f.close(ctx)
	var (
		revisions []discovery.Revision
		records   discovery.Parser
	)
	err = f.list(ctx, func(m *message) {
		event := s.config.event(m, &records)
		if event.Type != discovery.Put || event.ID == id {
			revisions = append(revisions, discovery.Revision{
				Number: m.sequence, Time: m.time, Type: event.Type, Node: event.Node, Err: event.Err,
			})
		}
	})
	return revisions, err
}
