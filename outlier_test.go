package caddydiscovery

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// flaky is a service that answers with its id, and with another status while one is set.
type flaky struct {
	*httptest.Server
	status atomic.Int32
	served atomic.Int32
}

func newFlaky(t *testing.T, id string) *flaky {
	t.Helper()
	s := new(flaky)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		s.served.Add(1)
		switch status := s.status.Load(); status {
		case 0:
		case -1:
			panic(http.ErrAbortHandler)
		case -2:
			w.Header().Set("Content-Length", "10")
			_, _ = io.WriteString(w, "half")
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		case -3:
			w.Header().Set("Grpc-Status", "14")
		default:
			w.WriteHeader(int(status))
		}
		_, _ = io.WriteString(w, id)
	}))
	t.Cleanup(s.Close)
	return s
}

// ejected returns the ids of the ejected nodes of the source that runs.
func ejectedNodes(t *testing.T) string {
	t.Helper()
	u := runningSource(t)
	var ids []string
	for _, e := range u.directory.Snapshot().Nodes() {
		if u.outliers.Ejected(e) {
			ids = append(ids, e.Node.ID)
		}
	}
	return strings.Join(ids, " ")
}

// TestFailingNodesAreEjected has one node of three fail, in each way in which one can: it
// gets five requests and no more, whatever chooses.
func TestFailingNodesAreEjected(t *testing.T) {
	for _, test := range []struct {
		status        int32
		options, rest string
	}{
		{500, "", ""},
		{503, "", "lb_policy round_robin"},
		{599, "", "lb_policy least_conn"},
		{-1, "", "lb_policy first"},
		{-2, "", "lb_policy random_choose 2"},
		{-3, "", "lb_policy round_robin"},
		{500, "", "lb_policy least_load"},
		{500, "", "lb_policy least_latency"},
		{500, "", "lb_policy uri_hash"},
		{502, "pick 2", "lb_policy least_conn"},
		{500, "pick 1 hash {path}", "lb_policy first"},
		{500, "prefer zone eu", ""},
		{500, "subset 1\nproxy_id p", ""},
		{500, "", "lb_policy round_robin\nlb_retries 2\nfail_duration 10s"},
		{500, "", "lb_policy round_robin\nlb_retries 1\nlb_retry_match {\nexpression {rp.status_code} == 500\n}"},
	} {
		t.Run(strings.NewReplacer("{", "", "}", "", "\n", " ").Replace(fmt.Sprint(test.status, test.options, test.rest)), func(t *testing.T) {
			name, m := newMemory(t)
			bad := newFlaky(t, "a")
			bad.status.Store(test.status)
			list(t, m, "a", bad.URL, "zone", "eu")
			list(t, m, "b", newFlaky(t, "b").URL, "zone", "us")
			list(t, m, "c", newFlaky(t, "c").URL, "zone", "us")
			url := serveNodes(t, name, "outlier\n"+test.options, test.rest)
			client := &http.Client{Transport: &http.Transport{}}
			defer client.CloseIdleConnections()
			for i := range 100 {
				if resp, err := client.Get(fmt.Sprint(url, "/", i)); err == nil {
					_, _ = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			}
			if n := bad.served.Load(); n != 5 && (n != 0 || !strings.Contains(test.options, "subset")) {
				t.Errorf("the failing node got %d requests, want 5", n)
			}
			if got := ejectedNodes(t); got != "a" && !strings.Contains(test.options, "subset") {
				t.Errorf("ejected %q, want a", got)
			}
		})
	}
}

// TestWhatClientsCauseEjectsNobody has statuses that clients can bring about, and clients
// that give up.
func TestWhatClientsCauseEjectsNobody(t *testing.T) {
	name, m := newMemory(t)
	bad := newFlaky(t, "a")
	list(t, m, "a", bad.URL)
	list(t, m, "b", newFlaky(t, "b").URL)
	url := serveNodes(t, name, "outlier {\nerrors 2\nrate 50% 2 10s\n}", "lb_policy first")
	for _, status := range []int32{400, 404, 429, 499, 501, 505, 508} {
		bad.status.Store(status)
		for range 5 {
			if got, _ := get(t, url); got != int(status) {
				t.Fatalf("status %d, want %d", got, status)
			}
		}
	}
	slow := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	}))
	t.Cleanup(slow.Close)
	list(t, m, "a", slow.URL)
	eventually(t, "the node has moved", func() bool {
		return "http://"+runningSource(t).directory.Snapshot().Node("a").Address() == slow.URL
	})
	for range 5 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if resp, err := http.DefaultClient.Do(req); err == nil {
			resp.Body.Close()
			t.Error("answered")
		}
		cancel()
	}
	for range 5 { // while they send
		conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\nhalf")
		conn.Close()
	}
	eventually(t, "all are over", func() bool { return inFlight(runningSource(t).directory.Snapshot().Node("a")) == 0 })
	if got := ejectedNodes(t); got != "" {
		t.Errorf("ejected %q by what clients do", got)
	}
}

