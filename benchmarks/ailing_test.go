package benchmarks

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

const (
	ailingNodes  = 5
	ailingRounds = 3
	// How long a healthy node takes, and how much longer one takes that is slow.
	ailingWork  = 2 * time.Millisecond
	ailingDelay = 200 * time.Millisecond
	// A turn: all are healthy; one has become ill, and is to be noticed; what is measured.
	ailingHealthy, ailingNotice, ailingMeasured = time.Second, 2 * time.Second, 4 * time.Second
)

// ailing are nodes of which the first may be ill.
type ailing struct {
	addresses []string
	ill       atomic.Bool
	served    atomic.Int64 // by the first
}

func newAiling(b *testing.B, slow bool) *ailing {
	b.Helper()
	f := new(ailing)
	for i := range ailingNodes {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			work := ailingWork
			if i == 0 {
				f.served.Add(1)
				switch {
				case !f.ill.Load():
				case slow:
					work += ailingDelay
				default:
					http.Error(w, "ill", http.StatusInternalServerError)
					return
				}
			}
			time.Sleep(work)
			_, _ = w.Write([]byte("ok"))
		})}
		go func() { _ = server.Serve(l) }()
		b.Cleanup(func() { _ = server.Close() })
		f.addresses = append(f.addresses, l.Addr().String())
	}
	return f
}

// A guard is a proxy and what it does about a node that is ill.
type guard struct {
	name  string
	what  string // in the words of its configuration
	start func(b *testing.B, port string, f *ailing)
}

// guards are those that are compared, before a node that fails or one that is slow.
func guards(slow bool) []guard {
	static := func(rest string) func(*testing.B, string, *ailing) {
		return func(b *testing.B, port string, f *ailing) {
			runCaddy(b, "http://127.0.0.1:"+port+" {\nreverse_proxy "+strings.Join(f.addresses, " ")+" {\nlb_policy least_conn\n"+rest+"\n}\n}\n")
		}
	}
	discovered := func(options, rest string) func(*testing.B, string, *ailing) {
		return func(b *testing.B, port string, f *ailing) {
			server := natstest.Start(b)
			bucket := server.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 1, Storage: jetstream.FileStorage})
			for i, address := range f.addresses {
				record := fmt.Sprintf(`{"nodeId":"n%d","endpoint":"http://%s","load":0,"metadata":{"lease":"1h"}}`, i, address)
				if _, err := bucket.PutString(context.Background(), fmt.Sprintf("node.n%d", i), record); err != nil {
					b.Fatal(err)
				}
			}
			runCaddy(b, "http://127.0.0.1:"+port+" {\nreverse_proxy {\ndynamic discovery "+server.URL()+" {\n"+options+"\n}\n"+rest+"\n}\n}\n")
		}
	}
	if slow {
		return []guard{
			{"discovered, least_latency", "`lb_policy least_latency`", discovered("", "lb_policy least_latency")},
			{"discovered, least_conn", "`lb_policy least_conn`", discovered("", "lb_policy least_conn")},
			{"static, least_conn", "`lb_policy least_conn`", static("")},
			{"nginx", "`least_conn`", nginxGuard("", "")},
			{"HAProxy", "`balance leastconn`", haproxyGuard("")},
		}
	}
	const onStatus = "lb_retries 1\nlb_retry_match {\nexpression {rp.status_code} == 500\n}"
	return []guard{
		{"discovered, outlier", "`outlier`, `lb_policy least_conn`", discovered("outlier", "lb_policy least_conn")},
		{"discovered, outlier, retry", "the same, and one retry of what answers 500", discovered("outlier", "lb_policy least_conn\n"+onStatus)},
		{"static, passive checks", "`fail_duration 30s`, `max_fails 5`, `unhealthy_status 5xx`, `lb_policy least_conn`", static("fail_duration 30s\nmax_fails 5\nunhealthy_status 5xx")},
		{"static, least_conn", "`lb_policy least_conn`", static("")},
		{"nginx", "`least_conn`, `max_fails=5 fail_timeout=30s`, `proxy_next_upstream error timeout http_500`", nginxGuard(" max_fails=5 fail_timeout=30s", "proxy_next_upstream error timeout http_500;")},
		{"HAProxy", "`balance leastconn`, `check inter 30s observe layer7 error-limit 5 on-error mark-down`", haproxyGuard(" check inter 30s observe layer7 error-limit 5 on-error mark-down")},
	}
}

