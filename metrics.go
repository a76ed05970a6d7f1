package caddydiscovery

import (
	"errors"
	"fmt"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/outlier"
	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

// exposeMetrics makes the metrics part of those of a config. Each config has a
// registry of its own, and all of them show the same process.
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

// reading is what the metrics show of one registry at the moment of a scrape.
type reading struct {
	*stats
	totals
	connected, synced float64 // 1: yes
	stale             time.Duration
	nodes             map[string]float64 // by state
	ejected, full     float64
	hosts, conflicts  float64
}

// metric is what one series shows, or one for each value of a label.
type metric struct {
	name, help string
	kind       prometheus.ValueType
	label      string
	values     []string
	read       func(r *reading, value string) float64
}

const gauge, total = prometheus.GaugeValue, prometheus.CounterValue

// heartbeatMetric is shown also where only a registrar uses the registry.
var heartbeatMetric = metric{"heartbeats_total", "Heartbeats of the nodes that this proxy lists, by result.", total, "result", []string{"ok", "failed"},
	func(r *reading, v string) float64 { return r.heartbeats.of(v == "ok") }}

// metrics are those of a registry that is watched.
var metrics = []metric{
	heartbeatMetric,
	{"registry_connected", "Whether the registry is being watched right now.", gauge, "", nil,
		func(r *reading, _ string) float64 { return r.connected }},
	{"registry_synced", "Whether the registry has been listed whole at least once.", gauge, "", nil,
		func(r *reading, _ string) float64 { return r.synced }},
	{"registry_stale_seconds", "For how long the registry has not been watched; 0 while it is.", gauge, "", nil,
		func(r *reading, _ string) float64 { return r.stale.Seconds() }},
	{"nodes", "Nodes of the registry, and records that are rejected, by state.", gauge, "state", view.States,
		func(r *reading, v string) float64 { return r.nodes[v] }},
	{"hosts", "Hosts that nodes announce, where a configuration asks for them.", gauge, "", nil,
		func(r *reading, _ string) float64 { return r.hosts }},
	{"host_conflicts", "Services that announce a host of another one and do not get it, counted for each host.", gauge, "", nil,
		func(r *reading, _ string) float64 { return r.conflicts }},
	{"changes_total", "Changes of the standing of nodes, by type.", total, "type", texts(
		discovery.ChangeSeen, discovery.ChangeUpdated, discovery.ChangeLeft, discovery.ChangeLapsed,
		discovery.ChangeHeld, discovery.ChangeEjected, discovery.ChangeRestored, discovery.ChangeRejected,
		discovery.ChangeHosts, discovery.ChangeCertificate),
		func(r *reading, v string) float64 { return float64(r.changes[discovery.ChangeType(v)]) }},
	{"rejected_records_total", "Records that could not be accepted, by what is wrong with them.", total, "reason", texts(discovery.Faults()...),
		func(r *reading, v string) float64 { return float64(r.rejected[discovery.Fault(v)]) }},
	{"snapshots_total", "Snapshots of the registry that were published.", total, "", nil,
		func(r *reading, _ string) float64 { return float64(r.snapshots) }},
	{"watch_restarts_total", "Watches of the registry that broke and were started again.", total, "", nil,
		func(r *reading, _ string) float64 { return float64(r.restarts) }},
	{"certificates_allowed_total", "Questions whether there may be a certificate for a host, by the answer: listed, lingering and remembered are those that allow it.", total, "result", texts(discovery.CertificateAnswers()...),
		func(r *reading, v string) float64 { return float64(r.certificates[discovery.CertificateAnswer(v)]) }},
	{"health_checks_total", "Active health checks of discovered nodes, by result.", total, "result", []string{"passed", "failed"},
		func(r *reading, v string) float64 { return r.checks.of(v == "passed") }},
	{"nodes_ejected", "Nodes that get no requests from some source right now because their requests failed.", gauge, "", nil,
		func(r *reading, _ string) float64 { return r.ejected }},
	{"nodes_full", "Nodes that have as many requests in flight from this proxy as their capacity says.", gauge, "", nil,
		func(r *reading, _ string) float64 { return r.full }},
	{"retries_refused_total", "Retries that retry_budget did not allow.", total, "", nil,
		func(r *reading, _ string) float64 { return float64(r.retriesRefused.Load()) }},
	{"lookups_total", "Requests for upstreams, by whether there were any.", total, "result", []string{"found", "none"},
		func(r *reading, v string) float64 { return r.lookups.of(v == "found") }},
}

var propagationMetric = metric{name: "propagation_seconds", help: "How long records took from the registry's storage to the directory, where the registry's clock shows it."}

func texts[T ~string](values ...T) (texts []string) {
	for _, v := range values {
		texts = append(texts, string(v))
	}
	return texts
}

func (m *metric) desc() *prometheus.Desc {
	labels := []string{"registry"}
	if m.label != "" {
		labels = append(labels, m.label)
	}
	return prometheus.NewDesc("caddy_discovery_"+m.name, m.help, labels, nil)
}

func (m *metric) collect(ch chan<- prometheus.Metric, r *reading) {
	if m.label == "" {
		ch <- prometheus.MustNewConstMetric(m.desc(), m.kind, m.read(r, ""), r.name)
	}
	for _, v := range m.values {
		ch <- prometheus.MustNewConstMetric(m.desc(), m.kind, m.read(r, v), r.name, v)
	}
}

// collector reads everything at the moment of a scrape. It has no state, so that
// all configs register the same one.
type collector struct{}

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	ch <- propagationMetric.desc()
	for _, m := range metrics {
		ch <- m.desc()
	}
	describeTraffic(ch)
}

