package natspubsub

import "time"

// stall is how long no further answer may come before the answers to a query
// count as complete: 200 nodes take 5 to 17 ms.
const stall = 100 * time.Millisecond

// A listing decides when the listing of a watch is over: its timer says when.
type listing struct {
	timer    *time.Timer
	asked    time.Time
	deadline time.Time
	pause    time.Duration // how long the next answer may take; 0 until the first
	over     bool
}

// newListing returns the listing of a watch that asked at a time, and is over when
// listen has passed since.
func newListing(asked time.Time, listen time.Duration) *listing {
	return &listing{timer: time.NewTimer(listen), asked: asked, deadline: asked.Add(listen)}
}

// answered waits for the next answer.
func (l *listing) answered() {
	if l.pause == 0 {
		// Who is far away answers late.
		l.pause = max(stall, 2*time.Since(l.asked))
	}
	l.wait(l.pause)
}

// wait ends the listing after a time, unless it is over.
func (l *listing) wait(d time.Duration) {
	if !l.over {
		l.timer.Reset(min(d, time.Until(l.deadline)))
	}
}
