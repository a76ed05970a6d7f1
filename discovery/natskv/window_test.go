package natskv

import (
	"fmt"
	"strconv"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// said is what the server says of a request.
func said(status, description string, messages, bytes int) nats.Header {
	return nats.Header{
		"Status": {status}, "Description": {description},
		"Nats-Pending-Messages": {strconv.Itoa(messages)}, "Nats-Pending-Bytes": {strconv.Itoa(bytes)},
	}
}

// Half of what may be on its way is asked for again when half has come, or nothing
// will come any more of what was asked for.
func TestWindowIsRefilled(t *testing.T) {
	t.Parallel()
	for limit, want := range map[int]string{ // what the server allows for one request
		0:    "[2048]",
		500:  "[500 500 500 500 48]",
		1:    "[1 1 1 1 1 1 1 1]",
		9000: "[2048]",
	} {
		w := newWindow(jetstream.ConsumerConfig{MaxRequestBatch: limit})
		asked := func() string {
			var sizes []int
			for _, r := range w.due() {
				if r.MaxBytes != maxRequestBytes || r.Expires != requestTTL {
					t.Errorf("limit %d: asked for %+v", limit, r)
				}
				sizes = append(sizes, r.Batch)
			}
			return fmt.Sprint(sizes)
		}
		if got := asked(); got != want {
			t.Errorf("limit %d: asked for %s at first, want %s", limit, got, want)
		}
		most := w.most
		for range most/2 - 1 {
			w.delivered()
		}
		if got := asked(); got != "[]" {
			t.Errorf("limit %d: asked for %s before half has come", limit, got)
		}
		w.delivered()
		if asked(); w.wanted != most {
			t.Errorf("limit %d: %d are on their way after half has come, want %d", limit, w.wanted, most)
		}
		if _, err := w.status(said("408", "Request Timeout", most, maxRequestBytes)); err != nil {
			t.Error(err)
		}
		if got := asked(); got != want {
			t.Errorf("limit %d: asked for %s after the requests ran out, want %s", limit, got, want)
		}
	}
}

// A message that is larger than one request may bring is asked for by itself, once.
func TestWindowAsksForALargeMessageAlone(t *testing.T) {
	t.Parallel()
	w := newWindow(jetstream.ConsumerConfig{})
	w.due()
	// Some of it came before, so that another request may bring the message.
	if _, err := w.status(said("409", "Message Size Exceeds MaxBytes", 2040, maxRequestBytes-1)); err != nil {
		t.Fatal(err)
	}
	for _, r := range w.due() {
		if r.MaxBytes == 0 {
			t.Errorf("asked for %+v although it is not known to be too large", r)
		}
	}
	alone := 0
	for range 3 { // requests that waited
		if _, err := w.status(said("409", "Message Size Exceeds MaxBytes", 10, maxRequestBytes)); err != nil {
			t.Fatal(err)
		}
		for _, r := range w.due() {
			if r.MaxBytes == 0 {
				alone += r.Batch
			}
		}
	}
	if alone != 1 {
		t.Errorf("asked for %d messages of any size, want the one", alone)
	}
	w.delivered()
	if w.alone {
		t.Error("it has come and is waited for")
	}
}

func TestWindowStatus(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		header    nats.Header
		heartbeat bool
		fails     bool
	}{
		"heartbeat": {said("100", "Idle Heartbeat", 0, 0), true, false},
		"completed": {said("409", "Batch Completed", 0, 0), false, false},
		"gone":      {said("503", "", 0, 0), false, true},
		"deleted":   {said("409", "Consumer Deleted", 0, 0), false, true},
	} {
		w := newWindow(jetstream.ConsumerConfig{})
		w.due()
		if heartbeat, err := w.status(test.header); heartbeat != test.heartbeat || (err != nil) != test.fails {
			t.Errorf("%s: %t, %v", name, heartbeat, err)
		}
	}
}
