package natskv

import (
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
	// maxRequests is how many requests that may be at once, where the server
	// allows fewer messages for each.
	maxRequests = 8
	// maxRequestBytes is how much one request may bring: as much as a batch of
	// usual records. Somebody may have put values of megabytes there.
	maxRequestBytes = 4 << 20
	// requestTTL is how long one request for messages lasts.
	requestTTL = 30 * time.Second
	// heartbeat is how often an idle server shows that the consumer lives.
	heartbeat = time.Second
)

// A window says how many messages a feed is to ask for next, so that enough are on
// their way and never too many. It counts what was asked for and what came of it. It is
// used by one goroutine.
type window struct {
	limit, most int           // of messages: in one request, and on their way altogether
	maxBytes    int           // of one request
	expires     time.Duration // of one request

	wanted   int  // asked for and not yet delivered
	tooLarge bool // the next message is larger than maxBytes
	alone    bool // and is asked for by itself
}

// newWindow returns the window of what the server allows, which it writes into the
// configuration of the consumer.
func newWindow(config jetstream.ConsumerConfig) window {
	w := window{limit: batch, expires: requestTTL, maxBytes: maxRequestBytes}
	if config.MaxRequestBatch > 0 {
		w.limit = min(w.limit, config.MaxRequestBatch)
	}
	if config.MaxRequestExpires > 0 {
		w.expires = min(w.expires, config.MaxRequestExpires)
	}
	if config.MaxRequestMaxBytes > 0 {
		w.maxBytes = min(w.maxBytes, config.MaxRequestMaxBytes)
	}
	w.most = min(batch, maxRequests*w.limit)
	return w
}

// A request asks for messages, as the server reads it.
type request struct {
	Batch     int           `json:"batch"`
	MaxBytes  int           `json:"max_bytes,omitempty"`
	Expires   time.Duration `json:"expires"`
	Heartbeat time.Duration `json:"idle_heartbeat"`
}

// due returns the requests that are to be made now: where few messages are on their
// way, or the next one is too large to come with others.
func (w *window) due() (requests []request) {
	// Every request that waited has met the same large message.
	if w.tooLarge && !w.alone {
		w.alone = true
		w.wanted++
		requests = append(requests, request{1, 0, w.expires, heartbeat})
	}
	w.tooLarge = false
	if w.wanted > w.most/2 {
		return requests
	}
	for w.wanted < w.most {
		n := min(w.limit, w.most-w.wanted)
		w.wanted += n
		requests = append(requests, request{n, w.maxBytes, w.expires, heartbeat})
	}
	return requests
}

// delivered counts a message that came.
func (w *window) delivered() {
	w.wanted--
	w.alone = false
}

// unanswered takes back a request that nobody has taken.
func (w *window) unanswered() { w.wanted = max(w.wanted-w.limit, 0) }

// errGone: nobody takes requests for messages.
var errGone = errors.New("the consumer is gone")

// status takes up what the server says of a request, and reports whether it is only a
// heartbeat.
func (w *window) status(header nats.Header) (heartbeat bool, err error) {
	status, description := header.Get("Status"), strings.ToLower(header.Get("Description"))
	unfulfilled := func() {
		left, err := strconv.Atoi(header.Get("Nats-Pending-Messages"))
		if err != nil {
			left = w.wanted
		}
		w.wanted = max(w.wanted-left, 0)
	}
	switch {
	case status == "100":
		return true, nil
	case status == "404", status == "408":
		// The request has run out: ask again for what it did not bring.
		unfulfilled()
		w.alone = false
		return false, nil
	case status == "409" && description == "batch completed":
		return false, nil // with fewer bytes than were allowed
	case status == "409" && strings.HasSuffix(description, "exceeds maxbytes"):
		// What the request may still bring is less than the next message. If it
		// has brought nothing yet, no other one like it will either.
		unfulfilled()
		if header.Get("Nats-Pending-Bytes") == strconv.Itoa(w.maxBytes) {
			w.tooLarge = true
		}
		return false, nil
	case status == "503":
		return false, errGone
	default:
		return false, fmt.Errorf("the server says: %s %s", status, description)
	}
}
