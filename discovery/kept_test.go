package discovery

import (
	"strings"
	"testing"
)

// A first listing that never ends, in which nodes come and go, leaves no trace of
// those that are gone.
func TestNothingIsKeptOfWhatWasNeverShown(t *testing.T) {
	l := &loop{Directory: NewDirectory(nil, Options{}), changed: make(map[string]*Entry)}
	shown := lapsedNode("shown", "orders", 0).entry
	l.show(l.snapshot.Load().succeed(map[string]*Entry{"shown": shown}, true))
	l.change("fleeting", lapsedNode("fleeting", "orders", 0).entry)
	l.change("fleeting", nil)
	l.change("shown", shown)
	l.change("shown", nil)
	if _, noted := l.changed["shown"]; len(l.changed) != 1 || !noted {
		t.Errorf("the next snapshot changes %v, want that the one goes that was shown", l.changed)
	}
}

// However long the key of a record is that is rejected, it is not kept.
func TestRecordNameIsBounded(t *testing.T) {
	long := strings.Repeat("k", 1<<20)
	names := make(map[string]bool)
	for _, n := range []string{recordName(long, ""), recordName(long+"k", ""), recordName("short", "a"), recordName("", "short"), recordName("", "a")} {
		if len(n) > maxKey {
			t.Errorf("a name of %d bytes", len(n))
		}
		names[n] = true
	}
	if len(names) != 5 || recordName(long, "a") != recordName(long, "b") || recordName("short", "a") != "short" {
		t.Error("names are mixed up")
	}
}
