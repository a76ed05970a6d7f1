package caddydiscovery

import (
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func TestDifferencesOfSnapshots(t *testing.T) {
	entries := make(map[string]*discovery.Entry) // by id and version, such as a1
	snapshot := func(nodes string) (list []*discovery.Entry) {
		for node := range strings.FieldsSeq(nodes) {
			if entries[node] == nil {
				entries[node] = &discovery.Entry{Node: discovery.Node{ID: node[:1], Metadata: map[string]string{"": node}}}
			}
			list = append(list, entries[node])
		}
		return list
	}
	show := func(e *discovery.Entry) string {
		if e == nil {
			return "-"
		}
		return e.Node.Metadata[""]
	}
	for _, c := range []struct{ was, is, want string }{
		{"", "", ""},
		{"", "a1 b1", "-:a1 -:b1"},
		{"a1 b1", "", "a1:- b1:-"},
		{"a1 b1 c1", "a1 b1 c1", ""},
		{"a1 b1 c1", "a1 b2 c1", "b1:b2"},
		{"a1 c1", "b1 c2 d1", "a1:- -:b1 c1:c2 -:d1"},
		{"b1 d1", "a1 b1 c1", "-:a1 -:c1 d1:-"},
	} {
		var got []string
		for was, is := range differences(snapshot(c.was), snapshot(c.is)) {
			got = append(got, show(was)+":"+show(is))
		}
		if got := strings.Join(got, " "); got != c.want {
			t.Errorf("from [%s] to [%s]: [%s], want [%s]", c.was, c.is, got, c.want)
		}
		for range differences(snapshot(c.was), snapshot(c.is)) {
			break // which ends it
		}
	}
}
