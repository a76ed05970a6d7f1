package caddydiscovery

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	dto "github.com/prometheus/client_model/go"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// series returns the names of all series that a running config exposes, and the
// values of each of their labels.
func series(t *testing.T) map[string]map[string][]string {
	t.Helper()
	ctx := caddy.ActiveContext()
	families, err := ctx.GetMetricsRegistry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]map[string][]string)
	for _, f := range families {
		names := []string{f.GetName()}
		if f.GetType() == dto.MetricType_HISTOGRAM {
			names = []string{f.GetName() + "_bucket", f.GetName() + "_sum", f.GetName() + "_count"}
		}
		for _, name := range names {
			if !strings.HasPrefix(name, "caddy_discovery_") {
				continue
			}
			labels := map[string][]string{"instance": nil} // Prometheus adds it
			if strings.HasSuffix(name, "_bucket") {
				labels["le"] = nil
			}
			for _, m := range f.GetMetric() {
				for _, l := range m.GetLabel() {
					labels[l.GetName()] = append(labels[l.GetName()], l.GetValue())
				}
			}
			found[name] = labels
		}
	}
	return found
}

var (
	selectorPattern = regexp.MustCompile(`(caddy_discovery_\w+)(?:\{([^}]*)\})?`)
	matcherPattern  = regexp.MustCompile(`(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"`)
	byPattern       = regexp.MustCompile(`by \(([^)]*)\)`)
)

// checkExpression checks that whatever a query names exists, and returns the series
// that it uses.
func checkExpression(t *testing.T, known map[string]map[string][]string, expression string) []string {
	t.Helper()
	var used []string
	for _, m := range selectorPattern.FindAllStringSubmatch(expression, -1) {
		labels, ok := known[m[1]]
		if !ok {
			t.Errorf("%s: there is no metric %s", expression, m[1])
			continue
		}
		used = append(used, m[1])
		for _, matcher := range matcherPattern.FindAllStringSubmatch(m[2], -1) {
			label, value := matcher[1], matcher[3]
			values, ok := labels[label]
			if !ok {
				t.Errorf("%s: %s has no label %s", expression, m[1], label)
			} else if label != "registry" && label != "instance" {
				for v := range strings.SplitSeq(value, "|") {
					if !slices.Contains(values, v) {
						t.Errorf("%s: the label %s of %s is never %q", expression, label, m[1], v)
					}
				}
			}
		}
	}
	for _, m := range byPattern.FindAllStringSubmatch(expression, -1) {
		for label := range strings.SplitSeq(m[1], ",") {
			if !slices.ContainsFunc(used, func(name string) bool { _, ok := known[name][strings.TrimSpace(label)]; return ok }) {
				t.Errorf("%s: nothing in it has the label %s", expression, label)
			}
		}
	}
	return used
}

// runEverything runs a config that exposes every metric.
func runEverything(t *testing.T) map[string]map[string][]string {
	t.Helper()
	name, m := newMemory(t)
	node := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/error" {
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(http.StatusInternalServerError)
	}))
	t.Cleanup(node.Close)
	list(t, m, "a", node.URL)
	port := freeport.String(t)
	load(t, `{
		registrar {
			registry memory `+name+`
			node_id edge-1
			endpoint http://127.0.0.1:`+port+`
			drain 0s
		}
	}
	http://127.0.0.1:`+port+` {
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+`
				metrics node
			}
		}
	}`)
	waitSynced(t)
	get(t, "http://127.0.0.1:"+port)
	get(t, "http://127.0.0.1:"+port+"/error")
	eventually(t, "the registrar counts", func() bool {
		_, ok := series(t)["caddy_discovery_heartbeats_total"]
		return ok
	})
	return series(t)
}

// TestGrafanaDashboard holds the dashboard of the examples to the real metrics.
func TestGrafanaDashboard(t *testing.T) {
	known := runEverything(t)
	data, err := os.ReadFile("examples/grafana/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct{ Definition string }
		}
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	used := make(map[string]bool)
	for _, p := range dashboard.Panels {
		if len(p.Targets) == 0 {
			t.Errorf("the panel %q shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			names := checkExpression(t, known, target.Expr)
			if len(names) == 0 {
				t.Errorf("the panel %q asks for nothing of ours: %s", p.Title, target.Expr)
			}
			for _, name := range names {
				used[name] = true
			}
		}
	}
	for _, v := range dashboard.Templating.List {
		checkExpression(t, known, v.Definition)
	}
	for name := range known {
		if base, ok := strings.CutSuffix(name, "_sum"); ok && used[base+"_bucket"] {
			continue
		}
		if base, ok := strings.CutSuffix(name, "_count"); ok && used[base+"_bucket"] {
			continue
		}
		if !used[name] {
			t.Errorf("no panel shows %s", name)
		}
	}
}

// TestAlertRules holds the alert rules of the examples to the real metrics, and has
// promtool check and try them.
func TestAlertRules(t *testing.T) {
	known := runEverything(t)
	data, err := os.ReadFile("examples/prometheus/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	rules := regexp.MustCompile(`(?ms)alert: (\w+)\n\s+expr: (.*?)\n\s+(?:for|labels):`).FindAllStringSubmatch(string(data), -1)
	if n := strings.Count(string(data), "- alert:"); n == 0 || len(rules) != n {
		t.Fatalf("read %d of %d rules", len(rules), n)
	}
	tests, err := os.ReadFile("examples/prometheus/alerts_test.yml")
	if err != nil {
		t.Fatal(err)
	}
	for _, rule := range rules {
		if len(checkExpression(t, known, rule[2])) == 0 {
			t.Errorf("%s asks for nothing of ours: %s", rule[1], rule[2])
		}
		if !strings.Contains(string(tests), rule[1]) {
			t.Errorf("%s is not tried", rule[1])
		}
	}
	for _, args := range []string{"check rules alerts.yml", "test rules alerts_test.yml"} {
		cmd := exec.Command("promtool", strings.Fields(args)...)
		cmd.Dir = "examples/prometheus"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", args, err, out)
		}
	}
	for name, labels := range known {
		for label, values := range labels {
			if len(values) > 100 {
				t.Errorf("%s has %d values of %s", name, len(values), label)
			}
		}
	}
}
