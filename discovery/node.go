package discovery

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Limits of one record. A record past one of them is rejected.
const (
	// MaxRecord is the size of a record in bytes.
	MaxRecord = 64 << 10
	// MaxID is the length of a node's id in bytes.
	MaxID = 256
	// MaxMetadata is the number of metadata pairs.
	MaxMetadata = 64
)

// Metadata keys with a meaning of their own.
const (
	KeyService  = "service"  // what the node serves
	KeyZone     = "zone"     // where it runs
	KeyVersion  = "version"  // what it runs
	KeyWeight   = "weight"   // a decimal ≥ 0; 0 means no new traffic
	KeyState    = "state"    // up, draining or maintenance
	KeyInstance = "instance" // a token that tells two processes with one id apart
	KeyLease    = "lease"    // how long the node counts as live after it was last heard
	KeyRole     = "role"     // "proxy": a proxy that lists itself
	KeyHosts    = "hosts"    // the sites that the node serves: host names, by spaces or commas
	KeyPaths    = "paths"    // which paths of these, such as /api/*; none means all
	KeyCapacity = "capacity" // how many requests in flight one proxy sends it at most
	KeySubsets  = "subsets"  // of which fleets a proxy uses a share; see internal/picker
)

// RoleProxy is the role that a proxy writes into its own record.
const RoleProxy = "proxy"

// Bounds of a lease that a record may name for itself. A shorter one would
// flicker between two heartbeats, a longer one would outlive any deployment.
const (
	MinLease = 100 * time.Millisecond
	MaxLease = 24 * time.Hour
)

// MaxWeight bounds the weight that a record may name, so that the sum of a
// fleet's weights is a finite number whatever its members write.
const MaxWeight = 1e9

// MaxCapacity bounds the capacity that a record may name: more is as good as none.
const MaxCapacity = 1 << 30

// State is what a node says of itself.
type State string

// The states that a record may name. Any other value counts as up: the key is
// an ordinary word, and fleets that use it for something else are not to
// disappear for it.
const (
	StateUp          State = "up"
	StateDraining    State = "draining"    // it finishes what it has
	StateMaintenance State = "maintenance" // it is not to be used
)

// The states in which a directory may see a node that is up by its record. Such a
// node is in use.
const (
	// StateHeld: its lease ran out with those of many others, and it accepts
	// connections.
	StateHeld State = "held"
	// StateRestored: it was remembered from before the start, the registry could
	// not be listed yet, and it accepts connections.
	StateRestored State = "restored"
)

// A Node is one member of a fleet, as its record tells. Its metadata is shared
// and must not be changed.
type Node struct {
	// ID names the node in its fleet; see [ValidateID].
	ID string
	// Endpoint is where it serves.
	Endpoint Endpoint
	// Load is whatever measure of load the fleet agrees on; less is better.
	Load float64
	// Metadata are free pairs; the Key constants name those with a meaning.
	Metadata map[string]string
	// LastSeen is the writer's own clock, for people to read. Nothing is
	// decided by it.
	LastSeen time.Time
	// LeftOut are the metadata keys of the record whose values are objects or
	// arrays, sorted, at most 8 and clipped, for people to read. Such a pair is not in
	// Metadata.
	LeftOut []string
}

// Service returns what the node serves, "" if it does not say.
func (n *Node) Service() string { return n.Metadata[KeyService] }

// Instance returns the token of the process that wrote the record, or "".
func (n *Node) Instance() string { return n.Metadata[KeyInstance] }

// Role returns the node's role, or "".
func (n *Node) Role() string { return n.Metadata[KeyRole] }

// State returns the state that the record names.
func (n *Node) State() State {
	switch s := State(strings.ToLower(n.Metadata[KeyState])); s {
	case StateDraining, StateMaintenance:
		return s
	default:
		return StateUp
	}
}

// Weight returns the weight that the record names, held within [MaxWeight]; 1 if
// it names none, or none that is a finite number ≥ 0.
func (n *Node) Weight() float64 {
	if s, ok := n.Metadata[KeyWeight]; ok {
		if w, err := strconv.ParseFloat(s, 64); err == nil && w >= 0 && !math.IsInf(w, 0) {
			return min(w, MaxWeight)
		}
	}
	return 1
}

// Capacity returns how many requests the node takes from one proxy at a time, as its
// record says, rounded down and held within [MaxCapacity]; 0 if it names none, or none
// that is a number ≥ 1.
func (n *Node) Capacity() int {
	if s, ok := n.Metadata[KeyCapacity]; ok {
		if c, err := strconv.ParseFloat(s, 64); err == nil && c >= 1 {
			return int(min(c, MaxCapacity))
		}
	}
	return 0
}

