package discovery_test

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestFirstListingIsPublishedWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		if s := d.Snapshot(); s.Synced || len(s.Nodes()) != 0 || s.Number != 0 {
			t.Fatalf("before the listing: %+v", s)
		}
		s := <-w.streams
		for i := range 1000 {
			s.put("", 0, newNode(fmt.Sprintf("n%03d", i)))
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := d.Snapshot(); got.Number != 0 || got.Synced {
			t.Fatalf("a part of the listing was published: %d nodes", len(got.Nodes()))
		}
		select {
		case <-d.Synced():
			t.Fatal("synced before the listing ended")
		default:
		}
		s.sync(discovery.Listing{})
		<-d.Synced()
		if got := d.Snapshot(); got.Number != 1 || !got.Synced || len(got.Nodes()) != 1000 || len(got.Service("orders")) != 1000 {
			t.Fatalf("after it: snapshot %d with %d nodes", got.Number, len(got.Nodes()))
		}
	})
}

// TestAdviceIsLoggedOnce holds that what a registry says of its setup is one line, however
// often it is listed.
func TestAdviceIsLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		log, lines := newLog(slog.LevelWarn)
		follow(t, w, discovery.Options{Logger: log})
		for revision := range uint64(3) {
			s := <-w.streams
			s.sync(discovery.Listing{Revision: revision, Advice: "do so"})
			synctest.Wait()
			s.end <- errors.New("broke")
		}
		if got := lines.containing("set up otherwise"); len(got) != 1 || got[0].fields["advice"] != "do so" {
			t.Errorf("logged %v", got)
		}
	})
}

// What an attempt to list said before it broke counts for nothing: the next one
// knows the ages anew, and what it lacks was never there.
func TestFirstListingInSeveralAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 1, newNode("dies"))
		s.put("", 2, newNode("goes"))
		s.emit(discovery.Event{Type: discovery.Rejected, ID: "bad", Err: discovery.ErrInvalid})
		s.end <- errors.New("broke")
		s = <-w.streams
		time.Sleep(time.Hour)
		s.emit(discovery.Event{Type: discovery.Put, ID: "dies", Node: newNode("dies"), Revision: 1, Age: time.Hour})
		s.put("", 3, newNode("new"))
		s.sync(discovery.Listing{Revision: 3})
		expect(t, d, "new", "listed")
		if r := d.Status().Rejections; len(r) != 0 {
			t.Errorf("rejections %v", r)
		}
	})
}

func TestLeasesCountFromAgeOfRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("fresh"), newNode("old"), newNode("overdue"), newNode("longlease", discovery.KeyLease, "1h"))
		m.Age("old", 20*time.Second)
		m.Age("overdue", 30*time.Second)
		m.Age("longlease", 30*time.Minute)
		start := time.Now()
		d := follow(t, m.Open(), discovery.Options{})
		expect(t, d, "fresh longlease old", "listed")
		if ago := time.Since(d.Snapshot().Node("old").LastHeard()); ago != 20*time.Second {
			t.Errorf("old was heard %v ago, want 20s", ago)
		}
		lapsesAt(t, d, "old", start.Add(10*time.Second))
		write(m, newNode("overdue"))
		expect(t, d, "fresh longlease overdue", "heard")
		lapsesAt(t, d, "fresh", start.Add(30*time.Second))
		lapsesAt(t, d, "longlease", start.Add(30*time.Minute))
	})
}

// A registry's age may come from a writer's clock that runs ahead (a score in a
// sorted set). It must not lengthen a lease.
func TestClockAheadLengthensNoLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.emit(discovery.Event{Type: discovery.Put, ID: "a", Node: newNode("a"), Age: -24 * time.Hour})
		s.sync(discovery.Listing{})
		expect(t, d, "a", "listed")
		lapsesAt(t, d, "a", time.Now().Add(discovery.DefaultTTL))
	})
}

func TestRemovalsInListing(t *testing.T) {
	for _, test := range []struct {
		marker discovery.EventType
		away   time.Duration
		stays  bool
	}{
		{discovery.Left, time.Second, false},
		{discovery.Left, time.Hour, false},
		{discovery.Expired, time.Second, false},
		{discovery.Expired, time.Hour, true},
	} {
		t.Run(fmt.Sprint(test.marker, " after ", test.away), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newScripted()
				d := follow(t, w, discovery.Options{})
				s := <-w.streams
				s.put("k", 1, newNode("a"))
				s.emit(discovery.Event{Type: test.marker, ID: "unknown", Key: "u", Revision: 2})
				s.sync(discovery.Listing{Revision: 2})
				expect(t, d, "a", "listed")
				s.end <- discovery.ErrBroken
				s = <-w.streams
				time.Sleep(test.away)
				s.emit(discovery.Event{Type: test.marker, ID: "a", Key: "k", Revision: 3})
				s.sync(discovery.Listing{Revision: 3})
				if !test.stays {
					expect(t, d, "", "listed again")
					return
				}
				expect(t, d, "a", "listed again")
				lapsesAt(t, d, "a", d.Status().Since.Add(discovery.DefaultTTL))
			})
		})
	}
}

func TestNewerOfTwoKeysCounts(t *testing.T) {
	for _, newerFirst := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w := newScripted()
			d := follow(t, w, discovery.Options{})
			s := <-w.streams
			for range 2 { // the first listing, and one after an outage
				puts := []func(){
					func() { s.put("node.a", 20, newNode("a", "from", "newer")) },
					func() { s.put("a", 10, newNode("a", "from", "older")) },
				}
				if !newerFirst {
					slices.Reverse(puts)
				}
				for _, put := range puts {
					put()
				}
				s.sync(discovery.Listing{Revision: 20})
				synctest.Wait()
				if from := d.Snapshot().Node("a").Node.Metadata["from"]; from != "newer" {
					t.Errorf("newer first %v: the %s record counts", newerFirst, from)
				}
				s.emit(discovery.Event{Type: discovery.Left, ID: "a", Key: "a", Revision: 21})
				expect(t, d, "a", "the older key left")
				s.end <- discovery.ErrBroken
				s = <-w.streams
			}
		})
	}
}

// The first snapshot of a listing shows the overdue nodes that accept connections.
func TestFirstListingWaitsForProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(4)
		n := newNetwork(nodes...)
		n.delay = 100 * time.Millisecond
		m := discoverytest.NewMemory()
		write(m, nodes...)
		time.Sleep(time.Minute)
		d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
		<-d.Synced()
		expectStates(t, d, "n0:held n1:held n2:held n3:held", "listed")
	})
}

// The first snapshot of a listing shows the address of a host name that answers.
func TestFirstListingWaitsForAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone("orders", "10.0.0.1 10.0.0.2")
		n := newNetwork(atEndpoint(newNode("a"), "http://10.0.0.2:80"))
		n.delay = 10 * time.Millisecond
		m := discoverytest.NewMemory()
		write(m, atEndpoint(newNode("a"), "http://orders:80"))
		d := follow(t, m.Open(), discovery.Options{Probe: n.probe, Lookup: z.lookup})
		<-d.Synced()
		if address := d.Snapshot().Node("a").Address(); address != "10.0.0.2:80" {
			t.Errorf("the node is at %q, want where it answers", address)
		}
	})
}
