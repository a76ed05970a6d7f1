// Package discoverytest holds the suite that every backend passes, and a
// registry in memory.
package discoverytest

import (
	"context"
	"syscall"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A Harness gives the suite one registry, empty at first, and the power to
// take it away.
type Harness interface {
	// Open returns a new connection to the registry. The suite closes it. It
	// must not need the registry to be up.
	Open(t *testing.T) discovery.Registry
	// Break makes the registry unreachable for everyone, without losing what
	// it holds (unless it never holds anything), and returns when it is.
	Break(t *testing.T)
	// Restore brings it back, at the same address.
	Restore(t *testing.T)
	// Write writes a record as a foreign writer would, whatever it says, in place of
	// the one that stands there of the node.
	Write(t *testing.T, id, record string)
}

// An EphemeralHarness is one of a registry that keeps nothing and hands each
// message to whoever listens just then. A goodbye that is said while a watcher
// is away is never heard, so the node goes when its lease runs out: the suite
// gives such a node a short one. Nothing else differs.
type EphemeralHarness interface {
	Harness
	// Ephemeral is never called.
	Ephemeral()
}

// A RemoteHarness is one of a registry that is reached through the network: the
// suite then also acts from far away.
type RemoteHarness interface {
	Harness
	// Addr returns where the registry is, as host:port.
	Addr() string
	// OpenVia is Open, by way of another address that leads to it.
	OpenVia(t *testing.T, address string) discovery.Registry
}

// RefuseConnection is a [discovery.Options].Probe for nodes that are made up: nobody
// accepts a connection, and nobody is dialled to find out.
func RefuseConnection(context.Context, string) error { return syscall.ECONNREFUSED }
