package integration

import (
	"fmt"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// resources is what Caddy holds at a moment.
type resources struct {
	connections int   // to the registry
	own         int   // goroutines of the plugin and of the clients of registries
	goroutines  int   // all there are
	files       int   // open descriptors
	heap        int64 // bytes that a garbage collection leaves
}

func (h resources) String() string {
	return fmt.Sprintf("%d connections to the registry, %d goroutines (%d of the plugin), %d open files, %.1f MiB of heap",
		h.connections, h.goroutines, h.own, h.files, float64(h.heap)/(1<<20))
}

// exceeds says in what h is more than before, "" if in nothing. Caddy has some
// goroutines that come and go, each with a connection or a timer, and fills what
// it remembers up to a bound.
func (h resources) exceeds(before resources) string {
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

// resources counts. What counts must not be under load.
func (rig *testRig) resources() resources {
	rig.t.Helper()
	rig.ask("/debug/pprof/heap?gc=1") // finalizers let go of something for the next one
	h := resources{
		own:        rig.goroutines(),
		goroutines: int(number(rig.t, rig.ask("/debug/pprof/goroutine?debug=1"), `^goroutine profile: total (\d+)`)),
		heap:       number(rig.t, rig.ask("/debug/pprof/heap?gc=1&debug=1"), `(?m)^# HeapAlloc = (\d+)`),
	}
	for _, k := range append(rig.further, rig.link) {
		h.connections += connectionsOf(rig.proxy.cmd.Process.Pid, k.port())
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", rig.proxy.cmd.Process.Pid))
	if err != nil {
		rig.t.Fatal(err)
	}
	h.files = len(files)
	return h
}

// resourcesAtRest waits until what Caddy holds hardly changes any more, after the load.
func (rig *testRig) resourcesAtRest() (now resources) {
	rig.t.Helper()
	client.CloseIdleConnections()
	within(rig.t, 4*patience, "Caddy holds what it did a moment ago", func() bool {
		previous := now
		now = rig.resources()
		return now.exceeds(previous) == "" && previous.exceeds(now) == ""
	})
	return now
}

// resourcesReleased waits until Caddy holds no more than before, and returns what it does.
func (rig *testRig) resourcesReleased(before resources) (now resources) {
	rig.t.Helper()
	client.CloseIdleConnections()
	var what string
	defer func() {
		if rig.t.Failed() {
			rig.t.Logf("more %s: now %v; before %v", what, now, before)
		}
	}()
	within(rig.t, 4*patience, "nothing is left behind", func() bool {
		now = rig.resources()
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

// connectionsOf counts the established connections of a process to ports of this
// machine.
func connectionsOf(pid int, ports ...int) int {
	own := make(map[string]bool)
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(fds)
	if err != nil {
		return 0
	}
	for _, e := range entries {
		if target, err := os.Readlink(fds + "/" + e.Name()); err == nil && strings.HasPrefix(target, "socket:[") {
			own[strings.Trim(target, "socket:[]")] = true
		}
	}
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return 0
	}
	n := 0
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) < 10 || f[3] != "01" || !own[f[9]] {
			continue
		}
		for _, port := range ports {
			if strings.HasSuffix(f[2], fmt.Sprintf(":%04X", port)) {
				n++
			}
		}
	}
	return n
}

func portOf(t *testing.T, address string) (port int) {
	t.Helper()
	_, number, err := net.SplitHostPort(address)
	if err == nil {
		_, err = fmt.Sscan(number, &port)
	}
	if err != nil {
		t.Fatal(err)
	}
	return port
}
