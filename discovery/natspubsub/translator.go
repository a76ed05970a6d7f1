package natspubsub

import (
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/recent"
)

const (
	// maxInstancesBytes is how much room the ids and instances may take that were seen
	// last: those of the largest fleet that a directory holds take less by far.
	maxInstancesBytes = 64 << 20
	// maxOrphans is how many nodes may be heard of whose endpoint nobody has told.
	maxOrphans      = 10_000
	maxOrphansBytes = maxOrphans * discovery.MaxID
)

// A translator emits what messages mean. It is used by one goroutine.
type translator struct {
	emit    func(discovery.Event)
	records discovery.Parser
	// instances are those of the records that were seen last, by id.
	instances *recent.Map[string]
	// orphans are heartbeats of nodes that no record has named yet, by id.
	orphans *recent.Map[heartbeat]
}

// A heartbeat is what a node says between its records.
type heartbeat struct {
	load  float64
	heard time.Time
}

func newTranslator(emit func(discovery.Event)) *translator {
	return &translator{
		emit:      emit,
		instances: recent.NewMap(discovery.MaxNodes, maxInstancesBytes, func(instance string) int { return len(instance) }),
		orphans:   recent.NewMap(maxOrphans, maxOrphansBytes, func(heartbeat) int { return 0 }),
	}
}

// join emits what a message says with which a node comes.
func (t *translator) join(data []byte) { t.event(parseRecord(data, &t.records)) }

// heartbeat emits what a heartbeat says.
func (t *translator) heartbeat(data []byte) { t.unlessReplaced(parseHeartbeat(data, &t.records)) }

// answer emits what the answer to a query says.
func (t *translator) answer(data []byte) { t.unlessReplaced(parseRecord(data, &t.records)) }

// unlessReplaced emits an event, but not that a node drains which another instance has
// replaced: what leaves must not cover the record of what has come in its place.
func (t *translator) unlessReplaced(e discovery.Event) {
	if e.Type == discovery.Put && e.Node.State() == discovery.StateDraining && t.replaced(e.ID, e.Node.Instance()) {
		return
	}
	t.event(e)
}

// replaced reports whether an instance of a node, if it says which it is, is another
// one than that whose record was seen last.
func (t *translator) replaced(id, instance string) bool {
	last, known := t.instances.Get(id)
	return known && instance != "" && instance != last
}

// event emits an event, and what it makes of heartbeats.
func (t *translator) event(e discovery.Event) {
	t.emit(e)
	switch e.Type {
	case discovery.Put:
		t.instances.Put(e.ID, e.Node.Instance())
		if h, found := t.orphans.Get(e.ID); found {
			t.orphans.Delete(e.ID)
			if time.Since(h.heard) < e.Node.LeaseOr(discovery.DefaultTTL) {
				t.emit(discovery.Event{Type: discovery.Beat, ID: e.ID, Load: h.load})
			}
		}
	case discovery.Beat:
		if _, known := t.instances.Get(e.ID); !known {
			t.orphans.Put(e.ID, heartbeat{e.Load, time.Now()})
		}
	case discovery.Rejected:
		// Whoever leaves next is not the one whose record stood there.
		t.instances.Delete(e.ID)
	}
}

// tooLarge emits that there was a message which nobody reads.
func (t *translator) tooLarge(size int) {
	t.event(discovery.Event{Type: discovery.Rejected, Err: discovery.Invalidf(discovery.FaultRecord, "record: %d bytes, want at most %d",
		size, discovery.MaxRecord)})
}

// leave emits what a leave message says.
func (t *translator) leave(data []byte) {
	m, err := parseLeave(data)
	if err != nil {
		// Without an id: what cannot be read is nobody's.
		t.emit(discovery.Event{Type: discovery.Rejected, Err: err})
		return
	}
	if t.replaced(m.NodeID, m.Instance) {
		return
	}
	t.instances.Delete(m.NodeID)
	t.orphans.Delete(m.NodeID)
	// A directory may know the node from an earlier watch.
	t.emit(discovery.Event{Type: discovery.Left, ID: m.NodeID, Instance: m.Instance})
}
