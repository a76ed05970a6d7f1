package discoverytest

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// How a node leaves: it drains and withdraws, or its lease runs out, and the record of a
// process that has taken its id stands whatever it does.

func leave(s *suite) {
	writer, d := s.open(), s.directory()
	s.announce(writer, s.node("a"), s.node("b"))
	s.until(d, "both join", lists(2))
	s.withdraw(writer, s.node("a"))
	s.until(d, "a leaves", lacks("a"))
	if d.Snapshot().Node("b") == nil {
		s.Error("b went with a")
	}
	// The goodbye of a node that is not there concerns nobody.
	s.withdraw(writer, s.node("a"))
	s.withdraw(writer, s.node("never-there"))
}

func withdrawLeavesOthersAlone(s *suite) {
	writer, d := s.open(), s.syncedDirectory()
	s.announce(writer, s.node("a", discovery.KeyInstance, "new"))
	s.until(d, "a joins", has("a"))
	s.withdraw(s.open(), s.node("a", discovery.KeyInstance, "old"))
	// The marker comes after the withdrawal, so once it is here the withdrawal
	// has had its effect, if any.
	s.announce(writer, s.node("marker"))
	s.until(d, "the marker joins", has("marker"))
	if d.Snapshot().Node("a") == nil {
		s.Error("a withdrawal removed the record of another instance")
	}
}

func drain(s *suite) {
	writer, d := s.open(), s.syncedDirectory()
	if keepsRecords(writer) && s.drain(writer, s.drainingNode("a", "1")) {
		s.Error("a record that is not there was the caller's own")
	}
	s.announce(writer, s.node("a", discovery.KeyInstance, "1"))
	s.until(d, "a joins", inState("a", discovery.StateUp))
	if !s.drain(writer, s.drainingNode("a", "1")) {
		s.Error("the record was not the caller's own")
	}
	s.until(d, "a drains", inState("a", discovery.StateDraining))
	// Another connection of the same process has the same right.
	s.announce(writer, s.node("b", discovery.KeyInstance, "1"))
	s.until(d, "b joins", inState("b", discovery.StateUp))
	if !s.drain(s.open(), s.drainingNode("b", "1")) {
		s.Error("the record was not the caller's own, by another connection")
	}
	s.until(d, "b drains", inState("b", discovery.StateDraining))
	s.withdraw(writer, s.node("a", discovery.KeyInstance, "1"))
	s.until(d, "a leaves", lacks("a"))
}

// drainLeavesOthersAlone lets a successor announce while its predecessor drains and
// withdraws: whoever is faster, the successor's record stands, and is up.
func drainLeavesOthersAlone(s *suite) {
	old, successor, d := s.open(), s.open(), s.syncedDirectory()
	for i := range 30 {
		id := nodeID(i)
		mine, theirs := s.node(id, discovery.KeyInstance, "old"), s.node(id, discovery.KeyInstance, "new")
		s.announce(old, mine)
		var group sync.WaitGroup
		group.Go(func() { s.announce(successor, theirs) })
		if i%2 == 0 { // else it may come between the drain and the withdrawal
			group.Wait()
		}
		if own := s.drain(old, s.drainingNode(id, "old")); own && i%2 == 0 && keepsRecords(old) {
			s.Error("the record of another instance was the caller's own")
		}
		s.withdraw(old, mine)
		group.Wait()
	}
	// The markers come after all of that, but on a cluster, whose servers tell of their
	// own keys.
	s.announce(successor, s.node("marker"))
	s.announce(old, s.node("other-marker"))
	s.until(d, "the markers join", func(snap *discovery.Snapshot) bool {
		return snap.Node("marker") != nil && snap.Node("other-marker") != nil
	})
	for i := range 30 {
		s.until(d, fmt.Sprintf("the successor of n%d is up, announced at the same time: %v", i, i%2 != 0), func(snap *discovery.Snapshot) bool {
			e := snap.Node(nodeID(i))
			return e != nil && e.State() == discovery.StateUp && e.Instance() == "new"
		})
	}
}

