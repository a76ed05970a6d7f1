package discovery

import (
	"context"
	"net/netip"
	"time"
)

const (
	// What a mass lapse may cost: so many sockets at once, more in a large fleet,
	// which else would be asked for minutes; and so long each.
	fewProbes    = 128
	maxProbes    = 1024
	probeTimeout = 2 * time.Second
)

// A prober asks nodes whether they accept connections, in the background and a bounded
// number at once. Each answer goes to whoever asked. All its methods are for one
// goroutine, which also receives from done.
type prober struct {
	dialer
	tasks[answer]
	waiting []*probe
}

// probe is a question to a node that has not been answered yet.
type probe struct {
	entry func() *Entry // the node as it is when its turn comes
	then  func(answer)  // nil: nobody waits for the answer
}

// answer is how a probe went.
type answer struct {
	to        *probe
	addresses []netip.Addr // of the node's host name, where that had to be looked up
	err       error        // why the node accepts no connection
}

func newProber(d dialer) *prober { return &prober{dialer: d, tasks: newTasks[answer](maxProbes)} }

// ask has a node dialled as soon as there is room for it, and then called with the
// answer by deliver.
func (p *prober) ask(entry func() *Entry, then func(answer)) *probe {
	q := &probe{entry: entry, then: then}
	p.waiting = append(p.waiting, q)
	return q
}

// withdraw ends the wait for an answer.
func (q *probe) withdraw() {
	if q != nil {
		q.then = nil
	}
}

// deliver calls whoever waits for the answer.
func (a answer) deliver() {
	if a.to.then != nil {
		a.to.then(a)
	}
}

// busy reports whether something is or will be asked.
func (p *prober) busy() bool { return p.running+len(p.waiting) > 0 }

// dialWaiting dials what waits for it, as many at once as a fleet of that size is worth.
func (p *prober) dialWaiting(ctx context.Context, fleet int) {
	most := min(max(fewProbes, fleet/20), maxProbes)
	for len(p.waiting) > 0 && p.running < most {
		q := p.waiting[0]
		p.waiting[0] = nil
		p.waiting = p.waiting[1:]
		if q.then == nil {
			continue
		}
		entry := q.entry()
		p.start(func() answer {
			ctx, cancel := context.WithTimeout(ctx, probeTimeout)
			defer cancel()
			addresses, err := p.dial(ctx, entry)
			return answer{q, addresses, err}
		})
	}
}
