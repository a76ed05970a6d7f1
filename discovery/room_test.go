package discovery_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Large records take no more than so much memory, and what they take costs nobody
// whose record is as usual.
func TestRoomForLargeRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{TTL: 24 * time.Hour})
		s := <-w.streams
		notes := strings.Repeat("x", 60_000) // one string, or the test would need what it forbids
		put := func(id string, pairs ...string) { s.put("node."+id, 0, newNode(id, pairs...)) }
		const many = 6000
		for i := range many {
			put(fmt.Sprintf("large-%04d", i), "notes", notes)
		}
		s.sync(discovery.Listing{})
		for i := range many {
			put(fmt.Sprintf("small-%04d", i), "notes", notes[:1000])
		}
		time.Sleep(coalesced)
		synctest.Wait()
		large, small := 0, 0
		for _, e := range d.Snapshot().Nodes() {
			if strings.HasPrefix(e.Node.ID, "large-") {
				large++
			} else {
				small++
			}
		}
		if total := large * len(notes); total > 300<<20 || total < 200<<20 || small != many {
			t.Fatalf("%d large records of %d MiB and %d small ones are in use", large, total>>20, small)
		}
		status := d.Status()
		if r := status.Rejections; len(r) != 1000 || discovery.RejectionReason(r[0].Err) != "full" || !strings.Contains(r[0].Err.Error(), "full with 256 MiB") {
			t.Fatalf("%d rejections, the first %+v", len(r), r[0])
		}
		inUse := func(id string) bool {
			time.Sleep(coalesced)
			synctest.Wait()
			return d.Snapshot().Node(id) != nil
		}
		// A small one that becomes large finds no room either, and one that goes makes
		// some.
		put("small-0000", "notes", notes)
		if !inUse("small-0000") || d.Snapshot().Node("small-0000").Refused() == nil ||
			d.Snapshot().Node("small-0000").Node.Metadata["notes"] != notes[:1000] {
			t.Error("a record that became too large costs its node more or less than the update")
		}
		put("large-0000", "notes", notes, "version", "2")
		if !inUse("large-0000") {
			t.Error("a large record that stays as large is not in use")
		}
		s.emit(discovery.Event{Type: discovery.Left, Key: "node.large-0001"})
		put("small-0000", "notes", notes)
		if !inUse("small-0000") || d.Snapshot().Node("small-0000").Refused() != nil {
			t.Error("there is room again, and it is not used")
		}
	})
}
