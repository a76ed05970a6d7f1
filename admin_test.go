package caddydiscovery

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// askAdmin calls an endpoint as Caddy's admin server does.
func askAdmin(tb testing.TB, method, target string) (int, []byte) {
	tb.Helper()
	r := httptest.NewRequest(method, target, nil)
	for _, route := range (Admin{}).Routes() {
		if route.Pattern != r.URL.Path {
			continue
		}
		w := httptest.NewRecorder()
		err := route.Handler.ServeHTTP(w, r)
		var apiErr caddy.APIError
		if errors.As(err, &apiErr) {
			return apiErr.HTTPStatus, []byte(apiErr.Error())
		} else if err != nil {
			tb.Fatal(err)
		}
		return w.Code, w.Body.Bytes()
	}
	tb.Fatalf("no route for %s", target)
	return 0, nil
}

// getAdmin decodes what an endpoint returns.
func getAdmin(tb testing.TB, target string) []map[string]any {
	tb.Helper()
	status, body := askAdmin(tb, http.MethodGet, target)
	if status != http.StatusOK {
		tb.Fatalf("%s: %d %s", target, status, body)
	}
	var elements []map[string]any
	if err := json.Unmarshal(body, &elements); err != nil {
		tb.Fatalf("%s: %v in %s", target, err, body)
	}
	return elements
}

func idsOf(elements []map[string]any) string {
	var ids []string
	for _, e := range elements {
		ids = append(ids, fmt.Sprint(e["id"]))
	}
	return strings.Join(ids, " ")
}

// waitSynced waits until the directories of the running config are synced.
func waitSynced(tb testing.TB) {
	tb.Helper()
	for _, d := range runningDirectories() {
		<-d.Synced()
	}
}

func TestAdminAPI(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "http://10.0.0.1:80", "service", "orders", "zone", "x")
	list(t, m, "b", "https://10.0.0.2:443", "service", "orders")
	list(t, m, "c", "10.0.0.3:80", "service", "pay", "state", "draining")
	list(t, m, "d", "10.0.0.4:80", "service", "orders", "weight", "0")
	m.Put("bad", []byte(`{"nodeId":"bad","endpoint":"http://10.0.0.1/<script>"}`))
	load(t, `:`+freeport.String(t)+` {
		reverse_proxy /a {
			dynamic discovery {
				registry memory `+name+`
				service orders
				where zone x
			}
		}
		reverse_proxy /b {
			dynamic discovery {
				registry memory `+name+`
				service {header.X-Service}
				where zone {header.X-Zone}
			}
		}
		reverse_proxy /c {
			dynamic discovery {
				registry memory `+name+`
				service {header.X-Service}
				where zone {header.X-Zone}
			}
		}
	}`)
	waitSynced(t)

	t.Run("registries", func(t *testing.T) {
		got := getAdmin(t, "/discovery/registries")
		if len(got) != 1 {
			t.Fatalf("got %v, want one registry for three sources", got)
		}
		r := got[0]
		want := []string{"backend", "connected", "last_error", "last_event", "nodes", "registry", "restored", "revision", "stale_for", "synced"}
		if fields := slices.Sorted(maps.Keys(r)); !slices.Equal(fields, want) {
			t.Errorf("fields %v, want %v", fields, want)
		}
		if r["backend"] != "memory" || r["connected"] != true || r["synced"] != true || r["nodes"] != 4.0 || r["stale_for"] != 0.0 || r["restored"] != false {
			t.Errorf("got %v", r)
		}
	})
	t.Run("nodes", func(t *testing.T) {
		got := getAdmin(t, "/discovery/nodes")
		if ids := idsOf(got); ids != "a b c d bad" {
			t.Fatalf("nodes %s", ids)
		}
		want := []string{"address", "endpoint", "id", "in_flight", "last_heard", "lease_left", "load", "metadata", "reason", "registry", "service", "sources", "state"}
		for _, n := range got {
			if n["state"] == "rejected" {
				n["in_flight"] = nil // nobody counts what goes to no node
			}
			if fields := slices.Sorted(maps.Keys(n)); !slices.Equal(fields, want) {
				t.Errorf("fields %v, want %v", fields, want)
			}
		}
		for id, ids := range map[string]string{"b": "b", "bad": "bad", "nobody": ""} {
			if got := idsOf(getAdmin(t, "/discovery/nodes?id="+id)); got != ids {
				t.Errorf("of %s there is %q, want %q", id, got, ids)
			}
		}
		a := got[0]
		if a["endpoint"] != "http://10.0.0.1:80" || a["address"] != "10.0.0.1:80" || a["service"] != "orders" || a["state"] != "up" {
			t.Errorf("got %v", a)
		}
		if left := a["lease_left"].(float64); left <= 0 || left > 30 {
			t.Errorf("lease_left %v, want up to 30 seconds", left)
		}
		if _, err := time.Parse(time.RFC3339Nano, a["last_heard"].(string)); err != nil {
			t.Error(err)
		}
		for i, want := range []string{
			"service orders, where zone x: true , service {http.request.header.X-Service}, where zone {http.request.header.X-Zone}: true , service {http.request.header.X-Service}, where zone {http.request.header.X-Zone} #2: true ",
			"service orders, where zone x: false scheme, service {http.request.header.X-Service}, where zone {http.request.header.X-Zone}: false scheme, service {http.request.header.X-Service}, where zone {http.request.header.X-Zone} #2: false scheme",
			"service orders, where zone x: false service, service {http.request.header.X-Service}, where zone {http.request.header.X-Zone}: false draining, service {http.request.header.X-Service}, where zone {http.request.header.X-Zone} #2: false draining",
			"service orders, where zone x: false weight 0, service {http.request.header.X-Service}, where zone {http.request.header.X-Zone}: false weight 0, service {http.request.header.X-Service}, where zone {http.request.header.X-Zone} #2: false weight 0",
			"",
		} {
			var standings []string
			for _, s := range got[i]["sources"].([]any) {
				s := s.(map[string]any)
				standings = append(standings, fmt.Sprintf("%v: %v %v", s["source"], s["eligible"], s["reason"]))
			}
			if s := strings.Join(standings, ", "); s != want {
				t.Errorf("node %v: sources %q, want %q", got[i]["id"], s, want)
			}
		}
		bad := got[4]
		if bad["state"] != "rejected" || !strings.Contains(bad["reason"].(string), "a path is not accepted") {
			t.Errorf("a rejected record is shown as %v", bad)
		}
		for query, want := range map[string]string{
			"?service=orders":                "a b d",
			"?state=draining":                "c",
			"?state=rejected":                "bad",
			"?state=up&service=pay":          "",
			"?registry=memory&service=pay":   "c",
			"?registry=another":              "",
			"?state=up":                      "a b d",
			"?service=%3Cscript%3E&state=up": "",
		} {
			if ids := idsOf(getAdmin(t, "/discovery/nodes"+query)); ids != want {
				t.Errorf("%s: nodes %q, want %q", query, ids, want)
			}
		}
	})
	t.Run("journal", func(t *testing.T) {
		list(t, m, "a", "http://10.0.0.9:80", "service", "orders", "zone", "x")
		eventually(t, "the change is in the journal", func() bool {
			return getAdmin(t, "/discovery/journal?limit=1")[0]["type"] == "updated"
		})
		got := getAdmin(t, "/discovery/journal")
		if ids := idsOf(got); ids != "a d c b a bad" {
			t.Errorf("the journal is about %s, want the newest first", ids)
		}
		want := []string{"id", "reason", "registry", "time", "type"}
		if fields := slices.Sorted(maps.Keys(got[0])); !slices.Equal(fields, want) {
			t.Errorf("fields %v, want %v", fields, want)
		}
		if got[0]["reason"] != "endpoint http://10.0.0.1:80 → http://10.0.0.9:80" {
			t.Errorf("reason %q", got[0]["reason"])
		}
		if ids := idsOf(getAdmin(t, "/discovery/journal?id=a")); ids != "a a" {
			t.Errorf("of a it tells %q", ids)
		}
	})
	t.Run("mistakes", func(t *testing.T) {
		for target, want := range map[string]string{
			"/discovery/nodes?state=broken": "want one of up, draining, maintenance, unhealthy, held, restored, rejected",
			"/discovery/journal?limit=0":    "want 1 or more",
			"/discovery/journal?limit=x":    "want 1 or more",
		} {
			if status, body := askAdmin(t, http.MethodGet, target); status != 400 || !strings.Contains(string(body), want) {
				t.Errorf("%s: %d %s", target, status, body)
			}
		}
		for _, route := range (Admin{}).Routes() {
			if status, _ := askAdmin(t, http.MethodPost, route.Pattern); status != http.StatusMethodNotAllowed {
				t.Errorf("POST %s: %d", route.Pattern, status)
			}
		}
	})
	t.Run("an outage", func(t *testing.T) {
		m.Break()
		defer m.Restore()
		eventually(t, "the loss shows", func() bool {
			r := getAdmin(t, "/discovery/registries")[0]
			return r["connected"] == false && r["last_error"] != "" && r["stale_for"].(float64) > 0
		})
		if n := len(getAdmin(t, "/discovery/nodes")); n != 5 {
			t.Errorf("%d nodes during the outage, want all 5", n)
		}
	})
}

