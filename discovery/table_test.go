package discovery

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// tableNode returns a node that was heard at a time, not in use.
func tableNode(id, address, service string, heard time.Duration) *tracked {
	n := Node{ID: id, Endpoint: Endpoint{address: address}, Metadata: map[string]string{KeyService: service}}
	v := new(liveness)
	v.heard.Store(int64(heard))
	v.renewed.Store(int64(heard))
	return &tracked{entry: newEntry(n, DefaultTTL, v), key: "node." + id, watch: 1}
}

// Whatever happens, a node in use is found by its id, its key and its address, and in
// the order of the leases, and one that is not is found nowhere.
func TestTableFindsWhatIsInUse(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	table := newTable()
	for range 5_000 {
		id, address := fmt.Sprint("n", random.IntN(40)), fmt.Sprintf("10.0.0.%d:80", random.IntN(8))
		next := tableNode(id, address, "orders", time.Duration(random.IntN(1000)))
		switch n := table.nodes[id]; {
		case n == nil:
			if random.IntN(3) == 0 {
				next.key = ""
			}
			table.add(next)
		case random.IntN(3) == 0:
			table.remove(n)
		case random.IntN(3) == 0:
			table.setKey(n, []string{"", "other." + id}[random.IntN(2)])
		default:
			table.replace(n, next.entry)
		}
		addresses := make(map[string]int)
		for id, n := range table.nodes {
			addresses[n.entry.Node.Endpoint.Address()]++
			found := table.byRecord[(&Event{ID: id, Key: n.key}).record()]
			if n.id() != id || found != n || table.leases.items[n.place-1] != n || n.due != n.entry.due() {
				t.Fatalf("%q is lost: %+v", id, n)
			}
		}
		for address, nodes := range addresses {
			if at := table.addresses[address]; len(at) != nodes {
				t.Fatalf("%d nodes at %s, want %d", len(at), address, nodes)
			}
		}
		if len(table.byRecord) != len(table.nodes) || len(table.leases.items) != len(table.nodes) || len(table.addresses) != len(addresses) {
			t.Fatal("something is left of a node that is gone")
		}
	}
	for len(table.nodes) > 0 {
		first := table.overdue(1 << 62)
		if soonest := slices.MinFunc(table.leases.items, func(a, b *tracked) int { return cmp.Compare(a.due, b.due) }); first.due != soonest.due {
			t.Fatalf("%v is due first, want %v", first.due, soonest.due)
		}
		table.remove(first)
	}
	if len(table.byRecord)+len(table.addresses)+len(table.leases.items)+table.room.used != 0 {
		t.Error("an empty table is not empty")
	}
}

// A node that was heard since it was queued is not overdue.
func TestTableOverdue(t *testing.T) {
	table := newTable()
	a, b := tableNode("a", "10.0.0.1:80", "", 0), tableNode("b", "10.0.0.2:80", "", time.Second)
	table.add(a)
	table.add(b)
	a.entry.liveness.renewed.Store(int64(time.Minute))
	if got := table.overdue(DefaultTTL + time.Second); got != b {
		t.Errorf("%v is overdue, want b", got)
	}
	if got := table.overdue(DefaultTTL); got != nil {
		t.Errorf("%v is overdue, want none", got.id())
	}
}

func TestAddressConflict(t *testing.T) {
	const address = "10.0.0.1:80"
	lost := tableNode("lost", address, "orders", time.Minute)
	for _, test := range []struct {
		name          string
		id, service   string
		address       string
		since         time.Duration
		dead          bool
		others        int
		wantsConflict bool
	}{
		{"announced since", "x", "pay", address, 2 * time.Minute, false, 0, true},
		{"there all along", "x", "pay", address, time.Second, false, 0, false},
		{"of the same service", "x", "orders", address, 2 * time.Minute, false, 0, false},
		{"not heard itself", "x", "pay", address, 2 * time.Minute, true, 0, false},
		{"elsewhere", "x", "pay", "10.0.0.2:80", 2 * time.Minute, false, 0, false},
		{"under the same id", "lost", "pay", address, 2 * time.Minute, false, 0, false},
		{"among as many as are compared", "x", "pay", address, 2 * time.Minute, false, maxNeighbours - 2, true},
		{"among too many", "x", "pay", address, 2 * time.Minute, false, maxNeighbours - 1, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			index := make(addrIndex)
			other := tableNode(test.id, test.address, test.service, 0)
			other.announced = test.since
			index.add(lost)
			index.add(other)
			for i := range test.others {
				index.add(tableNode(fmt.Sprint("n", i), address, "orders", 0))
			}
			got := index.conflict(lost, func(*tracked) bool { return !test.dead })
			if (got == other) != test.wantsConflict || !test.wantsConflict && got != nil {
				t.Errorf("conflict with %v, want one: %v", got, test.wantsConflict)
			}
			index.remove(lost)
		})
	}
}
