package discovery

import (
	"errors"
	"fmt"
	"slices"
)

// Errors of a registry. A backend wraps them with what it tried and what would
// help; callers match with [errors.Is].
var (
	// ErrUnreachable: nobody answers at any of the addresses.
	ErrUnreachable error = sentinel("registry unreachable")
	// ErrCredentials: the registry refused the credentials.
	ErrCredentials error = sentinel("registry refused the credentials")
	// ErrPermission: the credentials are good, but not for this.
	ErrPermission error = sentinel("no permission")
	// ErrUnsupported: the server lacks a feature that the backend needs.
	ErrUnsupported error = sentinel("not supported by the registry")
	// ErrNotFound: the bucket (or what corresponds to it) does not exist and
	// may not be created.
	ErrNotFound error = sentinel("registry not found")
	// ErrFull: the registry has no room for another record.
	ErrFull error = sentinel("registry is full")
	// ErrInvalid: a name, an id, an option or a record is malformed. What is wrong
	// with a record is an [InvalidError].
	ErrInvalid error = sentinel("invalid")
	// ErrForbidden: a record that could be read rules itself out: it names an
	// endpoint that no record may name, or another node than its key. Its node goes
	// at once, since what it said before holds no longer. A record that is rejected
	// for any other reason could not be read: a value of another type, no JSON, too
	// long. It costs its node the update, and the node stays as it was last known,
	// for the rest of its lease, which such a record does not renew. Where only the
	// record itself tells whose it is (a sorted set of Redis), one without a readable
	// id is nobody's, and the node whose record it replaced has left.
	ErrForbidden error = sentinel("forbidden")
	// ErrBroken: the stream of changes broke and must be started anew.
	ErrBroken error = sentinel("watch broken")
)

// sentinel is the type of the errors above, by which [Explained] finds any of them.
type sentinel string

func (s sentinel) Error() string { return string(s) }

// Explained reports whether an error wraps one of the errors of this package, so that
// a backend that finds one on its way up has nothing to add.
func Explained(err error) bool {
	_, found := errors.AsType[sentinel](err)
	return found
}

// Forbid returns the error, such that [errors.Is] finds [ErrForbidden] in it, too.
// Its text stays as it is.
func Forbid(err error) error { return forbiddenError{err} }

type forbiddenError struct{ error }

func (f forbiddenError) Unwrap() []error { return []error{f.error, ErrForbidden} }

// A Fault is what is wrong with a record, in one word that is fit for a metric.
type Fault string

// What may be wrong with a record.
const (
	FaultEndpoint Fault = "endpoint" // its endpoint is malformed, or none that a record may name
	FaultID       Fault = "id"       // it names no node, or by an id that none may have
	FaultLoad     Fault = "load"     // its load is no number of 0 or more
	FaultMetadata Fault = "metadata" // its metadata are too many, or malformed
	FaultKey      Fault = "key"      // it names another node than its key in the registry
	FaultRecord   Fault = "record"   // it is no record at all, or too long
	FaultFull     Fault = "full"     // the directory has no room for it
	FaultOther    Fault = "other"    // whatever no [InvalidError] says
)

// Faults returns all that [FaultOf] may return, sorted.
func Faults() []Fault {
	return slices.Sorted(slices.Values([]Fault{FaultEndpoint, FaultID, FaultLoad, FaultMetadata, FaultKey, FaultRecord, FaultFull, FaultOther}))
}

// FaultOf returns what an error says is wrong with a record, [FaultOther] if it wraps
// no [InvalidError].
func FaultOf(err error) Fault {
	if invalid, ok := errors.AsType[*InvalidError](err); ok {
		return invalid.Fault
	}
	return FaultOther
}

// An InvalidError says why a record is rejected. [errors.Is] finds [ErrInvalid] in it.
type InvalidError struct {
	// Fault is what is wrong, for programs. The text of the error is for people.
	Fault Fault

	why error
}

// Invalidf returns an [InvalidError] whose text is "invalid" and what follows from the
// format, which may wrap an error as that of [fmt.Errorf] does.
func Invalidf(fault Fault, format string, args ...any) error {
	return &InvalidError{fault, fmt.Errorf(format, args...)}
}

// Error says what is wrong and what would be accepted.
func (e *InvalidError) Error() string { return ErrInvalid.Error() + " " + e.why.Error() }

// Unwrap returns [ErrInvalid], and what the error was made of.
func (e *InvalidError) Unwrap() []error { return []error{ErrInvalid, e.why} }