// A config that does not run, or runs no more, is not shown.
func TestAdminShowsRunningConfigsOnly(t *testing.T) {
	name, _ := newMemory(t)
	site := `:` + freeport.String(t) + ` {
		reverse_proxy {
			dynamic discovery {
				registry memory ` + name + `
			}
		}
	}`
	if err := validate(site); err != nil {
		t.Fatal(err)
	}
	if status, body := askAdmin(t, http.MethodGet, "/discovery/registries"); string(body) != "[]\n" {
		t.Errorf("after a validation: %d %q", status, body)
	}
	load(t, site)
	load(t, site+"\n# reloaded")
	runningSource(t) // one, after a reload
	load(t, `:`+freeport.String(t))
	for _, path := range []string{"/discovery/registries", "/discovery/nodes", "/discovery/journal"} {
		if _, body := askAdmin(t, http.MethodGet, path); string(body) != "[]\n" {
			t.Errorf("%s without a source: %q", path, body)
		}
	}
}

// fleet runs a config with one source over n nodes.
func fleet(tb testing.TB, n int) {
	tb.Helper()
	name, m := newMemory(tb)
	for i := range n {
		list(tb, m, fmt.Sprintf("orders-%05d", i), fmt.Sprintf("http://10.%d.%d.%d:5001", i>>16, i>>8&0xff, i&0xff),
			discovery.KeyService, fmt.Sprintf("service-%d", i%20), discovery.KeyZone, "eu-1", discovery.KeyVersion, "1.2.3")
	}
	u := source(tb, "registry memory "+name+"\nservice service-1")
	u.directory.join(u)
}

func BenchmarkAdmin(b *testing.B) {
	fleet(b, 10_000)
	for _, path := range []string{"registries", "nodes", "journal"} {
		b.Run(path+"/nodes=10000", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, body := askAdmin(b, http.MethodGet, "/discovery/"+path)
				b.SetBytes(int64(len(body)))
			}
		})
	}
}
