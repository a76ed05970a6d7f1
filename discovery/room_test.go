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
		if r := status.Rejections; len(r) != 1000 || discovery.FaultOf(r[0].Err) != discovery.FaultFull || !strings.Contains(r[0].Err.Error(), "full with 256 MiB") {
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

// Where no room is left, a node in use that drains or moves is taken at its word; one
// that grows without measure renews no lease, and is told of once.
func TestChangesWhereNoRoomIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		notes := strings.Repeat("x", 60_000)
		lease := func(n discovery.Node) discovery.Node {
			n.Metadata[discovery.KeyLease] = "24h"
			return n
		}
		good := newNode("good", "notes", notes[:3500])
		greedy := newNode("greedy", "notes", notes[:3500])
		s.put("node.good", 0, good)
		s.put("node.greedy", 0, greedy)
		heard := time.Now()
		// What is left is ever less.
		for _, fill := range []struct{ size, nodes int }{{len(notes), 5000}, {6000, 30}, {3321, 10}, {2871, 20}} {
			for i := range fill.nodes {
				id := fmt.Sprintf("%05d-%04d", fill.size, i)
				s.put("node."+id, 0, lease(newNode(id, "notes", notes[:fill.size])))
			}
		}
		s.sync(discovery.Listing{})
		time.Sleep(coalesced)
		synctest.Wait()
		full := len(d.Snapshot().Nodes())
		for range 5 {
			time.Sleep(5 * time.Second)
			good = newNode("good", "notes", notes[:3500], discovery.KeyState, "draining")
			good.Endpoint = atEndpoint(good, "http://a-longer-name.example.org:5001").Endpoint
			s.put("node.good", 0, good)
			s.put("node.greedy", 0, newNode("greedy", "notes", notes))
			s.put("node.large", 0, lease(newNode("large", "notes", notes)))
		}
		time.Sleep(coalesced)
		synctest.Wait()
		if e := d.Snapshot().Node("good"); e == nil || e.State() != discovery.StateDraining || e.Serves() ||
			e.Refused() != nil || e.Node.Endpoint.Host() != "a-longer-name.example.org" {
			t.Error("the node that drains and moves is used as it was")
		}
		if e := d.Snapshot().Node("greedy"); e == nil || e.Refused() == nil {
			t.Error("the node that grows without measure is not kept as it was")
		}
		told := d.Journal().Newest(1000, func(c *discovery.Change) bool {
			return c.Type == discovery.ChangeRejected && (c.ID == "greedy" || c.ID == "good" || c.ID == "large")
		})
		if len(told) != 2 || full != len(d.Snapshot().Nodes()) {
			t.Errorf("with %d nodes, %d before, the journal tells of rejections %+v", len(d.Snapshot().Nodes()), full, told)
		}
		lapsesAt(t, d, "greedy", heard.Add(discovery.DefaultTTL))
	})
}
