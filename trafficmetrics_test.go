package caddydiscovery

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// requestSeries returns the series of traffic, without their values where these are
// durations.
func requestSeries(t *testing.T) map[string]float64 {
	t.Helper()
	found := scrape(t)
	maps.DeleteFunc(found, func(name string, _ float64) bool {
		name, _, _ = strings.Cut(name, " ")
		return !slices.Contains([]string{"requests_total", "request_duration_seconds", "requests_in_flight", "retries_total"}, name)
	})
	return found
}

// counted waits until these series and no others are there.
func counted(t *testing.T, want map[string]float64) {
	t.Helper()
	var got map[string]float64
	defer func() {
		if t.Failed() {
			for _, name := range slices.Sorted(maps.Keys(got)) {
				if got[name] != want[name] {
					t.Logf("have %s: %v", name, got[name])
				}
			}
		}
	}()
	eventually(t, fmt.Sprint(want), func() bool {
		got = requestSeries(t)
		return maps.Equal(got, want)
	})
}

func countingSite(port, registry, metrics, rest string) string {
	return "http://127.0.0.1:" + port + " {\nreverse_proxy {\ndynamic discovery {\nregistry memory " + registry + " {\nloss_guard off\n}\n" + metrics + "\n}\n" + rest + "\n}\n}"
}

// TestRequestsAreCounted holds what is counted, by service and by node, over reloads that
// change nothing and that change how it is counted, and of two handlers.
func TestRequestsAreCounted(t *testing.T) {
	registry, m := newMemory(t)
	var once sync.Once
	release := make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/slow":
			<-release
		case "/404":
			http.NotFound(w, r)
		case "/reset":
			panic(http.ErrAbortHandler)
		}
		_, _ = io.WriteString(w, "a")
	}))
	t.Cleanup(slow.Close)
	t.Cleanup(func() { once.Do(func() { close(release) }) })
	list(t, m, "a", slow.URL, "service", "orders")
	port := freeport.String(t)
	url := "http://127.0.0.1:" + port
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	ask := func(url string) {
		for range 10 { // a reload may close a connection that it had just accepted
			if resp, err := client.Get(url); err == nil {
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				return
			}
		}
		t.Errorf("no answer to %s", url)
	}

	load(t, countingSite(port, registry, "", ""))
	ask(url)
	counted(t, map[string]float64{})

	load(t, countingSite(port, registry, "metrics node", ""))
	for _, path := range []string{"/", "/", "/404", "/reset"} {
		ask(url + path)
	}
	counted(t, map[string]float64{
		"requests_total 2xx a orders": 2, "requests_total 4xx a orders": 1, "requests_total error a orders": 1,
		"request_duration_seconds a orders": 4, "requests_in_flight a orders": 0, "retries_total a orders": 0,
	})

	// The same counts go on after a reload, by both handlers, and by another directory of
	// the same registry.
	other := freeport.String(t)
	load(t, countingSite(port, registry, "metrics node", "")+"\n"+strings.ReplaceAll(countingSite(other, registry, "metrics node", ""), "loss_guard off", "loss_guard off\nttl 1h"))
	ask(url)
	ask("http://127.0.0.1:" + other)
	go ask(url + "/slow")
	counted(t, map[string]float64{
		"requests_total 2xx a orders": 4, "requests_total 4xx a orders": 1, "requests_total error a orders": 1,
		"request_duration_seconds a orders": 6, "requests_in_flight a orders": 1, "retries_total a orders": 0,
	})

	// A node that left is there for as long as it has a request, and once more.
	m.Expire("a")
	eventually(t, "a is gone", func() bool { return scrape(t)["nodes up"] == 0 })
	if got := requestSeries(t); got["requests_in_flight a orders"] != 1 {
		t.Errorf("while it has a request, a node that left has %v", got)
	}
	once.Do(func() { close(release) })
	counted(t, map[string]float64{})

	// By service there is one series, whatever the nodes.
	list(t, m, "b", slow.URL, "service", "orders")
	list(t, m, "c", "http://127.0.0.1:"+freeport.String(t), "service", "orders")
	load(t, countingSite(port, registry, "metrics service", "lb_retries 3\nlb_policy round_robin"))
	eventually(t, "both are listed", func() bool { return scrape(t)["nodes up"] == 2 })
	ask(url)
	ask(url)
	got := requestSeries(t)
	if got["requests_total 2xx  orders"] != 2 || got["requests_total error  orders"] == 0 ||
		got["requests_total error  orders"] != got["retries_total  orders"] || len(got) != 5 {
		t.Errorf("by service there is %v", got)
	}
	load(t, countingSite(port, registry, "", ""))
	counted(t, map[string]float64{})
}

// TestEjectionsAreCountedByNode has them counted where requests are: by node, by service, or
// for the registry alone.
func TestEjectionsAreCountedByNode(t *testing.T) {
	for metrics, want := range map[string]string{"metrics node": "ejections_total a orders", "metrics service": "ejections_total  orders", "": "ejections_total  "} {
		t.Run(metrics, func(t *testing.T) {
			registry, m := newMemory(t)
			bad := newFlaky(t, "a")
			bad.status.Store(500)
			list(t, m, "a", bad.URL, "service", "orders")
			list(t, m, "b", newFlaky(t, "b").URL, "service", "orders")
			url := serveNodes(t, registry, metrics+"\noutlier {\nerrors 2\n}", "lb_policy round_robin")
			eventually(t, "the node is ejected", func() bool { get(t, url); return ejectedNodes(t) == "a" })
			values := scrape(t)
			if sum := values["ejections_total a orders"] + values["ejections_total  orders"] + values["ejections_total  "]; values[want] != 1 || sum != 1 {
				t.Errorf("%s is %v, and the sum of all %v, want 1", want, values[want], sum)
			}
		})
	}
}
