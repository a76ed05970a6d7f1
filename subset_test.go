package caddydiscovery

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	logtest "go.uber.org/zap/zaptest/observer"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// TestRecordClaimsSubsets has a config with sources in several registries: the record in
// each says which fleets of that one this proxy shares, once, also over reloads.
func TestRecordClaimsSubsets(t *testing.T) {
	name, m := newMemory(t)
	other := discoverytest.NewMemory()
	memories.Store(name+"-other", other)
	defer memories.Delete(name + "-other")
	config := func(options, sources string) string {
		port := freeport.String(t)
		return "{\n" + options + "\n}\nhttp://127.0.0.1:" + port + " {\n" + sources + "\n}"
	}
	registrar := func(name, id string) string {
		return "registrar {\nregistry memory " + name + "\nnode_id " + id + "\nendpoint http://10.0.0.1:80\n}\n"
	}
	source := func(name, path, rest string) string {
		return "reverse_proxy " + path + " {\ndynamic discovery {\nregistry memory " + name + "\n" + rest + "\n}\n}\n"
	}
	claims := func(m *discoverytest.Memory, id string) []string {
		n, err := discovery.ParseNode(m.Record(id))
		if err != nil {
			return []string{"no record"}
		}
		return strings.Fields(n.Metadata[discovery.KeySubsets])
	}
	load(t, config(registrar(name, "edge")+registrar(name, "second")+registrar(name+"-other", "edge"),
		source(name, "/a/*", "service orders\nsubset 5")+
			source(name, "/b/*", "service orders\nsubset 7")+
			source(name, "/c/*", "service pay\nsubset 5\nproxy_id p")+
			source(name, "/d/*", "service users")+
			source(name+"-other", "/e/*", "subset 3")))
	eventually(t, "the records stand", func() bool {
		return len(claims(m, "edge")) == 2 && len(claims(m, "second")) == 0 && len(claims(other, "edge")) == 1
	})
	if got := claims(m, "edge"); !slices.ContainsFunc(got, func(s string) bool { return strings.HasSuffix(s, ":7") }) ||
		!slices.ContainsFunc(got, func(s string) bool { return strings.HasSuffix(s, fmt.Sprintf(":%016x:5", picker.Hash("p"))) }) {
		t.Errorf("the record claims %v", got)
	}
	load(t, config(registrar(name, "edge"), source(name, "", "service orders")))
	eventually(t, "a config without a subset claims nothing", func() bool { return len(claims(m, "edge")) == 0 })
	load(t, config(registrar(name, "edge"), source(name, "", "service orders\nsubset 9")))
	eventually(t, "another one does again", func() bool { return len(claims(m, "edge")) == 1 && strings.HasSuffix(claims(m, "edge")[0], ":9") })

	subsets.Lock()
	defer subsets.Unlock()
	if len(subsets.of) != 1 {
		t.Errorf("the subsets of %d configs are known, want those of the one that runs", len(subsets.of))
	}
}

// TestFleetNames says which sources share their nodes.
func TestFleetNames(t *testing.T) {
	name, _ := newMemory(t)
	fleet := func(options string) string { return source(t, "registry memory "+name+"\n"+options).fleet() }
	base := fleet("service orders\nwhere zone a b\nwhere tier gold\nprefer rack 1")
	for options, equal := range map[string]bool{
		"service orders\nwhere tier gold\nwhere zone b a\nprefer rack 1":                       true,
		"service orders\nwhere zone a b\nwhere tier gold\nprefer rack 1\nsubset 9\nproxy_id x": true,
		"service orders\nwhere zone a b\nwhere tier gold\nprefer rack 2":                       false,
		"service orders\nwhere zone a\nwhere tier gold\nprefer rack 1":                         false,
		"service pay\nwhere zone a b\nwhere tier gold\nprefer rack 1":                          false,
		"service orders\nwhere zone a b\nwhere tier gold\nprefer rack 1\nscheme https":         false,
	} {
		if (fleet(options) == base) != equal {
			t.Errorf("%q is another fleet: %v, want %v", options, equal, !equal)
		}
	}
}