func nginxGuard(server, location string) func(*testing.B, string, *ailing) {
	return func(b *testing.B, port string, f *ailing) {
		dir := b.TempDir()
		var servers strings.Builder
		for _, address := range f.addresses {
			fmt.Fprintf(&servers, "\t\tserver %s%s;\n", address, server)
		}
		config := fmt.Sprintf(`daemon off;
pid %[1]s/pid;
worker_processes 1;
events { worker_connections 4096; }
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	keepalive_requests 1000000000;
	upstream fleet {
		least_conn;
%[2]s		keepalive 64;
		keepalive_requests 1000000000;
	}
	server {
		listen 127.0.0.1:%[3]s;
		location / {
			proxy_pass http://fleet;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			%[4]s
		}
	}
}
`, dir, &servers, port, location)
		file := filepath.Join(dir, "nginx.conf")
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			b.Fatal(err)
		}
		cmd := exec.Command(lookPath(b, "nginx"), "-p", dir, "-e", "stderr", "-c", file)
		startProgram(b, cmd, syscall.SIGTERM)
	}
}

func haproxyGuard(server string) func(*testing.B, string, *ailing) {
	return func(b *testing.B, port string, f *ailing) {
		var servers strings.Builder
		for i, address := range f.addresses {
			fmt.Fprintf(&servers, "\tserver n%d %s%s\n", i, address, server)
		}
		config := fmt.Sprintf(`defaults
	mode http
	timeout connect 10s
	timeout client 10m
	timeout server 10m
	http-reuse always
frontend edge
	bind 127.0.0.1:%s
	default_backend fleet
backend fleet
	balance leastconn
%s`, port, &servers)
		file := filepath.Join(b.TempDir(), "haproxy.cfg")
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			b.Fatal(err)
		}
		startProgram(b, exec.Command(lookPath(b, "haproxy"), "-db", "-f", file), syscall.SIGKILL)
	}
}

// illness is what was measured once a node was ill.
type illness struct {
	early, requests, served, failed int64 // failed before what is measured; and in it: all, by the node, failed
	p50, p99, healthy99             time.Duration
}

// suffer has the workers ask a proxy while a node becomes ill.
func (f *ailing) suffer(b *testing.B, address string) illness {
	b.Helper()
	awaitServer(b, address).Close()
	var phase atomic.Int32 // 0: healthy, 1: to be noticed, 2: measured, 3: over
	var early, failed atomic.Int64
	times := make([][3][]time.Duration, workers)
	var group sync.WaitGroup
	for i := range times {
		c := dial(b, address)
		group.Go(func() {
			defer c.Close()
			for {
				p := phase.Load()
				if p == 3 {
					return
				}
				began := time.Now()
				status := c.get(b, "")
				if status == 0 {
					return
				}
				times[i][p] = append(times[i][p], time.Since(began))
				if status != 200 {
					switch p {
					case 1:
						early.Add(1)
					case 2:
						failed.Add(1)
					}
				}
			}
		})
	}
	time.Sleep(ailingHealthy)
	f.ill.Store(true)
	phase.Store(1)
	time.Sleep(ailingNotice)
	before := f.served.Load()
	phase.Store(2)
	time.Sleep(ailingMeasured)
	served := f.served.Load() - before
	phase.Store(3)
	group.Wait()
	var healthy, all []time.Duration
	for i := range times {
		healthy, all = append(healthy, times[i][0]...), append(all, times[i][2]...)
	}
	if len(all) == 0 || len(healthy) == 0 {
		b.Fatal("no request was answered")
	}
	return illness{early: early.Load(), requests: int64(len(all)), served: served, failed: failed.Load(),
		p50: percentile(all, 50), p99: percentile(all, 99), healthy99: percentile(healthy, 99)}
}

