package natskv

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// nodesDescription is of the buckets that were created here.
const nodesDescription = "nodes of a fleet"

// markerTTL is how long the server keeps a marker of a record that has expired, by which
// watches learn of it. The server also raises to it every shorter TTL that a writer gives
// a record of its own, so that it is the least that the server takes. A watch that is cut
// off for longer misses the marker and finds at its next audit that the bucket has changed.
const markerTTL = time.Second

// advice says what is to be changed about a bucket that an earlier version created: there
// markers lived as long as records, and with them every record that was to live for less.
func (c *Config) advice(bucket *jetstream.StreamConfig) string {
	if bucket.Description != nodesDescription || bucket.SubjectDeleteMarkerTTL <= markerTTL {
		return ""
	}
	return fmt.Sprintf("in bucket %q a record that its writer gives a TTL of less than %[2]v lives for %[2]v; mend it with: nats stream edit %[3]s --subject-del-markers-ttl=%[4]v --force",
		c.Bucket, bucket.SubjectDeleteMarkerTTL, c.stream(), markerTTL)
}

// createNodes creates the bucket of the nodes.
func (s *session) createNodes(ctx context.Context) error {
	c := s.config
	return s.create(ctx, jetstream.KeyValueConfig{
		Bucket:         c.Bucket,
		Description:    nodesDescription,
		TTL:            c.BucketTTL,
		History:        uint8(c.History),
		MaxBytes:       c.MaxBytes,
		LimitMarkerTTL: markerTTL,
	}, fmt.Sprintf("--ttl=%s --history=%d --max-bucket-size=%d", c.BucketTTL, c.History, c.MaxBytes))
}

// createOverrides creates the bucket of the overrides. It has no TTL.
func (s *session) createOverrides(ctx context.Context) error {
	return s.create(ctx, jetstream.KeyValueConfig{
		Bucket:      s.config.overridesBucket(),
		Description: "what operators have decided about the nodes of a fleet",
		History:     overridesHistory,
		MaxBytes:    s.config.MaxBytes,
	}, fmt.Sprintf("--history=%d", overridesHistory))
}

// create creates a bucket, unless the configuration forbids it; then the error says
// how to do it with the options of nats kv add. One that somebody else creates
// meanwhile is as good, also with another configuration.
func (s *session) create(ctx context.Context, config jetstream.KeyValueConfig, options string) error {
	if s.config.NoCreate {
		return fmt.Errorf("%w: bucket %q does not exist and create is off; create it with: nats kv add %s %s --storage=%s --replicas=%d",
			discovery.ErrNotFound, config.Bucket, config.Bucket, options, s.config.Storage, max(s.config.Replicas, 1))
	}
	config.Storage = jetstream.FileStorage
	if s.config.Storage == StorageMemory {
		config.Storage = jetstream.MemoryStorage
	}
	err := s.createReplicated(ctx, config)
	if errors.Is(err, jetstream.ErrLimitMarkerTTLNotSupported) {
		config.LimitMarkerTTL = 0
		err = s.createReplicated(ctx, config)
	}
	if err != nil && !errors.Is(err, jetstream.ErrBucketExists) {
		return fmt.Errorf("creating bucket %q: %w", config.Bucket, err)
	}
	return nil
}

// createReplicated creates a bucket with as many replicas as are configured. Where no
// number is, that is one, or the least that the account allows.
func (s *session) createReplicated(ctx context.Context, config jetstream.KeyValueConfig) error {
	config.Replicas = max(s.config.Replicas, 1)
	_, err := s.js.CreateKeyValue(ctx, config)
	if isAPIError(err, codeNoTier) {
		allowed, infoErr := s.tiers(ctx)
		if infoErr != nil {
			return infoErr
		}
		if s.config.Replicas != 0 || len(allowed) == 0 {
			return fmt.Errorf("%w: the account allows no bucket with %s, only with these: %s; set replicas to one of them: %w",
				discovery.ErrUnsupported, replicas(config.Replicas), strings.Join(allowed, ", "), err)
		}
		config.Replicas, _ = strconv.Atoi(allowed[0][1:])
		_, err = s.js.CreateKeyValue(ctx, config)
	}
	switch {
	case isAPIError(err, codeReplicas), isAPIError(err, codeNoPeers):
		help := "set replicas 1 for a single one"
		if s.config.Replicas == 0 {
			help = "the account allows no fewer"
		}
		err = fmt.Errorf("%w: %s need a cluster of as many servers; %s: %w",
			discovery.ErrUnsupported, replicas(config.Replicas), help, err)
	case isAPIError(err, codeMaxBytesRequired):
		err = fmt.Errorf("%w: the account allows no bucket without a bound; set max_bytes: %w", discovery.ErrUnsupported, err)
	case isAPIError(err, codeMaxStreamBytes):
		err = fmt.Errorf("%w: the account allows no bucket of %d bytes%s; lower max_bytes: %w",
			discovery.ErrFull, config.MaxBytes, s.mostBytes(ctx, config), err)
	}
	return err
}

func replicas(n int) string {
	if n == 1 {
		return "1 replica"
	}
	return fmt.Sprintf("%d replicas", n)
}

// tiers returns the numbers of replicas that the account allows, the least first: R1.
func (s *session) tiers(ctx context.Context) ([]string, error) {
	account, err := s.js.AccountInfo(ctx)
	if err != nil {
		return nil, err
	}
	names := slices.Sorted(maps.Keys(account.Tiers)) // there are no more than five replicas
	return slices.DeleteFunc(names, func(name string) bool { return len(name) != 2 || name < "R1" || name > "R9" }), nil
}

// mostBytes says how large a bucket may be, where the server tells.
func (s *session) mostBytes(ctx context.Context, config jetstream.KeyValueConfig) string {
	account, err := s.js.AccountInfo(ctx)
	if err != nil {
		return ""
	}
	limits := account.Limits
	if tier, found := account.Tiers["R"+strconv.Itoa(config.Replicas)]; found {
		limits = tier.Limits
	}
	most := limits.StoreMaxStreamBytes
	if config.Storage == jetstream.MemoryStorage {
		most = limits.MemoryMaxStreamBytes
	}
	if most <= 0 {
		return ""
	}
	return fmt.Sprintf(", at most %d", most)
}

// isAPIError reports whether the server gave an error of this code.
func isAPIError(err error, code int) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && int(api.ErrorCode) == code
}
