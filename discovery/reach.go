package discovery

import (
	"context"
	"net/netip"
	"slices"
	"time"
)

const (
	maxReached = 32 // nodes whose addresses are tried at once
	// maxTried is how many addresses of a name are tried: a name with thousands
	// must not cost as many connections.
	maxTried = 8
	// tryNext is how long an address has to answer before the next one is tried
	// beside it, as in RFC 8305, and preferReached for how much longer than another
	// the one in use may take and be kept.
	tryNext       = 100 * time.Millisecond
	preferReached = 500 * time.Millisecond
	// A node may have its addresses tried three times in a row and every two seconds
	// after that, however often it is said to fail.
	tryEvery = 2 * time.Second
	tryBurst = 3
)

// A reacher finds out at which address a node can be reached whose host name stands
// for several: the first one may be of a network that this machine does not have, or
// of a server that is down. All its methods are for one goroutine, which also receives
// from found; connections are tried beside.
type reacher struct {
	probe  func(ctx context.Context, address string) error
	permit func(*Entry) bool
	off    bool // nothing is dialled

	waiting map[string]*Entry // by the ids in queue, the newest entry of each; nil: dropped
	queue   []string
	running map[string]struct{}
	found   chan reached
}

// reached is at which address an entry can be reached.
type reached struct {
	entry   *Entry
	address netip.Addr
	err     error // why there is none
}

func newReacher(probe func(ctx context.Context, address string) error, permit func(*Entry) bool) *reacher {
	return &reacher{
		probe: probe, permit: permit,
		waiting: make(map[string]*Entry),
		running: make(map[string]struct{}),
		found:   make(chan reached, maxReached),
	}
}

// want has the addresses of an entry tried, if it has several.
func (r *reacher) want(e *Entry) {
	if r.off || !e.named || len(e.addresses) < 2 {
		return
	}
	paid := now() - tryBurst*tryEvery
	if e.vitals.tried != 0 {
		paid = max(paid, e.vitals.tried)
	}
	if paid += tryEvery; paid > now() {
		return
	}
	e.vitals.tried = paid
	if _, queued := r.waiting[e.Node.ID]; !queued {
		r.queue = append(r.queue, e.Node.ID)
	}
	r.waiting[e.Node.ID] = e
}

// drop ends what want began, as long as nothing was tried.
func (r *reacher) drop(id string) {
	if _, queued := r.waiting[id]; queued {
		r.waiting[id] = nil
	}
}

// busy reports whether something is or will be tried.
func (r *reacher) busy() bool { return len(r.queue)+len(r.running) > 0 }

// start tries what waits for it, a bounded number at once.
func (r *reacher) start(ctx context.Context) {
	for range len(r.queue) {
		if len(r.running) >= maxReached {
			return
		}
		id := r.queue[0]
		r.queue = r.queue[1:]
		if _, running := r.running[id]; running {
			r.queue = append(r.queue, id)
			continue
		}
		e := r.waiting[id]
		delete(r.waiting, id)
		if e == nil {
			continue
		}
		r.running[id] = struct{}{}
		go func() {
			found := reached{entry: e, err: errNotPermitted}
			if r.permit(e) {
				found.address, found.err = reach(ctx, r.probe, e)
			}
			r.found <- found
		}()
	}
}

// done notes that something was tried.
func (r *reacher) done(f reached) { delete(r.running, f.entry.Node.ID) }

// stop waits for what is being tried. Its context has ended.
func (r *reacher) stop() {
	for range len(r.running) {
		<-r.found
	}
}

// reach returns the address of an entry that accepts a connection: the one in use if
// it does, and else whichever does first. They are tried one after the other. The
// error is that of the one in use.
func reach(ctx context.Context, probe func(ctx context.Context, address string) error, e *Entry) (netip.Addr, error) {
	addresses := slices.Clone(e.addresses)
	if i := slices.IndexFunc(addresses, func(a netip.Addr) bool { return e.socket(a) == e.address }); i > 0 {
		used := addresses[i]
		copy(addresses[1:i+1], addresses[:i])
		addresses[0] = used
	}
	addresses = addresses[:min(len(addresses), maxTried)]
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	if len(addresses) == 1 {
		defer cancel()
		return addresses[0], probe(ctx, e.socket(addresses[0]))
	}
	type answer struct {
		i   int
		err error
	}
	answers := make(chan answer, len(addresses))
	running, next := 0, 0
	defer func() {
		cancel()
		for ; running > 0; running-- {
			<-answers
		}
	}()
	try := func() {
		i := next
		next++
		running++
		go func() { answers <- answer{i, probe(ctx, e.socket(addresses[i]))} }()
	}
	var first error
	other := -1
	timer := time.NewTimer(tryNext)
	defer timer.Stop()
	for try(); running > 0; {
		select {
		case a := <-answers:
			running--
			switch {
			case a.err == nil && (a.i == 0 || first != nil):
				return addresses[a.i], nil
			case a.err == nil:
				if other < 0 {
					other = a.i
					timer.Reset(preferReached)
				}
			case a.i == 0:
				first = a.err
			}
			if first != nil && other >= 0 {
				return addresses[other], nil
			}
		case <-timer.C:
			if other >= 0 {
				return addresses[other], nil
			}
		}
		if next < len(addresses) && other < 0 {
			try()
			timer.Reset(tryNext)
		}
	}
	return netip.Addr{}, first
}
