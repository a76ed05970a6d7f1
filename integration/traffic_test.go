package integration

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// sumOf adds up the series of a metric that have all these labels.
func sumOf(metrics, name string, labels ...string) (sum float64, series int) {
	for line := range strings.Lines(metrics) {
		if !strings.HasPrefix(line, "caddy_discovery_"+name+"{") || slices.ContainsFunc(labels, func(l string) bool { return !strings.Contains(line, l) }) {
			continue
		}
		fields := strings.Fields(line)
		value, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		if err == nil {
			sum, series = sum+value, series+1
		}
	}
	return sum, series
}

// TestTrafficIsCounted has what clients sent add up to what is counted by node, over retries,
// a reload, and a node that leaves; the log tells where each request was, and the fleet is
// there for Prometheus.
func TestTrafficIsCounted(t *testing.T) {
	t.Parallel()
	onKVAndRedis(t, func(t *testing.T, r registry) {
		for i := range 3 {
			newAiling(t, r, fmt.Sprintf("orders-%d", i), "")
		}
		newAiling(t, r, "broken", "").status.Store(-1)
		port := freeport.String(t)
		config := func(policy string) string {
			return "http://127.0.0.1:" + port + " {\nlog\nlog_append tried {http.reverse_proxy.upstream.node.tried}\nreverse_proxy {\ndynamic discovery {\n" +
				r.block("ttl 1h") + "\nservice orders\nmetrics node\n}\nlb_policy " + policy + "\nlb_retries 3\n}\n}\n"
		}
		p := start(t, "", config("round_robin"))
		eventually(t, "all are listed", func() bool { return strings.Count(p.get("/discovery/nodes"), `"up"`) == 4 })
		sent := 0
		send := func(requests int) {
			t.Helper()
			for range requests {
				if body, err := ask("http://127.0.0.1:" + port); err != nil || !strings.HasPrefix(body, "orders-") {
					t.Fatalf("%q, %v, want a node that serves", body, err)
				}
				sent++
			}
			eventually(t, "what was sent is counted", func() bool {
				metrics := p.get("/metrics")
				requests, _ := sumOf(metrics, "requests_total", `service="orders"`)
				retries, _ := sumOf(metrics, "retries_total", `service="orders"`)
				inFlight, _ := sumOf(metrics, "requests_in_flight")
				served, _ := sumOf(metrics, "requests_total", `code="2xx"`)
				return int(requests-retries) == sent && int(served) == sent && inFlight == 0
			})
		}
		send(40)
		metrics := p.get("/metrics")
		failed, _ := sumOf(metrics, "requests_total", `code="error"`, `node="broken"`)
		if retries, _ := sumOf(metrics, "retries_total"); failed < 10 || retries != failed {
			t.Errorf("%v requests failed at a node that fails, and %v were retries, want as many and ten or more", failed, retries)
		}
		eventually(t, "the log tells where a request was", func() bool { return strings.Contains(p.log.String(), `"tried":"broken,orders-`) })

		p.reload("", config("least_conn"))
		send(40)

		targets := p.get("/discovery/sd?service=orders")
		if n := strings.Count(targets, `"targets"`); n != 4 || !strings.Contains(targets, `"broken"`) {
			t.Errorf("Prometheus is told of %d nodes, want 4: %s", n, targets)
		}
		if targets := p.get("/discovery/sd?service=pay"); strings.Contains(targets, `"targets"`) {
			t.Errorf("of a service without nodes it is told %s", targets)
		}

		r.remove("broken")
		eventually(t, "the series of a node that left are gone", func() bool {
			_, series := sumOf(p.get("/metrics"), "requests_in_flight", `node="broken"`)
			return series == 0
		})
		served, _ := sumOf(p.get("/metrics"), "requests_total", `code="2xx"`)
		if int(served) != sent {
			t.Errorf("%v requests are counted as served, want %d", served, sent)
		}
	})
}
