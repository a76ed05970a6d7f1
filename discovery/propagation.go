package discovery

import (
	"slices"
	"sync/atomic"
	"time"
)

// PropagationBuckets is how many buckets a [Propagation] has.
const PropagationBuckets = 15

var propagationBounds = [PropagationBuckets - 1]float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}

// PropagationBounds returns the upper bounds of the buckets of a [Propagation] but the
// last, in seconds: what took longer is in that.
func PropagationBounds() []float64 { return slices.Clone(propagationBounds[:]) }

// propagation counts how long records were on their way. One goroutine writes,
// anyone reads.
type propagation struct {
	counts [PropagationBuckets]atomic.Uint64
	sum    atomic.Int64
}

func (p *propagation) observe(d time.Duration) {
	i, _ := slices.BinarySearch(propagationBounds[:], d.Seconds())
	p.counts[i].Add(1)
	p.sum.Add(int64(d))
}

// Propagation is how long records took from the registry's storage to a directory,
// as far as the registry's clock shows.
type Propagation struct {
	// Counts are the records in each bucket, not cumulative; see [PropagationBounds].
	Counts [PropagationBuckets]uint64
	// Sum is how long all of them took together.
	Sum time.Duration
}

// Propagation returns how long records took to come so far. It may be called from
// any goroutine.
func (d *Directory) Propagation() Propagation {
	p := Propagation{Sum: time.Duration(d.propagation.sum.Load())}
	for i := range p.Counts {
		p.Counts[i] = d.propagation.counts[i].Load()
	}
	return p
}
