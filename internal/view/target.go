package view

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Target is a node as Prometheus expects it of an HTTP service discovery
// (https://prometheus.io/docs/prometheus/latest/http_sd/).
type Target struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

// metaLabel begins labels that Prometheus shows to its relabel rules and then drops.
const metaLabel = "__meta_discovery_"

// maxLabels bounds the bytes that a record makes of labels: Prometheus reads them for all
// nodes each minute, and records may have 64 KiB of metadata.
const maxLabels = 4 << 10

// OfTarget shows a node as a target. One that is taken out of service is a target as well,
// with its state: it runs, and wants to be watched.
func OfTarget(registry string, e *discovery.Entry) Target {
	n := &e.Node
	labels := map[string]string{
		metaLabel + "registry": registry,
		metaLabel + "id":       n.ID,
		metaLabel + "state":    string(e.State()),
		metaLabel + "scheme":   n.Endpoint.Scheme,
		metaLabel + "weight":   strconv.FormatFloat(e.Weight(), 'g', -1, 64),
	}
	room := maxLabels
	add := func(name, value string) {
		if _, taken := labels[name]; taken || len(name)+len(value) > room {
			return // such as of "a.b" beside "a-b"
		}
		room -= len(name) + len(value)
		labels[name] = value
	}
	add(metaLabel+"service", n.Service())
	for _, key := range slices.Sorted(maps.Keys(n.Metadata)) {
		add(metaLabel+"metadata_"+labelName(key), n.Metadata[key])
	}
	return Target{Targets: []string{n.Endpoint.Address()}, Labels: labels}
}

// labelName makes of a metadata key what a label may be called, as Prometheus does itself
// with those of Kubernetes.
func labelName(key string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, key)
}