// Lease returns the lease that the record names, held within [MinLease] and
// [MaxLease]; 0 if it names none, or none that is a positive duration.
func (n *Node) Lease() time.Duration {
	if s, ok := n.Metadata[KeyLease]; ok {
		if d, err := time.ParseDuration(s); err == nil && d > 0 {
			return min(max(d, MinLease), MaxLease)
		}
	}
	return 0
}

// LeaseOr returns [Node.Lease], or the given duration where the record names none.
func (n *Node) LeaseOr(d time.Duration) time.Duration { return cmp.Or(n.Lease(), d) }

// footprint is about how many bytes of memory a node takes, in use or remembered:
// what its record says, and what is kept beside that of every node.
func (n *Node) footprint() int {
	size := 1024 + 2*len(n.ID) + len(n.Endpoint.address)
	for k, v := range n.Metadata {
		size += len(k) + len(v) + 64
	}
	for _, k := range n.LeftOut {
		size += len(k) + 16
	}
	return size
}

// Validate reports, as an error that wraps [ErrInvalid], why the node may not
// be listed.
func (n *Node) Validate() error {
	if err := ValidateID(n.ID); err != nil {
		return err
	}
	if n.Endpoint.address == "" {
		return Invalidf(FaultRecord, "record of node %q: it has no endpoint", Clip(n.ID))
	}
	switch n.Endpoint.Scheme {
	case "", "http", "https":
	default:
		return Invalidf(FaultEndpoint, "endpoint of node %q: the scheme must be http or https", Clip(n.ID))
	}
	if math.IsNaN(n.Load) || math.IsInf(n.Load, 0) || n.Load < 0 {
		return Invalidf(FaultLoad, "load %v of node %q: want a finite number ≥ 0", n.Load, Clip(n.ID))
	}
	if len(n.Metadata) > MaxMetadata {
		return Invalidf(FaultMetadata, "metadata of node %q: %d pairs, want at most %d", Clip(n.ID), len(n.Metadata), MaxMetadata)
	}
	for k, v := range n.Metadata {
		if k == "" || !printable(k) || !printable(v) {
			return Invalidf(FaultMetadata, "metadata %q of node %q: keys must not be empty, and keys and values must be UTF-8 without control characters",
				Clip(k), Clip(n.ID))
		}
	}
	return nil
}

// ValidateID reports, as an error that wraps [ErrInvalid], why an id cannot
// name a node.
func ValidateID(id string) error {
	switch {
	case id == "":
		return Invalidf(FaultID, "node id: it is empty")
	case len(id) > MaxID:
		return Invalidf(FaultID, "node id %q: %d bytes, want at most %d", Clip(id), len(id), MaxID)
	case !printable(id):
		return Invalidf(FaultID, "node id %q: want UTF-8 without control characters", Clip(id))
	}
	return nil
}

// record is the wire form.
type record struct {
	NodeID   string            `json:"nodeId"`
	Endpoint string            `json:"endpoint"`
	LastSeen string            `json:"lastSeen"`
	Load     float64           `json:"load"`
	Metadata map[string]string `json:"metadata,omitempty"`
	// IsOnline is computed by .NET writers from their own clock when they
	// write; it is written for them and never believed.
	IsOnline bool `json:"isOnline"`
}

// AppendRecord appends the node's record to b, as of now. Two calls with equal
// arguments append equal bytes. The error wraps [ErrInvalid]: see [Node.Validate], or
// the record is too long.
func AppendRecord(b []byte, n Node, now time.Time) ([]byte, error) {
	if err := n.Validate(); err != nil {
		return b, err
	}
	data, err := json.Marshal(record{
		NodeID:   n.ID,
		Endpoint: n.Endpoint.String(),
		// Seven digits, as .NET writes them.
		LastSeen: now.UTC().Format("2006-01-02T15:04:05.0000000Z"),
		Load:     n.Load,
		Metadata: n.Metadata,
		IsOnline: true,
	})
	if err != nil {
		return b, fmt.Errorf("encoding the record of node %q: %w", Clip(n.ID), err)
	}
	if len(data) > MaxRecord {
		return b, Invalidf(FaultRecord, "record of node %q: %d bytes, want at most %d", Clip(n.ID), len(data), MaxRecord)
	}
	return append(b, data...), nil
}
