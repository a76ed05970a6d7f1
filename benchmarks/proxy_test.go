package benchmarks

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

var (
	rounds = flag.Int("rounds", 5, "turns that each proxy of BenchmarkProxy gets")
	only   = flag.String("only", "", "a regexp: which proxies BenchmarkProxy runs, without a report. Default: all")
)

// Where a proxy has its upstreams from, and which of them a request may go to.
const (
	sourceStatic  = "static"
	sourceAgain   = "static, once more"
	sourceA       = "`dynamic a`"
	sourceAll     = "discovery"
	sourceShared  = "discovery, on ten addresses"
	sourcePick    = "discovery, `pick 2`"
	sourceSubset  = "discovery, `subset 100`, `pick 2`"
	sourceNginx   = "nginx"
	sourceHAProxy = "HAProxy"
)

const (
	subset = 100
	shared = 10 // addresses of the nodes of sourceShared
)

// The policies, and the sizes of fleets.
const (
	random     = "random"
	roundRobin = "round_robin"
	leastConn  = "least_conn"
	hashing    = "header X-Service" // of which there are many values
)

var (
	policies   = []string{random, roundRobin, leastConn, hashing}
	proxySizes = []int{10, 100, 1_000, 10_000}
)

// A variant is one proxy in front of one fleet.
type variant struct {
	source, policy string
	nodes          int
}

// variants are those that say something, the ones that are compared with each
// other next to each other.
func variants() []variant {
	var all []variant
	for _, policy := range policies {
		for _, n := range proxySizes {
			if n == 100 && policy != random {
				continue // the charts are of random
			}
			all = append(all, variant{sourceStatic, policy, n})
			if n == 10 && policy == random {
				all = append(all, variant{sourceAgain, policy, n})
			}
			if n <= maxAnswer && (policy == random || n == 10) {
				all = append(all, variant{sourceA, policy, n})
			}
			all = append(all, variant{sourceAll, policy, n})
			if n > 100 {
				all = append(all, variant{sourceShared, policy, n})
			}
			if n > 100 && (policy == random || policy == leastConn) {
				all = append(all, variant{sourcePick, policy, n})
			}
			if n == 10_000 && policy == leastConn {
				all = append(all, variant{sourceSubset, policy, n})
			}
			if n == 10 && policy == roundRobin {
				all = append(all, variant{sourceNginx, policy, n}, variant{sourceHAProxy, policy, n})
			}
		}
	}
	wanted := regexp.MustCompile(*only)
	return slices.DeleteFunc(all, func(v variant) bool { return !wanted.MatchString(v.String()) })
}

// reach is how many nodes the proxy connects to.
func (v variant) reach() int {
	switch v.source {
	case sourceSubset:
		return subset
	case sourceShared:
		return shared
	}
	return v.nodes
}

func (v variant) String() string {
	return fmt.Sprintf("%s, %s, %s nodes", v.source, v.policy, humanize.Comma(int64(v.nodes)))
}

// standing is a proxy that runs, and what was measured of it.
type standing struct {
	variant
	address string
	program *program
	fresh   int64 // memory after the first request, in bytes
	turns   []turn
}

// surroundings are what all proxies work with.
type surroundings struct {
	port   int            // of the nodes
	dns    string         // where names are answered
	fleets map[int]*fleet // by size
	shared map[int]*fleet // those on few addresses
}

// start runs the proxy of a variant, and has it answer one request.
func (v variant) start(b *testing.B, s surroundings) *standing {
	b.Helper()
	port := freeport.String(b)
	running := &standing{variant: v, address: "127.0.0.1:" + port}
	switch v.source {
	case sourceNginx:
		running.program = startNginx(b, port, v.nodes, s.port)
	case sourceHAProxy:
		running.program = startHAProxy(b, port, v.nodes, s.port)
	default:
		running.program = startCaddy(b, "127.0.0.1:"+freeport.String(b), fmt.Sprintf(
			"http://127.0.0.1:%s {\nreverse_proxy %s\nlb_policy %s\ntransport http {\nkeepalive %s\n}\n}\n}\n",
			port, v.upstreams(s), v.policy, keepalive))
	}
	c := awaitServer(b, running.address)
	defer c.Close()
	for began, status := time.Now(), 0; status != 200; { // a fleet that is listed late is answered with 503
		if status = c.get(b, ""); status != 200 && time.Since(began) > time.Minute {
			b.Fatalf("%v: status %d", v, status)
		}
	}
	if v.source == sourceNginx {
		running.program.adopt(b)
	}
	running.fresh = running.program.memory(b)
	return running
}

