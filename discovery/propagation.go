package discovery

import (
	"sync/atomic"
	"time"
)

// PropagationBounds are the upper bounds of the buckets of [Directory.Propagation],
// in seconds. What took longer than the last one is in a further bucket.
var PropagationBounds = [...]float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}

// propagation counts how long records were on their way. One goroutine writes,
// anyone reads.
type propagation struct {
	counts [len(PropagationBounds) + 1]atomic.Uint64
	sum    atomic.Int64
}

func (p *propagation) observe(d time.Duration) {
	i := 0
	for i < len(PropagationBounds) && d.Seconds() > PropagationBounds[i] {
		i++
	}
	p.counts[i].Add(1)
	p.sum.Add(int64(d))
}

// Propagation is how long records took from the registry's storage to a directory,
// as far as the registry's clock shows.
type Propagation struct {
	// Counts are the records in each bucket of [PropagationBounds], not cumulative.
	Counts [len(PropagationBounds) + 1]uint64
	// Sum is how long all of them took together.
	Sum time.Duration
}

// Propagation returns how long records took to come so far. It may be called from
// any goroutine.
func (d *Directory) Propagation() Propagation {
	var p Propagation
	for i := range p.Counts {
		p.Counts[i] = d.propagation.counts[i].Load()
	}
	p.Sum = time.Duration(d.propagation.sum.Load())
	return p
}
