package discovery

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// newLapsed returns a node of a service that counts for so long as one that lapsed lately.
func newLapsed(id, service string, counts time.Duration) *lapsedNode {
	n := Node{ID: id, Endpoint: Endpoint{address: "10.0.0.1:80"}, Metadata: map[string]string{KeyService: service}}
	return &lapsedNode{entry: newEntry(n, DefaultTTL, new(liveness)), key: "node." + id, counts: counts}
}

func ids(nodes []*lapsedNode) string {
	var all []string
	for _, g := range nodes {
		all = append(all, g.id())
	}
	return strings.Join(all, " ")
}

func TestLapsedNodesAreBounded(t *testing.T) {
	record := newLapsed("a0000", "orders", 0).entry.Node.footprint() + len("node.a0000")
	for _, test := range []struct {
		name        string
		most, bytes int
		want        int
	}{
		{"in number", 10, 1 << 30, 10},
		{"in bytes", 1 << 30, 7*record + 1, 7},
	} {
		t.Run(test.name, func(t *testing.T) {
			nodes := newLapsedNodes(test.most, test.bytes, newCounts())
			for i := range 1000 {
				nodes.add(newLapsed(fmt.Sprintf("a%04d", i), "orders", time.Hour), time.Duration(i), i%2 == 0)
			}
			if len(nodes.byID) != test.want || len(nodes.byRecord) != test.want || len(nodes.ages.items) != test.want || nodes.counts.all.gone != test.want || nodes.counts.of("orders").gone != test.want {
				t.Errorf("%d, %d and %d kept, %d and %d count; want %d of each",
					len(nodes.byID), len(nodes.byRecord), len(nodes.ages.items), nodes.counts.all.gone, nodes.counts.of("orders").gone, test.want)
			}
			if nodes.byID["a0999"] == nil || nodes.byID["a0000"] != nil {
				t.Error("not the oldest went")
			}
			asked := nodes.ask()
			if got := len(asked); got != test.want/2+test.want%2 {
				t.Errorf("%d to be asked", got)
			}
			for _, n := range asked {
				nodes.answered(n, 1000)
			}
			nodes.expire(keepLapsed + 1000)
			if len(nodes.byID) != 0 || len(nodes.byRecord) != 0 || len(nodes.ages.items) != 0 || nodes.bytes != 0 || nodes.counts.all.gone != 0 || len(nodes.counts.services) != 0 || len(nodes.unasked) != 0 {
				t.Errorf("left after their time: %+v", nodes)
			}
		})
	}
}

func TestLapsedNodesThatDoNotFitAreNotKept(t *testing.T) {
	nodes := newLapsedNodes(10, 100, newCounts())
	nodes.add(newLapsed("a", "orders", time.Hour), 0, false)
	if len(nodes.byID) != 0 || nodes.bytes != 0 || len(nodes.unasked) != 0 {
		t.Errorf("kept what does not fit: %+v", nodes)
	}
}

// What is being asked stays until it has answered, however many lapse meanwhile, and
// is like any other from then on.
func TestLapsedNodesStayUntilTheyAnswer(t *testing.T) {
	nodes := newLapsedNodes(10, 1<<30, newCounts())
	asked := make([]*lapsedNode, 30)
	for i := range asked {
		asked[i] = newLapsed(fmt.Sprintf("asked-%02d", i), "orders", time.Hour)
		if !nodes.addAsked(asked[i], 0) {
			t.Fatalf("no room for %d", i)
		}
	}
	for i := range 20 {
		nodes.add(newLapsed(fmt.Sprintf("a%02d", i), "orders", time.Hour), 1, false)
	}
	counts := func(pending, kept int) {
		t.Helper()
		if nodes.pending != pending || len(nodes.ages.items) != kept || len(nodes.byID) != pending+kept || len(nodes.byRecord) != pending+kept || nodes.counts.all.gone != pending+kept {
			t.Errorf("%d are asked, %d are not; %d and %d kept, %d count; want %d and %d",
				nodes.pending, len(nodes.ages.items), len(nodes.byID), len(nodes.byRecord), nodes.counts.all.gone, pending, kept)
		}
	}
	counts(30, 10)
	if nodes.await(asked[0]) {
		t.Error("asked twice at once")
	}
	if got := len(nodes.ask()); got != 10 {
		t.Errorf("%d more to be asked, want 10", got)
	}
	counts(40, 0)
	for i, g := range asked {
		if i < 5 {
			nodes.drop(g)
		} else {
			nodes.answered(g, 2)
		}
		nodes.answered(g, 2)
	}
	counts(10, 10)
	if nodes.byID["asked-29"] == nil || nodes.byID["asked-05"] != nil {
		t.Error("not the oldest went")
	}
	nodes.expire(keepLapsed + 2)
	if nodes.pending != 10 || len(nodes.ages.items) != 0 || len(nodes.byID) != 10 || nodes.counts.all.gone != 0 {
		t.Errorf("after their time %d are asked, %d are not, %d count", nodes.pending, len(nodes.ages.items), nodes.counts.all.gone)
	}
	for _, g := range nodes.byID {
		nodes.answered(g, keepLapsed+2)
	}
	nodes.expire(2*keepLapsed + 2)
	counts(0, 0)
	if len(nodes.unasked) != 0 || len(nodes.counts.services) != 0 || nodes.bytes != 0 || nodes.room.used != 0 {
		t.Errorf("%d bytes and %d of the room are left", nodes.bytes, nodes.room.used)
	}
}

