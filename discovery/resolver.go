package discovery

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"
)

const (
	// A host name is looked up again so long after it was resolved, give or take
	// a fifth. A resolver of the system does not tell for how long its answer
	// holds.
	resolveEvery = 30 * time.Second
	// One that could not be resolved is tried again sooner at first, and one whose
	// name server keeps silent more seldom in the end: it holds a lookup for long.
	resolveRetry  = time.Second
	resolveSeldom = 2 * time.Minute

	lookupTimeout  = 5 * time.Second
	maxLookups     = 32
	maxSlowLookups = maxLookups / 2 // of names that failed or were slow the last time

	// What one node may have asked for at once: its first names and those it changes
	// to, at most three in a row and one each 30 seconds after that.
	askEvery = 30 * time.Second
	askBurst = 3

	// namesTick is how often the resolver looks which names are due.
	namesTick = time.Second
)

// lookupClass is the order in which names are looked up. The more time the last
// lookup of a name took, the later its class: where name servers keep silent, that
// costs the names that they serve and not the others.
type lookupClass int

const (
	classKnown   lookupClass = iota // resolved, and quickly
	classNew                        // never looked up
	classFailing                    // not there, or a little slow
	classSlow
	classSlowest
	lookupClasses
)

// patience is how long a lookup may take where other names wait for its place.
// Where none does it may take all of lookupTimeout.
var patience = [lookupClasses]time.Duration{
	classKnown: 200 * time.Millisecond, classNew: 200 * time.Millisecond,
	classFailing: 600 * time.Millisecond, classSlow: 2400 * time.Millisecond, classSlowest: lookupTimeout,
}

// A resolver keeps known what host names stand for, in the background. Whoever
// uses it has one name at a time. All its methods are for one goroutine, which
// also receives from the channels that it shows; lookups run beside.
type resolver struct {
	tasks[lookup]
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)

	names   map[string]*hostName
	users   map[string]*nameUser
	queues  [lookupClasses][]*hostName
	turn    int                    // takes known names and new ones by turns
	asked   map[*hostName]struct{} // the names that are being looked up
	slow    int                    // how many of those are of classFailing or later
	untried int                    // names that were never looked up and are about to be
	tick    *time.Timer            // for refresh
	crowded *time.Timer            // for lookUpWaiting
	ticking bool
}

// hostName is a name and what is known of it.
type hostName struct {
	name      string
	users     map[string]struct{}
	pinned    bool         // used by the directory itself
	addresses []netip.Addr // sorted; none before the first success
	tried     bool
	cost      time.Duration // of its last lookup
	ended     time.Duration // when that ended
	failures  int
	next      time.Duration // when it is looked up again

	queued  bool
	again   bool // it has to be asked once more after the lookup under way
	class   lookupClass
	began   time.Duration
	cancel  context.CancelFunc // while a lookup is under way
	dropped bool               // nobody knows it any more
}

// nameUser is somebody who has a name looked up.
type nameUser struct {
	name  string
	asked allowance
}

// allowance is until when what somebody asked for is paid, at one for each interval; 0
// before the first.
type allowance time.Duration

// take takes one, or returns how long that has to wait: a burst may be taken at once.
func (a *allowance) take(every, burst time.Duration) time.Duration {
	at := now()
	paid := at + every
	if *a != 0 {
		paid = max(at, time.Duration(*a)) + every
	}
	if wait := paid - at - burst*every; wait > 0 {
		return wait
	}
	*a = allowance(paid)
	return 0
}

// lookup is what a lookup found.
type lookup struct {
	of        *hostName
	addresses []netip.Addr
	err       error
}

func newResolver(find func(ctx context.Context, host string) ([]netip.Addr, error)) *resolver {
	return &resolver{
		tasks:   newTasks[lookup](maxLookups),
		lookup:  find,
		names:   make(map[string]*hostName),
		users:   make(map[string]*nameUser),
		asked:   make(map[*hostName]struct{}),
		tick:    stoppedTimer(),
		crowded: stoppedTimer(),
	}
}

// use notes the name that a user has from now on, and returns what is known of it.
func (r *resolver) use(user, name string) []netip.Addr {
	u := r.users[user]
	if u == nil {
		u = &nameUser{asked: allowance(now())}
		r.users[user] = u
	}
	if u.name != name {
		r.leave(user)
		u.name = name
	}
	h := r.get(name)
	h.users[user] = struct{}{}
	if len(h.addresses) == 0 && h.idle() && h.next > now() {
		if wait := u.asked.take(askEvery, askBurst); wait == 0 {
			r.enqueue(h)
		} else {
			h.next = min(h.next, now()+wait)
		}
	}
	return h.addresses
}

