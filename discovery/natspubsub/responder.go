package natspubsub

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

const (
	// maxQueries is how many queries may wait to be answered. Who asks in vain
	// listens instead.
	maxQueries = 1024
	// maxQueryBytes is how much of what they say may wait, of which nothing is read.
	maxQueryBytes = 1 << 20
	// answerChunk is how many records of ours answer a query before the server
	// has to have taken them within chunkTimeout, so that announcing never waits
	// behind thousands.
	answerChunk  = 256
	chunkTimeout = 2 * time.Second
)

// A responder answers queries with our own records, on one connection after the other.
// It may be used concurrently.
type responder struct {
	subject string
	own     *ownRecords
	running sync.WaitGroup

	mu     sync.Mutex     // guards what follows
	link   *natslink.Link // the last connection
	closed bool
}

// serve sees to it that queries on the connection are answered, until it is lost. It
// is called before anything else is published there. A connection that is lost is left
// alone: the next one may be served already.
func (a *responder) serve(link *natslink.Link) error {
	a.mu.Lock()
	if a.closed || a.link == link || link.IsClosed() {
		a.mu.Unlock()
		return nil
	}
	a.link = link
	a.running.Add(1) // under the lock, so that wait waits for it
	a.mu.Unlock()

	queries, err := link.SubscribeSync(a.subject)
	if err == nil {
		err = queries.SetPendingLimits(maxQueries, maxQueryBytes)
	}
	if err != nil {
		a.running.Done()
		return err
	}
	go func() {
		defer a.running.Done()
		a.run(link, queries)
	}()
	return nil
}

// close lets serve do nothing any more.
func (a *responder) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
}

// wait waits until nothing is answered any more, after close and the end of the
// connection.
func (a *responder) wait() { a.running.Wait() }

// run answers queries until the connection is lost.
func (a *responder) run(link *natslink.Link, queries *nats.Subscription) {
	ctx, release := link.Guard(context.Background(), func(natslink.Operation, string) bool { return false })
	defer release()
	for {
		m, err := queries.NextMsgWithContext(ctx)
		switch {
		case err == nil:
			a.answer(ctx, link, m.Reply)
		case !errors.Is(err, nats.ErrSlowConsumer): // which is told once for all that were dropped
			return
		}
	}
}

// answer answers one query with every record of ours that stands, a message each.
// Where there is none, any more, it answers with nothing, so that nobody waits for us.
func (a *responder) answer(ctx context.Context, link *natslink.Link, to string) {
	// Whoever may ask could otherwise make us publish, with our own rights, to
	// whatever he likes.
	if !link.IsInbox(to) {
		return
	}
	sent := 0
	for ids := range slices.Chunk(a.own.ids(), answerChunk) {
		unlock, err := a.own.lock(ctx)
		if err != nil {
			return
		}
		for _, id := range ids {
			// It may have been withdrawn since.
			if data := a.own.data(id); data != nil && link.Publish(to, data) == nil {
				sent++
			}
		}
		unlock()
		if link.FlushTimeout(chunkTimeout) != nil {
			return
		}
	}
	if sent == 0 {
		_ = link.Publish(to, nil) // a lost connection ends run
	}
}
