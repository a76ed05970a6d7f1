package natspubsub

import (
	"fmt"
	"testing"
)

func TestMemory(t *testing.T) {
	t.Parallel()
	m := newMemory[int](3)
	for i := range 100 {
		m.note("live", i)
		m.note(fmt.Sprint(i), i)
		if n := len(m.young) + len(m.old); n > 6 {
			t.Fatalf("it holds %d ids, want at most 6", n)
		}
		// What is noted again and again is never forgotten.
		if v, known := m.recall("live"); !known || v != i {
			t.Fatalf("after %d others: %d, %t", i, v, known)
		}
	}
	for _, id := range []string{"98", "99"} {
		if _, known := m.recall(id); !known {
			t.Errorf("one of the last, %s, is forgotten", id)
		}
	}
	if _, known := m.recall("50"); known {
		t.Error("an old id is remembered")
	}
	m.forget("live")
	if _, known := m.recall("live"); known {
		t.Error("it remembers what it is told to forget")
	}
}
