package natskv

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// maxSilence is how long nothing may come before the stream counts as
	// broken: two heartbeats and some delay.
	maxSilence = 2500 * time.Millisecond
	// inactiveThreshold is after how long the server drops a consumer whose
	// reader went away without a word.
	inactiveThreshold = 10 * time.Second
	// interestGrace is how long a consumer that was created may be unknown to the
	// server that we are connected to, and interestWait how long until it is asked
	// again.
	interestGrace = time.Second
	interestWait  = 20 * time.Millisecond
	// deleteTimeout bounds the wait for the answer when a consumer is deleted. It is
	// part of every exit of a proxy, and the request is under way in any case.
	deleteTimeout = 100 * time.Millisecond
)

// A message is one revision of one key.
type message struct {
	key      string
	data     []byte
	header   nats.Header
	sequence uint64    // in the stream
	number   uint64    // in the feed, from 1
	time     time.Time // when the server stored it
	pending  uint64    // how many more there were when it was sent
}

// A feed delivers the messages of a bucket in order and without a gap, from an
// ephemeral consumer of its own. It is used by one goroutine, but for exhausted,
// which anyone may call.
//
// The client library has consumers that do this, and does not fit: they take
// any message that has a Status header for a word of the server's, so that a
// record with such a header, which everyone who may write can put, ends every
// watch of the bucket for ever.
type feed struct {
	session  *session
	stream   string
	consumer string
	prefix   string // of the subjects, before the key
	listed   uint64 // how many messages there were when the feed was opened
	opened   time.Time

	window       window
	subscription *nats.Subscription
	messages     chan *nats.Msg
	received     uint64 // number of the last message
	silence      *time.Timer
	wake         <-chan struct{} // makes next return, where it is not nil
}

// feedNeeds returns the subjects that a feed publishes to. That of deleting its
// consumer is not among them: it may be denied.
func feedNeeds() []string {
	return []string{"CONSUMER.CREATE.", "CONSUMER.MSG.NEXT.", "CONSUMER.INFO."}
}

// openFeed opens a feed of one key, or of all where key is "". It must be closed.
func (s *session) openFeed(ctx context.Context, info *jetstream.StreamInfo, policy jetstream.DeliverPolicy, key string) (*feed, error) {
	origin := info.Config.Name
	if m := info.Config.Mirror; m != nil {
		origin = m.Name // a mirror holds the subjects of the bucket that it mirrors
	}
	f := &feed{
		session:  s,
		stream:   info.Config.Name,
		prefix:   "$KV." + strings.TrimPrefix(origin, streamPrefix) + ".",
		messages: make(chan *nats.Msg, 2*batch+64),
	}
	threshold := inactiveThreshold
	if limit := info.Config.ConsumerLimits.InactiveThreshold; limit > 0 {
		threshold = min(threshold, limit)
	}
	config := jetstream.ConsumerConfig{
		Description:       "caddy-discovery",
		DeliverPolicy:     policy,
		AckPolicy:         jetstream.AckNonePolicy,
		FilterSubject:     f.prefix + cmp.Or(key, ">"),
		InactiveThreshold: threshold,
		MemoryStorage:     true,
		Replicas:          1,
	}
	consumer, err := s.js.CreateConsumer(ctx, f.stream, config)
	if isAPIError(err, codeNoTier) {
		// The account allows no consumer on a single server. What it allows is
		// what the bucket has.
		config.Replicas = info.Config.Replicas
		consumer, err = s.js.CreateConsumer(ctx, f.stream, config)
	}
	if err != nil {
		return nil, err
	}
	created := consumer.CachedInfo()
	f.consumer = created.Name
	f.listed = created.NumPending
	f.window = newWindow(created.Config)
	f.subscription, err = s.link.ChanSubscribe(s.link.NewInbox(), f.messages)
	if err != nil {
		f.close(ctx)
		return nil, err
	}
	f.silence = time.NewTimer(maxSilence)
	f.opened = time.Now()
	return f, nil
}

// errWoken: something beside the feed wants to be looked at.
var errWoken = errors.New("woken")

// errSilent: neither a message nor a heartbeat came.
var errSilent = fmt.Errorf("no heartbeat for %v", maxSilence)

