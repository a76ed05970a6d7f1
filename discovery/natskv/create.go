package natskv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// createBucket creates a bucket with the storage and the replicas that are
// configured. Where no number of replicas is, that is one, or the least that the
// account allows.
func (r *Registry) createBucket(ctx context.Context, s *session, config jetstream.KeyValueConfig) (jetstream.KeyValue, error) {
	config.Storage = jetstream.FileStorage
	if r.config.Storage == StorageMemory {
		config.Storage = jetstream.MemoryStorage
	}
	config.Replicas = max(r.config.Replicas, 1)
	kv, err := s.js.CreateKeyValue(ctx, config)
	if isAPIError(err, codeNoTier) {
		allowed, infoErr := tiers(ctx, s)
		if infoErr != nil {
			return nil, infoErr
		}
		if r.config.Replicas != 0 || len(allowed) == 0 {
			return nil, fmt.Errorf("%w: the account allows no bucket with %s, only with these: R%s; set replicas to one of them: %w",
				discovery.ErrUnsupported, replicas(config.Replicas), joinInts(allowed, ", R"), err)
		}
		config.Replicas = allowed[0]
		kv, err = s.js.CreateKeyValue(ctx, config)
	}
	switch {
	case isAPIError(err, codeReplicas), isAPIError(err, codeNoPeers):
		help := "set replicas 1 for a single one"
		if r.config.Replicas == 0 {
			help = "the account allows no fewer"
		}
		err = fmt.Errorf("%w: %s need a cluster of as many servers; %s: %w",
			discovery.ErrUnsupported, replicas(config.Replicas), help, err)
	case isAPIError(err, codeMaxBytesRequired):
		err = fmt.Errorf("%w: the account allows no bucket without a bound; set max_bytes: %w", discovery.ErrUnsupported, err)
	case isAPIError(err, codeMaxStreamBytes):
		err = fmt.Errorf("%w: the account allows no bucket of %d bytes%s; lower max_bytes: %w",
			discovery.ErrFull, config.MaxBytes, mostBytes(ctx, s, config), err)
	}
	return kv, err
}

func replicas(n int) string {
	if n == 1 {
		return "1 replica"
	}
	return fmt.Sprintf("%d replicas", n)
}

// tiers returns the numbers of replicas that the account allows, the least first.
func tiers(ctx context.Context, s *session) ([]int, error) {
	account, err := s.js.AccountInfo(ctx)
	if err != nil {
		return nil, err
	}
	var allowed []int
	for name := range account.Tiers {
		if n, err := strconv.Atoi(strings.TrimPrefix(name, "R")); err == nil && n > 0 {
			allowed = append(allowed, n)
		}
	}
	slices.Sort(allowed)
	return allowed, nil
}

// mostBytes says how large a bucket may be, where the server tells.
func mostBytes(ctx context.Context, s *session, config jetstream.KeyValueConfig) string {
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

func joinInts(numbers []int, separator string) string {
	words := make([]string, len(numbers))
	for i, n := range numbers {
		words[i] = strconv.Itoa(n)
	}
	return strings.Join(words, separator)
}

// isAPIError reports whether the server gave an error of this code.
func isAPIError(err error, code int) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && int(api.ErrorCode) == code
}
