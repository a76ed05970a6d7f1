package redis

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// How many entries one XREAD asks for: each may hold a record.
	streamCount = 250
	// How long one XREAD waits for changes.
	block = time.Second
	// How long a subscription may say nothing before it is asked, and then to
	// answer. A connection cut by a packet filter said nothing for 90 s.
	silence = 2 * time.Second
)

// A feed brings to the loop of a watch what the goroutines around it learn of the
// server. They only read from there; the loop alone emits and changes what is known.
type feed struct {
	client *client
	emit   func(discovery.Event) // for the loop only

	found    chan func() (request, error) // what the loop is to take in, and then to look at
	messages chan *goredis.Message        // of subscriptions
	failed   chan error                   // a goroutine gave up
	group    sync.WaitGroup
	closers  []func()
}

// close closes the connections and waits for the goroutines, whose context has ended.
func (f *feed) close() {
	for _, c := range f.closers {
		c()
	}
	f.group.Wait()
}

// closeWith closes what may block when the watch ends, and does not wait for
// the watch to notice: a call that is under way is what keeps it from noticing.
func (f *feed) closeWith(ctx context.Context, c io.Closer) {
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	f.closers = append(f.closers, func() {
		if stop() {
			_ = c.Close()
		}
	})
}

// send lets the loop take in what was found. It reports false if the watch has ended.
func (f *feed) send(ctx context.Context, apply func() (request, error)) bool {
	select {
	case f.found <- apply:
		return true
	case <-ctx.Done():
		return false
	}
}

// fail ends the watch.
func (f *feed) fail(err error) {
	select {
	case f.failed <- err:
	default:
	}
}

// read starts to read a stream after an id, on a connection of its own: what
// blocks cannot be interrupted but by closing it.
func (f *feed) read(ctx context.Context, c *goredis.Client, key, id string, apply func([]goredis.XMessage) (request, error)) {
	f.group.Go(func() {
		for {
			// The library's own limit for a blocked read is ten seconds more.
			readCtx, cancel := context.WithTimeout(ctx, block+readTimeout)
			streams, err := c.XRead(readCtx, &goredis.XReadArgs{
				Streams: []string{key, id}, Count: streamCount, Block: block,
			}).Result()
			cancel()
			switch {
			case ctx.Err() != nil:
				return
			case err == goredis.Nil:
				continue
			case err != nil:
				f.fail(fmt.Errorf("reading the stream of changes: %w", explain(err)))
				return
			}
			entries := streams[0].Messages
			id = entries[len(entries)-1].ID
			if !f.send(ctx, func() (request, error) { return apply(entries) }) {
				return
			}
		}
	})
}

// notifies reports whether the server publishes keyspace notifications of the
// given classes. Where CONFIG is forbidden it cannot be known, so no.
func (f *feed) notifies(ctx context.Context, c *goredis.Client, classes string) (bool, error) {
	const name = "notify-keyspace-events"
	answer, err := ask(ctx, f.client, func(ctx context.Context) (map[string]string, error) {
		return c.ConfigGet(ctx, name).Result()
	})
	if ok, err := offered(err); !ok {
		return false, err
	}
	flags := answer[name]
	all := strings.Contains(flags, "A") || strings.Trim(classes, flags) == ""
	return all && strings.Contains(flags, "K"), nil
}

// subscribe receives notifications until the watch ends, and returns once the
// server has confirmed that it sends them, or false if it does not let us. A
// subscription that breaks ends the watch: what was published meanwhile is lost.
func (f *feed) subscribe(ctx context.Context, c goredis.UniversalClient, pattern bool, channels ...string) (bool, error) {
	s := c.PSubscribe(ctx) // dials nothing yet
	f.closeWith(ctx, s)
	err := f.client.do(ctx, func(ctx context.Context) error {
		subscribe := s.Subscribe
		if pattern {
			subscribe = s.PSubscribe
		}
		if err := subscribe(ctx, channels...); err != nil {
			return err
		}
		for range channels {
			m, err := s.ReceiveTimeout(ctx, readTimeout)
			if _, ok := m.(*goredis.Subscription); err == nil && !ok {
				err = fmt.Errorf("it answered %T", m)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		_ = s.Close()
		return offered(fmt.Errorf("subscribing to notifications: %w", err))
	}
	f.group.Go(func() {
		if err := f.receive(ctx, s); ctx.Err() == nil {
			f.fail(err)
		}
	})
	return true, nil
}

// receive hands on what is published, until the subscription breaks.
func (f *feed) receive(ctx context.Context, s *goredis.PubSub) error {
	asked := false
	for {
		m, err := s.ReceiveTimeout(ctx, silence)
		switch {
		case err == nil:
			asked = false
		case !asked && isTimeout(err):
			asked = true
			err = s.Ping(ctx)
		}
		if err != nil {
			return fmt.Errorf("subscribed to notifications: %w", explain(err))
		}
		switch m := m.(type) {
		case *goredis.Message:
			select {
			case f.messages <- m:
			case <-ctx.Done():
				return ctx.Err()
			}
		case *goredis.Subscription:
			// Only a new connection is confirmed again.
			return fmt.Errorf("%w: the subscription to notifications was interrupted", discovery.ErrBroken)
		}
	}
}
