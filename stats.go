package caddydiscovery

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

// allStats are the stats of the registries in use. What is counted belongs to no
// config, and so neither ends nor starts anew with one.
var allStats = caddy.NewUsagePool() // name of the registry → *stats

// stats are the counters of all that a process does with registries of one name.
// Two of one name (with other options, as after a reload that changes them) are
// counted together, or they would be the same series twice.
type stats struct {
	name string

	heartbeats, checks, lookups counter
	ejections, retriesRefused   atomic.Uint64

	tally    *traffic.Tally // of the requests, while sources want it
	counting atomic.Int32   // how many do

	mu          sync.Mutex // guards what follows
	directories []*discovery.Directory
	ended       totals // of directories that are not there any more
}

// counter counts how something went.
type counter struct{ good, bad atomic.Uint64 }

func (c *counter) count(good bool) {
	if good {
		c.good.Add(1)
	} else {
		c.bad.Add(1)
	}
}

func (c *counter) of(good bool) float64 {
	if good {
		return float64(c.good.Load())
	}
	return float64(c.bad.Load())
}

// acquireStats returns the stats of a registry, to which those of the directory
// belong from then on; it may be nil. It is matched by one of release.
func acquireStats(name string, d *discovery.Directory) *stats {
	s, _ := acquire(allStats, name, func() (*stats, error) {
		s := &stats{name: name}
		s.tally = traffic.NewTally(s.listed)
		return s, nil
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	if d != nil {
		s.directories = append(s.directories, d)
	}
	return s
}

func (s *stats) release(d *discovery.Directory) {
	s.mu.Lock()
	if i := slices.Index(s.directories, d); i >= 0 {
		s.directories = slices.Delete(s.directories, i, i+1)
		s.ended.add(totalsOf(d))
	}
	s.mu.Unlock()
	_, _ = allStats.Delete(s.name)
}

func statsInUse() (all []*stats) {
	allStats.Range(func(_, v any) bool {
		all = append(all, v.(*stats))
		return true
	})
	return all
}

// Destruct has nothing to let go of.
func (*stats) Destruct() error { return nil }

// sum returns what all directories of the registry have counted.
func (s *stats) sum() (sum totals) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum.add(s.ended)
	for _, d := range s.directories {
		sum.add(totalsOf(d))
	}
	return sum
}

// totals is what a directory has counted.
type totals struct {
	changes     map[discovery.ChangeType]uint64
	rejected    map[discovery.Fault]uint64
	snapshots   uint64
	restarts    uint64
	propagation discovery.Propagation

	certificates map[discovery.CertificateAnswer]uint64
}

func totalsOf(d *discovery.Directory) totals {
	t := totals{snapshots: d.Snapshot().Number, restarts: d.Status().Restarts, propagation: d.Propagation()}
	t.changes, t.rejected = d.Journal().Counts()
	t.certificates = d.CertificateAnswers()
	return t
}

func (t *totals) add(other totals) {
	if t.changes == nil {
		t.changes, t.rejected = make(map[discovery.ChangeType]uint64), make(map[discovery.Fault]uint64)
		t.certificates = make(map[discovery.CertificateAnswer]uint64)
	}
	for k, n := range other.changes {
		t.changes[k] += n
	}
	for k, n := range other.rejected {
		t.rejected[k] += n
	}
	for k, n := range other.certificates {
		t.certificates[k] += n
	}
	t.snapshots += other.snapshots
	t.restarts += other.restarts
	for i, n := range other.propagation.Counts {
		t.propagation.Counts[i] += n
	}
	t.propagation.Sum += other.propagation.Sum
}
