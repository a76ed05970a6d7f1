package discovery

import (
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync/atomic"
	"time"
)

// An Entry is a node as a Directory holds it: the node, which never changes,
// and beside it what changes with every heartbeat, which is atomic. It may be
// read from any goroutine.
type Entry struct {
	// Node is the record. Read it only.
	Node Node

	addresses []netip.Addr
	address   string // the one to dial, with the port; "" while there is none
	port      uint16
	named     bool // the endpoint has a host name
	ordinary  bool // see ordinary

	// What every look at the fleet asks for, so that it needs no look into metadata.
	weight   float64
	state    State
	instance string
	proxy    bool
	capacity int

	presence presence // where it makes the state another than that of the record
	override Override
	refused  error // why its newest record is not accepted; nil: this is it
	lease    time.Duration
	liveness *liveness
}

// liveness is what a heartbeat changes. Successive entries of one node share it,
// so that a heartbeat needs no new snapshot.
type liveness struct {
	load    atomic.Uint64 // math.Float64bits
	heard   atomic.Int64  // when the node was last heard, since the epoch of the process
	renewed atomic.Int64  // from when its lease counts; later than heard after an outage

	joined   atomic.Int64               // from when the node counts as new; 0 if it does not
	attached atomic.Pointer[attachment] // what Attached keeps

	// At which address it can be reached, where its host name stands for several and
	// the first one has failed; nil: not known.
	answers atomic.Pointer[netip.Addr]
	// Until when the tries of its addresses are paid, at one for each tryEvery. It is
	// the reacher's alone.
	tried allowance
}

func newLiveness(load float64, heard, renewed time.Duration) *liveness {
	v := new(liveness)
	v.load.Store(math.Float64bits(load))
	v.heard.Store(int64(heard))
	v.renewed.Store(int64(renewed))
	return v
}

// renew notes that the node was heard, maybe some time ago: a listing repeats old
// records. A lease only ever moves later here. A load that is none is not believed.
func (v *liveness) renew(load float64, heard time.Duration) {
	v.heard.Store(max(v.heard.Load(), int64(heard)))
	v.renewed.Store(max(v.renewed.Load(), int64(heard)))
	if load >= 0 && load <= math.MaxFloat64 {
		v.load.Store(math.Float64bits(load))
	}
}

// processStart is the epoch of all local times: differences to it are monotonic
// and fit an atomic.
var processStart = time.Now()

func now() time.Duration { return time.Since(processStart) }

func newEntry(n Node, lease time.Duration, v *liveness) *Entry {
	e := &Entry{
		Node: n, port: uint16(n.Endpoint.Port()),
		weight: n.Weight(), state: n.State(), instance: n.Instance(), proxy: n.Role() == RoleProxy, capacity: n.Capacity(),
		lease: lease, liveness: v,
	}
	if addr, err := netip.ParseAddr(n.Endpoint.Host()); err == nil {
		e.addresses, e.address = []netip.Addr{addr}, n.Endpoint.Address()
		e.ordinary = ordinary(e.addresses)
	} else {
		e.named = true
	}
	return e
}

// at returns the entry of the same node with the addresses behind its host name.
func (e *Entry) at(addresses []netip.Addr) *Entry {
	next := *e
	next.addresses, next.address, next.ordinary = addresses, "", ordinary(addresses)
	if len(addresses) > 0 {
		use := addresses[0]
		if answers := e.liveness.answers.Load(); answers != nil && slices.Contains(addresses, *answers) {
			use = *answers
		}
		next.address = e.socket(use)
	}
	return &next
}

// socket returns an address with the endpoint's port, ready to be dialled.
func (e *Entry) socket(addr netip.Addr) string {
	return net.JoinHostPort(addr.String(), strconv.Itoa(int(e.port)))
}

// Addresses returns the addresses that the endpoint stands for, sorted: the one
// that it names, or all that its host name was resolved to last; none while it
// could not be resolved. Read it only.
func (e *Entry) Addresses() []netip.Addr { return e.addresses }

// Address returns the one of Addresses that is in use, with the endpoint's port, ready
// to be dialled; "" while there is none. It is the first of them, unless that has
// failed and another one accepts connections.
func (e *Entry) Address() string { return e.address }

// AddressBeside returns another one of Addresses in the form of Address, for which
// tried reports false; Address if there is none.
func (e *Entry) AddressBeside(tried func(address string) bool) string {
	if len(e.addresses) > 1 {
		for _, addr := range e.addresses {
			if s := e.socket(addr); !tried(s) {
				return s
			}
		}
	}
	return e.address
}

