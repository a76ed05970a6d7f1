package benchmarks

import (
	"fmt"
	"html"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/nats-io/nats-server/v2/server"
)

// The report is part of a file that other benchmarks write to as well; each owns
// what stands between its own two marks.
const (
	beginBackends = "<!-- make bench-backends: begin -->"
	endBackends   = "<!-- make bench-backends: end -->"
)

// writeReport writes the comparison of the backends into benchmarks.md, and its
// charts beside it.
func writeReport(folder string, results []*result) error {
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	var rows strings.Builder
	rows.WriteString("| backend | server | change → seen, p50 | p99 | heartbeats a second | bytes on the wire a heartbeat |")
	for _, n := range fleetSizes {
		fmt.Fprintf(&rows, " first sync of %s |", humanize.Comma(int64(n)))
	}
	rows.WriteString(" server memory then |\n|---|---|--:|--:|--:|--:|" + strings.Repeat("--:|", len(fleetSizes)+1) + "\n")
	for _, r := range results {
		fmt.Fprintf(&rows, "| `%s` | %s | %s | %s | %s | %.0f |", r.name, r.server,
			micros(r.seen50), micros(r.seen99), humanize.Comma(int64(r.heartbeats)), r.wire)
		for _, n := range fleetSizes {
			fmt.Fprintf(&rows, " %s |", micros(r.sync[n]))
		}
		fmt.Fprintf(&rows, " %s |\n", humanize.IBytes(uint64(r.memory)))
	}

	charts := []struct {
		file, title, unit string
		value             func(*result) float64
	}{
		{"backends-seen.svg", "Change → seen by the directory, p50", "ms", func(r *result) float64 { return r.seen50.Seconds() * 1e3 }},
		{"backends-sync.svg", fmt.Sprintf("First sync of %s nodes", humanize.Comma(int64(fleetSizes[len(fleetSizes)-1]))), "ms",
			func(r *result) float64 { return r.sync[fleetSizes[len(fleetSizes)-1]].Seconds() * 1e3 }},
		{"backends-heartbeats.svg", "Heartbeats a second, acknowledged, eight writers", "", func(r *result) float64 { return r.heartbeats }},
	}
	var pictures strings.Builder
	for _, c := range charts {
		var bars []bar
		for _, r := range results {
			bars = append(bars, bar{r.name, c.value(r)})
		}
		if err := os.WriteFile(filepath.Join(folder, c.file), []byte(chart(c.title, c.unit, bars)), 0o644); err != nil {
			return err
		}
		fmt.Fprintf(&pictures, "![%s](%s)\n\n", c.title, c.file)
	}

	section := beginBackends + "\n## The backends side by side\n\n" +
		"`make bench-backends`, one run on " + machine() + ".\nServers, directory and writers share the machine, so figures compare with each other and not with those of a larger one.\n\n" +
		pictures.String() + rows.String() + "\n" +
		"*Change → seen* is from before `Announce` is called until the directory's snapshot holds the node, 300 times, one backend after the other in each round. " +
		"*Heartbeats* are acknowledged ones of eight connections, in two seconds. " +
		"*Bytes* are both ways, between the writer and the server. *First sync* is from the start of a directory until it is synced, the median of five, and includes the connection.\n" +
		endBackends + "\n"

	return writeSection(folder, section, beginBackends, endBackends)
}

// writeSection writes what stands between two marks of benchmarks.md, and leaves
// the rest of it as it is.
func writeSection(folder, section, beginMark, endMark string) error {
	file := filepath.Join(folder, "benchmarks.md")
	old, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		old = []byte("# Benchmarks\n\nEach section is written by the command that it names.\n\n")
	} else if err != nil {
		return err
	}
	text := string(old)
	begin, end := strings.Index(text, beginMark), strings.Index(text, endMark)
	if begin >= 0 && end > begin {
		text = text[:begin] + section + strings.TrimPrefix(text[end+len(endMark):], "\n")
	} else {
		text += section
	}
	return os.WriteFile(file, []byte(text), 0o644)
}

// hardware describes what the figures were measured on.
func hardware() string {
	cpu := "an unknown processor"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, ok := strings.CutPrefix(line, "model name"); ok {
				cpu = strings.TrimSpace(strings.TrimLeft(name, "\t :"))
				break
			}
		}
	}
	return fmt.Sprintf("%s, %d cores, %s/%s", cpu, runtime.NumCPU(), runtime.GOOS, runtime.GOARCH)
}

// machine describes what the figures were measured on and with.
func machine() string {
	redis := "Redis of an unknown version"
	if out, err := exec.Command("redis-server", "--version").Output(); err == nil {
		if fields := strings.Fields(string(out)); len(fields) > 2 {
			redis = "Redis " + strings.TrimPrefix(fields[2], "v=")
		}
	}
	clients := ""
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range info.Deps {
			switch m.Path {
			case "github.com/nats-io/nats.go", "github.com/redis/go-redis/v9":
				clients += ", " + filepath.Base(strings.TrimSuffix(m.Path, "/v9")) + " " + m.Version
			}
		}
	}
	return fmt.Sprintf("%s, %s, nats-server %s, %s%s", hardware(), runtime.Version(), server.VERSION, redis, clients)
}

type bar struct {
	name  string
	value float64
}

// chart draws horizontal bars that can be read on light and on dark.
func chart(title, unit string, bars []bar) string {
	const width, left, row, top = 720, 170, 34, 48
	most := 0.0
	for _, b := range bars {
		most = max(most, b.value)
	}
	height := top + row*len(bars) + 14
	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s">`,
		width, height, width, height, html.EscapeString(title))
	s.WriteString(`<style>text{font:14px system-ui,sans-serif;fill:#24292f}.t{font-weight:600;font-size:16px}rect{fill:#0969da}` +
		`@media(prefers-color-scheme:dark){text{fill:#e6edf3}rect{fill:#4493f8}}</style>`)
	fmt.Fprintf(&s, `<text class="t" x="8" y="26">%s</text>`, html.EscapeString(title))
	for i, b := range bars {
		y := top + row*i
		length := 1.0
		if most > 0 {
			length = max(1, b.value/most*(width-left-120))
		}
		format := "%.0f"
		if b.value < 100 {
			format = "%.2f"
		}
		fmt.Fprintf(&s, `<text x="%d" y="%d" text-anchor="end">%s</text><rect x="%d" y="%d" width="%.1f" height="22" rx="3"/><text x="%.1f" y="%d">%s</text>`,
			left-10, y+16, html.EscapeString(b.name), left, y, length, left+length+8, y+16,
			html.EscapeString(strings.TrimSpace(fmt.Sprintf(format+" "+unit, b.value))))
	}
	s.WriteString("</svg>\n")
	return s.String()
}
