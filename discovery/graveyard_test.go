package discovery

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// lapsedNode returns what is kept of a node of a service.
func lapsedNode(id, service string, until time.Duration) *grave {
	n := Node{ID: id, Endpoint: Endpoint{address: "10.0.0.1:80"}, Metadata: map[string]string{KeyService: service}}
	return &grave{entry: newEntry(n, DefaultTTL, new(liveness)), key: "node." + id, until: until}
}

func ids(graves []*grave) string {
	var all []string
	for _, g := range graves {
		all = append(all, g.id())
	}
	return strings.Join(all, " ")
}

func TestGraveyardIsBounded(t *testing.T) {
	record := lapsedNode("a0000", "orders", 0).entry.Node.footprint() + len("node.a0000")
	for _, test := range []struct {
		name        string
		most, bytes int
		want        int
	}{
		{"in number", 10, 1 << 30, 10},
		{"in bytes", 1 << 30, 7*record + 1, 7},
	} {
		t.Run(test.name, func(t *testing.T) {
			y := newGraveyard(test.most, test.bytes)
			for i := range 1000 {
				y.bury(lapsedNode(fmt.Sprintf("a%04d", i), "orders", time.Hour), time.Duration(i), i%2 == 0)
			}
			if len(y.byID) != test.want || len(y.byRecord) != test.want || y.ages.Len() != test.want || y.lapsed() != test.want || y.lapsedOf("orders") != test.want {
				t.Errorf("%d, %d and %d kept, %d and %d count; want %d of each",
					len(y.byID), len(y.byRecord), y.ages.Len(), y.lapsed(), y.lapsedOf("orders"), test.want)
			}
			if y.byID["a0999"] == nil || y.byID["a0000"] != nil {
				t.Error("not the oldest went")
			}
			if got := len(y.ask()); got != test.want/2+test.want%2 {
				t.Errorf("%d to be asked", got)
			}
			y.expire(graveTime + 1000)
			if len(y.byID) != 0 || len(y.byRecord) != 0 || y.ages.Len() != 0 || y.bytes != 0 || y.lapsed() != 0 || len(y.plots) != 0 || y.unasked != 0 {
				t.Errorf("left after their time: %+v", y)
			}
		})
	}
}

func TestGraveyardTooLarge(t *testing.T) {
	y := newGraveyard(10, 100)
	y.bury(lapsedNode("a", "orders", time.Hour), 0, false)
	if len(y.byID) != 0 || y.bytes != 0 || y.unasked != 0 {
		t.Errorf("kept what does not fit: %+v", y)
	}
}

// What is being asked stays until it has answered, however many lapse meanwhile, and
// is like any other from then on.
func TestGraveyardAwaitsAnswers(t *testing.T) {
	y := newGraveyard(10, 1<<30)
	asked := make([]*grave, 30)
	for i := range asked {
		asked[i] = lapsedNode(fmt.Sprintf("asked-%02d", i), "orders", time.Hour)
		if !y.buryAsked(asked[i], 0) {
			t.Fatalf("no room for %d", i)
		}
	}
	for i := range 20 {
		y.bury(lapsedNode(fmt.Sprintf("a%02d", i), "orders", time.Hour), 1, false)
	}
	counts := func(pending, kept int) {
		t.Helper()
		if y.pending != pending || y.ages.Len() != kept || len(y.byID) != pending+kept || len(y.byRecord) != pending+kept || y.lapsed() != pending+kept {
			t.Errorf("%d are asked, %d are not; %d and %d kept, %d count; want %d and %d",
				y.pending, y.ages.Len(), len(y.byID), len(y.byRecord), y.lapsed(), pending, kept)
		}
	}
	counts(30, 10)
	if y.await(asked[0]) {
		t.Error("asked twice at once")
	}
	for _, g := range y.ask() {
		if !y.await(g) {
			t.Errorf("no room for %s", g.id())
		}
	}
	counts(40, 0)
	for i, g := range asked {
		if i < 5 {
			y.drop(g)
		} else {
			y.answered(g, 2)
		}
		y.answered(g, 2)
	}
	counts(10, 10)
	if y.byID["asked-29"] == nil || y.byID["asked-05"] != nil {
		t.Error("not the oldest went")
	}
	y.expire(graveTime + 2)
	if y.pending != 10 || y.ages.Len() != 0 || len(y.byID) != 10 || y.lapsed() != 0 {
		t.Errorf("after their time %d are asked, %d are not, %d count", y.pending, y.ages.Len(), y.lapsed())
	}
	for _, g := range y.byID {
		y.answered(g, graveTime+2)
	}
	y.expire(2*graveTime + 2)
	counts(0, 0)
	if y.unasked != 0 || len(y.plots) != 0 || y.bytes != 0 || y.room.used != 0 {
		t.Errorf("%d bytes and %d of the room are left", y.bytes, y.room.used)
	}
}

