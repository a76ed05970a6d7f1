package discoverytest

import (
	"errors"
	"fmt"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// What an outage of the registry changes: nothing, for as long as it lasts.

func survivesBreak(s *suite) {
	writer, d := s.open(), s.syncedDirectory()
	s.announce(writer, s.node("a", discovery.KeyLease, "1s"))
	s.until(d, "a joins", has("a"))
	s.h.Break(s.T)
	s.eventually("the break is noticed", func() bool { return !d.Status().Connected })
	// Three leases of silence are no evidence while the registry is away.
	<-time.After(3 * time.Second)
	if d.Snapshot().Node("a") == nil {
		s.Fatal("a node was dropped because its registry was away")
	}
	s.h.Restore(s.T)
	s.eventually("the registry is found again", func() bool { return d.Status().Connected })
	if d.Snapshot().Node("a") == nil {
		s.Fatal("a node was dropped when its registry came back")
	}
	s.until(d, "the lease runs out, now that the registry is there", lacks("a"))
}

func resync(s *suite) {
	writer, d := s.open(), s.syncedDirectory()
	leaves := s.node("leaves")
	if _, ok := s.h.(EphemeralHarness); ok {
		leaves = s.node("leaves", discovery.KeyLease, "2s")
	}
	s.announce(writer, s.node("stays"), leaves, s.node("moves"))
	s.until(d, "three join", lists(3))
	s.h.Break(s.T)
	s.eventually("the break is noticed", func() bool { return !d.Status().Connected })
	s.h.Restore(s.T)

	// These come while the directory waits for its next try, or lists, or has
	// listed: it must not matter.
	moved := s.node("moves")
	moved.Endpoint = s.endpoint("http://10.0.0.9:5009")
	s.eventually("the registry takes records again", func() bool { return writer.Announce(s.within(), moved) == nil })
	s.announce(writer, s.node("joins"), s.node("stays"))
	s.withdraw(writer, leaves)
	s.until(d, "the view equals the registry", func(snap *discovery.Snapshot) bool {
		return fmt.Sprint(ids(snap)) == "[joins moves stays]" && at("moves", moved.Endpoint)(snap)
	})
}

func unreachableAtFirst(s *suite) {
	s.h.Break(s.T)
	r := s.open()
	if err := r.Announce(s.within(), s.node("a")); !errors.Is(err, discovery.ErrUnreachable) {
		s.Errorf("Announce returned %v, want ErrUnreachable", err)
	}
	if err := r.Watch(s.within(), func(discovery.Event) {}); !errors.Is(err, discovery.ErrUnreachable) {
		s.Errorf("Watch returned %v, want ErrUnreachable", err)
	}
	d := s.directory()
	s.eventually("the failure is known", func() bool { return d.Status().LastError != nil })
	s.h.Restore(s.T)
	s.synced(d)
	s.announce(r, s.node("a"))
	s.until(d, "a joins", has("a"))
}
