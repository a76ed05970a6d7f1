package caddydiscovery

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// TestTargetsForPrometheus holds the fleet to what Prometheus expects of an HTTP service
// discovery, and has promtool discover it.
func TestTargetsForPrometheus(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "https://10.0.0.1", "service", "orders", "zone", "eu-1", "a.b", "dot", "a-b", "dash", "städte", "x", "long", strings.Repeat("l", 5000))
	list(t, m, "b", "[2001:db8::1]:81", "service", "pay", "state", "draining", "weight", "0.5")
	load(t, ":"+freeport.String(t)+" {\nreverse_proxy {\ndynamic discovery {\nregistry memory "+name+"\n}\n}\n}")
	waitSynced(t)

	_, data := askAdmin(t, http.MethodGet, "/discovery/sd")
	var got []struct {
		Targets []string
		Labels  map[string]string
	}
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	const l = "__meta_discovery_"
	want := []map[string]string{
		{l + "registry": "memory", l + "id": "a", l + "service": "orders", l + "state": "up", l + "scheme": "https", l + "weight": "1",
			l + "metadata_a_b": "dash", l + "metadata_zone": "eu-1", l + "metadata_st_dte": "x", l + "metadata_service": "orders"},
		{l + "registry": "memory", l + "id": "b", l + "service": "pay", l + "state": "draining", l + "scheme": "", l + "weight": "0.5",
			l + "metadata_service": "pay", l + "metadata_state": "draining", l + "metadata_weight": "0.5"},
	}
	if len(got) != 2 || !reflect.DeepEqual(got[0].Labels, want[0]) || !reflect.DeepEqual(got[1].Labels, want[1]) {
		t.Errorf("labels %v, want %v", got, want)
	}
	if targets := fmt.Sprint(got[0].Targets, got[1].Targets); targets != "[10.0.0.1:443] [[2001:db8::1]:81]" {
		t.Errorf("targets %s", targets)
	}
	if _, data := askAdmin(t, http.MethodGet, "/discovery/sd?service=pay"); !strings.Contains(string(data), "db8") || strings.Contains(string(data), "10.0.0.1") {
		t.Errorf("of one service there is %s", data)
	}
	if _, data := askAdmin(t, http.MethodGet, "/discovery/sd?service=none"); strings.TrimSpace(string(data)) != "[]" {
		t.Errorf("of no service there is %s", data)
	}

	admin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, route := range (Admin{}).Routes() {
			if route.Pattern == r.URL.Path {
				_ = route.Handler.ServeHTTP(w, r)
			}
		}
	}))
	t.Cleanup(admin.Close)
	config := filepath.Join(t.TempDir(), "prometheus.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, "scrape_configs:\n- job_name: fleet\n  http_sd_configs:\n  - url: %s/discovery/sd\n"+
		"  relabel_configs:\n  - source_labels: [__meta_discovery_id]\n    target_label: node\n  - source_labels: [__meta_discovery_scheme]\n    regex: (.+)\n    target_label: __scheme__\n",
		admin.URL), 0o600); err != nil {
		t.Fatal(err)
	}
	found, err := exec.Command("promtool", "check", "service-discovery", "--timeout", "1s", config, "fleet").CombinedOutput()
	if err != nil || !strings.Contains(string(found), `"node": "a"`) || !strings.Contains(string(found), `"node": "b"`) || !strings.Contains(string(found), `"__address__": "10.0.0.1:443"`) {
		t.Errorf("Prometheus finds %s, %v", found, err)
	}
}
