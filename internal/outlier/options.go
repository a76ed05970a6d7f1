// Package outlier tells nodes whose requests fail from those that serve, by what becomes of
// the requests themselves, and says for how long they are to get none: they are ejected.
package outlier

import (
	"log/slog"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Options say which nodes are ejected, and for how long.
type Options struct {
	// Errors in a row make a node an outlier.
	Errors int
	// So many percent of at least Requests in the Window do, too. 0: they do not.
	Percent  int
	Requests int
	Window   time.Duration
	// Eject is for how long a node is ejected the first time. It doubles for each time in
	// a row, up to MostTimes as long.
	Eject time.Duration
	// MaxEjected is how many percent of the nodes may be ejected at one time.
	MaxEjected int
	// ByService says that the nodes of each service are counted by themselves for that.
	ByService bool
	// TLS says that nodes are dialled by the names of their endpoints.
	TLS bool

	// Now is the clock by which requests are timed.
	Now func() time.Duration
	// Count is called for each ejection, while the request is under way that led to it.
	Count func(*discovery.Entry)
	// Logger is told at level Warn which nodes are ejected, and at level Info which are
	// in use again.
	Logger *slog.Logger
}

// MostTimes is how many times as long as the first one an ejection is at most.
const MostTimes = 10

// Most returns how many of so many nodes may be ejected: their share, rounded down, but
// one of two and of three.
func (o *Options) Most(nodes int) int {
	most := nodes * o.MaxEjected / 100
	if nodes == 2 || nodes == 3 {
		most = max(most, 1)
	}
	return most
}

// lasts returns how long an ejection lasts that came after so many others in a row.
func (o *Options) lasts(before int) time.Duration {
	longest := MostTimes * o.Eject
	if before > 3 { // 16 times as long
		return longest
	}
	return min(o.Eject<<before, longest)
}
