package caddydiscovery

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

// exposeMetrics makes the metrics part of those of a config. Each config has a
// registry of its own, and all of them show the same process: what is counted
// belongs to no config, and so neither ends nor starts anew with one.
func exposeMetrics(ctx caddy.Context) error {
	registry := ctx.GetMetricsRegistry()
	if registry == nil {
		return nil // outside of a running Caddy
	}
	err := registry.Register(collector{})
	if errors.As(err, new(prometheus.AlreadyRegisteredError)) {
		return nil // by another source of the same config
	}
	if err != nil {
		return fmt.Errorf("registering the metrics: %w", err)
	}
	return nil
}

// stats are the counters of all that a process does with registries of one name.
// Two of one name (with other options, as after a reload that changes them) are
// counted together, or they would be the same series twice.
type stats struct {
	name string

	heartbeats, checks, lookups tally

	// Guarded by allStats.
	users       int
	directories []*sharedDirectory
	retired     totals // of directories that ended
}

// tally counts how something went.
type tally struct{ good, bad atomic.Uint64 }

func (r *tally) count(good bool) {
	if good {
		r.good.Add(1)
	} else {
		r.bad.Add(1)
	}
}

func (s *stats) lookup(found bool)   { s.lookups.count(found) }
func (s *stats) heartbeat(err error) { s.heartbeats.count(err == nil) }

// allStats are the stats of the registries in use. Their number is bounded by what
// the running configs name.
var allStats = struct {
	sync.Mutex
	byName map[string]*stats
}{byName: make(map[string]*stats)}

// acquireStats returns the stats of a registry, to which those of the directory
// belong from then on; it may be nil. It is matched by one of release.
func acquireStats(name string, d *sharedDirectory) *stats {
	allStats.Lock()
	defer allStats.Unlock()
	s := allStats.byName[name]
	if s == nil {
		s = &stats{name: name}
		allStats.byName[name] = s
	}
	s.users++
	if d != nil {
		s.directories = append(s.directories, d)
	}
	return s
}

func (s *stats) release(d *sharedDirectory) {
	allStats.Lock()
	defer allStats.Unlock()
	if i := slices.Index(s.directories, d); i >= 0 {
		s.retired.add(totalsOf(d))
		s.directories = slices.Delete(s.directories, i, i+1)
	}
	if s.users--; s.users == 0 {
		delete(allStats.byName, s.name)
	}
}

// totals is what a directory counted.
type totals struct {
	changes     map[discovery.ChangeType]uint64
	rejected    map[discovery.Fault]uint64
	snapshots   uint64
	restarts    uint64
	propagation discovery.Propagation
}

func totalsOf(d *sharedDirectory) totals {
	t := totals{snapshots: d.Snapshot().Number, restarts: d.Status().Restarts, propagation: d.Propagation()}
	t.changes, t.rejected = d.Journal().Counts()
	return t
}

func (t *totals) add(other totals) {
	if t.changes == nil {
		t.changes, t.rejected = make(map[discovery.ChangeType]uint64), make(map[discovery.Fault]uint64)
	}
	for k, n := range other.changes {
		t.changes[k] += n
	}
	for k, n := range other.rejected {
		t.rejected[k] += n
	}
	t.snapshots += other.snapshots
	t.restarts += other.restarts
	for i, n := range other.propagation.Counts {
		t.propagation.Counts[i] += n
	}
	t.propagation.Sum += other.propagation.Sum
}

// collector reads everything at the moment of a scrape. It has no state, so that
// all configs register the same one.
type collector struct{}

func describeMetric(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("caddy_discovery_"+name, help, append([]string{"registry"}, labels...), nil)
}

