package discovery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"
)

const (
	// A connection that is closed within this time was accepted by something that
	// found nobody behind itself, as service meshes and load balancers do.
	probeListens = 200 * time.Millisecond

	// So often in a row it is no evidence that this machine may not dial a node.
	maxForbidden = 3

	// maxTried is how many addresses of a name are tried: a name with thousands
	// must not cost as many connections.
	maxTried = 8
	// tryNext is how long an address has to answer before the next one is tried
	// beside it, as in RFC 8305, and preferReached for how much longer than another
	// the one in use may take and be kept.
	tryNext       = 100 * time.Millisecond
	preferReached = 500 * time.Millisecond
)

var (
	errClosedAtOnce = errors.New("the connection was accepted and closed at once")
	errNoRoute      = errors.New("this machine has no route to such an address")
	// errNotPermitted is why a node is not dialled that no request would reach.
	errNotPermitted = errors.New("it may not be dialled")
	// errRecordsOnly is why a host name is not looked up.
	errRecordsOnly = errors.New("the records are all that is looked at")
)

// A dialer finds out whether a node accepts connections, and at which address. Its
// methods may be called from many goroutines.
type dialer struct {
	probe  func(ctx context.Context, address string) error
	permit func(*Entry) bool
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	// Nothing is dialled, and every node counts as one that accepts connections.
	recordsOnly bool
}

func newDialer(o Options) dialer {
	d := dialer{probe: o.Probe, permit: o.Permit, lookup: o.Lookup, recordsOnly: o.RecordsOnly}
	if d.probe == nil {
		d.probe = dialTCP
	}
	if d.permit == nil {
		d.permit = func(*Entry) bool { return true }
	}
	switch {
	case d.recordsOnly:
		d.lookup = func(context.Context, string) ([]netip.Addr, error) { return nil, errRecordsOnly }
	case d.lookup == nil:
		d.lookup = lookupHost
	}
	return d
}

// allows reports whether some request may reach a node, so that it may be dialled.
func (d *dialer) allows(e *Entry) bool { return d.recordsOnly || e.Address() != "" && d.permit(e) }

// dial returns nil if a node accepts connections. If nobody has looked up its host name
// yet, it does that before, and returns the addresses that it found.
func (d *dialer) dial(ctx context.Context, e *Entry) (addresses []netip.Addr, err error) {
	if d.recordsOnly {
		return nil, nil
	}
	if e.Address() == "" {
		if addresses, err = lookUp(ctx, d.lookup, e.Node.Endpoint.Host()); err != nil {
			return nil, err
		}
		e = e.at(addresses)
	}
	addr, err := d.reach(ctx, e)
	if err == nil && len(e.addresses) > 1 {
		e.liveness.answers.Store(&addr)
	}
	return addresses, err
}

// reach returns the address of an entry that accepts a connection: the one in use if
// it does, and else whichever does first. They are tried one after the other. The
// error is that of the one in use.
func (d *dialer) reach(ctx context.Context, e *Entry) (netip.Addr, error) {
	if !d.permit(e) {
		return netip.Addr{}, errNotPermitted
	}
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
		return addresses[0], d.probe(ctx, e.socket(addresses[0]))
	}
	type tried struct {
		i   int
		err error
	}
	tries := newTasks[tried](len(addresses))
	defer func() {
		cancel()
		tries.wait()
	}()
	timer := stoppedTimer()
	defer timer.Stop()
	var first error // why the one in use does not accept
	next, other := 0, -1
	for first == nil || other < 0 {
		if next < len(addresses) && other < 0 {
			i := next
			next++
			tries.start(func() tried { return tried{i, d.probe(ctx, e.socket(addresses[i]))} })
			timer.Reset(tryNext)
		} else if tries.running == 0 {
			return netip.Addr{}, first
		}
		select {
		case t := <-tries.done:
			tries.running--
			switch {
			case t.err == nil && t.i == 0:
				return addresses[0], nil
			case t.err == nil && other < 0:
				other = t.i
				timer.Reset(preferReached)
			case t.i == 0:
				first = t.err
			}
		case <-timer.C:
			if other >= 0 {
				return addresses[other], nil
			}
		}
	}
	return addresses[other], nil
}

// inconclusive reports whether a node could not be dialled for a reason that says
// nothing about the node. That this machine lacks something passes. That it does not let
// the connection out may pass, and else stands for requests as well: it counts for
// nothing a few times in a row only, of which times is the number.
func inconclusive(err error, times *int) bool {
	if err == nil {
		*times = 0
		return false
	}
	is := func(other error) bool { return errors.Is(err, other) }
	if is(syscall.EACCES) || is(syscall.EPERM) {
		*times++
		return *times <= maxForbidden
	}
	lacks := []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL}
	return slices.ContainsFunc(lacks, is)
}

// dialTCP is the default probe: does something accept a connection, and keep it?
// Nothing is sent, because nobody knows what the node speaks.
func dialTCP(ctx context.Context, address string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	switch {
	case errors.Is(err, syscall.EADDRNOTAVAIL) && !routed(ctx, address):
		return fmt.Errorf("dialling %s: %w", address, errNoRoute)
	case err != nil:
		return err
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(probeListens)); err != nil {
		return err
	}
	// The end of ctx ends the wait.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	switch n, err := conn.Read(make([]byte, 1)); {
	case n > 0 || errors.Is(err, os.ErrDeadlineExceeded):
		return ctx.Err()
	default:
		return fmt.Errorf("dialling %s: %w", address, errClosedAtOnce)
	}
}

// routed reports whether this machine could send anything to the address. A machine
// without IPv6 gives the same error for an address of IPv6 as one without free ports,
// and the latter still has some for UDP, where dialling sends nothing.
func routed(ctx context.Context, address string) bool {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "udp", address)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}