// DialAddress returns the host:port at which the node is dialled: that of
// [Entry.Address], or, over TLS, its endpoint's, for the name in its certificate.
func (e *Entry) DialAddress(tls bool) string {
	if tls {
		return e.Node.Endpoint.Address()
	}
	return e.address
}

// DialledAt reports whether the address is one that [Entry.DialAddress] returns.
func (e *Entry) DialledAt(address string) bool {
	return address == e.address || e.named && address == e.Node.Endpoint.Address()
}

// Named reports whether the endpoint has a host name.
func (e *Entry) Named() bool { return e.named }

// in returns the entry of the same node with a presence. Only a node that is up
// otherwise is shown as held or restored: one that drains goes on draining.
func (e *Entry) in(p presence) *Entry {
	next := *e
	next.state, next.presence = e.ownState(), alive
	if s := p.state(); s != "" && next.state == StateUp {
		next.state, next.presence = s, p
	}
	return &next
}

// State returns the node's state: what an operator says, or else its record; or
// [StateHeld] or [StateRestored].
func (e *Entry) State() State { return e.state }

// Weight returns the node's weight: that of its record, times what an operator
// says.
func (e *Entry) Weight() float64 { return e.weight }

// Refused returns why the node's newest record is not accepted, nil if this is it:
// the node is in use as it was last known, for the rest of its lease.
func (e *Entry) Refused() error { return e.refused }

// Instance returns what [Node.Instance] returns.
func (e *Entry) Instance() string { return e.instance }

// Proxy reports whether the node's role is that of a proxy.
func (e *Entry) Proxy() bool { return e.proxy }

// Capacity returns what [Node.Capacity] returns.
func (e *Entry) Capacity() int { return e.capacity }

// Serves reports whether the node takes new traffic: it is up, or held or
// restored, and its weight is not 0.
func (e *Entry) Serves() bool {
	return (e.state == StateUp || e.state == StateHeld || e.state == StateRestored) && e.weight > 0
}

// Load returns the load that the node reported last.
func (e *Entry) Load() float64 { return math.Float64frombits(e.liveness.load.Load()) }

// Joined returns from when the node counts as new, on the local clock: since it
// was first listed, or since it is up again. It is the zero time for nodes that
// were there before this directory could know.
func (e *Entry) Joined() time.Time {
	if at := e.liveness.joined.Load(); at != 0 {
		return processStart.Add(time.Duration(at))
	}
	return time.Time{}
}

// restored is 1 for a node in StateRestored, 0 for others.
func (e *Entry) restored() int {
	if e.presence == restored {
		return 1
	}
	return 0
}

// Attached returns what a user of the directory keeps about the node beside its record:
// a T, which is zero when it is first asked for, and the same one later, also through
// the entries that succeed this one, until the node is gone. A T must be safe for use by
// many goroutines. Users that share a directory share what they attach by its type; by
// a type that is not exported nobody else's is met.
func Attached[T any](e *Entry) *T {
	for {
		first := e.liveness.attached.Load()
		for a := first; a != nil; a = a.next {
			if v, ok := a.value.(*T); ok {
				return v
			}
		}
		v := new(T)
		if e.liveness.attached.CompareAndSwap(first, &attachment{v, first}) {
			return v
		}
	}
}

// attachment is one of the values attached to a node, of which no two have one type.
type attachment struct {
	value any
	next  *attachment
}

// LastHeard returns when the node was last heard, on the local clock.
func (e *Entry) LastHeard() time.Time {
	return processStart.Add(time.Duration(e.liveness.heard.Load()))
}

// LeaseEnd returns when the node lapses unless it is heard before, on the local
// clock. While the registry is away leases are suspended, and this time passes
// without consequence.
func (e *Entry) LeaseEnd() time.Time { return processStart.Add(e.due()) }

func (e *Entry) due() time.Duration { return time.Duration(e.liveness.renewed.Load()) + e.lease }

// under returns the entry of the same node under an override, shown as alive if that is
// another one.
func (e *Entry) under(o Override) *Entry {
	if o.Equal(e.override) {
		return e
	}
	next := *e
	next.override = o
	next.state, next.presence, next.weight = next.ownState(), alive, e.Node.Weight()
	if o.Weight != nil {
		next.weight = min(next.weight*max(*o.Weight, 0), MaxWeight)
	}
	return &next
}

// ownState is what the operator says of the node, or else its record.
func (e *Entry) ownState() State {
	if e.override.State != "" {
		return e.override.State
	}
	return e.Node.State()
}

// Override returns what an operator has decided about the node; it is zero if
// nothing was.
func (e *Entry) Override() Override { return e.override }
