package discovery

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func testPublisher() *publisher {
	snapshot := new(atomic.Pointer[Snapshot])
	snapshot.Store(&Snapshot{superseded: make(chan struct{})})
	p := newPublisher(snapshot, make(chan struct{}))
	return &p
}

func publishedEntry(id string) *Entry {
	return tableNode(id, "10.0.0.1:80", "orders", 0).entry
}

// expectPublished checks what the snapshot and the channel beside it show.
func expectPublished(t *testing.T, p *publisher, number uint64, synced bool, ids ...string) {
	t.Helper()
	s := p.snapshot.Load()
	closed := false
	select {
	case <-p.synced:
		closed = true
	default:
	}
	if s.Number != number || s.Synced != synced || closed != synced || len(s.Nodes()) != len(ids) {
		t.Fatalf("snapshot %d, synced %v and %v, of %d nodes; want %d, %v, %v", s.Number, s.Synced, closed, len(s.Nodes()), number, synced, ids)
	}
	for i, id := range ids {
		if s.Nodes()[i].Node.ID != id {
			t.Fatalf("node %d is %q, want %q", i, s.Nodes()[i].Node.ID, id)
		}
	}
}

// A first listing waits for what is unknown of it, and not for ever. What was shown of
// restored nodes until then, and not listed, goes with it.
func TestPublisherFirstListing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := testPublisher()
		p.restored["listed"], p.restored["gone"] = publishedEntry("listed"), publishedEntry("gone")
		p.publishRestored()
		expectPublished(t, p, 1, false, "gone", "listed")
		p.restored["gone"] = nil // not published any more
		p.change("listed", publishedEntry("listed"))
		p.endRestored()
		p.startGrace()
		if p.publish(false) {
			t.Error("it did not wait")
		}
		<-p.wake.C
		if !p.publish(false) {
			t.Error("it waited for ever")
		}
		expectPublished(t, p, 2, true, "listed")
	})
}

// A storm of changes is published at a bounded rate, and all of it in the end.
func TestPublisherRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := testPublisher()
		published := 0
		for began := time.Now(); time.Since(began) < 10*time.Second; time.Sleep(time.Millisecond) {
			p.change("a", publishedEntry("a"))
			if p.publish(true) {
				published++
			}
		}
		if most := 10*snapshotRate + snapshotBurst + 1; published > most || published < most-5 {
			t.Errorf("%d snapshots in 10 seconds, want about %d", published, most)
		}
		p.change("a", nil)
		<-p.wake.C
		if !p.publish(true) || len(p.snapshot.Load().Nodes()) != 0 || p.publish(true) {
			t.Error("the last change is not the last thing that is published")
		}
	})
}

// A first listing that never ends, in which nodes come and go, leaves no trace of
// those that are gone.
func TestNothingIsKeptOfWhatWasNeverShown(t *testing.T) {
	p := testPublisher()
	p.change("shown", publishedEntry("shown"))
	p.publish(true)
	p.change("fleeting", publishedEntry("fleeting"))
	p.change("fleeting", nil)
	p.change("shown", publishedEntry("shown"))
	p.change("shown", nil)
	if _, noted := p.changed["shown"]; len(p.changed) != 1 || !noted {
		t.Errorf("the next snapshot changes %v, want that the one goes that was shown", p.changed)
	}
}
