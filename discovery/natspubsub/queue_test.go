package natspubsub

import (
	"bytes"
	"runtime"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func TestQueueBounds(t *testing.T) {
	t.Parallel()
	const maxBytes, maxCount = 1 << 20, 2000
	for name, test := range map[string]struct {
		sizes []int // of what arrives, over and over, 10,000 times
		count int   // how many are kept of each, about
		bytes int   // at most
	}{
		"small":     {sizes: []int{100}, count: maxCount, bytes: maxCount * 200},
		"large":     {sizes: []int{60 << 10}, count: maxBytes / 2 / (60<<10 + messageOverhead), bytes: maxBytes / 2},
		"too large": {sizes: []int{discovery.MaxRecord + 1}, count: maxCount, bytes: maxCount * messageOverhead},
		"usual":     {sizes: []int{4000}, count: maxBytes / (4000 + messageOverhead), bytes: maxBytes},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			q := newQueue()
			q.maxBytes, q.maxCount = maxBytes, maxCount
			for i := range 10_000 {
				q.put(&nats.Msg{Sub: new(nats.Subscription), Data: make([]byte, test.sizes[i%len(test.sizes)])})
			}
			if len(q.waiting) != test.count || q.bytes > test.bytes || int(q.dropped.Load()) != 10_000-test.count {
				t.Errorf("%d messages of %d bytes wait and %d were dropped, want %d of at most %d",
					len(q.waiting), q.bytes, q.dropped.Load(), test.count, test.bytes)
			}
			// Large ones leave room for others.
			before := q.dropped.Load()
			if name == "large" {
				q.put(&nats.Msg{Sub: new(nats.Subscription), Data: make([]byte, 300)})
			}
			if q.dropped.Load() != before {
				t.Error("large messages have left no room for a small one")
			}
			for len(q.waiting) > 0 {
				q.pop()
			}
			if q.bytes != 0 || q.largeBytes != 0 {
				t.Errorf("an empty queue holds %d bytes, %d of large messages", q.bytes, q.largeBytes)
			}
		})
	}
}

// Who takes slowly gets what was kept in order, and then hears that it was not all.
func TestQueueOverflow(t *testing.T) {
	t.Parallel()
	q := newQueue()
	q.maxCount = 3
	go q.run()
	defer q.close()
	if !eventually(q.idle) {
		t.Fatal("an empty queue is not idle")
	}
	subscription := new(nats.Subscription)
	for i := range 5 {
		q.in <- &nats.Msg{Sub: subscription, Data: []byte{byte(i)}}
	}
	mark := make(chan struct{})
	q.marks <- mark // which is never dropped
	if !eventually(func() bool { return q.dropped.Load() == 2 }) {
		t.Fatalf("%d were dropped, want 2", q.dropped.Load())
	}
	for i := range 3 {
		select {
		case a := <-q.out:
			if !bytes.Equal(a.data, []byte{byte(i)}) {
				t.Errorf("got %v, want %d", a.data, i)
			}
		case <-q.overflow:
			t.Fatal("told of before what was kept is taken")
		}
	}
	if a := <-q.out; a.mark != mark {
		t.Errorf("got %v, want the mark", a)
	}
	<-q.overflow
}

func eventually(what func() bool) bool {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); runtime.Gosched() {
		if what() {
			return true
		}
	}
	return false
}
