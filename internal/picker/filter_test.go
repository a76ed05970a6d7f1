package picker

import (
	"fmt"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// TestReasons has a node that a source uses, and others that each lack one thing.
func TestReasons(t *testing.T) {
	b := newBuilder()
	b.Own = func(instance string) bool { return instance == "me" }
	b.Denied = func(e *discovery.Entry) Reason {
		if e.Node.ID == "denied" {
			return "denied: by deny"
		}
		return ""
	}
	b.Check = func(e *discovery.Entry) Reason {
		return map[string]Reason{"ill": Unhealthy, "new": NotChecked}[e.Node.ID]
	}
	q := &Query{ByService: true, Service: "orders", Where: []Criterion{{"zone", []string{"eu", "us"}}}}
	secure := node("secure", "service", "orders", "zone", "eu")
	secure.Endpoint.Scheme = "https"
	for _, test := range []struct {
		node      discovery.Node
		want      Reason
		wanted    bool
		unhealthy bool
	}{
		{node("fits", "service", "orders", "zone", "us"), "", true, false},
		{node("other", "service", "pay", "zone", "eu"), OtherService, false, false},
		{node("drains", "service", "orders", "zone", "eu", "state", "draining"), "draining", true, false},
		{node("light", "service", "orders", "zone", "eu", "weight", "0"), "weight 0", true, false},
		{secure, "scheme", false, false},
		{node("own", "service", "orders", "zone", "eu", "instance", "me"), "this process itself", false, false},
		{node("proxy", "service", "orders", "zone", "eu", "role", "proxy"), "role proxy", false, false},
		{node("elsewhere", "service", "orders", "zone", "mars"), "where zone", false, false},
		{node("denied", "service", "orders", "zone", "eu"), "denied: by deny", false, false},
		{node("ill", "service", "orders", "zone", "eu"), Unhealthy, true, true},
		{node("new", "service", "orders", "zone", "eu"), NotChecked, true, true},
	} {
		snapshot := snapshotOf(t, test.node)
		e := snapshot.Nodes()[0]
		got := b.Reason(e, q)
		if wanted := b.Wants(e, q); got != test.want || wanted != test.wanted || got.Unhealthy() != test.unhealthy {
			t.Errorf("%s: reason %q, wanted %v, unhealthy %v", e.Node.ID, got, wanted, got.Unhealthy())
		}
		if p := b.Build(snapshot, q); p.Empty() != (test.want != "") {
			t.Errorf("%s: it is picked: %v", e.Node.ID, !p.Empty())
		}
	}
	b.Proxies = true
	proxy := snapshotOf(t, node("proxy", "role", "proxy"))
	if got := b.Reason(proxy.Nodes()[0], &Query{}); got != "" {
		t.Errorf("a proxy is left out of a source that uses them: %q", got)
	}
	reasons, candidates := b.Reasons(snapshotOf(t, node("light", "weight", "0"), node("ill"), node("fits")), &Query{})
	if got := fmt.Sprint(candidates, reasons); got != "3 map[:1 unhealthy:1 weight 0:1]" {
		t.Errorf("reasons %s", got)
	}
}
