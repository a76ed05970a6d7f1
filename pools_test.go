package caddydiscovery

import (
	"slices"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// fakeMember is a source that asks for one node.
type fakeMember struct{ name, node string }

func (m *fakeMember) describe() string                         { return m.name }
func (m *fakeMember) wants(e *discovery.Entry) bool            { return e.Node.ID == m.node }
func (m *fakeMember) standing(*discovery.Entry) (string, bool) { return "", false }
func (m *fakeMember) until(*discovery.Entry) time.Time         { return time.Time{} }

// TestDirectoryKnowsItsMembers holds that a directory asks for what its own sources
// want, as long as they are there, and tells apart those that ask for the same.
func TestDirectoryKnowsItsMembers(t *testing.T) {
	d, other := new(sharedDirectory), new(sharedDirectory)
	a := &discovery.Entry{Node: discovery.Node{ID: "a"}}
	first, second, third := &fakeMember{"service orders", "b"}, &fakeMember{"service orders", "a"}, &fakeMember{"every service", "b"}
	for _, m := range []member{first, second, third} {
		d.join(m)
	}
	other.join(&fakeMember{"service orders", "b"})
	check := func(d *sharedDirectory, wanted bool, names ...string) {
		t.Helper()
		if d.wanted(a) != wanted {
			t.Errorf("the node is wanted: %v, want %v", !wanted, wanted)
		}
		var got []string
		for _, s := range d.namedSources() {
			got = append(got, s.Name)
		}
		if !slices.Equal(got, names) {
			t.Errorf("the sources are %q, want %q", got, names)
		}
	}
	check(d, true, "service orders", "service orders #2", "every service")
	check(other, false, "service orders")
	before := d.joined()
	d.leave(second)
	d.leave(second)
	check(d, false, "service orders", "every service")
	if len(before) != 3 || before[1] != member(second) {
		t.Error("what was handed out was changed")
	}
}
