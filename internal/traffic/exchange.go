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

// An UploadObserver is an observer that wants to know when a node has a request whole.
type UploadObserver interface {
	Observer
	// Uploaded is called once for each exchange whose Uploads says that it waits for the
	// client, when the body of the request has been read to its end, or that does not
	// matter any more: there is a response, or there will be none. It may be called by
	// another goroutine, at the time of Answered or Done.
	Uploaded(x *Exchange, now time.Duration)
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
	// Unavailable says that the header of the response has gRPC's status 14: the node does
	// not take up the call. A call that it does take up has its status in the trailer.
	Unavailable bool
	// Response is there from Answered on, nil if there was none. Its body is not the
	// observers'.
	Response *http.Response

	// Outcome and Err, which says more where it is not Answered, are known to Done.
	Err     error
	Outcome Outcome

	over      atomic.Bool
	closed    atomic.Bool  // the body of the request, by the transport
	failed    atomic.Bool  // to read the body of the request
	uploaded  atomic.Bool  // the body, or UploadObserver has been told that it does not matter
	wholeAt   atomic.Int64 // when all of the body had been read; 0: it was not, or there is none
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

// Uploads reports whether the body of the request comes from the client while it is sent.
func (x *Exchange) Uploads() bool { return x.uploads != nil }

// endUpload tells those who want to know that there is nothing more to wait for of the body.
func (x *Exchange) endUpload(now time.Duration) {
	if x.uploads == nil || !x.uploaded.CompareAndSwap(false, true) {
		return
	}
	for _, o := range x.observers {
		if o, ok := o.(UploadObserver); ok {
			o.Uploaded(x, now)
		}
	}
}

// Waited returns how long the node took to begin its answer, or to fail to. It is from when
// all of the request had been read, as HAProxy's Tr, so that what a client takes to send is
// not the node's. Where the answer came before, as in streams, it is from when the request
// was sent; where it failed before, it is 0.
func (x *Exchange) Waited() time.Duration {
	end, whole := x.AnsweredAt, time.Duration(x.wholeAt.Load())
	if end == 0 {
		end = x.DoneAt
	}
	switch {
	case x.uploads == nil:
		return end - x.SentAt
	case whole > 0 && whole <= end:
		return end - whole
	case x.AnsweredAt == 0:
		return 0
	}
	return end - x.SentAt
}

// received goes on with what a transport returned.
func (x *Exchange) received(res *http.Response, err error) {
	if err != nil {
		x.done(x.blame(err), err)
		return
	}
	x.AnsweredAt = Now()
	x.endUpload(x.AnsweredAt)
	x.Response, x.Status = res, res.StatusCode
	if grpc := res.Header["Grpc-Status"]; len(grpc) == 1 && grpc[0] == "14" {
		x.Unavailable = true
	}
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
	x.endUpload(x.DoneAt)
	for _, o := range x.observers {
		o.Done(x)
	}
}
