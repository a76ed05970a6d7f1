package discovery

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// journalSize is how many changes a journal remembers: an hour of a busy fleet.
	journalSize = 4096
	// journalBytes is how much memory their records may take. A usual fleet needs a
	// third of it.
	journalBytes = 16 << 20
	// Where they take more, the oldest records that are larger than this lose what
	// nobody but their writer gave a meaning.
	largeRecord = 2 << 10
	// Of such a record values up to this length stay.
	briefValue = 256
	// maxReason is how much of a reason is kept.
	maxReason = 1 << 10
)

// ChangeType says what became of a node.
type ChangeType string

// What can become of a node. Three different things take it away and are never
// confused: it left, its lease lapsed, or its record was rejected.
const (
	// ChangeSeen: the node was listed, or joined.
	ChangeSeen ChangeType = "seen"
	// ChangeUpdated: its record says something else.
	ChangeUpdated ChangeType = "updated"
	// ChangeLeft: its record was removed.
	ChangeLeft ChangeType = "left"
	// ChangeLapsed: its lease ran out.
	ChangeLapsed ChangeType = "lapsed"
	// ChangeHeld: its lease ran out with that of many others, and it stays.
	ChangeHeld ChangeType = "held"
	// ChangeEjected: it is listed, and takes no requests because it is ill.
	ChangeEjected ChangeType = "ejected"
	// ChangeRestored: it is in use again, or is in use as it was remembered.
	ChangeRestored ChangeType = "restored"
	// ChangeRejected: its record cannot be accepted.
	ChangeRejected ChangeType = "rejected"
	// ChangeHosts: a host that it announces is refused, or is its service's by now.
	ChangeHosts ChangeType = "hosts"
	// ChangeCertificate: a certificate is allowed for a host that it announces, for the
	// first time.
	ChangeCertificate ChangeType = "certificate"

	// ChangeConnected and ChangeDisconnected are about the registry, not about a
	// node: they have no id.
	ChangeConnected    ChangeType = "connected"
	ChangeDisconnected ChangeType = "disconnected"
)

// A Change is one entry of a Journal.
type Change struct {
	// Number counts the changes of one journal, from 1.
	Number uint64
	// Time is when it was noted, by the local clock.
	Time time.Time
	// Type says what happened.
	Type ChangeType
	// ID is the node's id; as far as it could be read, for ChangeRejected.
	ID string
	// Reason says why, for people to read.
	Reason string
	// Entry is the node as it is from then on, or as it was last; nil where the
	// change is not about a node that was accepted. Of a large record only metadata
	// with a meaning of its own is left once many came after it. Read it only.
	Entry *Entry
	// Listed says that the node did not come just then: the first listing of the
	// registry showed it.
	Listed bool
}

// A Journal remembers what became of the nodes of one directory: the newest 4096
// changes, within 16 MiB, and how many there were of each type. Its methods may be called from
// any goroutine; none of them keeps the writer waiting for longer than it takes to
// copy a few hundred entries.
type Journal struct {
	mu       sync.Mutex
	ring     []Change // the change with number n is at (n-1) % journalSize
	last     uint64
	bytes    int           // what the changes in the ring take
	abridged uint64        // up to this number records are not large any more
	grown    chan struct{} // closed at the next change; nil while nobody waits
	counts   map[ChangeType]uint64
	rejected map[Fault]uint64
}

// Add notes a change, and sets its number, and its time unless it has one.
func (j *Journal) Add(c Change) { j.add(c, "") }

func (j *Journal) add(c Change, fault Fault) {
	if c.Time.IsZero() {
		c.Time = time.Now()
	}
	c.Reason = shorten(c.Reason, maxReason)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.last++
	c.Number = j.last
	if len(j.ring) < journalSize {
		j.ring = append(j.ring, c)
	} else {
		forgotten := &j.ring[(c.Number-1)%journalSize]
		j.bytes -= forgotten.footprint()
		*forgotten = c
		j.abridged = max(j.abridged, j.last-journalSize)
	}
	j.bytes += c.footprint()
	for j.bytes > journalBytes && j.abridged < j.last {
		j.abridged++
		old := &j.ring[(j.abridged-1)%journalSize]
		j.bytes -= old.footprint()
		old.Entry = old.Entry.brief()
		j.bytes += old.footprint()
	}
	if j.counts == nil {
		j.counts, j.rejected = make(map[ChangeType]uint64), make(map[Fault]uint64)
	}
	j.counts[c.Type]++
	if fault != "" {
		j.rejected[fault]++
	}
	if j.grown != nil {
		close(j.grown)
		j.grown = nil
	}
}