// TestEjectedNodesComeBack has a node fail, recover, and start slowly.
func TestEjectedNodesComeBack(t *testing.T) {
	name, m := newMemory(t)
	bad := newFlaky(t, "a")
	bad.status.Store(500)
	list(t, m, "a", bad.URL)
	list(t, m, "b", newFlaky(t, "b").URL)
	url := serveNodes(t, name, "outlier {\nerrors 3\neject 200ms\n}\nslow_start 1h", "lb_policy round_robin")
	eventually(t, "the node is ejected", func() bool { get(t, url); return ejectedNodes(t) == "a" })
	u := runningSource(t)
	e := u.directory.Snapshot().Node("a")
	if reason, unhealthy := u.standing(e); !unhealthy || !strings.HasPrefix(reason, "ejected until ") ||
		!strings.HasSuffix(reason, ", for the first time: 3 errors in a row, the last one: status 500") {
		t.Errorf("the admin API would say %q, unhealthy %v", reason, unhealthy)
	}
	if until := u.until(e); time.Until(until) > 200*time.Millisecond {
		t.Errorf("until %v", until)
	}
	if n := u.directory.stats.ejections.Load(); n == 0 {
		t.Error("no ejection counted")
	}
	bad.status.Store(0)
	eventually(t, "the node is back", func() bool { return ejectedNodes(t) == "" })
	if share := u.builder.Share(e); share < 0.1 || share > 0.11 {
		t.Errorf("a share of %v, want that of a new node", share)
	}
	if share := u.builder.Share(u.directory.Snapshot().Node("b")); share != 1 {
		t.Errorf("the other's share is %v, want all of it", share)
	}
	eventually(t, "it serves", func() bool { _, body := get(t, url); return body == "a" })
}

// TestEjectedNodesServeWhereNobodyElseCan has the others leave.
func TestEjectedNodesServeWhereNobodyElseCan(t *testing.T) {
	for _, options := range []string{"", "where zone eu", "where zone {query.zone}", "prefer zone eu", "health {\nuri /\ninterval 1h\nstatus 2xx\n}"} {
		t.Run(strings.NewReplacer("{", "", "}", "", "\n", " ").Replace("all "+options), func(t *testing.T) {
			name, m := newMemory(t)
			bad := newFlaky(t, "a")
			list(t, m, "a", bad.URL, "zone", "eu")
			if strings.Contains(options, "{query") {
				list(t, m, "b", service(t, "b").URL, "zone", "us") // it counts as one that could serve
			} else {
				list(t, m, "b", "http://"+at("b"), "zone", "eu", "state", "maintenance")
			}
			url := serveNodes(t, name, "outlier {\nerrors 1\nmax_ejected 100%\n}\n"+options, "") + "/?zone=eu"
			if status, body := get(t, url); body != "a" {
				t.Fatalf("status %d, %q", status, body)
			}
			bad.status.Store(500)
			get(t, url)
			if got := ejectedNodes(t); got != "a" {
				t.Fatalf("ejected %q, want a", got)
			}
			bad.status.Store(0)
			for range 5 {
				if status, body := get(t, url); body != "a" {
					t.Fatalf("status %d, %q, want the node that is ejected", status, body)
				}
			}
		})
	}
}

// TestEjectionsOutliveReloads has the same settings loaded again, and others.
func TestEjectionsOutliveReloads(t *testing.T) {
	name, m := newMemory(t)
	bad := newFlaky(t, "a")
	bad.status.Store(500)
	list(t, m, "a", bad.URL)
	list(t, m, "b", newFlaky(t, "b").URL)
	config := "http://127.0.0.1:" + freeport.String(t)
	url := config
	config += " {\nreverse_proxy {\nlb_policy %s\ndynamic discovery {\nregistry memory " + name + "\noutlier {\nerrors %d\n}\n}\n}\n}"
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	ask := func() { // whatever comes of it: a reload resets what it has not accepted
		if resp, err := client.Get(url); err == nil {
			resp.Body.Close()
		}
	}
	load(t, fmt.Sprintf(config, "round_robin", 2))
	eventually(t, "the node is ejected", func() bool { ask(); return ejectedNodes(t) == "a" })
	served := bad.served.Load()
	for range 3 {
		load(t, fmt.Sprintf(config, "random", 2))
		load(t, fmt.Sprintf(config, "least_conn", 2))
		if got := ejectedNodes(t); got != "a" {
			t.Errorf("ejected %q after a reload, want a", got)
		}
	}
	for range 20 {
		ask()
	}
	if n := bad.served.Load(); n != served {
		t.Errorf("it got %d requests more", n-served)
	}
	load(t, fmt.Sprintf(config, "round_robin", 3))
	if got := ejectedNodes(t); got != "" {
		t.Errorf("ejected %q by other settings, want nobody", got)
	}
	eventually(t, "it is ejected again", func() bool { ask(); return ejectedNodes(t) == "a" })
}

