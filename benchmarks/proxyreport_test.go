package benchmarks

import (
	"fmt"
	"html"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/nats-io/nats-server/v2/server"
)

const (
	beginProxy = "<!-- make bench-proxy: begin -->"
	endProxy   = "<!-- make bench-proxy: end -->"
)

// writeProxyReport writes the comparison of the proxies into benchmarks.md, and
// its charts beside it.
func writeProxyReport(folder string, c *comparison) error {
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	charts := []struct {
		file, title, unit string
		logarithmic       bool
		value             func(*standing) float64
	}{
		{"proxy-cpu.svg", "Processor time of the proxy for a request, random", "µs", true, func(s *standing) float64 { return micro(s.cpu()) }},
		{"proxy-rate.svg", "Requests a second, random", "", false, (*standing).rate},
	}
	var pictures strings.Builder
	for _, chart := range charts {
		picture := drawLines(chart.title, chart.unit, chart.logarithmic, proxySizes, c.lines(chart.value))
		if err := os.WriteFile(filepath.Join(folder, chart.file), []byte(picture), 0o644); err != nil {
			return err
		}
		fmt.Fprintf(&pictures, "![%s](%s)\n\n", chart.title, chart.file)
	}
	section := beginProxy + "\n## The proxy\n\n" +
		fmt.Sprintf("`make bench-proxy`, one run of %.0f minutes on %s (load average %s before), %s, %s.\n\n", c.took.Minutes(), hardware(), c.busy, runtime.Version(), proxyVersions()) +
		pictures.String() + c.explain() +
		"### Figures to reach\n\n" + c.figuresTable() + "\n" +
		"### Requests\n\n" + c.requestsTable() + "\n" +
		"### Following a fleet of " + comma(planeNodes) + " nodes\n\n" + c.plane.table() +
		endProxy + "\n"
	return writeSection(folder, section, beginProxy, endProxy)
}

// explain says how it was measured.
func (c *comparison) explain() string {
	return fmt.Sprintf("Each line of the tables is a proxy in a process of its own; all of them run, and take turns of a second, %d each, "+
		"forwards in one round and backwards in the next. The figures are medians of the turns, ratios are the medians of the ratios in each round, with the least and the greatest. "+
		"%d connections ask, each as soon as it has its answer. Every answer of every turn was a 200. "+
		"The nodes are addresses in 127.0.0.0/8 that answer two bytes; they list themselves in NATS JetStream KV, and their heartbeats come between the rounds. "+
		"Nodes *on ten addresses* share them, so that choosing shows alone, without the connections to thousands of nodes. "+
		"Connections to the nodes are open before the first turn, as far as a proxy gets to all of its nodes, and stay open. *discovery* alone has no option but `service`.\n\n"+
		"The load, the nodes and the proxy share the cores of one machine, so requests a second are those of all three together, and latency is mostly waiting for a core: "+
		"with %[2]d connections that never pause, p50 is little else than %[2]d by the requests a second. "+
		"**The processor time of a request**, user and system, of all threads of the proxy, **is the figure to go by.** Memory is what was resident after a turn.\n\n"+
		"`dynamic a` is not asked for 10,000 nodes, whose addresses do not fit into a DNS message (64 KiB), and its list is not looked up anew during a turn. "+
		"nginx and HAProxy have their own round robin, a worker or thread for each core, and the same open connections. `header` hashes one of %[3]d values.\n\n",
		*rounds, workers, keys)
}

func (c *comparison) requestsTable() string {
	var t strings.Builder
	t.WriteString("| policy | nodes | upstreams | requests a second | p50 | p99 | processor time a request | memory |\n|---|--:|---|--:|--:|--:|--:|--:|\n")
	for _, s := range c.all {
		fmt.Fprintf(&t, "| `%s` | %s | %s | %s | %s | %s | %.0f µs | %s |\n", s.policy, comma(s.nodes), s.source,
			comma(int(s.rate())), micros(s.p50()), micros(s.p99()), micro(s.cpu()), humanize.IBytes(uint64(s.memory())))
	}
	return t.String()
}

