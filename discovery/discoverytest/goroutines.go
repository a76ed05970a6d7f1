package discoverytest

import (
	"context"
	"fmt"
	"runtime/pprof"
	"strings"
	"time"
)

// startedBy calls f and returns the goroutines, with their stacks, that are left of all
// that it has started, "" if all end in time. Others that run meanwhile do not
// count: a goroutine inherits the label of the one that starts it.
func startedBy(name string, wait time.Duration, f func()) (left string) {
	const key = "discoverytest"
	pprof.Do(context.Background(), pprof.Labels(key, name), func(context.Context) { f() })
	mark := fmt.Sprintf("%q:%q", key, name)
	for deadline := time.Now().Add(wait); ; time.Sleep(5 * time.Millisecond) {
		var all strings.Builder
		_ = pprof.Lookup("goroutine").WriteTo(&all, 1)
		var found []string
		for _, block := range strings.Split(all.String(), "\n\n") {
			if strings.Contains(block, mark) {
				found = append(found, block)
			}
		}
		if left = strings.Join(found, "\n\n"); left == "" || time.Now().After(deadline) {
			return left
		}
	}
}
