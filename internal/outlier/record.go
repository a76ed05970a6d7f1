package outlier

import (
	"fmt"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/window"
)

// records are what the detectors know of one node, attached to it.
type records struct{ list atomic.Pointer[[]*record] }

// A record is what one detector knows of one process at one address. Another process, or
// another address, begins with a new one.
type record struct {
	detector          *Detector
	id                string
	address, instance string

	inRow  atomic.Int64 // failures
	recent window.Window
	// Requests that were sent before this time say nothing any more: it is when the node
	// was in use again.
	since atomic.Int64
	// Until when it is not judged again, because it would be one too many.
	spared atomic.Int64

	ejection atomic.Pointer[Ejection] // nil while the node is in use

	// What follows is guarded by the lock of the detector.
	group string // whose nodes are counted with it while it is ejected
	times int    // of ejections in a row
}

// A Failure is how a request failed: the status of the response, or one of these.
type Failure int

// What fails beside responses.
const (
	NoConnection Failure = -iota - 1
	NoAnswer
	BrokeOff
	Unavailable // by the status of gRPC
)

func (f Failure) String() string {
	switch f {
	case NoConnection:
		return "no connection"
	case NoAnswer:
		return "no answer"
	case BrokeOff:
		return "an answer that broke off"
	case Unavailable:
		return "gRPC status 14"
	}
	return "status " + strconv.Itoa(int(f))
}

// An Ejection says why a node gets no requests, and for how long.
type Ejection struct {
	Cause        string
	Since, Until time.Time
	Times        int // in a row, this one included
}

// Count says which time in a row it is.
func (x *Ejection) Count() string {
	if x.Times == 1 {
		return "for the first time"
	}
	return fmt.Sprintf("%d times in a row", x.Times)
}

// is reports whether the record is ours, and of the process that the entry lists.
func (d *Detector) is(r *record, e *discovery.Entry) bool {
	return r.detector == d && r.address == e.DialAddress(d.options.TLS) && r.instance == e.Instance()
}

// find returns the record of a node, nil if there is none.
func (d *Detector) find(e *discovery.Entry) *record {
	if list := discovery.Attached[records](e).list.Load(); list != nil {
		for _, r := range *list {
			if d.is(r, e) {
				return r
			}
		}
	}
	return nil
}

// record returns the record of a node, which it may begin; nil where the node is not as it
// is listed now: what a process did that has been replaced says nothing of the other.
func (d *Detector) record(e *discovery.Entry) *record {
	if r := d.find(e); r != nil {
		return r
	}
	r := &record{detector: d, id: e.Node.ID, address: e.DialAddress(d.options.TLS), instance: e.Instance()}
	if now := d.directory.Snapshot().Node(e.Node.ID); now == nil || !d.is(r, now) {
		return nil
	}
	attached := discovery.Attached[records](e)
	for {
		old := attached.list.Load()
		var list []*record
		if old != nil {
			// Of a detector that has ended nobody asks any more.
			list = slices.DeleteFunc(slices.Clone(*old), func(r *record) bool { return r.detector == d || r.detector.ended.Load() })
			if i := slices.IndexFunc(*old, func(r *record) bool { return d.is(r, e) }); i >= 0 {
				return (*old)[i]
			}
		}
		list = append(list, r)
		if attached.list.CompareAndSwap(old, &list) {
			return r
		}
	}
}

// Any reports whether some detector of its directory has ejected the node.
func Any(e *discovery.Entry) bool {
	list := discovery.Attached[records](e).list.Load()
	return list != nil && slices.ContainsFunc(*list, func(r *record) bool {
		return r.detector.is(r, e) && !r.detector.ended.Load() && r.ejection.Load() != nil
	})
}
