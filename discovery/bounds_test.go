package discovery_test

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func TestMaxNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		n := newNode("")
		for i := range discovery.MaxNodes + 1 {
			n.ID = fmt.Sprintf("n%06d", i)
			s.put("", uint64(i), n)
		}
		s.sync(discovery.Listing{})
		synctest.Wait()
		if got := len(d.Snapshot().Nodes()); got != discovery.MaxNodes {
			t.Fatalf("%d nodes", got)
		}
		if r := d.Status().Rejections; len(r) != 1 || r[0].ID != n.ID || !strings.Contains(r[0].Err.Error(), "full with 100000 nodes") {
			t.Errorf("rejections %+v", r)
		}
		s.emit(discovery.Event{Type: discovery.Left, ID: "n000000"})
		s.put("", 0, n)
		time.Sleep(coalesced)
		synctest.Wait()
		if d.Snapshot().Node(n.ID) == nil || len(d.Status().Rejections) != 0 {
			t.Errorf("a node that left made no room: %+v", d.Status().Rejections)
		}
	})
}

// A flood of nodes, of which each is another, fills the directory and no more,
// whatever becomes of them.
func TestFloodOfNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		w := newScripted()
		d := follow(t, w, discovery.Options{Probe: n.probe})
		s := <-w.streams
		s.sync(discovery.Listing{})
		node := newNode("")
		for i := range discovery.MaxNodes + 1000 {
			node.ID = fmt.Sprintf("n%06d", i)
			s.put("", 0, node)
		}
		time.Sleep(coalesced)
		synctest.Wait()
		if got := d.Status(); got.Nodes != discovery.MaxNodes || len(got.Rejections) != 1000 {
			t.Errorf("%d nodes, %d rejections", got.Nodes, len(got.Rejections))
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := d.Status(); got.Nodes != 0 {
			t.Errorf("%d nodes a lease later", got.Nodes)
		}
		if n.most > 1024 {
			t.Errorf("%d probes at once", n.most)
		}
	})
}

// A flood of records that all name one address costs no more than any other, and
// ends nobody.
func TestFloodOfOneAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{Probe: newNetwork(newNode("a")).probe})
		s := <-w.streams
		s.sync(discovery.Listing{})
		for i := range 50_000 {
			s.put("", 0, newNode(fmt.Sprint("n", i), "service", fmt.Sprint("s", i)))
		}
		for i := range 50_000 {
			s.emit(discovery.Event{Type: discovery.Left, ID: fmt.Sprint("n", i)})
		}
		time.Sleep(coalesced)
		synctest.Wait()
		expectStates(t, d, "", "all left")
	})
}

// A hundred thousand keys of junk cost a bounded list, a bounded number of lines,
// and no node.
func TestFloodOfJunk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, logs := newLog(slog.LevelInfo)
		w := newScripted()
		d := follow(t, w, discovery.Options{Logger: log})
		s := <-w.streams
		s.put("node.a", 1, newNode("a"))
		s.sync(discovery.Listing{Revision: 1})
		synctest.Wait()
		snapshot := d.Snapshot()
		for round := range 2 {
			for i := range 100_000 {
				s.emit(discovery.Event{
					Type: discovery.Rejected, ID: fmt.Sprint("junk", i), Key: fmt.Sprint("junk", i), Revision: uint64(2 + i),
					Err: fmt.Errorf("%w record: junk %d", discovery.ErrInvalid, round),
				})
			}
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if d.Snapshot() != snapshot {
			t.Error("junk published a snapshot")
		}
		if got := len(d.Status().Rejections); got > 1000 {
			t.Errorf("%d rejections are remembered", got)
		}
		if len(logs.all()) > 200 {
			t.Errorf("%d lines", len(logs.all()))
		}
		s.put("node.a", 200_000, newNode("a", "zone", "z"))
		time.Sleep(coalesced)
		synctest.Wait()
		if d.Snapshot().Node("a").Node.Metadata["zone"] != "z" {
			t.Error("a good record did not get through")
		}
	})
}

func TestRejectionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.sync(discovery.Listing{})
		for i := range 5000 {
			s.emit(discovery.Event{Type: discovery.Rejected, ID: fmt.Sprintf("%04d", i), Err: discovery.ErrInvalid})
		}
		synctest.Wait()
		s.emit(discovery.Event{Type: discovery.Rejected, ID: "0000", Err: fmt.Errorf("%w: for another reason", discovery.ErrInvalid)})
		synctest.Wait()
		if r := d.Status().Rejections; len(r) != 1000 || !strings.Contains(r[0].Err.Error(), "another reason") || !slices.IsSortedFunc(r, func(a, b discovery.Rejection) int { return strings.Compare(a.ID, b.ID) }) {
			t.Errorf("%d rejections", len(r))
		}
	})
}

func TestSnapshotsFollowChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.sync(discovery.Listing{})
		synctest.Wait()
		time.Sleep(time.Minute)

		s.put("", 0, newNode("first", discovery.KeyLease, "1h"))
		expect(t, d, "first", "the first change after a quiet spell")
		time.Sleep(time.Minute)

		// 1000 changes a second, for 10 seconds, each seen at once; then as many for a
		// source whose pools take a millisecond to make. Any second counts, wherever it
		// begins.
		storm := func(seen func()) (published []time.Time) {
			last := d.Snapshot().Number
			for i := range 10_000 {
				id := fmt.Sprintf("n%03d", i%500)
				if i/500%2 == 0 {
					s.put("", 0, newNode(id))
				} else {
					s.emit(discovery.Event{Type: discovery.Left, ID: id})
				}
				synctest.Wait()
				if now := d.Snapshot().Number; now != last {
					seen()
					published = append(published, time.Now())
					last = now
				}
				time.Sleep(time.Millisecond)
			}
			return published
		}
		if published := storm(func() {}); len(published) != 10_000 {
			t.Errorf("%d snapshots of 10,000 changes a millisecond apart", len(published))
		}
		published := storm(func() { d.Charge(time.Millisecond) })
		for i := range published {
			n := i
			for n < len(published) && published[n].Sub(published[i]) < time.Second {
				n++
			}
			if n-i > 50 {
				t.Fatalf("%d snapshots of a millisecond within a second", n-i)
			}
		}
		if len(published) < 450 {
			t.Errorf("only %d snapshots in 10 seconds of changes", len(published))
		}
		time.Sleep(time.Second)
		expect(t, d, "first", "in the end")

		// 10,000 joins at once.
		before := d.Snapshot().Number
		for i := range 10_000 {
			s.put("", 0, newNode(fmt.Sprintf("m%d", i)))
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n := d.Snapshot().Number - before; n > 50 || len(d.Snapshot().Nodes()) != 10_001 {
			t.Errorf("10,000 joins made %d snapshots and %d nodes", n, len(d.Snapshot().Nodes()))
		}
	})
}
