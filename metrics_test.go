package caddydiscovery

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	dto "github.com/prometheus/client_model/go"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// scrape returns the plugin's metrics of the running config: the values by name
// and labels other than the registry. Gathering fails on duplicates.
func scrape(t *testing.T) map[string]float64 {
	t.Helper()
	ctx := caddy.ActiveContext()
	families, err := ctx.GetMetricsRegistry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := make(map[string]float64)
	for _, f := range families {
		name, ours := strings.CutPrefix(f.GetName(), "caddy_discovery_")
		if !ours {
			continue
		}
		for _, m := range f.GetMetric() {
			key := name
			for _, l := range m.GetLabel() {
				if l.GetName() != "registry" {
					key += " " + l.GetValue()
				} else if l.GetValue() != "memory" {
					t.Errorf("%s is about registry %q", name, l.GetValue())
				}
			}
			switch f.GetType() {
			case dto.MetricType_HISTOGRAM:
				values[key] = float64(m.GetHistogram().GetSampleCount())
			case dto.MetricType_COUNTER:
				values[key] = m.GetCounter().GetValue()
			default:
				values[key] = m.GetGauge().GetValue()
			}
		}
	}
	return values
}

func TestMetrics(t *testing.T) {
	name, m := newMemory(t)
	a := service(t, "a")
	list(t, m, "a", a.URL, "service", "orders")
	list(t, m, "b", "10.0.0.3:80", "service", "pay", "state", "draining")
	m.Put("bad", []byte(`{"nodeId":"bad","endpoint":"http://10.0.0.1/x"}`))
	port := freeport.String(t)
	config := func(ttl string, more string) string {
		return `{
			registrar {
				registry memory ` + name + `
				node_id edge-1
				endpoint http://127.0.0.1:` + port + `
				heartbeat 20ms
				ttl 1m
				drain 0s
			}
		}
		http://127.0.0.1:` + port + ` {
			` + more + `
			reverse_proxy {
				dynamic discovery {
					registry memory ` + name + ` {
						ttl ` + ttl + `
					}
					service orders
				}
			}
		}`
	}
	load(t, config("30s", ""))
	waitSynced(t)
	if status, body := get(t, "http://127.0.0.1:"+port); status != http.StatusOK || body != "a" {
		t.Fatalf("%d %s", status, body)
	}
	eventually(t, "the proxy is listed", func() bool { return scrape(t)["nodes up"] == 2 })
	eventually(t, "a few heartbeats", func() bool { return scrape(t)["heartbeats_total ok"] > 3 })
	got := scrape(t)
	for metric, want := range map[string]float64{
		"registry_connected":              1,
		"registry_synced":                 1,
		"registry_stale_seconds":          0,
		"nodes up":                        2,
		"nodes draining":                  1,
		"nodes maintenance":               0,
		"nodes unhealthy":                 0,
		"nodes held":                      0,
		"nodes restored":                  0,
		"nodes rejected":                  1,
		"changes_total seen":              3,
		"changes_total left":              0,
		"changes_total rejected":          1,
		"rejected_records_total endpoint": 1,
		"rejected_records_total record":   0,
		"watch_restarts_total":            0,
		"lookups_total found":             1,
		"lookups_total none":              0,
		"heartbeats_total failed":         0,
		"health_checks_total passed":      0,
		"health_checks_total failed":      0,
		"propagation_seconds":             0,
	} {
		if v, ok := got[metric]; !ok || v != want {
			t.Errorf("%s: %v (%v), want %v", metric, v, ok, want)
		}
	}
	if got["snapshots_total"] == 0 {
		t.Error("no snapshot was counted")
	}

	// Reloads lose nothing and double nothing, even one that opens another
	// directory of the same registry.
	for i, ttl := range []string{"30s", "31s", "32s"} {
		load(t, config(ttl, fmt.Sprintf("respond /%d 204", i)))
		waitSynced(t)
		next := scrape(t)
		for metric, v := range got {
			if strings.Contains(metric, "_total") && next[metric] < v {
				t.Errorf("after reload %d %s fell from %v to %v", i, metric, v, next[metric])
			}
		}
		if i == 0 && next["changes_total seen"] != 3 {
			t.Errorf("a reload that changes nothing lets nodes be seen again: %v", next["changes_total seen"])
		}
		got = next
	}
	// Two directories of one name are one series.
	load(t, config("30s", "reverse_proxy /pay {\ndynamic discovery {\nregistry memory "+name+" {\nttl 40s\n}\n}\n}"))
	waitSynced(t)
	if n := len(runningDirectories()); n != 2 {
		t.Errorf("%d directories run, want 2", n)
	}
	scrape(t)

	m.Break()
	eventually(t, "the loss shows", func() bool {
		got = scrape(t)
		return got["registry_connected"] == 0 && got["registry_stale_seconds"] > 0 && got["watch_restarts_total"] > 0 && got["heartbeats_total failed"] > 0
	})
	m.Restore()

	load(t, `http://127.0.0.1:`+port)
	announcements.leaving.Wait()
	if n := len(statsInUse()); n != 0 {
		t.Errorf("%d registries are counted that nobody uses", n)
	}
}
