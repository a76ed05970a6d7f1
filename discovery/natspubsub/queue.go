package natspubsub

import (
	"sync/atomic"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// maxPending is how many messages may wait to be emitted: more than the
	// answers of the largest fleet that a directory holds.
	maxPending = 1 << 17
	// maxPendingBytes is how much room they may take.
	maxPendingBytes = 64 << 20
	// largeMessage is from which size on messages share half of that room only, so
	// that a few writers of large records leave room for the usual ones.
	largeMessage = 4 << 10
	// messageOverhead is about what a message takes beside its data.
	messageOverhead = 64
	// statusNoResponders is what the server itself answers to a request that nobody
	// subscribes to.
	statusNoResponders = "503"
)

// An arrival is one message that waits to be emitted.
type arrival struct {
	subscription *nats.Subscription
	data         []byte
	noResponders bool          // the server says that nobody is there to answer
	tooLarge     int           // the size of data that were too large to keep
	mark         chan struct{} // closed when everything before it is emitted
}

// A queue takes what arrives, in order and without ever blocking the connection,
// and holds it within bounds until it is emitted. What exceeds them is dropped.
type queue struct {
	in    chan *nats.Msg     // all subscriptions put here
	marks chan chan struct{} // who waits puts here what is closed when all that is in has come out
	out   chan arrival
	// empty can be received from while nothing waits.
	empty chan struct{}
	// overflow is closed when something was dropped and all that was not has been
	// taken out.
	overflow chan struct{}
	dropped  atomic.Int64
	// lastDropped is where the last message came that was dropped.
	lastDropped atomic.Pointer[nats.Subscription]

	ended chan struct{} // closed when nobody takes any more
	done  chan struct{}

	waiting            []arrival
	bytes, largeBytes  int
	maxBytes, maxCount int
}

func newQueue() *queue {
	return &queue{
		in:       make(chan *nats.Msg, maxPending),
		marks:    make(chan chan struct{}),
		out:      make(chan arrival),
		empty:    make(chan struct{}),
		overflow: make(chan struct{}),
		ended:    make(chan struct{}),
		done:     make(chan struct{}),
		maxBytes: maxPendingBytes,
		maxCount: maxPending,
	}
}

// close ends run and waits for it.
func (q *queue) close() {
	close(q.ended)
	<-q.done
}

// idle reports whether everything that has arrived was taken out. It may say no
// although that is so.
func (q *queue) idle() bool {
	select {
	case <-q.empty:
		return len(q.in) == 0
	default:
		return false
	}
}

// run moves messages until close.
func (q *queue) run() {
	defer close(q.done)
	told := false
	for {
		var (
			out   chan<- arrival
			empty chan<- struct{}
			first arrival
		)
		if len(q.waiting) > 0 {
			out, first = q.out, q.waiting[0]
		} else {
			empty = q.empty
			if !told && q.dropped.Load() > 0 && len(q.in) == 0 {
				told = true
				close(q.overflow)
			}
		}
		select {
		case m := <-q.in:
			q.put(m)
		case mark := <-q.marks:
			for range len(q.in) {
				q.put(<-q.in)
			}
			// They are no more than callers who wait.
			q.waiting = append(q.waiting, arrival{mark: mark})
		case out <- first:
			q.pop()
		case empty <- struct{}{}:
		case <-q.ended:
			return
		}
	}
}

// put takes a message in, or drops it.
func (q *queue) put(m *nats.Msg) {
	a := arrival{subscription: m.Sub, data: m.Data}
	switch {
	case len(m.Data) > discovery.MaxRecord:
		a.data, a.tooLarge = nil, len(m.Data) // it would be refused in any case
	case len(m.Data) == 0:
		a.noResponders = m.Header.Get("Status") == statusNoResponders
	}
	size := a.size()
	large := 0
	if size > largeMessage {
		large = size
	}
	if len(q.waiting) >= q.maxCount || q.bytes+size > q.maxBytes || large > 0 && q.largeBytes+large > q.maxBytes/2 {
		q.lastDropped.Store(m.Sub)
		q.dropped.Add(1)
		return
	}
	q.bytes += size
	q.largeBytes += large
	q.waiting = append(q.waiting, a)
}

func (q *queue) pop() {
	if first := q.waiting[0]; first.mark == nil {
		size := first.size()
		q.bytes -= size
		if size > largeMessage {
			q.largeBytes -= size
		}
	}
	q.waiting[0] = arrival{}
	if q.waiting = q.waiting[1:]; len(q.waiting) == 0 {
		q.waiting = nil // what a wave of messages took is not kept
	}
}

func (a *arrival) size() int { return len(a.data) + messageOverhead }