var (
	descConnected   = describeMetric("registry_connected", "Whether the registry is being watched right now.")
	descSynced      = describeMetric("registry_synced", "Whether the registry has been listed whole at least once.")
	descStale       = describeMetric("registry_stale_seconds", "For how long the registry has not been watched; 0 while it is.")
	descNodes       = describeMetric("nodes", "Nodes of the registry, and records that are rejected, by state.", "state")
	descChanges     = describeMetric("changes_total", "Changes of the standing of nodes, by type.", "type")
	descRejected    = describeMetric("rejected_records_total", "Records that could not be accepted, by what is wrong with them.", "reason")
	descSnapshots   = describeMetric("snapshots_total", "Snapshots of the registry that were published.")
	descRestarts    = describeMetric("watch_restarts_total", "Watches of the registry that broke and were started again.")
	descPropagation = describeMetric("propagation_seconds", "How long records took from the registry's storage to the directory, where the registry's clock shows it.")
	descChecks      = describeMetric("health_checks_total", "Active health checks of discovered nodes, by result.", "result")
	descHeartbeats  = describeMetric("heartbeats_total", "Heartbeats of the nodes that this proxy lists, by result.", "result")
	descLookups     = describeMetric("lookups_total", "Requests for upstreams, by whether there were any.", "result")
)

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descConnected, descSynced, descStale, descNodes, descChanges, descRejected,
		descSnapshots, descRestarts, descPropagation, descChecks, descHeartbeats, descLookups,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (collector) Collect(ch chan<- prometheus.Metric) {
	sources := sourcesOf()
	allStats.Lock()
	all := make([]*stats, 0, len(allStats.byName))
	running := make(map[*stats][]*sharedDirectory)
	sums := make(map[*stats]totals)
	for _, name := range slices.Sorted(maps.Keys(allStats.byName)) {
		s := allStats.byName[name]
		var sum totals
		sum.add(s.retired)
		for _, d := range s.directories {
			if d.opened.Load() != 0 {
				running[s] = append(running[s], d)
			}
			sum.add(totalsOf(d))
		}
		all, sums[s] = append(all, s), sum
	}
	allStats.Unlock()

	for _, s := range all {
		count := func(desc *prometheus.Desc, n uint64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(n), append([]string{s.name}, labels...)...)
		}
		count(descHeartbeats, s.heartbeats.good.Load(), "ok")
		count(descHeartbeats, s.heartbeats.bad.Load(), "failed")
		if len(running[s]) == 0 {
			continue // a registrar uses it, nothing more
		}
		gauge := func(desc *prometheus.Desc, v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, v, append([]string{s.name}, labels...)...)
		}
		connected, synced := true, true
		var stale time.Duration
		nodes := make(map[string]int)
		for _, d := range running[s] {
			status := d.Status()
			connected = connected && status.Connected
			synced = synced && status.Synced
			if !status.Connected {
				stale = max(stale, time.Since(status.Since))
			}
			for _, e := range d.Snapshot().Nodes() {
				state, _ := view.StateOf(e, sources[d])
				nodes[state]++
			}
			nodes[view.StateRejected] += len(status.Rejections)
		}
		gauge(descConnected, truth(connected))
		gauge(descSynced, truth(synced))
		gauge(descStale, stale.Seconds())
		for _, state := range view.States {
			gauge(descNodes, float64(nodes[state]), state)
		}

		sum := sums[s]
		for _, t := range nodeChanges {
			count(descChanges, sum.changes[t], string(t))
		}
		for _, fault := range discovery.Faults() {
			count(descRejected, sum.rejected[fault], string(fault))
		}
		count(descSnapshots, sum.snapshots)
		count(descRestarts, sum.restarts)
		count(descChecks, s.checks.good.Load(), "passed")
		count(descChecks, s.checks.bad.Load(), "failed")
		count(descLookups, s.lookups.good.Load(), "found")
		count(descLookups, s.lookups.bad.Load(), "none")

		buckets, total := make(map[float64]uint64), uint64(0)
		for i, bound := range discovery.PropagationBounds() {
			total += sum.propagation.Counts[i]
			buckets[bound] = total
		}
		total += sum.propagation.Counts[discovery.PropagationBuckets-1]
		ch <- prometheus.MustNewConstHistogram(descPropagation, total, sum.propagation.Sum.Seconds(), buckets, s.name)
	}
}

// nodeChanges are the types of changes that are about nodes.
var nodeChanges = []discovery.ChangeType{
	discovery.ChangeSeen, discovery.ChangeUpdated, discovery.ChangeLeft, discovery.ChangeLapsed,
	discovery.ChangeHeld, discovery.ChangeEjected, discovery.ChangeRestored, discovery.ChangeRejected,
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Interface guards
var (
	_ prometheus.Collector = collector{}
)
