package discovery

import (
	"errors"
	"maps"
	"slices"
)

// How many lines about single nodes a directory logs a second.
const logRate = 20

// logLines are what a log says of a change.
var logLines = map[ChangeType]string{
	ChangeSeen:     "node joined",
	ChangeUpdated:  "node changed",
	ChangeLeft:     "node left",
	ChangeLapsed:   "node lapsed",
	ChangeHeld:     "node held",
	ChangeEjected:  "node ejected",
	ChangeRestored: "node restored",
	ChangeRejected: "node rejected",
}

// note is where every change of a node's standing is told: in the journal, which
// counts it, and in the log. What a first listing shows is told at its end, if it
// comes to one.
func (l *loop) note(why ChangeType, e *Entry, reason string) {
	if !l.everyNode {
		return
	}
	rejection := ""
	if why == ChangeRejected {
		rejection = RejectionReason(errors.New(reason))
	}
	l.journal.add(Change{Type: why, ID: e.Node.ID, Reason: reason, Entry: e}, rejection)
	if !l.logs() {
		return
	}
	fields := make([]any, 0, 6)
	if reason != "" {
		fields = append(fields, "reason", reason)
	}
	fields = append(fields, "node", e.Node.ID, "endpoint", e.Node.Endpoint.String())
	if s := e.Node.Service(); s != "" {
		fields = append(fields, "service", s)
	}
	if e.state != StateUp && e.doubt == trusted {
		fields = append(fields, "state", string(e.state))
	}
	l.log.Info(logLines[why], l.leftOut(fields)...)
}

// noteRejection is note for a record that never was a node. Listings repeat what
// is rejected, and the log need not.
func (l *loop) noteRejection(e Event) {
	if !l.everyNode {
		return
	}
	l.journal.add(Change{Type: ChangeRejected, ID: visible(e.ID), Reason: e.Err.Error()}, RejectionReason(e.Err))
	if l.listed && l.logs() {
		l.log.Info("record rejected", l.leftOut([]any{
			"id", visible(e.ID), "key", visible(e.Key), "error", e.Err,
		})...)
	}
}

// noteListing is note for all that the first listing showed. Its nodes are sorted,
// and the log gets their number only.
func (l *loop) noteListing() {
	const reason = "it was listed when the registry was first seen"
	for _, key := range slices.Sorted(maps.Keys(l.rejected)) {
		r := l.rejected[key]
		l.journal.add(Change{Type: ChangeRejected, ID: r.ID, Reason: r.Err.Error(), Listed: true}, RejectionReason(r.Err))
	}
	for _, id := range slices.Sorted(maps.Keys(l.table.nodes)) {
		l.journal.Add(Change{Type: ChangeSeen, ID: id, Reason: reason, Entry: l.table.nodes[id].entry, Listed: true})
	}
}

// logs reports whether a line about a single node may be logged now. Of a storm
// the lines that may not are counted.
func (l *loop) logs() bool {
	if l.lines.Allow() {
		return true
	}
	l.suppressed++
	return false
}

// leftOut completes the fields of a line by how many were left out before it.
func (l *loop) leftOut(fields []any) []any {
	if l.suppressed > 0 {
		fields = append(fields, "lines_left_out", l.suppressed)
		l.suppressed = 0
	}
	return fields
}