func TestLapsedNodesAreAskedWithinBounds(t *testing.T) {
	nodes := newLapsedNodes(10, 1<<30, newCounts())
	nodes.pending = MaxNodes
	if nodes.addAsked(newLapsed("a", "orders", time.Hour), 0) || nodes.byID["a"] == nil {
		t.Error("one more than may be in use is asked, or is not kept")
	}
	nodes.pending, nodes.room.used = 0, maxExcess
	large := newLapsed("b", "orders", time.Hour)
	large.entry.Node.Metadata["note"] = strings.Repeat("x", 2*ordinaryRecord)
	if nodes.addAsked(large, 0) || nodes.byID["b"] == nil {
		t.Error("one for which the room is used up is asked, or is not kept")
	}
	if !nodes.addAsked(newLapsed("c", "orders", time.Hour), 0) {
		t.Error("an ordinary one finds no room")
	}
}

func TestLapsedNodesCountForAWhile(t *testing.T) {
	nodes := newLapsedNodes(100, 1<<30, newCounts())
	nodes.add(newLapsed("a", "orders", 10), 0, false)
	nodes.add(newLapsed("b", "orders", 19), 1, true)
	nodes.add(newLapsed("c", "billing", 18), 2, false)
	nodes.add(newLapsed("d", "billing", 0), 3, false) // long ago
	counts := func(want string) {
		t.Helper()
		if got := fmt.Sprintf("%d: %d orders, %d billing, %d kept", nodes.counts.all.gone, nodes.counts.of("orders").gone, nodes.counts.of("billing").gone, len(nodes.byID)); got != want {
			t.Errorf("%s; want %s", got, want)
		}
	}
	counts("3: 2 orders, 1 billing, 4 kept")
	nodes.add(newLapsed("a", "orders", 11), 4, false) // once more
	counts("3: 2 orders, 1 billing, 4 kept")
	nodes.expire(15)
	counts("2: 1 orders, 1 billing, 4 kept")
	if nodes.byID["a"] == nil || nodes.byRecord["node.d"] == nil {
		t.Error("what counts no longer is not kept")
	}
	nodes.drop(nodes.byRecord["node.c"])
	nodes.drop(nodes.byID["d"])
	counts("1: 1 orders, 0 billing, 2 kept")
	nodes.drop(newLapsed("a", "orders", 0)) // another one of the same id
	counts("1: 1 orders, 0 billing, 2 kept")
}

func TestLapsedNodesAreAskedOnce(t *testing.T) {
	nodes := newLapsedNodes(100, 1<<30, newCounts())
	for i, id := range []string{"b", "a", "c"} {
		nodes.add(newLapsed(id, "orders", 100), time.Duration(i), false)
	}
	nodes.add(newLapsed("x", "billing", 100), 0, false)
	nodes.add(newLapsed("y", "billing", 100), 0, true)
	if got := ids(nodes.askOf("orders")); got != "b a c" {
		t.Errorf("asked [%s]", got)
	}
	if got := ids(nodes.ask()); got != "x" {
		t.Errorf("asked [%s]", got)
	}
	if got := ids(nodes.ask()) + ids(nodes.askOf("orders")) + ids(nodes.askOf("nobody")); got != "" {
		t.Errorf("asked twice: [%s]", got)
	}
	a := nodes.byID["a"]
	for i := range maxAgain + 1 {
		nodes.answered(a, 10)
		nodes.askAgain(a)
		if got := ids(nodes.ask()); (got == "a") != (i < maxAgain) {
			t.Errorf("nothing was learnt of a %d times: asked [%s]", i+1, got)
		}
	}
	nodes.expire(200)
	nodes.askAgain(nodes.byID["b"])
	if got := ids(nodes.ask()); got != "" {
		t.Errorf("asked [%s], which count no longer", got)
	}
}
