package simulation

import (
	"bytes"
	"errors"
	"fmt"
	"html"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	beginMark = "<!-- make simulate: begin -->"
	endMark   = "<!-- make simulate: end -->"
)

// writeReport writes the table into balancing.md, and the pictures beside it.
func writeReport(folder string, results map[string]map[string]result) error {
	for name, picture := range map[string]string{
		"simulation-p99.svg":   drawTails(results),
		"simulation-share.svg": drawShares(results[changing]),
	} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(picture), 0o644); err != nil {
			return err
		}
	}
	file := filepath.Join(folder, "balancing.md")
	page, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, found := bytes.Cut(page, []byte(beginMark))
	_, after, ended := bytes.Cut(rest, []byte(endMark))
	if !found || !ended {
		return errors.New(file + " has no place for the table")
	}
	section := beginMark + "\n" + table(results) + "\n" +
		"![p99 by scenario and policy](simulation-p99.svg)\n\n![The share of the node that loses its power](simulation-share.svg)\n" + endMark
	return os.WriteFile(file, slices.Concat(before, []byte(section), after), 0o644)
}

// table returns what was found, a scenario a row and a policy a column.
func table(results map[string]map[string]result) string {
	var t strings.Builder
	t.WriteString("| share of the first node · p50 · p99 | ")
	for _, p := range policies {
		fmt.Fprintf(&t, "`%s` | ", p.name)
	}
	t.WriteString("\n|---" + strings.Repeat("|--:", len(policies)) + "|\n")
	for _, s := range scenarios {
		fmt.Fprintf(&t, "| %s | ", s.name)
		for _, p := range policies {
			r := results[s.name][p.name]
			fmt.Fprintf(&t, "%.1f %% · %s · %s", 100*r.share, inWords(r.p50), inWords(r.p99))
			if r.errors > 0 {
				fmt.Fprintf(&t, ", %.2f %% fail", 100*r.errors)
			}
			t.WriteString(" | ")
		}
		t.WriteString("\n")
	}
	return strings.ReplaceAll(t.String(), " | \n", " |\n")
}

func inWords(d time.Duration) string {
	if d >= time.Second {
		return fmt.Sprintf("%.0f s", d.Seconds())
	}
	return fmt.Sprintf("%.0f ms", d.Seconds()*1e3)
}

// colours are those of the policies, to be told apart by any sight, on light and on dark.
var colours = []struct{ light, dark string }{
	{"#57606a", "#9198a1"}, {"#bf8700", "#d29922"}, {"#cf222e", "#ff7b72"}, {"#0969da", "#4493f8"}, {"#1a7f37", "#3fb950"},
}

const (
	width, left, right, top, bottom = 860, 60, 170, 48, 44
	legend                          = 24
)

// begin returns the head of a picture.
func begin(title string, height int) *strings.Builder {
	s := new(strings.Builder)
	fmt.Fprintf(s, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-label="%s">`,
		width, height, width, height, html.EscapeString(title))
	s.WriteString(`<style>text{font:14px system-ui,sans-serif;fill:#24292f}.t{font-weight:600;font-size:16px}.g{stroke:#d0d7de}path{fill:none;stroke-width:2}`)
	for i, c := range colours {
		fmt.Fprintf(s, `path.c%d{stroke:%s}circle.c%d{fill:%s}`, i, c.light, i, c.light)
	}
	s.WriteString(`@media(prefers-color-scheme:dark){text{fill:#e6edf3}.g{stroke:#3d444d}`)
	for i, c := range colours {
		fmt.Fprintf(s, `path.c%d{stroke:%s}circle.c%d{fill:%s}`, i, c.dark, i, c.dark)
	}
	fmt.Fprintf(s, `}</style><text class="t" x="8" y="26">%s</text>`, html.EscapeString(title))
	for i, p := range policies {
		at := top + 10 + legend*i
		fmt.Fprintf(s, `<circle class="c%d" cx="%d" cy="%d" r="5"/><text x="%d" y="%d">%s</text>`, i, width-right+22, at, width-right+34, at+5, p.name)
	}
	return s
}

// drawShares draws the share of the first node over time.
func drawShares(results map[string]result) string {
	const height, most = 380, 0.25
	s := begin("Share of the node that serves a quarter from 40 s to 80 s", height)
	seconds := len(results[policies[0].name].seconds) - 1
	x := func(second int) float64 { return left + float64(second)*float64(width-left-right)/float64(seconds) }
	y := func(share float64) float64 { return top + (1-min(share, most)/most)*(height-top-bottom) }
	for share := 0.0; share <= most+0.001; share += 0.05 {
		fmt.Fprintf(s, `<line class="g" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/><text x="%d" y="%.1f" text-anchor="end">%.0f %%</text>`,
			left, width-right, y(share), y(share), left-8, y(share)+5, 100*share)
	}
	for second := 0; second <= seconds; second += 20 {
		fmt.Fprintf(s, `<text x="%.1f" y="%d" text-anchor="middle">%d s</text>`, x(second), height-bottom+22, second)
	}
	for i, p := range policies {
		var path strings.Builder
		for second := range seconds {
			fmt.Fprintf(&path, "%c%.1f %.1f", "ML"[min(second, 1)], x(second), y(results[p.name].seconds[second]))
		}
		fmt.Fprintf(s, `<path class="c%d" d="%s"/>`, i, &path)
	}
	s.WriteString("</svg>\n")
	return s.String()
}

// drawTails draws p99 of each scenario under each policy.
func drawTails(results map[string]map[string]result) string {
	const row, label, least, most = 34, 370, 0.02, 100.0 // seconds
	height := top + row*len(scenarios) + bottom
	s := begin("p99, by policy", height)
	x := func(d float64) float64 {
		return label + math.Log(min(max(d, least), most)/least)/math.Log(most/least)*(width-label-right)
	}
	for _, tick := range []float64{0.02, 0.1, 1, 10, 100} {
		fmt.Fprintf(s, `<line class="g" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/><text x="%.1f" y="%d" text-anchor="middle">%s</text>`,
			x(tick), x(tick), top, height-bottom, x(tick), height-bottom+22, inWords(time.Duration(tick*float64(time.Second))))
	}
	for j, scenario := range scenarios {
		at := top + row*j + row/2
		fmt.Fprintf(s, `<text x="8" y="%d">%s</text>`, at+5, html.EscapeString(scenario.name))
		for i, p := range policies {
			// They lie a little apart, so that equal ones are seen.
			fmt.Fprintf(s, `<circle class="c%d" cx="%.1f" cy="%d" r="4"/>`, i, x(results[scenario.name][p.name].p99.Seconds()), at+4*(i-2))
		}
	}
	s.WriteString("</svg>\n")
	return s.String()
}
