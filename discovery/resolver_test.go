package discovery

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// nameServer is what a resolver asks in tests.
type nameServer struct {
	mu      sync.Mutex
	answers map[string]string // an address; "silent": none, ever
	asked   []string
	now     map[string]bool // who is being looked up
}

func (s *nameServer) lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	s.mu.Lock()
	s.asked = append(s.asked, name)
	s.now[name] = true
	answer := s.answers[name]
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.now, name)
	}()
	switch answer {
	case "silent":
		<-ctx.Done()
		return nil, ctx.Err()
	case "":
		return nil, errors.New("no such host")
	}
	return []netip.Addr{netip.MustParseAddr(answer)}, nil
}

// pass lets the resolver work for a time.
func pass(ctx context.Context, r *resolver, d time.Duration) {
	end := time.After(d)
	for {
		r.lookUpWaiting(ctx)
		select {
		case <-end:
			return
		case l := <-r.done:
			r.take(l, func(l lookup) { _, _, _ = r.found(l) })
		case <-r.tick.C:
			r.refresh()
		case <-r.crowded.C:
		}
	}
}

func resolverTest(t *testing.T, test func(t *testing.T, r *resolver, s *nameServer, wait func(time.Duration))) {
	synctest.Test(t, func(t *testing.T) {
		s := &nameServer{answers: make(map[string]string), now: make(map[string]bool)}
		r := newResolver(s.lookup)
		ctx, cancel := context.WithCancel(t.Context())
		test(t, r, s, func(d time.Duration) {
			t.Helper()
			pass(ctx, r, d)
			synctest.Wait()
		})
		cancel()
		r.stop()
		if len(s.now) > 0 {
			t.Errorf("after it stopped it looks up %v", s.now)
		}
	})
}

func TestResolverKnowsTheNamesThatAreUsed(t *testing.T) {
	resolverTest(t, func(t *testing.T, r *resolver, s *nameServer, wait func(time.Duration)) {
		s.answers["a"] = "10.0.0.1"
		if known := r.use("1", "a"); len(known) > 0 || r.untried != 1 {
			t.Errorf("before a lookup %v is known, %d names are untried", known, r.untried)
		}
		r.use("2", "a")
		r.use("3", "gone")
		wait(time.Millisecond)
		if got := fmt.Sprint(r.of("a"), r.untried, slices.Sorted(slices.Values(s.asked))); got != "[10.0.0.1] 0 [a gone]" {
			t.Errorf("looked up: %s", got)
		}
		if got := fmt.Sprint(slices.Sorted(maps.Keys(r.usersOf("a")))); got != "[1 2]" {
			t.Errorf("users %s", got)
		}
		// A name that is known answers at once, and one that nobody uses is forgotten.
		if known := r.use("3", "a"); len(known) != 1 {
			t.Errorf("known: %v", known)
		}
		r.leave("1")
		r.leave("2")
		r.leave("3")
		wait(10 * time.Minute)
		if len(r.names)+len(r.users) > 0 || len(s.asked) != 2 || r.ticking {
			t.Errorf("left: %d names, %d users, %v asked", len(r.names), len(r.users), s.asked)
		}
	})
}

// What one user asks for is bounded, whichever way it asks.
func TestResolverBoundsAUser(t *testing.T) {
	resolverTest(t, func(t *testing.T, r *resolver, s *nameServer, wait func(time.Duration)) {
		for i := range 1000 {
			r.use("bad", fmt.Sprint("x", i))
			wait(10 * time.Millisecond)
		}
		if len(s.asked) > askBurst {
			t.Errorf("1000 names in ten seconds: %d are looked up", len(s.asked))
		}
		// One that leaves and comes back is still known.
		r.leave("bad")
		wait(3 * namesTick)
		r.use("bad", "y")
		wait(time.Millisecond)
		if slices.Contains(s.asked, "y") {
			t.Error("it leaves, and may ask again at once")
		}
		// A user that shares its name does not wait for what the other may ask.
		s.answers["y"] = "10.0.0.2"
		r.use("good", "y")
		wait(time.Millisecond)
		if len(r.of("y")) != 1 {
			t.Error("a name waits because of somebody else who uses it")
		}
		before := len(s.asked)
		for range 1000 {
			r.ask("good")
			wait(10 * time.Millisecond)
		}
		if asked := len(s.asked) - before; asked < 1 || asked > askBurst+1 {
			t.Errorf("asked for anew 1000 times in ten seconds: looked up %d times", asked)
		}
		wait(3 * askEvery)
		before = len(s.asked)
		r.ask("good")
		wait(2 * resolveRetry)
		if len(s.asked) == before {
			t.Error("what was bounded once stays shut")
		}
		// In the end the last name of the one that changed so often is looked up.
		wait(time.Minute)
		if len(r.use("bad", "y")) != 1 {
			t.Error("it does not get what is known")
		}
	})
}

// A name that nobody uses any more costs nothing, neither in the queue nor under
// way.
func TestResolverGivesUpNames(t *testing.T) {
	resolverTest(t, func(t *testing.T, r *resolver, s *nameServer, wait func(time.Duration)) {
		for i := range 100 {
			name := fmt.Sprint("silent", i)
			s.answers[name] = "silent"
			r.use(fmt.Sprint(i), name)
		}
		wait(time.Millisecond)
		if len(s.now) != maxLookups || r.untried != 100 {
			t.Errorf("%d are looked up at once, %d untried", len(s.now), r.untried)
		}
		r.leaveAll()
		wait(2 * namesTick)
		if len(s.now) > 0 || r.untried != 0 || len(r.names) > 0 || r.slow != 0 {
			t.Errorf("still looked up: %v; %d untried, %d names, %d slow", s.now, r.untried, len(r.names), r.slow)
		}
	})
}

// Names that fail are looked up ever more seldom, those whose server is silent
// most so; once they answer they are like any other.
func TestResolverAsksFailingNamesSeldom(t *testing.T) {
	resolverTest(t, func(t *testing.T, r *resolver, s *nameServer, wait func(time.Duration)) {
		s.answers["silent"] = "silent"
		r.use("1", "silent")
		r.use("2", "nowhere")
		wait(time.Hour)
		count := func(name string) int {
			return strings.Count(strings.Join(s.asked, " ")+" ", name+" ")
		}
		if n := count("silent"); n < 20 || n > 60 {
			t.Errorf("a silent name is looked up %d times in an hour", n)
		}
		if n := count("nowhere"); n < 90 || n > 170 {
			t.Errorf("a name that is not there is looked up %d times in an hour", n)
		}
		s.answers["silent"] = "10.0.0.1"
		wait(3 * time.Minute)
		if len(r.of("silent")) != 1 {
			t.Error("it is not found again")
		}
		before := count("silent")
		wait(10 * time.Minute)
		if n := count("silent") - before; n < 15 || n > 30 {
			t.Errorf("resolved, it is looked up %d times in ten minutes", n)
		}
	})
}
