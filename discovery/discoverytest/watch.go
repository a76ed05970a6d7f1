package discoverytest

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// What a watch tells: the listing, its end, and changes as they happen.

func emptyRegistry(s *suite) {
	d := s.syncedDirectory()
	if got := d.Snapshot().Nodes(); len(got) != 0 {
		s.Errorf("an empty registry lists %v", ids(d.Snapshot()))
	}
	if status := d.Status(); !status.Connected || !status.Synced {
		s.Errorf("status after the first listing: %+v", status)
	}
}

// listThenSynced holds a watch against the contract of Watcher.
func listThenSynced(s *suite) {
	writer, watcher := s.open(), s.open()
	s.announce(writer, s.node("a"), s.node("b"))
	w := s.watch(watcher)
	if _, ok := discovery.As[discovery.Overrider](watcher); ok {
		if e := w.next("the overrides"); e.Type != discovery.Overridden || len(e.Overrides) != 0 {
			s.Errorf("the watch of a registry that keeps overrides begins with %v %v, want that there are none", e.Type, e.Overrides)
		}
	}
	listed := map[string]bool{}
	w.until("the listing", func(e discovery.Event) bool {
		if e.Type == discovery.Synced {
			return true
		}
		if e.Type != discovery.Put {
			s.Fatalf("event %v in the listing", e.Type)
		}
		if e.ID != e.Node.ID {
			s.Errorf("event of %q carries the node %q", e.ID, e.Node.ID)
		}
		if e.Age < 0 || e.Age > patience {
			s.Errorf("a fresh record of %q is %v old", e.ID, e.Age)
		}
		listed[e.ID] = true
		return false
	})
	if !listed["a"] || !listed["b"] || len(listed) != 2 {
		s.Errorf("listed %v, want a and b", listed)
	}
	s.announce(writer, s.node("c"))
	if e := w.next("c joins"); e.Type != discovery.Put || e.ID != "c" {
		s.Errorf("after the listing came %v %q, want the put of c", e.Type, e.ID)
	}
	s.withdraw(writer, s.node("c"))
	if e := w.next("c leaves"); e.Type != discovery.Left || e.ID != "c" {
		s.Errorf("then came %v %q, want that c left", e.Type, e.ID)
	}
	w.end()
}

func list(s *suite) {
	writer := s.open()
	s.announce(writer, s.node("a"), s.node("b"), s.node("c"))
	s.withdraw(writer, s.node("b"))
	if got := fmt.Sprint(ids(s.syncedDirectory().Snapshot())); got != "[a c]" {
		s.Errorf("the first listing has %s, want [a c]", got)
	}
}

func join(s *suite) {
	d := s.syncedDirectory()
	s.announce(s.open(), s.node("a"))
	s.until(d, "a joins", has("a"))
}

func update(s *suite) {
	writer, d := s.open(), s.syncedDirectory()
	n := s.node("a")
	s.announce(writer, n)
	s.until(d, "a joins", has("a"))
	n.Endpoint = s.endpoint("http://10.0.0.8:5002")
	s.announce(writer, n)
	s.until(d, "a moves", at("a", n.Endpoint))
	s.announce(writer, s.node("a", discovery.KeyState, "draining"))
	snapshot := s.until(d, "a drains", inState("a", discovery.StateDraining))
	if len(snapshot.Nodes()) != 1 {
		s.Errorf("an update left %v", ids(snapshot))
	}
}

func heartbeatPublishesNothing(s *suite) {
	writer, d := s.open(), s.syncedDirectory()
	n := s.node("a")
	s.announce(writer, n)
	snapshot := s.until(d, "a joins", has("a"))
	e := snapshot.Node("a")
	before := e.LastHeard()
	n.Load = 0.75
	s.announce(writer, n)
	s.eventually("the heartbeat arrives", func() bool { return e.Load() == 0.75 && e.LastHeard().After(before) })
	if d.Snapshot() != snapshot {
		s.Error("a heartbeat published a snapshot")
	}
}

func manyAtOnce(s *suite) {
	const n = 500
	d, writer := s.syncedDirectory(), s.open()
	var group sync.WaitGroup
	for i := range 10 {
		group.Go(func() {
			for j := range n / 10 {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				if err := writer.Announce(ctx, s.node(nodeID(i*n/10+j))); err != nil {
					s.Errorf("Announce: %v", err)
				}
				cancel()
			}
		})
	}
	group.Wait()
	snapshot := s.until(d, "all join", lists(n))
	if got := len(snapshot.Service("orders")); got != n {
		s.Errorf("the service has %d nodes, want %d", got, n)
	}
}

// cancel ends a watch while changes are under way.
func cancel(s *suite) {
	watcher, writer := s.open(), s.open()
	w := s.watch(watcher)
	w.synced()
	s.announce(writer, s.node("warm"))
	var group sync.WaitGroup
	for i := range 4 {
		group.Go(func() { s.announce(writer, s.node(nodeID(i))) })
	}
	w.end()
	group.Wait()

	// A context that has ended already is not even tried.
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := watcher.Watch(ctx, func(discovery.Event) {}); !errors.Is(err, context.Canceled) {
		s.Errorf("Watch with an ended context returned %v", err)
	}
}

// verify holds that what was written before a verification succeeds is emitted by then.
func verify(s *suite) {
	writer, watcher := s.open(), s.open()
	v, ok := discovery.As[discovery.Verifier](watcher)
	if !ok {
		return
	}
	ctx := s.within()
	if err := v.Verify(ctx); err == nil {
		s.Error("verified without a watch")
	}
	w := s.watch(watcher)
	w.synced()
	for i := range 20 {
		id := nodeID(i)
		s.announce(writer, s.node(id))
		if err := v.Verify(ctx); err != nil {
			s.Fatalf("Verify: %v", err)
		}
		emitted := false
		for range len(w.events) {
			e := <-w.events
			emitted = emitted || e.ID == id
		}
		if !emitted {
			s.Errorf("verified before %s was emitted", id)
		}
	}
	w.end()
}