func (p plane) table() string {
	var t strings.Builder
	fmt.Fprintf(&t, "Caddy with `pick 2` and `least_conn`, over %.0f seconds at each rate, by the processor time of its process. Records come one by one, a millisecond apart, but for the heartbeats that are *held back*: "+
		"all of %v come at once, which saves waking up for each. Every second record of *joins and leaves* is a node that leaves, the others are new ones. "+
		"A *bare watcher* is another process that watches the same bucket by the client library and does nothing with what comes. A snapshot is made into a pool only when a request comes, so that there are %d requests a second in the last lines.\n\n",
		stretchLength.Seconds(), burst, trickle)
	t.WriteString("| what happens | requests a second | records a second | of one core | beyond rest | a bare watcher | snapshots a second |\n|---|--:|--:|--:|--:|--:|--:|\n")
	for _, r := range []struct {
		what     string
		requests int
		stretch
		rest stretch
	}{
		{"nothing", 0, p.idle, p.idle},
		{"heartbeats", 0, p.heartbeats, p.idle},
		{"heartbeats, held back", 0, p.bursts, p.idle},
		{"joins and leaves", 0, p.changes, p.idle},
		{"joins and leaves", 0, p.doubled, p.idle},
		{"nothing", trickle, p.servedIdle, p.servedIdle},
		{"joins and leaves", trickle, p.served, p.servedIdle},
	} {
		fmt.Fprintf(&t, "| %s | %d | %s | %s | %s | %s | %.1f |\n", r.what, r.requests, comma(int(math.Round(r.records))),
			percent(r.cpu), percent(r.over(r.rest)), percent(r.bare), r.snapshots)
	}
	return t.String()
}

// A figure is one that should be reached.
type figure struct {
	what, reach, measured string
	processor             string // what the processor time of a request says to the same
	met                   bool
	why                   string // why it is not met, if it is not
}

// figures are those that this run measures.
func (c *comparison) figures() []figure {
	var all []figure
	compare := func(what string, reach, processor float64, s, other *standing, why string) {
		rate, cpu := s.against(other)
		f := figure{
			what: what, reach: fmt.Sprintf("≥ %.2f", reach), measured: rate.String(),
			processor: cpu.String(), met: rate.median >= reach, why: why,
		}
		switch {
		case reach == 0:
			f.reach = ""
		case processor > 0:
			f.reach += fmt.Sprintf(", processor time ≤ %.2f", processor)
			f.met = f.met && cpu.median <= processor
		}
		all = append(all, f)
	}
	static := func(policy string, nodes int) *standing { return c.find(sourceStatic, policy, nodes) }
	same, sameCPU := c.find(sourceAgain, random, 10).against(static(random, 10))
	noise := fmt.Sprintf("two proxies that are equal come to %v in this run, and %v", same, sameCPU)
	for _, policy := range policies {
		compare("10 nodes against 10 static upstreams, `"+policy+"`", 0.98, 1.03, c.find(sourceAll, policy, 10), static(policy, 10), noise)
	}
	for _, r := range []struct {
		policy string
		reach  map[int]float64
	}{
		{random, map[int]float64{1_000: 0.95, 10_000: 0.93}},
		{roundRobin, map[int]float64{1_000: 0.95, 10_000: 0.93}},
		{leastConn, map[int]float64{1_000: 0.95, 10_000: 0.90}},
		{hashing, map[int]float64{1_000: 0.90, 10_000: 0.65}},
	} {
		for _, n := range []int{1_000, 10_000} {
			compare(fmt.Sprintf("%s nodes on ten addresses against 10 static upstreams, `%s`", comma(n), r.policy), r.reach[n], 0,
				c.find(sourceShared, r.policy, n), static(r.policy, 10), noise)
		}
	}
	many, _ := static(roundRobin, 10_000).against(static(roundRobin, 10))
	open := fmt.Sprintf("each connection is used seldom: static upstreams under `round_robin`, which looks at one of them, come to %v with 10,000 nodes of what they do with 10", many)
	for _, policy := range policies {
		compare("10,000 nodes against 10,000 static upstreams, `"+policy+"`", map[string]float64{random: 1.8, leastConn: 1.8}[policy], 0,
			c.find(sourceAll, policy, 10_000), static(policy, 10_000), "the load and the nodes take what the proxy saves; by processor time it is another figure")
	}
	for _, r := range []struct {
		nodes int
		reach float64
	}{{1_000, 0.92}, {10_000, 0.90}} {
		for _, policy := range []string{random, leastConn} {
			compare(fmt.Sprintf("`pick 2` of %s nodes against 10 static upstreams, `%s`", comma(r.nodes), policy), r.reach, 0,
				c.find(sourcePick, policy, r.nodes), static(policy, 10), open)
		}
	}
	few, part := static(leastConn, 10), c.find(sourceSubset, leastConn, 10_000)
	compare(fmt.Sprintf("`subset %d` with `pick 2` of 10,000 nodes against 10 static upstreams, `%s`", subset, leastConn), 0.95, 0,
		part, few, fmt.Sprintf("%d connections to nodes instead of 10; and %s", subset, noise))
	directory := max(part.fresh-few.fresh, 0)
	memory := float64(part.memory()-directory) / float64(few.memory())
	all = append(all, figure{
		what:  fmt.Sprintf("memory of the same two, without the directory's own (%s before the first request)", humanize.IBytes(uint64(directory))),
		reach: "≤ 1.30", measured: fmt.Sprintf("%.2f", memory), processor: "", met: memory <= 1.3,
		why: fmt.Sprintf("%d connections to nodes instead of 10, at most %d of them busy", subset, workers),
	})
	return append(all, c.plane.figures()...)
}