// leave ends what use began. What the user asked for is remembered for a while.
func (r *resolver) leave(user string) {
	u := r.users[user]
	if u == nil {
		return
	}
	if h := r.names[u.name]; h != nil {
		delete(h.users, user)
	}
	u.name = ""
}

// leaveAll is leave for every user.
func (r *resolver) leaveAll() {
	for user := range r.users {
		r.leave(user)
	}
}

// pin keeps exactly these names known, whoever uses them.
func (r *resolver) pin(names []string) {
	for _, h := range r.names {
		h.pinned = false
	}
	for _, name := range names {
		h := r.get(name)
		if h.pinned = true; len(h.addresses) == 0 && h.idle() {
			r.enqueue(h)
		}
	}
}

// of returns what is known of a name.
func (r *resolver) of(name string) []netip.Addr {
	if h := r.names[name]; h != nil {
		return h.addresses
	}
	return nil
}

// ask has the user's name looked up anew, soon: there is a reason to doubt what is
// known. Who does that too often waits until the name is due anyway.
func (r *resolver) ask(user string) {
	u := r.users[user]
	if u == nil || u.name == "" {
		return
	}
	h := r.names[u.name]
	if h == nil || h.queued || h.again || h.next <= now() || u.asked.take(askEvery, askBurst) > 0 {
		return
	}
	switch soon := h.ended + resolveRetry; {
	case h.cancel != nil:
		h.again = true
	case h.tried && soon > now():
		h.next = min(h.next, soon) // many ask at once when a fleet joins
	default:
		r.enqueue(h)
	}
}

// get returns a name, which is not due if it was not known.
func (r *resolver) get(name string) *hostName {
	h := r.names[name]
	if h == nil {
		h = &hostName{name: name, users: make(map[string]struct{}), next: math.MaxInt64}
		r.names[name] = h
		if !r.ticking {
			r.ticking = true
			r.tick.Reset(namesTick)
		}
	}
	return h
}

func (h *hostName) wanted() bool { return !h.dropped && (h.pinned || len(h.users) > 0) }

// idle reports whether the name neither waits for a lookup nor is looked up.
func (h *hostName) idle() bool { return !h.queued && h.cancel == nil }

func (r *resolver) enqueue(h *hostName) {
	switch {
	case h.cost >= patience[classSlow]:
		h.class = classSlowest
	case h.cost >= patience[classFailing]:
		h.class = classSlow
	case h.cost >= patience[classKnown], h.failures > 0:
		h.class = classFailing
	case !h.tried:
		h.class = classNew
	default:
		h.class = classKnown
	}
	if !h.tried {
		r.untried++
	}
	h.queued = true
	r.queues[h.class] = append(r.queues[h.class], h)
}

// lookUpWaiting looks up the names that wait for it, a bounded number at once.
func (r *resolver) lookUpWaiting(ctx context.Context) {
	r.crowded.Stop()
	for {
		class, waits := r.nextClass()
		if !waits {
			return
		}
		if class >= classFailing && r.slow >= maxSlowLookups || r.running >= maxLookups {
			r.makeRoom(class)
			return
		}
		i := 0
		if class == classNew && r.turn%4 == 3 {
			i = len(r.queues[class]) - 1 // a node that comes beside a flood of others gets its turn, too
		}
		h := r.pop(class, i)
		if !h.wanted() {
			r.unqueue(h)
			continue
		}
		r.turn++
		h.queued, h.began = false, now()
		ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
		h.cancel = cancel
		r.asked[h] = struct{}{}
		if class >= classFailing {
			r.slow++
		}
		r.start(func() lookup {
			defer cancel()
			addresses, err := lookUp(ctx, r.lookup, h.name)
			return lookup{h, addresses, err}
		})
	}
}

// nextClass returns the class of the name that is looked up next, if one waits. Names
// that nobody uses any more lose their place.
func (r *resolver) nextClass() (first lookupClass, found bool) {
	for class := range lookupClasses {
		for len(r.queues[class]) > 0 && !r.queues[class][0].wanted() {
			r.unqueue(r.pop(class, 0))
		}
		if len(r.queues[class]) > 0 && (!found || class == classNew && r.turn%2 == 1) {
			first, found = class, true
		}
	}
	return first, found
}

// pop takes the first or the last name of a class.
func (r *resolver) pop(class lookupClass, i int) *hostName {
	queue := r.queues[class]
	h := queue[i]
	queue[i] = nil
	if i == 0 {
		r.queues[class] = queue[1:]
	} else {
		r.queues[class] = queue[:i]
	}
	return h
}

