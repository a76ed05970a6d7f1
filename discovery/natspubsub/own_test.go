package natspubsub

import (
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// Whose record it is, is decided in one step with what is said of it: a successor
// that announces while its predecessor waits to publish is answered for, and neither
// drained nor withdrawn.
func TestOwnerIsDecidedWhilePublishing(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.NoJetStream())
	node := func(instance, state string) discovery.Node {
		endpoint, err := discovery.ParseEndpoint("http://10.0.0.1:80")
		if err != nil {
			t.Fatal(err)
		}
		return discovery.Node{ID: "a", Endpoint: endpoint, Metadata: map[string]string{
			discovery.KeyInstance: instance, discovery.KeyState: state,
		}}
	}
	for call, f := range map[string]func(r *Registry) error{
		"Drain": func(r *Registry) error {
			own, err := r.Drain(t.Context(), node("1", "draining"))
			if own {
				err = errors.Join(err, errors.New("it was taken for our own"))
			}
			return err
		},
		"Withdraw": func(r *Registry) error { return r.Withdraw(t.Context(), node("1", "draining")) },
	} {
		t.Run(call, func(t *testing.T) {
			r, err := Open(Config{URLs: []string{s.URL()}, SubjectPrefix: call})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = r.Close() })
			if err := r.Announce(t.Context(), node("1", "up")); err != nil {
				t.Fatal(err)
			}
			nc := s.Conn()
			said, err := nc.SubscribeSync(call + ".*")
			if err := errors.Join(err, nc.Flush()); err != nil {
				t.Fatal(err)
			}
			unlock, err := r.own.lock(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- f(r) }()
			for deadline := time.Now().Add(30 * time.Second); !waitsIn("(*Registry)."+call+"(", "(*ownRecords).lock("); {
				if time.Now().After(deadline) {
					unlock()
					t.Fatalf("%s does not wait until nobody else publishes", call)
				}
				time.Sleep(time.Millisecond)
			}
			// What Announce does when it publishes.
			successor := &record{instance: "2", data: []byte("its record"), until: time.Now().Add(time.Hour)}
			r.own.put("a", successor)
			unlock()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if got := string(r.own.data("a")); got != "its record" {
				t.Errorf("queries are answered with %q", got)
			}
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			if n, _, err := said.Pending(); err != nil || n > 0 {
				t.Errorf("%d messages were sent, %v", n, err)
			}
		})
	}
}

// waitsIn reports whether a goroutine waits in these functions.
func waitsIn(functions ...string) bool {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
next:
	for g := range strings.SplitSeq(string(stacks), "\n\n") {
		for _, f := range append(functions, "[select") {
			if !strings.Contains(g, f) {
				continue next
			}
		}
		return true
	}
	return false
}