// figures are those of following a fleet.
func (p plane) figures() []figure {
	var all []figure
	beats := p.heartbeats
	all = append(all,
		figure{
			what: "1,000 heartbeats a second on 10,000 nodes, of one core", reach: "≤ 2 %",
			measured: percent(beats.over(p.idle)), met: beats.over(p.idle) <= 0.02,
			why: bare(beats) + fmt.Sprintf("; %s when the heartbeats of %v come at once", percent(p.bursts.over(p.idle)), burst),
		},
		figure{
			what: "snapshots a second meanwhile", reach: "0", measured: fmt.Sprintf("%.1f", beats.snapshots), met: beats.snapshots == 0,
		})
	for _, r := range []struct {
		what       string
		load, rest stretch
	}{
		{"1,000 joins and leaves a second on 10,000 nodes, of one core", p.changes, p.idle},
		{fmt.Sprintf("the same with %d requests a second, for which each snapshot is made into a pool", trickle), p.served, p.servedIdle},
	} {
		all = append(all, figure{
			what: r.what, reach: "≤ 5 %", measured: percent(r.load.over(r.rest)), met: r.load.over(r.rest) <= 0.05,
			why: bare(r.load) + "; the rest is reading the records and a pass over the fleet for each snapshot",
		})
	}
	return all
}

// bare says what the same records cost any watcher.
func bare(s stretch) string {
	return "a watcher of the client library that does nothing with the records takes " + percent(s.bare) + ", to wake up for each"
}

func (c *comparison) figuresTable() string {
	var t strings.Builder
	t.WriteString("| what | reach | measured | processor time, the same ratio | |\n|---|--:|--:|--:|---|\n")
	for _, f := range c.figures() {
		verdict := "met"
		switch {
		case f.reach == "":
			verdict = ""
		case !f.met:
			verdict = "**not met**"
			if f.why != "" {
				verdict += ": " + f.why
			}
		}
		fmt.Fprintf(&t, "| %s | %s | %s | %s | %s |\n", f.what, f.reach, f.measured, f.processor, verdict)
	}
	rate, cpu := c.find(sourceAgain, random, 10).against(c.find(sourceStatic, random, 10))
	fmt.Fprintf(&t, "| 10 static upstreams against the same once more: what the run itself is unsure of | | %v | %v | |\n", rate, cpu)
	return t.String()
}

