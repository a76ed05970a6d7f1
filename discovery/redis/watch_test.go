package redis

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// fakeView is a view whose looks take as long as the test says.
type fakeView struct {
	takes, slowest time.Duration
	next           []request // what the looks ask for in turn
	told           bool      // the stream has told all

	mu      sync.Mutex
	looks   []request // that were asked for
	applied int
}

// seen returns what was looked for, and how many looks were applied.
func (v *fakeView) seen() (looks []request, applied int) {
	synctest.Wait()
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.looks), v.applied
}

func (v *fakeView) follow(context.Context) error { return nil }
func (v *fakeView) list(context.Context) (discovery.Listing, time.Duration, error) {
	return discovery.Listing{}, 0, nil
}
func (v *fakeView) changes() string                   { return "poll" }
func (v *fakeView) notified(*goredis.Message) request { return request{some: true} }
func (v *fakeView) look(q request) func(context.Context) (lookResult, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.looks = append(v.looks, q)
	s := lookResult{slowest: v.slowest, told: func() bool { return v.told }, apply: func() (next request, err error) {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.applied++
		if len(v.next) > 0 {
			next, v.next = v.next[0], v.next[1:]
		}
		return next, nil
	}}
	return func(context.Context) (lookResult, error) {
		time.Sleep(v.takes)
		return s, nil
	}
}

// startWatch runs the loop of a watch with a view, polling once an hour.
func startWatch(t *testing.T, v *fakeView) (w *watch, done chan error) {
	t.Helper()
	c := &client{config: Config{Poll: time.Hour}, closing: make(chan struct{})}
	w = newWatch(c, func(discovery.Event) {})
	w.view, w.slowest, w.overrides = v, slowLook, &overridesView{denied: true}
	ctx, cancel := context.WithCancel(t.Context())
	done = make(chan error, 1)
	go func() {
		done <- w.run(ctx)
		close(w.ended)
	}()
	t.Cleanup(func() {
		cancel()
		<-w.ended
		w.close()
	})
	return w, done
}

// TestVerifyWaitsForALaterLook: one that is under way may have read already, and what
// it has found may still have to be told by the stream.
func TestVerifyWaitsForALaterLook(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v := &fakeView{takes: 100 * time.Millisecond}
		w, _ := startWatch(t, v)
		w.messages <- &goredis.Message{}
		synctest.Wait() // a look has begun
		verified := make(chan error, 1)
		go func() { verified <- w.verify(t.Context()) }()
		time.Sleep(time.Second)
		if looks, applied := v.seen(); len(looks) != 2 || !looks[1].whole || applied != 2 {
			t.Errorf("looked for %+v, want another look, at everything", looks)
		}
		select {
		case err := <-verified:
			t.Errorf("verified (%v) before the stream has told all", err)
		default:
		}
		w.send(t.Context(), func() (request, error) { v.told = true; return request{}, nil })
		if err := <-verified; err != nil {
			t.Error(err)
		}
	})
}

// TestLooksRest: what notifications ask for takes a tenth of the time, all at once;
// what somebody waits for does not wait.
func TestLooksRest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v := &fakeView{takes: 100 * time.Millisecond, told: true}
		w, _ := startWatch(t, v)
		for range 10 {
			w.messages <- &goredis.Message{}
		}
		synctest.Wait()
		for range 10 {
			w.messages <- &goredis.Message{}
		}
		time.Sleep(999 * time.Millisecond)
		if looks, _ := v.seen(); len(looks) != 1 {
			t.Errorf("%d looks before the server had a rest", len(looks))
		}
		time.Sleep(2 * time.Millisecond)
		if looks, _ := v.seen(); len(looks) != 2 {
			t.Errorf("%d looks after the rest, want the second", len(looks))
		}
		time.Sleep(200 * time.Millisecond)
		err := w.verify(t.Context())
		if looks, _ := v.seen(); err != nil || len(looks) != 3 {
			t.Errorf("%v, %d looks, want one at once", err, len(looks))
		}
	})
}

// TestLooksAgain: what a look wants looked at again is, when it is due.
func TestLooksAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v := &fakeView{told: true, next: []request{{keys: map[string]bool{"a": true}, after: time.Minute}}}
		w, _ := startWatch(t, v)
		w.messages <- &goredis.Message{}
		time.Sleep(59 * time.Second)
		if looks, _ := v.seen(); len(looks) != 1 {
			t.Errorf("looked for %+v, too early", looks)
		}
		time.Sleep(2 * time.Second)
		if looks, _ := v.seen(); len(looks) != 2 || !looks[1].keys["a"] {
			t.Errorf("looked for %+v, want the key", looks)
		}
	})
}

// TestLooksSoon: the look that decides whether a record is gone does not wait until the
// server has had a rest, which gets the longer for it; a look at everything does wait.
func TestLooksSoon(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v := &fakeView{takes: 100 * time.Millisecond, told: true, next: []request{{some: true, soon: true, after: 40 * time.Millisecond}, {whole: true}}}
		w, _ := startWatch(t, v)
		w.messages <- &goredis.Message{}
		time.Sleep(139 * time.Millisecond)
		if looks, _ := v.seen(); len(looks) != 1 {
			t.Errorf("looked for %+v, too early", looks)
		}
		time.Sleep(2 * time.Millisecond)
		if looks, _ := v.seen(); len(looks) != 2 || looks[1].whole {
			t.Errorf("looked for %+v, want a second look at some", looks)
		}
		// That one ends at 240 ms, when 760 ms of the rest are left, and 900 come to it.
		time.Sleep(1900*time.Millisecond - 142*time.Millisecond)
		if looks, _ := v.seen(); len(looks) != 2 {
			t.Errorf("looked for %+v before the server had a rest", looks)
		}
		time.Sleep(3 * time.Millisecond)
		if looks, _ := v.seen(); len(looks) != 3 || !looks[2].whole {
			t.Errorf("looked for %+v, want a look at everything", looks)
		}
	})
}

// TestSlowLookBreaks: a server that takes long for one question was away.
func TestSlowLookBreaks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v := &fakeView{slowest: slowLook + 1}
		w, done := startWatch(t, v)
		w.messages <- &goredis.Message{}
		err := <-done
		if _, applied := v.seen(); !errors.Is(err, discovery.ErrBroken) || applied != 0 {
			t.Errorf("%v, %d looks applied", err, applied)
		}
		if err := w.verify(t.Context()); !errors.Is(err, discovery.ErrBroken) {
			t.Errorf("verified: %v", err)
		}
	})
}

// TestServers: those that no URL names are located for an hour, and no more than fit.
func TestServers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := servers{named: []string{"a:1"}, seen: make(map[string]time.Time)}
		s.add("a:1", "c:3", "b:2")
		if got := s.located(); !slices.Equal(got, []string{"b:2", "c:3"}) {
			t.Errorf("located %v", got)
		}
		time.Sleep(locatedFor / 2)
		s.add("b:2")
		time.Sleep(locatedFor/2 + 1)
		if got := s.located(); !slices.Equal(got, []string{"b:2"}) {
			t.Errorf("located %v, want the one that was heard of since", got)
		}
		for i := range 2 * maxLocated {
			s.add(string(rune(i)))
		}
		if n := len(s.seen); n > maxLocated {
			t.Errorf("%d servers are kept", n)
		}
	})
}