// successorStays has a process take over an id, and then its predecessor leave:
// nobody hears anything of that, however far away the registry is.
func successorStays(s *suite) {
	w := s.watch(s.open())
	w.synced()
	run := func(r discovery.Registry, id string) *registration {
		s.Helper()
		listed := make(chan struct{})
		var once sync.Once
		running := s.register(r, s.node(id), discovery.RegistrarOptions{
			Drain: new(time.Second),
			OnHeartbeat: func(err error) {
				if err == nil {
					once.Do(func() { close(listed) })
				}
			},
		})
		w.until(id+" joins", func(e discovery.Event) bool {
			return e.Type == discovery.Put && e.ID == id && e.Node.Instance() == running.Instance()
		})
		select {
		case <-listed:
		case <-time.After(patience):
			s.Fatalf("%s does not know that it is listed", id)
		}
		return running
	}
	together := func(all []*registration) {
		for _, r := range all {
			r.stop()
		}
		for _, r := range all {
			r.left()
		}
	}
	writer := s.open()
	instances := make(map[string]string) // of the successors, by id
	var predecessors, successors []*registration
	for _, roundTrip := range []time.Duration{0, 80 * time.Millisecond, 150 * time.Millisecond} {
		old, ok := s.openFar(roundTrip)
		if !ok && roundTrip > 0 {
			continue
		}
		if !ok {
			old = s.open()
		}
		id := "at-" + roundTrip.String()
		predecessors = append(predecessors, run(old, id))
		successor := run(writer, id)
		instances[id] = successor.Instance()
		successors = append(successors, successor)
	}
	together(predecessors)
	s.announce(writer, s.node("marker"))
	w.until("the marker", func(e discovery.Event) bool {
		if instance := instances[e.ID]; instance != "" && (e.Type != discovery.Put || e.Node.Instance() != instance) {
			s.Errorf("a predecessor's leaving told of its successor %s: %v %q of instance %q", e.ID, e.Type, e.Node.State(), e.Node.Instance())
		}
		return e.ID == "marker"
	})
	together(successors)
	w.end()
}

// leaveBeforeListed has a registrar leave while it waits for the answer to its first
// announcement, which has arrived: it drains all the same.
func leaveBeforeListed(s *suite) {
	d := s.syncedDirectory()
	r := s.register(&slowAnswer{Announcer: s.open()}, s.node("a"), discovery.RegistrarOptions{Drain: new(100 * time.Millisecond)})
	s.until(d, "a joins", has("a"))
	r.stop()
	s.until(d, "a drains", inState("a", discovery.StateDraining))
	s.until(d, "a leaves", lacks("a"))
	r.left()
}

// slowAnswer delivers announcements at once, and the answers to them never.
type slowAnswer struct{ discovery.Announcer }

func (a *slowAnswer) Announce(ctx context.Context, n discovery.Node) error {
	if err := a.Announcer.Announce(ctx, n); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

func lapse(s *suite) {
	writer, d := s.open(), s.syncedDirectory()
	short := s.node("short", discovery.KeyLease, "1s")
	s.announce(writer, short, s.node("long"))
	s.until(d, "both join", lists(2))
	snapshot := s.until(d, "the lease runs out", lacks("short"))
	if snapshot.Node("long") == nil {
		s.Error("a node lapsed before its lease ran out")
	}
	s.announce(writer, short)
	s.until(d, "it comes back when it is heard", has("short"))
}

// registrar follows a node of a registrar from the first announcement to its end.
func registrar(s *suite) {
	d := s.syncedDirectory()
	n := s.node("a")
	r := s.register(s.open(), n, discovery.RegistrarOptions{
		Heartbeat: 100 * time.Millisecond, TTL: time.Second, Drain: new(100 * time.Millisecond),
	})
	e := s.until(d, "a joins", has("a")).Node("a")
	heard := e.LastHeard()
	s.eventually("it is renewed", func() bool { return e.LastHeard().After(heard) })

	n.Endpoint = s.endpoint("http://10.0.0.8:5002")
	if err := r.Update(n, discovery.RegistrarOptions{Heartbeat: 100 * time.Millisecond, Drain: new(100 * time.Millisecond)}); err != nil {
		s.Fatal(err)
	}
	s.until(d, "a moves", at("a", n.Endpoint))
	r.stop()
	s.until(d, "a drains", inState("a", discovery.StateDraining))
	s.until(d, "a leaves", lacks("a"))
	r.left()
}