// makeRoom gives up lookups in favour of names that wait, or has lookUpWaiting called when
// there is one that can be given up.
func (r *resolver) makeRoom(class lookupClass) {
	next := time.Duration(-1)
	for h := range r.asked {
		if class >= classFailing && h.class < classFailing {
			continue
		}
		left := h.began + patience[h.class] - now()
		if left <= 0 {
			h.cancel()
		} else if next < 0 || left < next {
			next = left
		}
	}
	if next >= 0 {
		r.crowded.Reset(next)
	}
}

// unqueue notes that a name does not wait for a lookup any more.
func (r *resolver) unqueue(h *hostName) {
	if !h.tried && h.queued {
		r.untried--
	}
	h.queued = false
}

// found takes in what a lookup found, and returns the name, whether it stands for other
// addresses than before, and why it could not be resolved for the first time in a row.
func (r *resolver) found(l lookup) (h *hostName, changed bool, failed error) {
	h = l.of
	delete(r.asked, h)
	if h.class >= classFailing {
		r.slow--
	}
	h.cancel = nil
	if !h.tried {
		h.tried = true
		r.untried--
	}
	if h.dropped {
		return h, false, nil
	}
	h.ended = now()
	h.cost = h.ended - h.began
	if l.err != nil {
		// Stale beats none: what the name stood for was checked, and it still is
		// when it is dialled.
		if h.failures++; h.failures == 1 {
			failed = l.err
		}
		wait, most := resolveRetry, resolveEvery
		if len(h.addresses) > 0 {
			wait = resolveEvery
		}
		if h.cost > patience[classFailing] {
			most = resolveSeldom
		}
		h.next = now() + jitter(min(wait<<min(h.failures-1, 10), most))
	} else {
		h.failures = 0
		h.next = now() + jitter(resolveEvery)
		changed = r.put(h.name, l.addresses)
	}
	if h.again {
		h.again = false
		h.next = min(h.next, h.ended+resolveRetry)
	}
	return h, changed, failed
}

// put notes what a name stands for, and reports whether that is news.
func (r *resolver) put(name string, addresses []netip.Addr) bool {
	_, known := r.names[name]
	h := r.get(name)
	if !known {
		h.tried, h.next = true, now()+jitter(resolveEvery)
	}
	changed := !slices.Equal(h.addresses, addresses)
	h.addresses = addresses
	return changed
}

// usersOf returns who uses a name. Read it only.
func (r *resolver) usersOf(name string) map[string]struct{} {
	if h := r.names[name]; h != nil {
		return h.users
	}
	return nil
}

// refresh queues the names that are due, and forgets those that nobody uses.
func (r *resolver) refresh() {
	at := now()
	for name, h := range r.names {
		switch {
		case !h.wanted():
			r.unqueue(h)
			h.dropped = true
			delete(r.names, name)
			if h.cancel != nil {
				h.cancel()
			}
		case h.idle() && h.next <= at:
			r.enqueue(h)
		}
	}
	for user, u := range r.users {
		if u.name == "" && (time.Duration(u.asked) <= at || len(r.users) > 2*MaxNodes) {
			delete(r.users, user)
		}
	}
	if r.ticking = len(r.names) > 0 || len(r.users) > 0; r.ticking {
		r.tick.Reset(namesTick)
	}
}

// stop waits for the lookups that are under way. Their context has ended.
func (r *resolver) stop() {
	r.tick.Stop()
	r.crowded.Stop()
	r.wait()
}

// lookUp returns the addresses behind a name, sorted.
func lookUp(ctx context.Context, lookup func(context.Context, string) ([]netip.Addr, error), name string) ([]netip.Addr, error) {
	found, err := lookup(ctx, name)
	if err != nil {
		return nil, err
	}
	addresses := make([]netip.Addr, 0, len(found))
	for _, addr := range found {
		if addr = addr.Unmap().WithZone(""); addr.IsValid() {
			addresses = append(addresses, addr)
		}
	}
	if len(addresses) == 0 {
		return nil, fmt.Errorf("looking up %s: no address", name)
	}
	slices.SortFunc(addresses, netip.Addr.Compare)
	return slices.Compact(addresses), nil
}

// jitter returns the duration, give or take a fifth.
func jitter(d time.Duration) time.Duration {
	return d*4/5 + time.Duration(rand.Int64N(int64(d)*2/5+1))
}

// lookupHost is the default lookup.
func lookupHost(ctx context.Context, name string) ([]netip.Addr, error) {
	return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
}
