package discovery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// shortage reports whether a probe failed because this machine lacks something: it
// says nothing about the node, and passes.
func shortage(err error) bool {
	for _, lack := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL} {
		if errors.Is(err, lack) {
			return true
		}
	}
	return false
}

// forbidden reports whether a probe failed because this machine does not let it out.
func forbidden(err error) bool {
	return errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM)
}

var (
	errClosedAtOnce = errors.New("the connection was accepted and closed at once")
	errNoRoute      = errors.New("this machine has no route to such an address")
)

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
