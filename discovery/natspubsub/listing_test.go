package natspubsub_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Nobody is there who would answer, and the server says so: there is nothing to
// wait for. What is said later is emitted when it is said.
func TestFirstSyncWithoutResponders(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	// A fleet that does not answer, and other listeners, make no difference.
	listen(t, nc, "catga.nodes.join")
	watch(t, open(t, config(s))).Listing()
	w := watch(t, open(t, config(s))) // listens for longer than the test waits
	if listed, _ := w.Listing(); len(listed) != 0 {
		t.Errorf("listed %v", listed)
	}
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"a","load":0.5}`)
	w.Want(discovery.Beat, "a")
	publish(t, nc, "catga.nodes.join", record("a"))
	w.Want(discovery.Put, "a")
}

// Somebody could answer and does not: the listing lasts for one heartbeat.
func TestFirstSyncWithoutAnswers(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	queries := listen(t, nc, "catga.nodes.query")
	c := config(s)
	c.Listen = 2 * time.Second
	r := open(t, c)
	began := time.Now()
	w := watch(t, r)
	if m := next(t, queries); m.Reply == "" || len(m.Data) != 0 {
		t.Errorf("the query is %+v", m)
	}
	wantError(t, r.Verify(t.Context()), discovery.ErrBroken)
	publish(t, nc, "catga.nodes.join", record("joins"))
	publish(t, nc, "catga.nodes.heartbeat", record("beats"))
	w.Want(discovery.Put, "joins")
	w.Want(discovery.Put, "beats")
	w.Want(discovery.Synced, "")
	if took := time.Since(began); took < c.Listen {
		t.Errorf("synced after %v, want not before %v", took, c.Listen)
	}
	if err := r.Verify(t.Context()); err != nil {
		t.Error(err)
	}
}

// The listing ends although answers never do.
func TestFirstSyncWithEndlessAnswers(t *testing.T) {
	t.Parallel()
	s := start(t)
	nc := s.Conn()
	queries := listen(t, nc, "catga.nodes.query")
	c := config(s)
	c.Listen = 500 * time.Millisecond
	w := watch(t, open(t, c))
	reply := next(t, queries).Reply
	stop := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
				_ = nc.Publish(reply, []byte(record("a")))
			}
		}
	})
	defer group.Wait()
	defer close(stop)
	w.Listing()
}

// Answers end the listing; who has nothing to say, says that.
func TestFirstSyncWithAnswers(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	announce(t, r, node(t, "a"), node(t, "b"))
	listed, synced := watch(t, open(t, config(s))).Listing()
	if len(listed) != 2 || listed[0].ID != "a" || listed[1].ID != "b" || !synced.Listing.Partial {
		t.Errorf("listed %v, then %+v", listed, synced.Listing)
	}
	withdraw(t, r, node(t, "a"))
	withdraw(t, r, node(t, "b"))
	if listed, _ := watch(t, open(t, config(s))).Listing(); len(listed) != 0 {
		t.Errorf("after they left: %v", listed)
	}
}

// A proxy that starts late learns the whole fleet at once.
func TestLateListener(t *testing.T) {
	const n = 200
	s := start(t)
	var group sync.WaitGroup
	for i := range n {
		r := open(t, config(s))
		group.Go(func() {
			if err := r.Announce(t.Context(), node(t, fmt.Sprintf("orders-%03d", i))); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	began := time.Now()
	seen := puts(t, watch(t, open(t, config(s))), n)
	took := time.Since(began)
	if len(seen) != n {
		t.Errorf("learnt of %d nodes, want %d", len(seen), n)
	}
	t.Logf("%d registries answered within %v", n, took)
}

// One process that announces thousands answers for all of them.
func TestManyAnswersOfOne(t *testing.T) {
	const n = 10_000
	s := start(t)
	r := open(t, config(s))
	announceMany(t, r, n)
	if seen := puts(t, watch(t, open(t, config(s))), n); len(seen) != n {
		t.Errorf("learnt of %d nodes, want %d", len(seen), n)
	}
}