// footprint is about how many bytes of memory the change takes.
func (c *Change) footprint() int {
	size := 128 + len(c.ID) + len(c.Reason)
	if c.Entry != nil {
		size += c.Entry.Node.footprint()
	}
	return size
}

// brief returns the entry, without most of its metadata if that is large.
func (e *Entry) brief() *Entry {
	if e == nil || e.Node.footprint() <= largeRecord {
		return e
	}
	brief := *e
	brief.Node.LeftOut = nil
	brief.Node.Metadata = make(map[string]string)
	for _, k := range reservedKeys {
		if v, ok := e.Node.Metadata[k]; ok && len(v) <= briefValue {
			brief.Node.Metadata[k] = v
		}
	}
	return &brief
}

// maxSince bounds what one call of Since copies.
const maxSince = 512

// Since returns changes that came after the one with the number, oldest first and
// not necessarily all of them, and a channel that is closed when there are more.
// To follow a journal: handle what Since returns, wait for the channel, and call
// again with the number of the last change. Where the first one's number is not
// the next, the journal has forgotten those between.
func (j *Journal) Since(number uint64) ([]Change, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	first := max(number, j.last-uint64(len(j.ring)))
	if first < j.last {
		changes := make([]Change, 0, min(j.last-first, maxSince))
		for n := first; n < j.last && len(changes) < maxSince; n++ {
			changes = append(changes, j.ring[n%journalSize])
		}
		return changes, closed
	}
	if j.grown == nil {
		j.grown = make(chan struct{})
	}
	return nil, j.grown
}

var closed = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// Newest returns the newest changes that match, newest first, at most limit of
// them unless that is 0. match is called without a lock.
func (j *Journal) Newest(limit int, match func(*Change) bool) []Change {
	var found []Change
	for before := j.Last() + 1; before > 1; {
		batch := j.before(before)
		if len(batch) == 0 {
			break // forgotten meanwhile
		}
		for i := range slices.Backward(batch) {
			if match == nil || match(&batch[i]) {
				if found = append(found, batch[i]); len(found) == limit {
					return found
				}
			}
		}
		before = batch[0].Number
	}
	return found
}

// before returns the changes that came right before the one with the number,
// oldest first, not necessarily all of them.
func (j *Journal) before(number uint64) []Change {
	j.mu.Lock()
	defer j.mu.Unlock()
	first := j.last - uint64(len(j.ring)) + 1
	if number > maxSince {
		first = max(first, number-maxSince)
	}
	var changes []Change
	for n := first; n < number; n++ {
		changes = append(changes, j.ring[(n-1)%journalSize])
	}
	return changes
}

// Last returns the number of the newest change, 0 if there was none.
func (j *Journal) Last() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.last
}

// Counts returns how many changes there were of each type, and how many records
// were rejected for each [Fault].
func (j *Journal) Counts() (changes map[ChangeType]uint64, rejected map[Fault]uint64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return maps.Clone(j.counts), maps.Clone(j.rejected)
}

// difference says how a record differs from the one before.
func difference(was, is *Node) string {
	const empty = `""`
	var parts []string
	note := func(name, from, to string) {
		if from != to {
			parts = append(parts, name+" "+cmp.Or(from, empty)+" → "+cmp.Or(to, empty))
		}
	}
	note("endpoint", was.Endpoint.String(), is.Endpoint.String())
	note("metadata left out", leftOut(was), leftOut(is))
	keys := slices.AppendSeq(slices.Collect(maps.Keys(was.Metadata)), maps.Keys(is.Metadata))
	slices.Sort(keys)
	const most = 5
	for _, k := range slices.Compact(keys) {
		if len(parts) > most {
			break
		}
		from, had := was.Metadata[k]
		to, has := is.Metadata[k]
		switch {
		case k == KeyInstance && from != to:
			parts = append(parts, "another process")
		case !had:
			parts = append(parts, Clip(k)+" "+cmp.Or(Clip(to), empty))
		case !has:
			parts = append(parts, Clip(k)+" gone")
		default:
			note(Clip(k), Clip(from), Clip(to))
		}
	}
	if len(parts) > most {
		parts = append(parts[:most], "…")
	}
	return strings.Join(parts, ", ")
}

// leftOut names the metadata keys of a record that are left out, "" if none are.
func leftOut(n *Node) string {
	const most = 5
	keys := n.LeftOut
	if len(keys) > most {
		keys = append(keys[:most:most], "…")
	}
	return strings.Join(keys, ", ")
}
