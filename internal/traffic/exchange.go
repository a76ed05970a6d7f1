// Package traffic watches what becomes of the requests that a handler sends to nodes.
//
// A [Transport] stands before the transport of the handler. For each attempt that goes to
// a node of a source that has observers it tells them of one [Exchange], three times:
// when it is sent, when the header of the response is there, and when it is over. That is
// one mechanism for all that goes by the traffic: balancing by latency, reports of load in
// responses, ejection of outliers, metrics. A handler without observers has no such
// transport, and pays nothing.
//
// What became of an attempt is told apart so far as it says something of the node, see
// [Outcome]: what a client aborts counts neither for a node nor against it.
package traffic

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// An Observer is told of the attempts that are sent to the nodes of a source. All its
// methods are called in the request's way and by many goroutines at once, so that they
// must be quick and safe for that, and must not block. The exchange is theirs for the
// call only.
type Observer interface {
	// Sent is called just before an attempt is sent.
	Sent(*Exchange)
	// Answered is called when the header of the response is there, before Caddy sees it:
	// what is taken off the header of the exchange's response does not reach the client.
	// Where there is no response, it is not called.
	Answered(*Exchange)
	// Done is called once for each Sent, when nothing more comes of it: the body of the
	// response has been read or is not wanted any more, the connection of an upgraded
	// protocol is closed, or there was no response. If the response has trailers, they
	// are there.
	Done(*Exchange)
}

// Outcome is what became of an attempt.
type Outcome uint8

// The outcomes.
const (
	// Answered: there was a response, whatever its status, and all of it that was wanted.
	Answered Outcome = iota
	// NoConnection: nothing was sent, because no connection was made.
	NoConnection
	// NoAnswer: it was sent, at least in part, and no header of a response came. A
	// handshake of TLS that fails is one of these.
	NoAnswer
	// BrokeOff: the response ended before its end.
	BrokeOff
	// Aborted: whoever sent the request gave it up, or its body broke off on its way to
	// us. It says nothing of the node, except for a status that was there before.
	Aborted
)

// Exchange is one attempt to have a node answer a request.
type Exchange struct {
	Node *discovery.Entry
	// Retry is how many attempts of the same request at this handler came before.
	Retry int

	// When it was sent, when the header of the response was there (0: there was none),
	// and when it was over: by Now.
	SentAt, AnsweredAt, DoneAt time.Duration
	// Status is the response's as it came, 0 without one; 101 for an upgrade, where the
	// exchange goes on for as long as the connection.
	Status int
	// Response is there from Answered on, nil if there was none. Its body is not the
	// observers'.
	Response *http.Response

	// Outcome and Err, which says more where it is not Answered, are known to Done.
	Err     error
	Outcome Outcome

	over      atomic.Bool
	closed    atomic.Bool // the body of the request, by the transport
	failed    atomic.Bool // to read the body of the request
	uploads   io.ReadCloser
	downloads io.ReadCloser   // the body of the response
	client    context.Context //nolint:containedctx // of the request, whose end is the client's
	observers []Observer
	count     *Count // where it is counted, by those that count
}

// epoch is when the clock of exchanges began.
var epoch = time.Now()

// Now returns the time of the clock by which exchanges are timed: monotonic, and since
// somewhen in the past.
func Now() time.Duration { return time.Since(epoch) }

// Context returns that of the request, from Sent on.
func (x *Exchange) Context() context.Context { return x.client }

// Prepare makes the exchange that of an attempt that is about to be sent.
func (x *Exchange) Prepare(node *discovery.Entry, retry int, observers []Observer) {
	x.Node, x.Retry, x.observers = node, retry, observers
}

// send begins the exchange with a request, whose body it may replace.
func (x *Exchange) send(req *http.Request) {
	x.client = req.Context()
	if req.Body != nil && req.Body != http.NoBody && !inMemory(req.Body) {
		x.uploads = req.Body
		req.Body = (*upload)(x)
	}
	x.SentAt = Now()
	for _, o := range x.observers {
		o.Sent(x)
	}
}

// received goes on with what a transport returned.
func (x *Exchange) received(res *http.Response, err error) {
	if err != nil {
		x.done(x.blame(err), err)
		return
	}
	x.AnsweredAt = Now()
	x.Response, x.Status = res, res.StatusCode
	for _, o := range x.observers {
		o.Answered(x)
	}
	switch conn, upgraded := res.Body.(io.ReadWriteCloser); {
	case res.Body == nil || res.Body == http.NoBody:
		x.done(Answered, nil)
	case upgraded && res.StatusCode == http.StatusSwitchingProtocols:
		res.Body = x.upgrade(conn)
	default:
		x.downloads = res.Body
		res.Body = (*download)(x)
	}
}

// blame returns whose doing an error is that came instead of a response.
func (x *Exchange) blame(err error) Outcome {
	switch {
	case errors.Is(x.client.Err(), context.Canceled), errors.Is(err, context.Canceled), x.failed.Load():
		return Aborted
	case errors.As(err, new(reverseproxy.DialError)):
		return NoConnection
	}
	return NoAnswer
}

// returned is called when the transport has returned, or panicked.
func (x *Exchange) returned() {
	if x.Response == nil {
		x.done(NoAnswer, errors.New("the transport panicked"))
	}
}

// done ends the exchange, if it is not over yet.
func (x *Exchange) done(outcome Outcome, err error) {
	if !x.over.CompareAndSwap(false, true) {
		return
	}
	x.DoneAt, x.Outcome, x.Err = Now(), outcome, err
	for _, o := range x.observers {
		o.Done(x)
	}
}
