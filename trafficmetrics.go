package caddydiscovery

import (
	"errors"
	"fmt"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

// TrafficMetrics has the requests to nodes counted: how many there were, with which
// statuses, how long they took, how many are under way, how many were retries, and how
// often outlier has ejected a node for them. They are shown beside the other metrics, with the labels "registry", "service" and "node".
// What is counted belongs to the registry, so that it goes on over a reload, and the
// sources of several handlers add up.
type TrafficMetrics struct {
	// What there is a series for: "service", or "node" for each node of each service.
	// Default: service
	By string `json:"by,omitempty"`

	// For how many nodes of the registry there are series at most, where they are by
	// node. The requests of others are counted together, as the node "other". A node
	// that left has none any more once they were read. Default: 500
	MaxNodes int `json:"max_nodes,omitempty"`
}

const (
	byService, byNode = "service", "node"
	defaultMaxNodes   = 500
	mostMetricNodes   = discovery.MaxNodes
)

// check checks and completes what was configured.
func (m *TrafficMetrics) check() error {
	switch m.By {
	case "":
		m.By = byService
	case byService, byNode:
	default:
		return fmt.Errorf("metrics: invalid value %q, want service or node", m.By)
	}
	switch {
	case m.MaxNodes < 0 || m.MaxNodes > mostMetricNodes:
		return fmt.Errorf("metrics: invalid number of nodes %d, want 1 to %d", m.MaxNodes, mostMetricNodes)
	case m.MaxNodes > 0 && m.By == byService:
		return errors.New("metrics: a number of nodes goes with node only; want 'metrics service' or 'metrics node <max nodes>'")
	case m.MaxNodes == 0 && m.By == byNode:
		m.MaxNodes = defaultMaxNodes
	}
	return nil
}

// metricsOption is the option 'metrics service|node [<max nodes>]'.
func metricsOption(to **TrafficMetrics) caddyblock.Option {
	return caddyblock.Option{Usage: "service|node [<max nodes>]", Min: 1, Max: 2, Set: func(args []string) error {
		m := new(TrafficMetrics)
		if err := caddyblock.OneOf(&m.By, byService, byNode).Set(args[:1]); err != nil {
			return err
		}
		if len(args) > 1 {
			if m.By == byService {
				return errors.New("a number of nodes goes with node only, want 'metrics service' or 'metrics node <max nodes>'")
			}
			if err := caddyblock.Number(&m.MaxNodes, 1, mostMetricNodes).Set(args[1:]); err != nil {
				return err
			}
		}
		*to = m
		return nil
	}}
}

// countTraffic has the requests of the source counted.
func (u *Upstreams) countTraffic(ctx caddy.Context) error {
	s := u.directory.stats
	observer := s.tally.ByService()
	if u.Metrics.By == byNode {
		observer = s.tally.ByNode(u.Metrics.MaxNodes)
	}
	s.counting.Add(1)
	u.counted = true
	return u.observe(ctx, observer)
}

// stopCounting is called before the directory is released. Requests that are under way
// are still counted.
func (u *Upstreams) stopCounting() {
	if u.counted {
		u.directory.stats.counting.Add(-1)
	}
}

// listed reports what a tally asks of its fleet.
func (s *stats) listed(service, node string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.directories {
		snapshot := d.Snapshot()
		if node == "" && len(snapshot.Service(service)) > 0 {
			return true
		}
		if node == "" {
			continue
		}
		if e := snapshot.Node(node); e != nil && traffic.Label(e.Node.Service()) == service {
			return true
		}
	}
	return false
}

func trafficDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("caddy_discovery_"+name, help, append([]string{"registry", "service", "node"}, labels...), nil)
}

// The metrics of traffic. The label "node" is empty where they are by service. Those of
// one node tell the attempts that went there.
var (
	requestsDesc = trafficDesc("requests_total", "Requests that were sent to nodes, retries included, by the class of their status; error: there was no answer; aborted: the client did not wait for one.", "code")
	durationDesc = trafficDesc("request_duration_seconds", "How long requests to nodes took, from when they were sent to the end of the response; upgraded connections until they were there.")
	inFlightDesc = trafficDesc("requests_in_flight", "Requests to nodes whose response is not over, upgraded connections included.")
	retriesDesc  = trafficDesc("retries_total", "Requests that were sent to nodes after an earlier node had failed them.")
)

// ejectionsDesc is shown without the option metrics, too, with the labels "service" and
// "node" empty: there those count that are about no requests that are counted.
var ejectionsDesc = trafficDesc("ejections_total", "Ejections of nodes whose requests failed.")

// countEjection counts it where the requests to the node are counted.
func (s *stats) countEjection(e *discovery.Entry) {
	if s.counting.Load() == 0 || !s.tally.Eject(e) {
		s.ejections.Add(1)
	}
}

func describeTraffic(ch chan<- *prometheus.Desc) {
	ch <- requestsDesc
	ch <- durationDesc
	ch <- inFlightDesc
	ch <- retriesDesc
	ch <- ejectionsDesc
}

// collectTraffic shows what was counted of the registry, and then lets go of what is
// about nodes that are gone.
func (s *stats) collectTraffic(ch chan<- prometheus.Metric) {
	if s.counting.Load() == 0 {
		return
	}
	counts := s.tally.All()
	for _, c := range counts {
		labels := []string{s.name, c.Service, c.Node}
		for i, code := range traffic.Codes {
			if n := c.Code(i); n > 0 {
				ch <- prometheus.MustNewConstMetric(requestsDesc, total, float64(n), append(labels, code)...)
			}
		}
		upTo, count, sum := c.Durations()
		ch <- prometheus.MustNewConstHistogram(durationDesc, count, sum, upTo, labels...)
		ch <- prometheus.MustNewConstMetric(inFlightDesc, gauge, float64(c.InFlight()), labels...)
		ch <- prometheus.MustNewConstMetric(retriesDesc, total, float64(c.Retries()), labels...)
		if n := c.Ejections(); n > 0 {
			ch <- prometheus.MustNewConstMetric(ejectionsDesc, total, float64(n), labels...)
		}
	}
	s.tally.Sweep(counts)
}
