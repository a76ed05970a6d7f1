package redis

import (
	"fmt"
	"strings"
	"testing"
)

// What is asked for while a look is under way is kept once, and within a bound.
func TestWantedKeys(t *testing.T) {
	t.Parallel()
	var pending request
	for range 1000 {
		pending.add(requestFor("same"))
	}
	if len(pending.keys) != 1 || pending.some {
		t.Errorf("%d keys, want one", len(pending.keys))
	}
	long := strings.Repeat("x", 1<<10)
	for i := range 2 * maxWanted / len(long) {
		pending.add(requestFor(fmt.Sprint(i, long)))
	}
	size := 0
	for key := range pending.keys {
		size += len(key)
	}
	if size > maxWanted || size < maxWanted/2 || !pending.some {
		t.Errorf("%d bytes of keys, some=%v, want at most %d and a look at what is likely", size, pending.some, maxWanted)
	}
	// What came before has not made room, and is not lost.
	if !pending.keys["same"] {
		t.Error("the first key was lost")
	}
}