// next returns the next message, or nil after a heartbeat: then the server had
// nothing to deliver for a while. The error is the context's cause once that
// ended, errWoken, errSilent, or what the server or a gap says.
func (f *feed) next(ctx context.Context) (*message, error) {
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err := f.ask(); err != nil {
			return nil, err
		}
		var m *nats.Msg
		select {
		case m = <-f.messages:
		case <-f.wake:
			return nil, errWoken
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-f.silence.C:
			if len(f.messages) == 0 {
				return nil, errSilent
			}
			// It was us who did not listen.
			f.silence.Reset(maxSilence)
			continue
		}
		f.silence.Reset(maxSilence)

		// A stored message has the subject of its key, whatever its headers
		// claim; the server's own words come under the subject of the request.
		if m.Subject != f.subscription.Subject {
			return f.read(m)
		}
		heartbeat, err := f.window.status(m.Header)
		if errors.Is(err, errGone) && f.received == 0 && time.Since(f.opened) < interestGrace {
			// The members of a cluster hear of a new consumer one after the other.
			f.window.unanswered()
			select {
			case <-time.After(interestWait):
			case <-ctx.Done():
			}
			continue
		}
		if heartbeat || err != nil {
			return nil, err
		}
	}
}

// read reads a message that the consumer delivered.
func (f *feed) read(m *nats.Msg) (*message, error) {
	meta, err := m.Metadata()
	if err != nil {
		return nil, fmt.Errorf("a message on %q that no consumer sent: %w", discovery.Clip(m.Subject), err)
	}
	f.window.delivered()
	if want := f.received + 1; meta.Sequence.Consumer != want {
		return nil, fmt.Errorf("a gap: got message %d of the consumer, want %d", meta.Sequence.Consumer, want)
	}
	f.received = meta.Sequence.Consumer
	return &message{
		key:      strings.TrimPrefix(m.Subject, f.prefix),
		data:     m.Data,
		header:   m.Header,
		sequence: meta.Sequence.Stream,
		number:   meta.Sequence.Consumer,
		time:     meta.Timestamp,
		pending:  meta.NumPending,
	}, nil
}

// ask asks for more messages where few are on their way.
func (f *feed) ask() error {
	for _, request := range f.window.due() {
		data, err := json.Marshal(request)
		if err != nil {
			return err
		}
		subject := f.session.api + "CONSUMER.MSG.NEXT." + f.stream + "." + f.consumer
		if err := f.session.link.PublishRequest(subject, f.subscription.Subject, data); err != nil {
			return err
		}
	}
	return nil
}

// list reads what there was when the feed was opened.
func (f *feed) list(ctx context.Context, take func(*message)) error {
	for done := f.listed == 0; !done; {
		m, err := f.next(ctx)
		if err != nil {
			return err
		}
		if m != nil {
			take(m)
		}
		if done, err = f.complete(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

// complete reports whether next has returned all that there was when the feed was
// opened, with what it returned last.
func (f *feed) complete(ctx context.Context, m *message) (bool, error) {
	if m == nil {
		// What was counted may have expired before it was sent.
		return f.exhausted(ctx, f.received)
	}
	return m.number >= f.listed || m.pending == 0, nil
}

// exhausted asks the server whether it has nothing more for us than the
// messages up to number.
func (f *feed) exhausted(ctx context.Context, number uint64) (bool, error) {
	consumer, err := f.session.js.Consumer(ctx, f.stream, f.consumer)
	if err != nil {
		return false, err
	}
	info := consumer.CachedInfo()
	return info.NumPending == 0 && info.Delivered.Consumer <= number, nil
}

// close ends the feed and removes its consumer, as far as the connection still
// allows: what is left behind, the server removes by itself. It works although
// ctx has ended.
func (f *feed) close(ctx context.Context) {
	if f.silence != nil {
		f.silence.Stop()
	}
	if f.subscription != nil {
		_ = f.subscription.Unsubscribe()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deleteTimeout)
	defer cancel()
	ctx, release := f.session.guard(ctx, []string{"CONSUMER.DELETE." + f.stream})
	defer release()
	_ = f.session.js.DeleteConsumer(ctx, f.stream, f.consumer)
}