func TestGraveyardAwaitsABoundedNumber(t *testing.T) {
	y := newGraveyard(10, 1<<30)
	y.pending = MaxNodes
	if y.buryAsked(lapsedNode("a", "orders", time.Hour), 0) || y.byID["a"] == nil {
		t.Error("one more than may be in use is asked, or is not kept")
	}
	y.pending, y.room.used = 0, maxExcess
	large := lapsedNode("b", "orders", time.Hour)
	large.entry.Node.Metadata["note"] = strings.Repeat("x", 2*ordinaryRecord)
	if y.buryAsked(large, 0) || y.byID["b"] == nil {
		t.Error("one for which the room is used up is asked, or is not kept")
	}
	if !y.buryAsked(lapsedNode("c", "orders", time.Hour), 0) {
		t.Error("an ordinary one finds no room")
	}
}

func TestGraveyardCounts(t *testing.T) {
	y := newGraveyard(100, 1<<30)
	y.bury(lapsedNode("a", "orders", 10), 0, false)
	y.bury(lapsedNode("b", "orders", 20), 1, true)
	y.bury(lapsedNode("c", "billing", 20), 2, false)
	y.bury(lapsedNode("d", "billing", 0), 3, false) // long ago
	counts := func(want string) {
		t.Helper()
		if got := fmt.Sprintf("%d: %d orders, %d billing, %d kept", y.lapsed(), y.lapsedOf("orders"), y.lapsedOf("billing"), len(y.byID)); got != want {
			t.Errorf("%s; want %s", got, want)
		}
	}
	counts("3: 2 orders, 1 billing, 4 kept")
	y.bury(lapsedNode("a", "orders", 15), 4, false) // once more
	counts("3: 2 orders, 1 billing, 4 kept")
	y.expire(15)
	counts("2: 1 orders, 1 billing, 4 kept")
	if y.byID["a"] == nil || y.byRecord["node.d"] == nil {
		t.Error("what counts no longer is not kept")
	}
	y.drop(y.byRecord["node.c"])
	y.drop(y.byID["d"])
	counts("1: 1 orders, 0 billing, 2 kept")
	y.drop(lapsedNode("a", "orders", 0)) // another grave
	counts("1: 1 orders, 0 billing, 2 kept")
}

func TestGraveyardAsks(t *testing.T) {
	y := newGraveyard(100, 1<<30)
	for i, id := range []string{"b", "a", "c"} {
		y.bury(lapsedNode(id, "orders", 100), time.Duration(i), false)
	}
	y.bury(lapsedNode("x", "billing", 100), 0, false)
	y.bury(lapsedNode("y", "billing", 100), 0, true)
	if got := ids(y.askOf("orders")); got != "b a c" {
		t.Errorf("asked [%s]", got)
	}
	if got := ids(y.ask()); got != "x" {
		t.Errorf("asked [%s]", got)
	}
	if got := ids(y.ask()) + ids(y.askOf("orders")) + ids(y.askOf("nobody")); got != "" {
		t.Errorf("asked twice: [%s]", got)
	}
	a := y.byID["a"]
	for i := range maxAgain + 1 {
		y.askAgain(a)
		if got := ids(y.ask()); (got == "a") != (i < maxAgain) {
			t.Errorf("nothing was learnt of a %d times: asked [%s]", i+1, got)
		}
	}
	y.expire(100)
	y.askAgain(y.byID["b"])
	if got := ids(y.ask()); got != "" {
		t.Errorf("asked [%s], which count no longer", got)
	}
}
