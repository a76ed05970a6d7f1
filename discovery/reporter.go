package discovery

import (
	"context"
	"log/slog"

	"golang.org/x/time/rate"
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
	ChangeRestored: "node restored",
	ChangeRejected: "node rejected",
}

// reporter tells of every change of a node's presence: the journal, which counts it,
// and the log, which gets a bounded number of lines about single nodes. It tells nothing
// of them before the first listing is over, but then what that showed.
type reporter struct {
	journal *Journal
	log     *slog.Logger
	begun   bool // the first listing is over
	limiter *rate.Limiter
	leftOut int // lines that were not logged since the last one
}

func newReporter(journal *Journal, log *slog.Logger) reporter {
	return reporter{journal: journal, log: log, limiter: rate.NewLimiter(logRate, logRate)}
}

// node tells what became of a node, and why.
func (r *reporter) node(what ChangeType, e *Entry, reason string) { r.tell(what, e, reason, "") }

// nodeRejected tells that a node is gone because its record was rejected.
func (r *reporter) nodeRejected(e *Entry, err error) {
	r.tell(ChangeRejected, e, err.Error(), FaultOf(err))
}

func (r *reporter) tell(what ChangeType, e *Entry, reason string, fault Fault) {
	if !r.begun {
		return
	}
	r.journal.add(Change{Type: what, ID: e.Node.ID, Reason: reason, Entry: e}, fault)
	if !r.allows() {
		return
	}
	fields := make([]any, 0, 12)
	if reason != "" {
		fields = append(fields, "reason", reason)
	}
	fields = append(fields, "node", e.Node.ID, "endpoint", e.Node.Endpoint.String())
	if s := e.Node.Service(); s != "" {
		fields = append(fields, "service", s)
	}
	if e.state != StateUp && e.presence == alive {
		fields = append(fields, "state", string(e.state))
	}
	r.write(slog.LevelInfo, logLines[what], fields)
}

// host tells what became of a host that a node announces.
func (r *reporter) host(n *hostNews) {
	if !r.begun {
		return
	}
	r.journal.Add(Change{Type: ChangeHosts, ID: n.entry.Node.ID, Reason: n.reason, Entry: n.entry})
	level := slog.LevelInfo
	if n.what == hostConflict {
		level = slog.LevelWarn
	}
	r.line(level, string(n.what), "node", n.entry.Node.ID, "service", n.entry.Node.Service(), "reason", n.reason)
}

// recordRejected tells of a rejected record that is no node's. Listings repeat them,
// and the log need not.
func (r *reporter) recordRejected(rejected *Rejection, logged bool) {
	if !r.begun {
		return
	}
	r.journal.add(Change{Type: ChangeRejected, ID: rejected.ID, Reason: rejected.Err.Error()}, FaultOf(rejected.Err))
	if logged {
		r.line(slog.LevelInfo, "record rejected", "id", rejected.ID, "key", rejected.Key, "error", rejected.Err)
	}
}

// firstListing tells what the first listing showed: the journal each of its records, in
// the order that is given, and the log nothing.
func (r *reporter) firstListing(rejected []Rejection, nodes []*tracked) {
	for i := range rejected {
		r.journal.add(Change{Type: ChangeRejected, ID: rejected[i].ID, Reason: rejected[i].Err.Error(), Listed: true}, FaultOf(rejected[i].Err))
	}
	for _, t := range nodes {
		r.journal.Add(Change{Type: ChangeSeen, ID: t.id(), Reason: "it was listed when the registry was first seen", Entry: t.entry, Listed: true})
	}
}

// line logs a line about a single node, unless there are too many.
func (r *reporter) line(level slog.Level, message string, fields ...any) {
	if r.begun && r.allows() {
		r.write(level, message, fields)
	}
}

func (r *reporter) allows() bool {
	if r.limiter.Allow() {
		return true
	}
	r.leftOut++
	return false
}

// write logs a line that is allowed, and how many were left out before it.
func (r *reporter) write(level slog.Level, message string, fields []any) {
	if r.leftOut > 0 {
		fields = append(fields, "lines_left_out", r.leftOut)
		r.leftOut = 0
	}
	r.log.Log(context.Background(), level, message, fields...)
}
