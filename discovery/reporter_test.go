package discovery

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Nothing is told of single nodes before the first listing is over, then everything in
// the journal and so many lines a second in the log, of which the next says how many it
// lacks.
func TestReporter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lines bytes.Buffer
		var journal Journal
		r := newReporter(&journal, slog.New(slog.NewTextHandler(&lines, nil)))
		a := publishedEntry("a")
		r.node(ChangeSeen, a, "")
		r.line(slog.LevelWarn, "too early")
		if lines.Len() != 0 || journal.Last() != 0 {
			t.Errorf("told before the first listing: %s", &lines)
		}
		r.begun = true
		for range 100 {
			r.node(ChangeUpdated, a, "zone b")
		}
		if got := strings.Count(lines.String(), "node changed"); got != logRate || journal.Last() != 100 {
			t.Errorf("%d lines and %d changes, want %d and 100", got, journal.Last(), logRate)
		}
		lines.Reset()
		time.Sleep(time.Second)
		r.nodeRejected(a, Invalidf(FaultLoad, "load -1"))
		for _, want := range []string{"node rejected", "lines_left_out=80", "node=a", "service=orders"} {
			if !strings.Contains(lines.String(), want) {
				t.Errorf("%q is not in %s", want, &lines)
			}
		}
		if _, rejected := journal.Counts(); rejected[FaultLoad] != 1 {
			t.Errorf("rejected: %v", rejected)
		}
	})
}
