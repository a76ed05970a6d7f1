package natskv

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

// operationTimeout bounds whatever asks the registry and waits.
const operationTimeout = 5 * time.Second

// A session is what stands on one connection: its JetStream, and the bucket once it
// was found.
type session struct {
	config *Config
	clock  *discovery.RegistryClock // that of the overrides
	link   *natslink.Link
	js     jetstream.JetStream
	api    string // prefix of the subjects of the JetStream API
	// kv is the bucket once it was found here, nil if it has gone.
	kv atomic.Pointer[jetstream.KeyValue]
}

func newSession(config *Config, clock *discovery.RegistryClock, link *natslink.Link) (s *session, err error) {
	s = &session{config: config, clock: clock, link: link, api: jetstream.DefaultAPIPrefix}
	if config.Domain == "" {
		s.js, err = jetstream.New(link.Conn)
	} else {
		s.api = "$JS." + config.Domain + ".API."
		s.js, err = jetstream.NewWithDomain(link.Conn, config.Domain)
	}
	return s, err
}

// guard returns a context that also ends, with the reason as its cause, when the
// connection is lost or the server denies a subject that begins with one of needs.
// Those that do not begin with "$" are of the JetStream API. What is denied of the
// overrides is of no concern to those who do not ask for them.
func (s *session) guard(ctx context.Context, needs []string) (guarded context.Context, release context.CancelFunc) {
	overrides := s.config.overridesStream()
	return s.link.Guard(ctx, func(_ natslink.Operation, subject string) bool {
		return slices.ContainsFunc(needs, func(need string) bool {
			return strings.Contains(subject, overrides) == strings.Contains(need, overrides) &&
				(strings.HasPrefix(subject, s.api+need) || need[0] == '$' && strings.HasPrefix(subject, need))
		})
	})
}

// do runs f on the session, and explains its error. needs are the beginnings of the
// subjects that f publishes to, beside those that find and create the bucket: as soon
// as the server denies one of them, f's context ends. parent is the caller's context,
// ctx the same with a deadline.
func (s *session) do(parent, ctx context.Context, needs []string, f func(context.Context) error) error {
	denied := s.link.Denied()
	guarded, release := s.guard(ctx, append(slices.Clip(needs), "STREAM.INFO.", "STREAM.CREATE.", "INFO"))
	defer release()
	err := f(guarded)
	if err == nil {
		return nil
	}
	err = s.explain(parent, guarded, err)
	if now := s.link.Denied(); now != denied && errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, discovery.ErrPermission) {
		// Something was denied meanwhile that we did not know we needed.
		err = now
	}
	if hint := s.importHint(needs, err); hint != "" {
		err = fmt.Errorf("%w%s", err, hint)
	}
	return err
}

// importHint says what may be wrong where a key of another domain gives no answer:
// the subjects of the keys are imported by themselves, and a server drops silently
// what nobody imports.
func (s *session) importHint(needs []string, err error) string {
	if s.config.Domain == "" || !errors.Is(err, context.DeadlineExceeded) || s.link.Err() != nil {
		return ""
	}
	for _, need := range needs {
		if need[0] == '$' {
			return fmt.Sprintf(" on %q; if the bucket is another account's, import its $KV.> as %s$KV.> as well", s.api+need, s.api)
		}
	}
	return ""
}

// bucket returns the bucket for reading and writing keys, found or created once
// a connection.
func (s *session) bucket(ctx context.Context) (jetstream.KeyValue, error) {
	return s.find(ctx, s.ensure)
}

// existing returns the bucket, nil if there is none: to leave is no reason to
// create it.
func (s *session) existing(ctx context.Context) (jetstream.KeyValue, error) {
	kv, err := s.find(ctx, s.stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil
	}
	return kv, err
}

// find returns the bucket, whose stream is found by one of the functions below.
func (s *session) find(ctx context.Context, stream func(context.Context) (*jetstream.StreamInfo, error)) (jetstream.KeyValue, error) {
	if kv := s.kv.Load(); kv != nil {
		return *kv, nil
	}
	if _, err := stream(ctx); err != nil {
		return nil, err
	}
	kv, err := s.js.KeyValue(ctx, s.config.Bucket)
	if err != nil {
		return nil, err
	}
	s.kv.Store(&kv)
	return kv, nil
}

// stream returns the stream of the bucket. It fails with
// [jetstream.ErrStreamNotFound] if there is none, and with ErrInvalid of package
// discovery if what has the name of the bucket is none.
func (s *session) stream(ctx context.Context) (*jetstream.StreamInfo, error) {
	stream, err := s.js.Stream(ctx, s.config.stream())
	if err != nil {
		return nil, err
	}
	info := stream.CachedInfo()
	if info.Config.MaxMsgsPerSubject < 1 {
		return nil, fmt.Errorf("%w bucket %q: stream %s exists but is no key-value bucket; name another bucket",
			discovery.ErrInvalid, s.config.Bucket, s.config.stream())
	}
	return info, nil
}

// ensure returns the bucket's stream, creating the bucket if it is missing and
// may be created. A bucket that exists is never changed: to create or update in
// one would silently rewrite the history and the TTL that its owner chose.
func (s *session) ensure(ctx context.Context) (*jetstream.StreamInfo, error) {
	info, err := s.stream(ctx)
	if !errors.Is(err, jetstream.ErrStreamNotFound) {
		return info, err
	}
	if err := s.createNodes(ctx); err != nil {
		return nil, err
	}
	return s.stream(ctx)
}
