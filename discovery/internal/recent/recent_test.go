package recent

import (
	"fmt"
	"strings"
	"testing"
)

func length(v string) int { return len(v) }

// held returns what the map holds, in number and in bytes.
func held(m *Map[string]) (entries, bytes int) {
	for _, half := range []map[string]string{m.young, m.old} {
		for key, v := range half {
			entries, bytes = entries+1, bytes+len(key)+len(v)
		}
	}
	return entries, bytes
}

func TestForgetsWhatWasNotPutForLongest(t *testing.T) {
	t.Parallel()
	m := NewMap(3, 1<<10, length)
	for i := range 100 {
		m.Put("again", fmt.Sprint(i))
		m.Put(fmt.Sprint(i), "")
		if n, _ := held(m); n > 6 {
			t.Fatalf("it holds %d entries, want at most 6", n)
		}
		if v, known := m.Get("again"); !known || v != fmt.Sprint(i) {
			t.Fatalf("after %d others: %q, %t", i, v, known)
		}
	}
	for _, key := range []string{"98", "99"} {
		if _, known := m.Get(key); !known {
			t.Errorf("one of the last, %s, is forgotten", key)
		}
	}
	if _, known := m.Get("50"); known {
		t.Error("an old entry is kept")
	}
	m.Delete("again")
	if _, known := m.Get("again"); known {
		t.Error("it keeps what it is told to forget")
	}
}

func TestBytesAreBounded(t *testing.T) {
	t.Parallel()
	m := NewMap(1000, 100, length)
	for i := range 500 {
		m.Put(fmt.Sprintf("%04d", i), strings.Repeat("x", i%30))
		m.Put("again", strings.Repeat("x", i%40))
		if _, n := held(m); n > 200 {
			t.Fatalf("it holds %d bytes, want at most 200", n)
		}
		if i%7 == 0 {
			m.Delete(fmt.Sprintf("%04d", i))
		}
	}
	young := 0
	for key, v := range m.young {
		young += len(key) + len(v)
	}
	if m.bytes != young {
		t.Errorf("it counts %d bytes, and holds %d", m.bytes, young)
	}
	m.Put(strings.Repeat("k", 300), "")
	m.Put("next", "")
	m.Put("more", "")
	if _, known := m.Get("next"); !known {
		t.Error("a key that is too long costs the one after it")
	}
}
