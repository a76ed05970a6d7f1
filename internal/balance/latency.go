// Package balance learns from the traffic of a process what two policies go by: how long a
// node takes to begin an answer ([Latency], for least_latency), and what it serves by how
// much of itself ([Usage] and [Shares], for least_load). It knows numbers and times, and
// neither nodes nor requests. All times are of one monotonic clock, which the caller reads.
package balance

import (
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// Latency is how long a node takes to begin an answer: a peak exponentially weighted moving
// average, as Finagle's load balancer has it. An answer that is slower than the average
// becomes it at once; quicker ones draw it down by the time that has passed, so that what
// was slow is believed slow for some time. Errors multiply it, and a request that waits
// counts as an answer that takes at least as long as it has waited so far.
//
// Its methods may be called by many goroutines at once. The zero Latency knows nothing.
type Latency struct {
	mu   sync.Mutex    // held by who writes
	idle time.Duration // for how long there was nothing to do before what waits now

	average atomic.Uint64 // seconds, as bits
	errors  atomic.Uint64 // by what errors multiply it, less 1, as bits
	at      atomic.Int64  // of when both are

	waiting atomic.Int32 // requests without an answer yet
	uploads atomic.Int32 // those of them that clients are still sending
	since   atomic.Int64 // for how long at least one of the others has waited
	answers atomic.Int32 // of all, errors too, up to what makes a node known
}

const (
	// firstAnswers is after how many answers a node is known. Until then it gets one
	// request at a time, whatever the others do.
	firstAnswers = 5
	// unknownCost is what a node without an answer counts as while one is awaited, and
	// the least that one counts as whose only answers were errors, in seconds.
	unknownCost = 1
	// errorFactor is by what an error multiplies the average, mostErrors by what all of
	// them do at most, and errorRelief is what an answer leaves of it. So it grows only
	// where more than one in eight requests fails: of a service that fails now and
	// then, as they all do, the times still say which node is the quickest.
	errorFactor = 2
	mostErrors  = 1024
	errorRelief = 0.9
	// idleForgets is how many times as quickly the past of a node is forgotten that has
	// nothing to do: nothing else shows that it is quick again, and one slow answer among
	// thousands should not keep it out for long.
	idleForgets = 3
)

// Sent notes that a request is sent.
func (l *Latency) Sent(now time.Duration) {
	l.mu.Lock()
	if l.waiting.Load() == 0 {
		l.idle = now - time.Duration(l.at.Load())
	}
	l.begin(now)
	l.waiting.Add(1)
	l.mu.Unlock()
}

// begin notes since when requests wait, if this is the first one that the node has.
func (l *Latency) begin(now time.Duration) {
	if l.waiting.Load() <= l.uploads.Load() {
		l.since.Store(int64(now))
	}
}

// Uploads notes of a request that was just sent that its client is still sending it. Until
// [Latency.Uploaded] it is none for which the node lets anybody wait.
func (l *Latency) Uploads() { l.uploads.Add(1) }

// Uploaded notes that the node has a request now of which Uploads was told, or that this
// does not matter any more.
func (l *Latency) Uploaded(now time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.begin(now)
	l.uploads.Add(-1)
}

// Answered notes what came of a request that was sent, after it took so long: an answer or,
// where failed, an error. Decay is the time constant of the average.
func (l *Latency) Answered(now, took, decay time.Duration, failed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answered(now)
	left := l.left(now, decay)
	average, errors := load(&l.average), load(&l.errors)*left
	rtt := max(took.Seconds(), 0)
	n := l.answers.Load()
	if failed {
		errors = min((1+errors)*errorFactor, mostErrors) - 1
		if n == 0 {
			rtt = max(rtt, unknownCost)
		}
	} else {
		errors *= errorRelief
	}
	switch {
	case n == 0, n == 1 && !failed:
		// The first answer comes over a new connection and from cold caches.
		average = rtt
	case rtt >= average:
		average = rtt
	case !failed: // what fails quickly is not quick
		average = average*left + rtt*(1-left)
	}
	store(&l.average, average)
	store(&l.errors, errors)
	l.at.Store(int64(now))
	if n < firstAnswers {
		l.answers.Add(1)
	}
}

// BrokeOff notes that an answer ended before its end.
func (l *Latency) BrokeOff() {
	l.mu.Lock()
	defer l.mu.Unlock()
	store(&l.errors, min((1+load(&l.errors))*errorFactor, mostErrors)-1)
}

// GivenUp notes that nobody waits any more for the answer to a request, after so long. That
// is no error, but the node took no less.
func (l *Latency) GivenUp(now, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answered(now)
	if rtt := took.Seconds(); l.answers.Load() > 0 && rtt > load(&l.average) {
		store(&l.average, rtt)
		l.at.Store(int64(now))
	}
}

func (l *Latency) answered(now time.Duration) {
	// Whoever else waits has done so since the answer before at least; that the longest
	// wait is forgotten here lets an answer count for more than silence.
	l.since.Store(int64(now))
	l.waiting.Add(-1)
}

// left returns what is left of what was known when the last answer came.
func (l *Latency) left(now, decay time.Duration) float64 {
	busy := now - time.Duration(l.at.Load()) - l.idle
	left := remains(busy, decay) * remains(l.idle, decay/idleForgets)
	l.idle = 0
	return left
}

// Cost returns how long the next answer is to be expected to take, in seconds, as far as
// the node is the cause; 0 if the node should have a request to be known by.
//
// What was known of a node that has nothing to do decays, so that a node that was slow once
// is tried again: by one request, whose wait counts from then on.
func (l *Latency) Cost(now, decay time.Duration) float64 {
	average, errors := load(&l.average), load(&l.errors)
	n := l.answers.Load()
	if waiting := l.waiting.Load(); waiting > 0 {
		waited := 0.0
		if waiting > l.uploads.Load() {
			waited = (now - time.Duration(l.since.Load())).Seconds()
		}
		if n == 0 {
			return max(unknownCost, waited)
		}
		return max(average*(1+errors), waited)
	}
	if n < firstAnswers {
		return 0
	}
	idle := now - time.Duration(l.at.Load())
	if idle < decay/(128*idleForgets) {
		return average * (1 + errors) // nearly; and so it is for a node that has much to do
	}
	left := remains(idle, decay/idleForgets)
	return average * left * (1 + errors*left)
}

// remains returns what is left, after a time, of what decays.
func remains(after, decay time.Duration) float64 {
	return math.Exp(-float64(max(after, 0)) / float64(decay))
}

func load(v *atomic.Uint64) float64     { return math.Float64frombits(v.Load()) }
func store(v *atomic.Uint64, f float64) { v.Store(math.Float64bits(f)) }
