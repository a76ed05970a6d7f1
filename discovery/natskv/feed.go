package natskv

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// batch is how many messages may be on their way to us. Half of it is
	// asked for again when half has come, so that a long list never waits for a
	// round trip.
	batch = 2048
	// requestTTL is how long one request for messages lasts.
	requestTTL = 30 * time.Second
	// heartbeat is how often an idle server shows that the consumer lives.
	heartbeat = time.Second
	// maxSilence is how long nothing may come before the stream counts as
	// broken: two heartbeats and some delay.
	maxSilence = 2500 * time.Millisecond
	// inactiveThreshold is after how long the server drops a consumer whose
	// reader went away without a word.
	inactiveThreshold = 10 * time.Second
	// deleteTimeout bounds the wait for the answer to the farewell. It is part of
	// every exit of a proxy, and the request is under way in any case.
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

	subscription *nats.Subscription
	messages     chan *nats.Msg
	wanted       int    // asked for and not yet delivered
	received     uint64 // number of the last message
	silence      *time.Timer
}

// feedNeeds returns the subjects that a feed publishes to. That of its farewell
// is not among them: it may be denied.
func feedNeeds() []string {
	return []string{"CONSUMER.CREATE.", "CONSUMER.MSG.NEXT.", "CONSUMER.INFO."}
}

// open opens a feed of the keys, all of them if there are none. It must be
// closed.
func (s *session) open(ctx context.Context, info *jetstream.StreamInfo, policy jetstream.DeliverPolicy, key string) (*feed, error) {
	f := &feed{
		session: s,
		stream:  info.Config.Name,
		// A mirror holds the subjects of the bucket that it mirrors.
		prefix:   "$KV." + strings.TrimPrefix(info.Config.Name, streamPrefix) + ".",
		messages: make(chan *nats.Msg, 2*batch+64),
	}
	if m := info.Config.Mirror; m != nil {
		f.prefix = "$KV." + strings.TrimPrefix(m.Name, streamPrefix) + "."
	}
	if key == "" {
		key = ">"
	}
	threshold := inactiveThreshold
	if limit := info.Config.ConsumerLimits.InactiveThreshold; limit > 0 {
		threshold = min(threshold, limit)
	}
	consumer, err := s.js.CreateConsumer(ctx, f.stream, jetstream.ConsumerConfig{
		Description:       "caddy-discovery",
		DeliverPolicy:     policy,
		AckPolicy:         jetstream.AckNonePolicy,
		FilterSubject:     f.prefix + key,
		InactiveThreshold: threshold,
		MemoryStorage:     true,
		Replicas:          1,
	})
	if err != nil {
		return nil, err
	}
	f.consumer = consumer.CachedInfo().Name
	f.listed = consumer.CachedInfo().NumPending
	f.subscription, err = s.link.ChanSubscribe(s.link.NewInbox(), f.messages)
	if err != nil {
		f.close(ctx)
		return nil, err
	}
	f.silence = time.NewTimer(maxSilence)
	return f, nil
}

// errSilent: neither a message nor a heartbeat came.
var errSilent = fmt.Errorf("no heartbeat for %v", maxSilence)

// next returns the next message, or nil after a heartbeat: then the server had
// nothing to deliver for a while. The error is the context's cause once that
// ended, errSilent, or what the server or a gap says.
func (f *feed) next(ctx context.Context) (*message, error) {
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if f.wanted <= batch/2 {
			if err := f.request(batch - f.wanted); err != nil {
				return nil, err
			}
		}
		var m *nats.Msg
		select {
		case m = <-f.messages:
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
			return f.take(m)
		}
		switch status := m.Header.Get("Status"); status {
		case "100":
			return nil, nil
		case "404", "408":
			// The request has run out: ask again for what it did not bring.
			left, err := strconv.Atoi(m.Header.Get("Nats-Pending-Messages"))
			if err != nil {
				left = f.wanted
			}
			f.wanted = max(f.wanted-left, 0)
		case "503":
			return nil, errors.New("the consumer is gone")
		default:
			return nil, fmt.Errorf("the server says: %s %s", status, strings.ToLower(m.Header.Get("Description")))
		}
	}
}

// take reads a message that the consumer delivered.
func (f *feed) take(m *nats.Msg) (*message, error) {
	meta, err := m.Metadata()
	if err != nil {
		return nil, fmt.Errorf("a message on %q that no consumer sent: %w", clip(m.Subject), err)
	}
	f.wanted--
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

func (f *feed) request(n int) error {
	data, err := json.Marshal(struct {
		Batch     int           `json:"batch"`
		Expires   time.Duration `json:"expires"`
		Heartbeat time.Duration `json:"idle_heartbeat"`
	}{n, requestTTL, heartbeat})
	if err != nil {
		return err
	}
	subject := f.session.api + "CONSUMER.MSG.NEXT." + f.stream + "." + f.consumer
	if err := f.session.link.PublishRequest(subject, f.subscription.Subject, data); err != nil {
		return err
	}
	f.wanted += n
	return nil
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
	ctx, release := f.session.link.Guard(ctx, func(subject string) bool {
		return strings.HasPrefix(subject, f.session.api+"CONSUMER.DELETE.")
	})
	defer release()
	_ = f.session.js.DeleteConsumer(ctx, f.stream, f.consumer)
}