// keepalive is how long connections to nodes stay open. It is more than two turns
// are apart, so that none of the proxies dials in each of them.
const keepalive = "10m"

// upstreams returns what the Caddyfile says up to the policy.
func (v variant) upstreams(s surroundings) string {
	fleet := s.fleets[v.nodes]
	if v.source == sourceShared {
		fleet = s.shared[v.nodes]
	}
	discovery := func(more string) string {
		return "{\ndynamic discovery " + fleet.url + " {\nservice orders\n" + more + "}"
	}
	switch v.source {
	case sourceA:
		return fmt.Sprintf("{\ndynamic a {\nname %d.fleet.test\nport %d\nrefresh %s\nresolvers tcp/%s\nversions ipv4\n}", v.nodes, s.port, keepalive, s.dns)
	case sourceAll, sourceShared:
		return discovery("")
	case sourcePick:
		return discovery("pick 2\n")
	case sourceSubset:
		return discovery(fmt.Sprintf("pick 2\nsubset %d\n", subset))
	default:
		return static(v.nodes, s.port) + " {"
	}
}

func startNginx(b *testing.B, port string, nodes, nodePort int) *program {
	b.Helper()
	dir := b.TempDir()
	file := filepath.Join(dir, "nginx.conf")
	config := fmt.Sprintf(`daemon off;
pid %[1]s/pid;
worker_processes auto;
events { worker_connections 4096; }
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	keepalive_requests 1000000000;
	keepalive_timeout %[2]s;
	upstream fleet {
		server %[3]s;
		keepalive 64;
		keepalive_requests 1000000000;
		keepalive_timeout %[2]s;
	}
	server {
		listen 127.0.0.1:%[4]s;
		location / {
			proxy_pass http://fleet;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_set_header Host $host;
			proxy_set_header X-Forwarded-For $remote_addr;
			proxy_set_header X-Forwarded-Host $host;
			proxy_set_header X-Forwarded-Proto $scheme;
		}
	}
}
`, dir, keepalive, strings.ReplaceAll(static(nodes, nodePort), " ", ";\n\t\tserver "), port)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(lookPath(b, "nginx"), "-p", dir, "-e", "stderr", "-c", file)
	cmd.Stderr = os.Stderr
	return startProgram(b, cmd, syscall.SIGTERM) // which ends its workers
}

func startHAProxy(b *testing.B, port string, nodes, nodePort int) *program {
	b.Helper()
	file := filepath.Join(b.TempDir(), "haproxy.cfg")
	var servers strings.Builder
	for i, address := range strings.Fields(static(nodes, nodePort)) {
		fmt.Fprintf(&servers, "\tserver n%d %s\n", i, address)
	}
	config := fmt.Sprintf(`defaults
	mode http
	timeout connect 10s
	timeout client %[1]s
	timeout server %[1]s
	http-reuse always
	option forwardfor
frontend edge
	bind 127.0.0.1:%[2]s
	default_backend fleet
backend fleet
	balance roundrobin
	http-request set-header X-Forwarded-Host %%[req.hdr(Host)]
	http-request set-header X-Forwarded-Proto http
%[3]s`, keepalive, port, &servers)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(lookPath(b, "haproxy"), "-db", "-f", file)
	cmd.Stderr = os.Stderr
	return startProgram(b, cmd, syscall.SIGKILL)
}

// lookPath finds a program. Debian has servers where only root looks.
func lookPath(b *testing.B, name string) string {
	b.Helper()
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	path, err := exec.LookPath("/usr/sbin/" + name)
	if err != nil {
		b.Fatalf("%s is not installed; scripts/need-nginx-haproxy says how", name)
	}
	return path
}

// awaitServer dials until somebody answers.
func awaitServer(b *testing.B, address string) *conn {
	b.Helper()
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(10 * time.Millisecond) {
		if c, err := dialOnce(address); err == nil {
			return c
		}
	}
	b.Fatalf("nobody listens at %s", address)
	return nil
}

// comparison is what BenchmarkProxy found out.
type comparison struct {
	all   []*standing
	plane plane
	took  time.Duration
	busy  string // the load average when it began: what else the machine did
}

