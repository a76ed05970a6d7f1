// Package discovery keeps a live view of a fleet that lists itself in a
// registry, and lists a node of its own there. It imports nothing of Caddy, so
// a plain Go service can use it as it is.
//
//	registry event → Node → Directory (one goroutine owns it) → Snapshot (immutable)
//
// A node is one member of a fleet. Its record stands in a [Registry], which package
// registries opens by a URL, and is renewed by heartbeats: a [Registrar] does that for
// the service that it is part of. A record that is not renewed for a lease has lapsed. A
// [Directory] follows a registry, and whoever wants to know the fleet loads its newest
// [Snapshot]. It keeps its last view for as long as the registry cannot be reached, and
// lets no lease run out meanwhile.
//
// # For authors of a backend
//
// A backend translates between one kind of registry and this package: wire to
// [Event] when it watches, [Node] to wire when it announces. It holds the
// connection and nothing else. It keeps no list of nodes, never retries, and
// never decides that a node is gone: the [Directory] does all three, once, for
// every backend.
//
// What a backend must get right:
//
//   - The listing comes first and ends with exactly one [Synced]. A listing
//     that cannot be completed is an error, never a shorter listing: a stale
//     view serves requests, a partial one drops nodes that are alive.
//   - When the stream breaks, Watch returns. It does not paper over a gap: the
//     next Watch lists again, and the Directory compares.
//   - What the registry says about a node is passed on as what it is. A
//     removal that somebody asked for is [Left]; a record that the registry
//     itself let expire is [Expired]; a record that merely is not there any
//     more is no event at all.
//   - A record that cannot be read is [Rejected], with the reason, and costs
//     that record only.
//   - No time of a writer is believed. Age comes from the registry's clock, or
//     is zero.
//
// Every backend passes the suite in package discoverytest.
package discovery
