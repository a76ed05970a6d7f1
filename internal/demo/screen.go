package main

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"
)

// A tone is what kind of event a line tells of.
type tone struct{ mark, color string }

var (
	good    = tone{"+", "32"}
	warning = tone{"~", "33"}
	bad     = tone{"!", "31"}
	quiet   = tone{"-", "2"}
)

// A screen prints the demo: calm colours on a terminal, plain lines elsewhere.
type screen struct {
	out      *os.File
	terminal bool

	mu sync.Mutex
	// passing says that the last line is to be overwritten by the next.
	passing bool
	// calls counts seconds, to print fewer where lines cannot be overwritten.
	calls int
}

func newScreen(out *os.File) *screen {
	return &screen{
		out:      out,
		terminal: term.IsTerminal(int(out.Fd())) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb",
	}
}

func (s *screen) paint(color, text string) string {
	if !s.terminal {
		return text
	}
	return "\x1b[" + color + "m" + text + "\x1b[0m"
}

// line prints a line; a passing one is overwritten by the next.
func (s *screen) line(text string, passing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.passing {
		fmt.Fprint(s.out, "\r\x1b[K")
	}
	s.passing = passing && s.terminal
	if s.passing {
		fmt.Fprint(s.out, text)
		return
	}
	fmt.Fprintln(s.out, text)
}

func (s *screen) say(text string) { s.line(text, false) }

// title prints pairs of a name and a text.
func (s *screen) title(pairs ...string) {
	s.say("")
	for i := 0; i+1 < len(pairs); i += 2 {
		s.say("  " + s.paint("2", fmt.Sprintf("%-9s", pairs[i])) + " " + pairs[i+1])
	}
	s.say("")
}

// event prints that something happened.
func (s *screen) event(t tone, format string, args ...any) {
	s.line("  "+s.paint(t.color, t.mark+" "+fmt.Sprintf(format, args...)), false)
}

// second prints who served how many requests in the last second. Once nothing
// happens any more such lines overwrite each other, or come every ten seconds
// where they cannot.
func (s *screen) second(since time.Duration, nodes []*node, served map[string]int, failed int, calm bool) {
	var columns []string
	total := 0
	for _, n := range nodes {
		st, _, _ := n.now()
		total += served[n.id]
		columns = append(columns, s.column(n.id, st, served[n.id]))
	}
	fails := fmt.Sprintf("%d failed", failed)
	if failed > 0 {
		fails = s.paint(bad.color, fails)
	}
	s.mu.Lock()
	s.calls++
	skip := calm && !s.terminal && s.calls%10 != 0
	s.mu.Unlock()
	if skip {
		return
	}
	s.line(fmt.Sprintf("%4.0fs  %s  %s %s",
		since.Seconds(), strings.Join(columns, "  "), s.paint("2", fmt.Sprintf("%3d/s", total)), fails), calm)
}

// column prints one node's share.
func (s *screen) column(id string, st state, served int) string {
	count := fmt.Sprintf("%3d", served)
	if served == 0 {
		count = "  -"
	}
	if !s.terminal {
		return fmt.Sprintf("%s %s %-8s", id, count, st)
	}
	switch st {
	case up:
		return s.paint("32", "●") + " " + id + " " + s.paint("1", count)
	case draining:
		return s.paint("33", "◐") + " " + id + " " + s.paint("1", count)
	case crashed:
		return s.paint("31", "✗") + " " + s.paint("2", id) + " " + count
	default:
		return s.paint("2", "○ "+id+" "+count)
	}
}
