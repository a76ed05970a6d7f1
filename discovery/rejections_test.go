package discovery

import (
	"fmt"
	"strings"
	"testing"
)

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

// The same bad record again is no news, another reason is, and a listing that does not
// show it ends it.
func TestRejections(t *testing.T) {
	r := newRejections()
	bad := func(watch uint64, key, reason string) Rejection {
		return Rejection{ID: "x", Key: key, Err: fmt.Errorf("%w %s", ErrInvalid, reason), watch: watch}
	}
	for _, step := range []struct {
		is   Rejection
		news bool
	}{
		{bad(1, "a", "load"), true},
		{bad(1, "a", "load"), false},
		{bad(1, "a", "endpoint"), true},
		{bad(1, "b", "load"), true},
		{bad(2, "b", "load"), false},
	} {
		if rejected, news := r.add(step.is.Key, step.is); news != step.news || rejected.Key != step.is.Key || rejected.Err.Error() != step.is.Err.Error() {
			t.Errorf("%+v: news %v, %+v", step, news, rejected)
		}
	}
	if r.of("b", 2) == nil || r.of("a", 2) != nil || r.of("a", 1) == nil {
		t.Error("it is not known which watch rejected which record")
	}
	r.endListing(2)
	if all := r.all(); len(all) != 1 || all[0].Key != "b" {
		t.Errorf("%v is left, want b", all)
	}
	r.remove("b")
	if len(r.all()) != 0 {
		t.Error("a good record is still rejected")
	}
}
