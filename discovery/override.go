package discovery

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// An Override is what an operator has decided about a node. It stands beside the
// node's record, is never written by a node, and outlives it. The zero value
// decides nothing.
type Override struct {
	// State replaces that of the record, unless it is "".
	State State
	// Weight multiplies that of the record, unless it is nil.
	Weight *float64
	// Until is when the override ends by itself, by the clock of this machine; never
	// if it is zero. In a registry it is by the registry's clock: see [Overrider].
	Until time.Time
}

// An Overrider is a Registry that keeps overrides. Its Watch emits [Overridden]
// before anything else, also if there are none, and whenever they change: no node
// is listed before it is known what operators decided about it.
//
// Where they cannot be had, the watch goes on without, and those that were emitted
// last stand: nobody is put back into service because something cannot be read. If
// the registry says that this user may not read them, the watch goes on at once. If it
// says nothing, the watch waits for them for a moment, by how long its other questions
// took, and emits them when they come. A [Directory] also has those that its warm-start
// file holds: they end by the clock of this machine, which alone reads that file, and
// while there is no registry to ask.
//
// When an override ends is kept by the registry's clock, so that "for 15 minutes" is as
// long on every machine, whatever its own clock says. A [RegistryClock] converts what
// is written and what is read; where the registry does not tell its time, its clock
// counts as like ours.
type Overrider interface {
	// Overrides returns all of them, also those that have ended, by the node's id. It
	// fails like [Announcer].Announce.
	Overrides(ctx context.Context) (map[string]Override, error)
	// SetOverride replaces the node's override; the node need not be listed. It fails
	// like [Announcer].Announce, with [ErrInvalid] also for an override that
	// [Override.Validate] refuses.
	SetOverride(ctx context.Context, id string, o Override) error
	// ClearOverride removes it. One that is not there is no error. It fails like
	// [Announcer].Announce.
	ClearOverride(ctx context.Context, id string) error
}

// IsZero reports whether the override decides nothing.
func (o Override) IsZero() bool { return o.State == "" && o.Weight == nil }

// Ended reports whether the override has ended by itself.
func (o Override) Ended(now time.Time) bool { return !o.Until.IsZero() && !now.Before(o.Until) }

// Equal reports whether both decide the same.
func (o Override) Equal(other Override) bool {
	if (o.Weight == nil) != (other.Weight == nil) || o.Weight != nil && *o.Weight != *other.Weight {
		return false
	}
	return o.State == other.State && o.Until.Equal(other.Until)
}

// String says what was decided, for people.
func (o Override) String() string {
	var parts []string
	if o.State != "" {
		parts = append(parts, "state "+string(o.State))
	}
	if o.Weight != nil {
		parts = append(parts, fmt.Sprintf("weight × %v", *o.Weight))
	}
	if len(parts) == 0 {
		return "none"
	}
	if !o.Until.IsZero() {
		parts = append(parts, "until "+o.Until.UTC().Format(time.RFC3339))
	}
	return strings.Join(parts, ", ")
}

// Validate reports, as an error that wraps [ErrInvalid], why the override cannot
// be kept.
func (o Override) Validate() error {
	switch o.State {
	case "", StateUp, StateDraining, StateMaintenance:
	default:
		return fmt.Errorf("%w state %q of an override, want up, draining or maintenance", ErrInvalid, Clip(string(o.State)))
	}
	if o.Weight != nil && !(*o.Weight >= 0 && *o.Weight <= MaxWeight) {
		return fmt.Errorf("%w weight %v of an override, want a number from 0 to %v", ErrInvalid, *o.Weight, MaxWeight)
	}
	return nil
}

// overrideRecord is the wire form.
type overrideRecord struct {
	State  string   `json:"state,omitempty"`
	Weight *float64 `json:"weight,omitempty"`
	Until  string   `json:"until,omitempty"`
}

// maxOverride bounds the record of an override.
const maxOverride = 4 << 10

// ParseOverride reads the record of an override. The error wraps [ErrInvalid].
func ParseOverride(data []byte) (Override, error) {
	if len(data) > maxOverride {
		return Override{}, fmt.Errorf("%w override: %d bytes, want at most %d", ErrInvalid, len(data), maxOverride)
	}
	if trimmed := bytes.TrimLeft(data, " \t\r\n"); len(trimmed) == 0 || trimmed[0] != '{' {
		return Override{}, fmt.Errorf("%w override: want a JSON object", ErrInvalid)
	}
	var r overrideRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return Override{}, fmt.Errorf("%w override: %w", ErrInvalid, err)
	}
	o := Override{State: State(strings.ToLower(r.State)), Weight: r.Weight}
	if r.Until != "" {
		if o.Until = parseTime(r.Until); o.Until.IsZero() {
			return Override{}, fmt.Errorf("%w time %q of an override, want one such as 2025-10-10T12:00:00Z", ErrInvalid, Clip(r.Until))
		}
	}
	return o, o.Validate()
}

// AppendOverride appends the record of an override to b. The error wraps [ErrInvalid].
func AppendOverride(b []byte, o Override) ([]byte, error) {
	if err := o.Validate(); err != nil {
		return b, err
	}
	r := overrideRecord{State: string(o.State), Weight: o.Weight}
	if !o.Until.IsZero() {
		r.Until = o.Until.UTC().Format(time.RFC3339Nano)
	}
	data, err := json.Marshal(r)
	if err != nil {
		return b, fmt.Errorf("encoding an override: %w", err)
	}
	return append(b, data...), nil
}