// TestEjectionsAreSeenByEachService has one route to all services, of which one has a
// single node: it is not ejected, and of the other's four two are.
func TestEjectionsAreSeenByEachService(t *testing.T) {
	name, m := newMemory(t)
	for _, id := range []string{"a0", "a1", "a2", "a3", "b0"} {
		s := newFlaky(t, id)
		s.status.Store(500)
		list(t, m, id, s.URL, discovery.KeyService, id[:1])
	}
	url := serveNodes(t, name, "service {query.service}\noutlier {\nerrors 2\n}", "")
	for range 50 {
		get(t, url+"/?service=a")
		get(t, url+"/?service=b")
	}
	if got := ejectedNodes(t); len(got) != 5 || strings.Contains(got, "b") {
		t.Errorf("ejected %q, want two nodes of a", got)
	}
}

// TestSessionsMoveFromEjectedNodes has a client whose node fails.
func TestSessionsMoveFromEjectedNodes(t *testing.T) {
	name, m := newMemory(t)
	nodes := make(map[string]*flaky)
	for _, id := range []string{"a", "b", "c"} {
		nodes[id] = newFlaky(t, id)
		list(t, m, id, nodes[id].URL)
	}
	url := serveNodes(t, name, "sticky\noutlier {\nerrors 2\n}", "")
	jar, _ := cookiejar.New(nil)
	client := &http.Client{Transport: &http.Transport{}, Jar: jar}
	defer client.CloseIdleConnections()
	ask := func() string {
		resp, err := client.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return string(body)
	}
	first := ask()
	for range 10 {
		if got := ask(); got != first {
			t.Fatalf("%q, want the node of the session, %q", got, first)
		}
	}
	nodes[first].status.Store(500)
	ask()
	ask()
	second := ask()
	if second == first || second == "" {
		t.Errorf("%q of an ejected node, want another one", second)
	}
	nodes[first].status.Store(0)
	for range 10 {
		if got := ask(); got != second {
			t.Errorf("%q, want the node to which the session has moved, %q", got, second)
		}
	}
}

func TestOutlierOptions(t *testing.T) {
	for _, test := range []struct{ lines, want string }{
		{"outlier", ""},
		{"outlier {\nerrors 3\nrate 50% 10 1m\neject 10s\nmax_ejected 20%\n}", ""},
		{"outlier {\nrate 50\n}", ""},
		{"outlier 5", "outlier"},
		{"outlier {\nerrors 0\n}", "invalid number \"0\", want 1 to 10000"},
		{"outlier {\nrate 0%\n}", "invalid percentage \"0%\", want 1% to 100%"},
		{"outlier {\nrate 50% 0\n}", "invalid number \"0\", want 1 to 100000"},
		{"outlier {\nrate 50% 20 2h\n}", "invalid window 2h0m0s, want 100ms to 1h0m0s"},
		{"outlier {\neject 1ms\n}", "invalid eject 1ms, want 100ms to 24h0m0s"},
		{"outlier {\nmax_ejected 101%\n}", "invalid percentage \"101%\", want 1% to 100%"},
		{"outlier {\nwhatever\n}", "whatever"},
		{"outlier\noutlier", "outlier"},
	} {
		_, err := tryAdapt(":80 {\nreverse_proxy {\ndynamic discovery {\nregistry memory x\n" + test.lines + "\n}\n}\n}")
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: %v, want %q", test.lines, err, test.want)
		}
	}
}

// TestEjectionsAreEvents has an event, a state and numbers tell of each.
func TestEjectionsAreEvents(t *testing.T) {
	resetEvents(t, nil)
	name, m := newMemory(t)
	bad := newFlaky(t, "a")
	bad.status.Store(500)
	list(t, m, "a", bad.URL)
	list(t, m, "b", newFlaky(t, "b").URL)
	port := freeport.String(t)
	eventConfig(t, name, port, `reverse_proxy /c {
		dynamic discovery {
			registry memory `+name+`
			outlier {
				errors 2
				eject 300ms
			}
		}
		lb_policy round_robin
	}`)
	url := "http://127.0.0.1:" + port + "/c"
	eventually(t, "it is unhealthy", func() bool { get(t, url); return slices.Contains(eventsSoFar(), "node_unhealthy a") })
	if values := scrape(t); values["ejections_total  "] != 1 || values["nodes_ejected"] != 1 || values["changes_total ejected"] != 1 {
		t.Errorf("counted %v ejections, %v ejected nodes, %v changes", values["ejections_total  "], values["nodes_ejected"], values["changes_total ejected"])
	}
	bad.status.Store(0)
	eventually(t, "it is healthy again", func() bool { return slices.Contains(eventsSoFar(), "node_healthy a") })
	if values := scrape(t); values["nodes_ejected"] != 0 {
		t.Errorf("%v nodes are ejected when it is back", values["nodes_ejected"])
	}
}