// BenchmarkProxy compares proxies in front of one fleet: static upstreams, Caddy's
// own dynamic ones, discovered ones, nginx and HAProxy. All of them run at once,
// each in a process of its own, and take turns: one serves, the others wait. With
// -report it writes the tables and the charts.
//
// The nodes, the load and the proxy share the machine. On few cores a faster proxy
// gets less of them, because it makes the others work more; the processor time of
// a request does not depend on that.
func BenchmarkProxy(b *testing.B) {
	for b.Loop() {
		began := time.Now()
		c := &comparison{busy: loadAverage(b)}
		s := surroundings{port: startNodes(b), dns: startDNS(b), fleets: make(map[int]*fleet), shared: make(map[int]*fleet)}
		registry := natstest.StartProcess(b)
		if *only == "" {
			c.plane = measurePlane(b, newFleet(b, registry, "changing", s.port))
		}
		for _, n := range proxySizes {
			s.fleets[n] = newFleet(b, registry, "fleet_"+strconv.Itoa(n), s.port)
			s.fleets[n].renew(n, 0)
			s.shared[n] = newFleet(b, registry, "shared_"+strconv.Itoa(n), s.port)
			s.shared[n].addresses = shared
			s.shared[n].renew(n, 0)
		}
		for _, v := range variants() {
			running := v.start(b, s)
			warm(b, running)
			c.all = append(c.all, running)
		}
		for round := range *rounds {
			// Heartbeats come between the rounds, so that they disturb nobody, and all
			// the proxies get some time to take them in.
			for _, fleets := range []map[int]*fleet{s.fleets, s.shared} {
				for n, f := range fleets {
					f.renew(n, float64(round+1))
				}
			}
			time.Sleep(2 * time.Second)
			order := slices.Clone(c.all)
			if round%2 == 1 { // whatever changes with time favours nobody
				slices.Reverse(order)
			}
			for _, p := range order {
				t := drive(b, p.address, p.program, 200*time.Millisecond, time.Second)
				if t.requests == 0 {
					b.Fatalf("%v: no answer in a turn", p)
				}
				p.turns = append(p.turns, t)
			}
		}
		for _, p := range c.all {
			name := strings.NewReplacer("`", "", ",", "", " ", "-").Replace(p.String())
			b.ReportMetric(p.rate(), "req/s-"+name)
			b.ReportMetric(float64(p.cpu().Nanoseconds())/1e3, "cpu-µs/req-"+name)
		}
		c.took = time.Since(began)
		if *report != "" && *only == "" {
			if err := writeProxyReport(*report, c); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}

// warm has a proxy open the connections that it will use: until it has answered
// ten requests for each, or for as long as one can wait.
func warm(b *testing.B, p *standing) {
	b.Helper()
	const patience = 6 * time.Second
	for asked, began := 0, time.Now(); asked < 10*p.reach() && time.Since(began) < patience; {
		asked += drive(b, p.address, p.program, 0, 200*time.Millisecond).requests
	}
}

// renew has the first n nodes send a heartbeat.
func (f *fleet) renew(n int, load float64) {
	f.b.Helper()
	for i := range n {
		f.announce(i, load)
	}
	f.settle()
}

func (s *standing) median(of func(turn) float64) float64 {
	values := make([]float64, len(s.turns))
	for i, t := range s.turns {
		values[i] = of(t)
	}
	return median(values)
}

func (s *standing) rate() float64 { return s.median(func(t turn) float64 { return t.rate }) }
func (s *standing) memory() int64 {
	return int64(s.median(func(t turn) float64 { return float64(t.memory) }))
}

func (s *standing) cpu() time.Duration {
	return time.Duration(s.median(func(t turn) float64 { return float64(t.cpu) }))
}

func (s *standing) p50() time.Duration {
	return time.Duration(s.median(func(t turn) float64 { return float64(t.p50) }))
}

func (s *standing) p99() time.Duration {
	return time.Duration(s.median(func(t turn) float64 { return float64(t.p99) }))
}

// A ratio is the median of the ratios in each round, and between which they are.
type ratio struct{ median, least, most float64 }

func ratioOf(values []float64) ratio {
	return ratio{median(values), slices.Min(values), slices.Max(values)}
}

func (r ratio) String() string { return fmt.Sprintf("%.2f (%.2f–%.2f)", r.median, r.least, r.most) }

// against returns how many times the requests a second of another one, and how many
// times its processor time a request.
func (s *standing) against(other *standing) (rate, cpu ratio) {
	var rates, cpus []float64
	for i := range s.turns {
		rates = append(rates, s.turns[i].rate/other.turns[i].rate)
		cpus = append(cpus, float64(s.turns[i].cpu)/float64(other.turns[i].cpu))
	}
	return ratioOf(rates), ratioOf(cpus)
}

// find returns a proxy that was measured.
func (c *comparison) find(source, policy string, nodes int) *standing {
	for _, s := range c.all {
		if s.variant == (variant{source, policy, nodes}) {
			return s
		}
	}
	panic("nobody measured " + variant{source, policy, nodes}.String())
}
