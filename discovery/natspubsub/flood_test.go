package natspubsub_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// Thousands of heartbeats at once, of both kinds, and not one is lost.
func TestStormOfHeartbeats(t *testing.T) {
	const nodes, beats = 1000, 5
	s := start(t)
	w := watch(t, open(t, config(s)))
	w.Listing()
	var group sync.WaitGroup
	for range 4 {
		nc := s.Conn()
		group.Go(func() {
			for range beats {
				for i := range nodes {
					data := fmt.Sprintf(`{"nodeId":"orders-%d","load":0.5,"timestamp":"2025-10-10T12:00:10.7654321Z"}`, i)
					if i%2 == 0 {
						data = record(fmt.Sprintf("orders-%d", i))
					}
					if err := nc.Publish("catga.nodes.heartbeat", []byte(data)); err != nil {
						t.Error(err)
					}
				}
			}
			if err := nc.Flush(); err != nil {
				t.Error(err)
			}
		})
	}
	for range 4 * beats * nodes {
		if e := w.Next(); e.Type == discovery.Rejected {
			t.Fatal(e.Err)
		}
	}
	group.Wait()
}

// What was dropped is not papered over.
func TestSlowListener(t *testing.T) {
	s := start(t)
	nc := s.Conn()
	r := open(t, config(s))
	w := watch(t, r)
	w.Listing()
	const more = 1<<17 + 100
	for range more {
		if err := nc.Publish("catga.nodes.heartbeat", []byte(`{"nodeId":"a"}`)); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	// What has arrived is known once the connection of the listener answers.
	if err := r.Announce(t.Context(), node(t, "end")); err != nil {
		t.Fatal(err)
	}
	for received := 0; ; received++ {
		select {
		case e := <-w.Events:
			if e.Type == discovery.Put {
				t.Fatal("nothing was dropped")
			}
		case err := <-w.Result:
			wantError(t, err, discovery.ErrBroken, "dropped", "catga.nodes.")
			if received < 1<<17 {
				t.Errorf("only %d messages came before the end", received)
			}
			return
		case <-time.After(patience):
			t.Fatal("the watch goes on")
		}
	}
}

// One writer floods the fleet with large messages while nobody takes them: what
// waits is bounded, others are heard, and then the watch begins anew.
func TestFlood(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	w := watch(t, open(t, config(s)))
	w.Listing()
	const large, size = 3000, 60 << 10
	flood := []byte(`{"nodeId":"flood","x":"` + strings.Repeat("x", size) + `"}`)
	for i := range large {
		if err := nc.Publish("catga.nodes.heartbeat", flood); err != nil {
			t.Fatal(err)
		}
		if i%100 == 0 {
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			await(t, "the server has sent what it has", func() bool { return sent(t, s, 0) })
		}
	}
	publish(t, nc, "catga.nodes.heartbeat", record("good"))
	await(t, "the server has sent everything", func() bool { return sent(t, s, large) })
	flooded, good := 0, false
	for timeout := time.After(patience); ; {
		select {
		case e := <-w.Events:
			if e.ID == "good" {
				good = true
			} else {
				flooded++
			}
			continue
		case err := <-w.Result:
			wantError(t, err, discovery.ErrBroken, "dropped")
		case <-timeout:
			t.Error("the watch goes on although messages were dropped")
		}
		break
	}
	if !good || flooded > large/2 {
		t.Errorf("%d of %d large messages were kept, and the small one behind them: %v", flooded, large, good)
	}
}

// sent reports whether the server has sent so many messages, and all that it has.
func sent(t *testing.T, s *natstest.Server, most int) bool {
	t.Helper()
	connections, err := s.Server().Connz(nil)
	if err != nil {
		t.Fatal(err)
	}
	messages := 0
	for _, c := range connections.Conns {
		if c.Pending > 0 {
			return false
		}
		messages += int(c.OutMsgs)
	}
	return messages >= most
}