// proxyVersions returns what was compared.
func proxyVersions() string {
	versions := []string{"nats-server " + server.VERSION}
	number := regexp.MustCompile(`\d+(\.\d+)+`)
	ask := func(name, path string, args ...string) {
		out, _ := exec.Command(path, args...).CombinedOutput()
		version := number.FindString(string(out))
		if version == "" {
			version = "of an unknown version"
		}
		versions = append(versions, name+" "+version)
	}
	path, _ := build()
	ask("Caddy", path, "version")
	for name, program := range map[string]string{"nginx": "nginx", "HAProxy": "haproxy"} {
		path, err := exec.LookPath(program)
		if err != nil {
			path = "/usr/sbin/" + program
		}
		ask(name, path, "-v")
	}
	slices.Sort(versions)
	return strings.Join(versions, ", ")
}

func comma(n int) string              { return humanize.Comma(int64(n)) }
func micro(d time.Duration) float64   { return float64(d.Nanoseconds()) / 1e3 }
func percent(fraction float64) string { return fmt.Sprintf("%.1f %%", 100*fraction) }

// A line is what one kind of proxy comes to, by the number of nodes.
type line struct {
	name   string
	values map[int]float64
}

// lines returns a value of all kinds of proxies, under random where they know it.
func (c *comparison) lines(value func(*standing) float64) []line {
	var all []line
	for _, l := range []struct{ source, policy string }{
		{sourceStatic, random}, {sourceA, random}, {sourceAll, random}, {sourceShared, random}, {sourcePick, random},
		{sourceNginx, roundRobin}, {sourceHAProxy, roundRobin},
	} {
		values := make(map[int]float64)
		for _, s := range c.all {
			if s.source == l.source && s.policy == l.policy {
				values[s.nodes] = value(s)
			}
		}
		all = append(all, line{strings.ReplaceAll(l.source, "`", ""), values})
	}
	return all
}

