package discovery

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func testPublisher() *publisher {
	snapshot := new(atomic.Pointer[Snapshot])
	snapshot.Store(&Snapshot{superseded: make(chan struct{})})
	p := newPublisher(snapshot, make(chan struct{}), new(atomic.Int64), newHostTable(func() bool { return true }, func(string) bool { return false }))
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

// costing has each snapshot take some time.
func costing(p *publisher, d time.Duration) {
	p.took = func(time.Time) time.Duration {
		time.Sleep(d)
		return d
	}
}

// A storm of changes takes 5 % of one core, what is made of the snapshots included, and
// at the most 20 snapshots a second where that is more. All of it is shown in the end.
func TestPublisherCost(t *testing.T) {
	for _, test := range []struct {
		name            string
		making, charged time.Duration
		snapshots       int // in a second
	}{
		{"cheap", 10 * time.Microsecond, 0, 5_000},
		{"dear", time.Millisecond, 0, 50},
		{"dear to others", 100 * time.Microsecond, 900 * time.Microsecond, 50},
		{"too dear", time.Millisecond, 9 * time.Millisecond, 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := testPublisher()
				costing(p, test.making)
				published := 0
				for began := time.Now(); time.Since(began) < time.Second; time.Sleep(10 * time.Microsecond) {
					p.change("a", publishedEntry("a"))
					if p.publish(true) {
						published++
						p.charged.Add(int64(test.charged))
					}
				}
				if published > test.snapshots+1 || published < test.snapshots*9/10 {
					t.Errorf("%d snapshots in a second, want about %d", published, test.snapshots)
				}
				p.change("a", nil)
				p.publish(true)
				<-p.wake.C
				if p.publish(true); len(p.snapshot.Load().Nodes()) != 0 || p.publish(true) {
					t.Error("the last change is not the last thing that is published")
				}
			})
		})
	}
}

// A change waits for what the snapshot before cost, also where that becomes known only
// while it waits, and is shown at once after a quiet spell.
func TestPublisherWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := testPublisher()
		costing(p, 100*time.Microsecond)
		show := func(what string, want time.Duration, meanwhile func()) {
			t.Helper()
			began := time.Now()
			p.change("a", publishedEntry("a"))
			for !p.publish(true) {
				meanwhile()
				<-p.wake.C
			}
			if waited := time.Since(began) - 100*time.Microsecond; waited != want {
				t.Errorf("%s waited for %v, want %v", what, waited, want)
			}
		}
		const cost = 100*time.Microsecond + collectCost // of one node
		nothing := func() {}
		show("the first listing", 0, nothing)
		show("the next change", 20*cost-100*time.Microsecond-credit, nothing)
		charge := sync.OnceFunc(func() { p.charged.Add(int64(time.Millisecond)) })
		show("one that is charged for", 20*(cost+time.Millisecond)-100*time.Microsecond, charge)
		p.charged.Add(int64(time.Hour))
		show("one that is charged for beyond all measure", maxWait-100*time.Microsecond, nothing)
		time.Sleep(time.Second)
		p.charged.Add(int64(time.Millisecond))
		show("one after a quiet spell", 0, nothing)
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