// Collect implements prometheus.Collector.
func (collector) Collect(ch chan<- prometheus.Metric) {
	watched := make(map[string][]*sharedDirectory)
	for _, d := range runningDirectories() {
		watched[d.name()] = append(watched[d.name()], d)
	}
	for _, s := range statsInUse() {
		r := &reading{stats: s}
		if len(watched[r.name]) == 0 {
			heartbeatMetric.collect(ch, r)
			continue
		}
		r.totals = s.sum()
		r.look(watched[r.name])
		for _, m := range metrics {
			m.collect(ch, r)
		}
		buckets, count := make(map[float64]uint64), uint64(0)
		for i, bound := range discovery.PropagationBounds() {
			count += r.propagation.Counts[i]
			buckets[bound] = count
		}
		count += r.propagation.Counts[discovery.PropagationBuckets-1]
		ch <- prometheus.MustNewConstMetric(ejectionsDesc, total, float64(s.ejections.Load()), s.name, "", "")
		s.collectTraffic(ch)
		ch <- prometheus.MustNewConstHistogram(propagationMetric.desc(), count, r.propagation.Sum.Seconds(), buckets, r.name)
	}
}

// look reads how the directories of the registry are. Where there are several, the
// worst of each counts.
func (r *reading) look(directories []*sharedDirectory) {
	r.connected, r.synced, r.nodes = 1, 1, make(map[string]float64)
	for _, d := range directories {
		status := d.Status()
		if !status.Connected {
			r.connected, r.stale = 0, max(r.stale, time.Since(status.Since))
		}
		if !status.Synced {
			r.synced = 0
		}
		snapshot, sources := d.Snapshot(), d.namedSources()
		r.hosts, r.conflicts = r.hosts+float64(snapshot.Hosts().Len()), r.conflicts+float64(snapshot.Hosts().Conflicts())
		for _, e := range snapshot.Nodes() {
			state, _ := view.StateOf(e, sources)
			r.nodes[state]++
			if outlier.Any(e) {
				r.ejected++
			}
			if isFull(e) {
				r.full++
			}
		}
		r.nodes[view.StateRejected] += float64(len(status.Rejections))
	}
}

// Interface guards
var (
	_ prometheus.Collector = collector{}
)