// BenchmarkAilingNode compares what becomes of requests to five nodes of which one answers
// 500 at once, or takes 200 ms longer than the others' 2 ms: through discovered nodes,
// static upstreams, nginx and HAProxy, one after the other, in several rounds, each time
// with a proxy that has just been started. With -report it writes the tables.
func BenchmarkAilingNode(b *testing.B) {
	var sections strings.Builder
	for _, slow := range []bool{false, true} {
		all := guards(slow)
		seen := make([][]illness, len(all))
		for round := range ailingRounds {
			for i, g := range all {
				b.Run(fmt.Sprintf("slow=%v/%d/%s", slow, round, g.name), func(b *testing.B) {
					f, port := newAiling(b, slow), freeport.String(b)
					g.start(b, port, f)
					x := f.suffer(b, "127.0.0.1:"+port)
					seen[i] = append(seen[i], x)
					b.ReportMetric(100*float64(x.served)/float64(x.requests), "%-of-the-bad-node")
				})
			}
		}
		sections.WriteString(ailingTable(slow, all, seen))
	}
	if *report == "" || b.Failed() {
		return
	}
	section := beginAiling + "\n## One node of five is ill\n\n`make bench-failing`, one run on " + hardware() + ", " + proxyVersions() + ".\n\n" +
		fmt.Sprintf("Five nodes that take %v for a request, and %d connections that ask without a pause. After %v one node falls ill; %v later %v are measured. "+
			"Medians of %d rounds, in each of which the proxies took turns, started anew. *Failed before* are the requests that failed in the %[4]v before, until the proxy had noticed. "+
			"Load, nodes and proxy share the machine. "+howToRead+"\n\n", ailingWork, workers, ailingHealthy, ailingNotice, ailingMeasured, ailingRounds) +
		sections.String() + endAiling + "\n"
	if err := writeSection(*report, section, beginAiling, endAiling); err != nil {
		b.Fatal(err)
	}
}

const howToRead = "A node that answers 500 at once has the fewest requests in flight, so that `least_conn` alone gives it half of them. Caddy's passive checks, nginx and HAProxy stop that as well where they are told to, for one handler or server list and for a fixed time. nginx and HAProxy take less of the two cores for a request than Caddy, which is what their lower p50 is."

const (
	beginAiling = "<!-- make bench-failing: begin -->"
	endAiling   = "<!-- make bench-failing: end -->"
)

func ailingTable(slow bool, all []guard, seen [][]illness) string {
	var s strings.Builder
	if slow {
		fmt.Fprintf(&s, "**It takes %v longer.**", ailingDelay)
	} else {
		s.WriteString("**It answers 500 at once.**")
	}
	s.WriteString("\n\n| proxy | settings | share of the node | failed | failed before | p50 | p99 | p99 while healthy |\n|---|---|--:|--:|--:|--:|--:|--:|\n")
	for i, g := range all {
		of := func(value func(illness) float64) float64 {
			var values []float64
			for _, x := range seen[i] {
				values = append(values, value(x))
			}
			return median(values)
		}
		milli := func(value func(illness) time.Duration) string {
			return fmt.Sprintf("%.1f ms", of(func(x illness) float64 { return value(x).Seconds() * 1e3 }))
		}
		fmt.Fprintf(&s, "| %s | %s | %.2f %% | %.2f %% | %.0f | %s | %s | %s |\n", g.name, g.what,
			of(func(x illness) float64 { return 100 * float64(x.served) / float64(x.requests) }),
			of(func(x illness) float64 { return 100 * float64(x.failed) / float64(x.requests) }),
			of(func(x illness) float64 { return float64(x.early) }),
			milli(func(x illness) time.Duration { return x.p50 }), milli(func(x illness) time.Duration { return x.p99 }),
			milli(func(x illness) time.Duration { return x.healthy99 }))
	}
	s.WriteString("\n")
	return s.String()
}
