package integration

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"testing"
)

// holdings is what Caddy holds at a moment.
type holdings struct {
	connections int   // to the registry
	own         int   // goroutines of the plugin and of the clients of registries
	goroutines  int   // all there are
	files       int   // open descriptors
	heap        int64 // bytes that a garbage collection leaves
}

func (h holdings) String() string {
	return fmt.Sprintf("%d connections to the registry, %d goroutines (%d of the plugin), %d open files, %.1f MiB of heap",
		h.connections, h.goroutines, h.own, h.files, float64(h.heap)/(1<<20))
}

// exceeds says in what h is more than before, "" if in nothing. Caddy has some
// goroutines that come and go, each with a connection or a timer, and fills what
// it remembers up to a bound.
func (h holdings) exceeds(before holdings) string {
	const slack = 5
	switch {
	case h.connections > before.connections:
		return "connections to the registry"
	case h.own > before.own:
		return "goroutines of the plugin"
	case h.goroutines > before.goroutines+slack:
		return "goroutines"
	case h.files > before.files+slack:
		return "open files"
	case h.heap > before.heap+3<<20:
		return "heap"
	}
	return ""
}

// holdings counts. What counts must not be under load.
func (w *ward) holdings() holdings {
	w.t.Helper()
	w.ask("/debug/pprof/heap?gc=1") // finalizers let go of something for the next one
	h := holdings{
		own:        w.goroutines(),
		goroutines: int(number(w.t, w.ask("/debug/pprof/goroutine?debug=1"), `^goroutine profile: total (\d+)`)),
		heap:       number(w.t, w.ask("/debug/pprof/heap?gc=1&debug=1"), `(?m)^# HeapAlloc = (\d+)`),
	}
	for _, k := range append(w.further, w.link) {
		h.connections += connectionsOf(w.proxy.cmd.Process.Pid, k.port())
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", w.proxy.cmd.Process.Pid))
	if err != nil {
		w.t.Fatal(err)
	}
	h.files = len(files)
	return h
}

// settled waits until what Caddy holds hardly changes any more, after the load.
func (w *ward) settled() (now holdings) {
	w.t.Helper()
	client.CloseIdleConnections()
	within(w.t, 4*patience, "Caddy holds what it did a moment ago", func() bool {
		previous := now
		now = w.holdings()
		return now.exceeds(previous) == "" && previous.exceeds(now) == ""
	})
	return now
}

// released waits until Caddy holds no more than before, and returns what it does.
func (w *ward) released(before holdings) (now holdings) {
	w.t.Helper()
	client.CloseIdleConnections()
	var what string
	defer func() {
		if w.t.Failed() {
			w.t.Logf("more %s: now %v; before %v", what, now, before)
		}
	}()
	within(w.t, 4*patience, "nothing is left behind", func() bool {
		now = w.holdings()
		what = now.exceeds(before)
		return what == ""
	})
	return now
}

func number(t *testing.T, text []byte, pattern string) int64 {
	t.Helper()
	match := regexp.MustCompile(pattern).FindSubmatch(text)
	if match == nil {
		t.Fatalf("nothing matches %s in %.200q", pattern, text)
	}
	n, err := strconv.ParseInt(string(match[1]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