// TestSubsetLines says what is logged of the proxies that share a fleet, and how often.
func TestSubsetLines(t *testing.T) {
	core, logs := logtest.New(zap.InfoLevel)
	s := &subset{group: picker.NewGroup("orders", "p", 25), log: zap.New(core)}
	s.lines = newSubsetLimiter()
	steps := []struct {
		how  picker.Sharing
		want string
	}{
		{picker.Sharing{Proxies: 1, Nodes: 200, Wanted: 25, Subset: 25}, "drawn by chance"},
		{picker.Sharing{Proxies: 1, Nodes: 201, Wanted: 25, Subset: 25}, ""},
		{picker.Sharing{Proxies: 8, Nodes: 200, Wanted: 25, Subset: 25}, "sharing the nodes"},
		{picker.Sharing{Proxies: 8, Nodes: 200, Wanted: 25, Subset: 25}, ""},
		{picker.Sharing{Proxies: 8, Nodes: 300, Wanted: 25, Subset: 38}, "raised"},
		{picker.Sharing{Proxies: 8, Nodes: 310, Wanted: 25, Subset: 39}, ""},
		{picker.Sharing{Proxies: 7, Nodes: 310, Wanted: 25, Subset: 45}, "raised"},
	}
	for i, step := range steps {
		s.tell(step.how)
		lines := logs.TakeAll()
		switch {
		case step.want == "" && len(lines) > 0, step.want != "" && len(lines) != 1:
			t.Errorf("step %d: %v, want %q", i, lines, step.want)
		case step.want != "" && !strings.Contains(lines[0].Message, step.want):
			t.Errorf("step %d: %q, want %q", i, lines[0].Message, step.want)
		case i == 0 && (lines[0].ContextMap()["idle"] != "34%" || !strings.Contains(lines[0].ContextMap()["because"].(string), "registrar")):
			t.Errorf("%v", lines[0].ContextMap())
		}
	}
	for i := range 100 {
		s.tell(picker.Sharing{Proxies: 2 + i%5, Nodes: 310, Wanted: 25, Subset: 45})
	}
	if n := logs.Len(); n > 10 {
		t.Errorf("proxies that come and go have made %d lines", n)
	}

	// One that has just started and is listed expects others.
	s.told, s.begun, s.lines = picker.Sharing{}, time.Now(), newSubsetLimiter()
	s.group.Join()
	logs.TakeAll()
	s.tell(picker.Sharing{Proxies: 1, Nodes: 200, Wanted: 25, Subset: 25})
	if lines := logs.TakeAll(); len(lines) > 0 {
		t.Errorf("a proxy that has just started is told %v", lines)
	}
}

// TestSubsetAlone has a proxy start that shares its fleet with nobody, and say so without
// a request; and one with a fleet that is no larger than its subset, which says nothing.
func TestSubsetAlone(t *testing.T) {
	for nodes, want := range map[int]int{30: 1, 3: 0} {
		t.Run(fmt.Sprint(nodes), func(t *testing.T) {
			name, m := newMemory(t)
			for i := range nodes {
				list(t, m, fmt.Sprint("n", i), fmt.Sprintf("http://10.0.0.%d:80", i+1), "service", "orders")
			}
			list(t, m, "stranger", "http://10.1.0.1:80", "service", "pay")
			u := source(t, "registry memory "+name+"\nservice orders\nsubset 3")
			core, logs := logtest.New(zap.WarnLevel)
			u.subset.log = zap.New(core)
			u.directory.start()
			<-u.directory.Synced()
			u.subset.expectOthers(t.Context(), u.Subset, u.mayServe)
			lines := logs.FilterMessageSnippet("drawn by chance").All()
			if len(lines) != want {
				t.Fatalf("%d lines, want %d", len(lines), want)
			}
			if want > 0 && (lines[0].ContextMap()["nodes"] != int64(30) || lines[0].ContextMap()["idle"] != "35%") {
				t.Errorf("%v", lines[0].ContextMap())
			}
		})
	}
}