// drawLines draws lines over fleets that grow tenfold from point to point, to be
// read on light and on dark.
func drawLines(title, unit string, logarithmic bool, sizes []int, lines []line) string {
	const width, height, left, right, top, bottom, legend = 860, 420, 80, 250, 48, 44, 24
	// Colours that people with any sight tell apart, on light and on dark.
	colours := []struct{ light, dark string }{
		{"#57606a", "#9198a1"}, {"#bf8700", "#d29922"}, {"#cf222e", "#ff7b72"}, {"#0969da", "#4493f8"},
		{"#1a7f37", "#3fb950"}, {"#8250df", "#ab7df8"}, {"#bf3989", "#f778ba"},
	}
	least, most := math.Inf(1), 0.0
	for _, l := range lines {
		for _, v := range l.values {
			least, most = min(least, v), max(most, v)
		}
	}
	var ticks []float64
	if logarithmic {
		least, most = math.Pow(10, math.Floor(math.Log10(least))), math.Pow(10, math.Ceil(math.Log10(most)))
		for v := least; v <= most*1.01; v *= 10 {
			ticks = append(ticks, v)
		}
	} else {
		step := math.Pow(10, math.Floor(math.Log10(most)))
		if most/step < 3 {
			step /= 2
		}
		least, most = 0, math.Ceil(most/step)*step
		for v := 0.0; v <= most*1.01; v += step {
			ticks = append(ticks, v)
		}
	}
	x := func(i int) float64 {
		return left + 20 + float64(i)*float64(width-left-right-40)/float64(len(sizes)-1)
	}
	y := func(v float64) float64 {
		at := (v - least) / (most - least)
		if logarithmic {
			at = math.Log(v/least) / math.Log(most/least)
		}
		return top + (1-at)*(height-top-bottom)
	}

	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s">`,
		width, height, width, height, html.EscapeString(title))
	s.WriteString(`<style>text{font:14px system-ui,sans-serif;fill:#24292f}.t{font-weight:600;font-size:16px}.g{stroke:#d0d7de}path{fill:none;stroke-width:2.5}`)
	for i, c := range colours {
		fmt.Fprintf(&s, `path.c%d{stroke:%s}circle.c%d{fill:%s}`, i, c.light, i, c.light)
	}
	s.WriteString(`@media(prefers-color-scheme:dark){text{fill:#e6edf3}.g{stroke:#3d444d}`)
	for i, c := range colours {
		fmt.Fprintf(&s, `path.c%d{stroke:%s}circle.c%d{fill:%s}`, i, c.dark, i, c.dark)
	}
	fmt.Fprintf(&s, `}</style><text class="t" x="8" y="26">%s</text>`, html.EscapeString(title))
	for _, v := range ticks {
		fmt.Fprintf(&s, `<line class="g" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/><text x="%d" y="%.1f" text-anchor="end">%s</text>`,
			left, width-right, y(v), y(v), left-8, y(v)+5, html.EscapeString(strings.TrimSpace(comma(int(v))+" "+unit)))
	}
	for i, n := range sizes {
		name := comma(n)
		if i == len(sizes)-1 {
			name += " nodes"
		}
		fmt.Fprintf(&s, `<text x="%.1f" y="%d" text-anchor="middle">%s</text>`, x(i), height-bottom+22, name)
	}
	for i, l := range lines {
		var path strings.Builder
		for j, n := range sizes {
			v, ok := l.values[n]
			if !ok {
				continue
			}
			command := "L"
			if path.Len() == 0 {
				command = "M"
			}
			fmt.Fprintf(&path, "%s%.1f %.1f", command, x(j), y(v))
			fmt.Fprintf(&s, `<circle class="c%d" cx="%.1f" cy="%.1f" r="4"/>`, i, x(j), y(v))
		}
		fmt.Fprintf(&s, `<path class="c%d" d="%s"/>`, i, &path)
		at := top + 10 + legend*i
		fmt.Fprintf(&s, `<circle class="c%d" cx="%d" cy="%d" r="5"/><text x="%d" y="%d">%s</text>`,
			i, width-right+22, at, width-right+34, at+5, html.EscapeString(l.name))
	}
	s.WriteString("</svg>\n")
	return s.String()
}

// TestProxyReport writes the report of a run that is made up.
func TestProxyReport(t *testing.T) {
	c := &comparison{busy: "0.00", took: 8 * time.Minute}
	for i, v := range variants() {
		s := &standing{variant: v, fresh: 50 << 20}
		for round := range 3 {
			s.turns = append(s.turns, turn{
				requests: 1000, rate: float64(1000 + 100*round + i), p50: time.Millisecond, p99: 2 * time.Millisecond,
				cpu: time.Duration(100+i) * time.Microsecond, memory: 60 << 20,
			})
		}
		c.all = append(c.all, s)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "benchmarks.md"), []byte("# Benchmarks\n\n"+beginProxy+"\nold\n"+endProxy+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	*otherBinary = "/nonexistent" // its version is of no interest
	t.Cleanup(func() { *otherBinary = "" })
	if err := writeProxyReport(dir, c); err != nil {
		t.Fatal(err)
	}
	report, err := os.ReadFile(filepath.Join(dir, "benchmarks.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"HAProxy |", "nginx |", "`dynamic a` |", sourceShared, "`" + hashing + "`", "| 10 nodes against 10 static upstreams, `random` | ≥ 0.98, processor time ≤ 1.03 |"} {
		if !strings.Contains(string(report), want) {
			t.Errorf("the report lacks %q", want)
		}
	}
	if strings.Contains(string(report), "old\n") || strings.Contains(string(report), "%!") {
		t.Error("the report has what it should not")
	}
}
