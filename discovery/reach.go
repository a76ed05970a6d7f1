package discovery

import (
	"context"
	"net/netip"
	"time"
)

const (
	maxReached = 32 // nodes whose addresses are tried at once
	// A node may have its addresses tried three times in a row and every two seconds
	// after that, however often it is said to fail.
	tryEvery = 2 * time.Second
	tryBurst = 3
)

// A reacher finds out at which address a node can be reached whose host name stands
// for several: the first one may be of a network that this machine does not have, or
// of a server that is down. All its methods are for one goroutine, which also receives
// from done; connections are tried beside.
type reacher struct {
	dialer
	tasks[reached]
	waiting map[string]*Entry   // to be tried, by id
	trying  map[string]struct{} // by id
}

// reached is at which address an entry can be reached.
type reached struct {
	entry   *Entry
	address netip.Addr
	err     error // why there is none
}

func newReacher(d dialer) *reacher {
	return &reacher{
		dialer: d, tasks: newTasks[reached](maxReached),
		waiting: make(map[string]*Entry), trying: make(map[string]struct{}),
	}
}

// want has the addresses of an entry tried, if it has several.
func (r *reacher) want(e *Entry) {
	if !r.recordsOnly && e.named && len(e.addresses) > 1 && e.liveness.tried.take(tryEvery, tryBurst) == 0 {
		r.waiting[e.Node.ID] = e
	}
}

// drop ends what want began, as long as nothing was tried.
func (r *reacher) drop(id string) { delete(r.waiting, id) }

// busy reports whether something is or will be tried.
func (r *reacher) busy() bool { return len(r.waiting)+r.running > 0 }

// tryWaiting tries what waits for it, a bounded number at once.
func (r *reacher) tryWaiting(ctx context.Context) {
	for id, e := range r.waiting {
		if r.running >= maxReached {
			return
		}
		if _, trying := r.trying[id]; trying {
			continue
		}
		delete(r.waiting, id)
		r.trying[id] = struct{}{}
		r.start(func() reached {
			addr, err := r.reach(ctx, e)
			return reached{e, addr, err}
		})
	}
}

// tried notes that something was tried.
func (r *reacher) tried(f reached) { delete(r.trying, f.entry.Node.ID) }
