package picker

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func joined(fleet, id string, subset int) *Group {
	g := NewGroup(fleet, id, subset)
	g.Join()
	return g
}

func claiming(id, claims string) discovery.Node { return node(id, discovery.KeySubsets, claims) }

func claimOf(groups ...*Group) string {
	claims, _ := Claims(groups)
	return claims
}

// TestGroup says which records count as proxies of a group.
func TestGroup(t *testing.T) {
	orders := joined("orders", "self", 25)
	other := claimOf(NewGroup("orders", "other", 30))
	hash := fmt.Sprintf("%016x", Hash("other"))
	tests := map[string]struct {
		claims string
		want   int // proxies, with this one
	}{
		"another one":                {other, 2},
		"among others":               {claimOf(NewGroup("pay", "other", 3), NewGroup("orders", "other", 30)), 2},
		"this one":                   {claimOf(orders), 1},
		"the successor of this one":  {claimOf(NewGroup("orders", "self", 40)), 1},
		"another group":              {claimOf(NewGroup("pay", "other", 30)), 1},
		"nothing":                    {"", 1},
		"a word":                     {"yes", 1},
		"no number":                  {orders.key + ":" + hash + ":", 1},
		"none":                       {orders.key + ":" + hash + ":0", 1},
		"fewer than none":            {orders.key + ":" + hash + ":-5", 1},
		"too many":                   {orders.key + ":" + hash + ":100001", 1},
		"far too many":               {orders.key + ":" + hash + ":99999999999999999999999", 1},
		"a short hash":               {orders.key + ":ff:5", 1},
		"no hash":                    {orders.key + ":zzzzzzzzzzzzzzzz:5", 1},
		"more words than may be":     {strings.Repeat(other+"    ", MaxClaims+5), 1},
		"as many words as there may": {strings.Repeat(claimOf(NewGroup("pay", "x", 9))+" ", MaxClaims-1) + other, 2},
	}
	for name, test := range tests {
		s := snapshotOf(t, claiming("x", test.claims), node("plain"))
		if got := joined("orders", "self", 25).Proxies(s); len(got) != test.want {
			t.Errorf("%s: %v, want %d proxies", name, got, test.want)
		}
		if NewGroup("orders", "self", 25).Proxies(s) != nil {
			t.Errorf("%s: a proxy that is not listed itself has a group", name)
		}
	}
}

// TestGroupIsBounded lists more proxies than are believed: each proxy believes itself and
// the same others.
func TestGroupIsBounded(t *testing.T) {
	var records []discovery.Node
	for i := range 3 * maxProxies {
		id := fmt.Sprint("proxy-", i)
		records = append(records, claiming(id, claimOf(NewGroup("orders", id, 5))))
	}
	s := snapshotOf(t, records...)
	believed := make(map[uint64]int)
	for i := range 3 * maxProxies {
		g := joined("orders", fmt.Sprint("proxy-", i), 5)
		proxies := g.Proxies(s)
		if len(proxies) != maxProxies {
			t.Fatalf("%d proxies are believed, want %d", len(proxies), maxProxies)
		}
		self := false
		for j, p := range proxies {
			believed[p.Hash]++
			self = self || p.Hash == g.self.Hash
			if j > 0 && proxies[j-1].Hash >= p.Hash {
				t.Fatal("they are not sorted")
			}
		}
		if !self {
			t.Fatal("a proxy does not believe itself")
		}
	}
	everywhere := 0
	for _, n := range believed {
		if n == 3*maxProxies {
			everywhere++
		}
	}
	if everywhere < maxProxies-1 {
		t.Errorf("%d proxies are believed by all, want %d", everywhere, maxProxies-1)
	}
}

// TestClaims says what a record claims for several sources.
func TestClaims(t *testing.T) {
	small, large, pay := NewGroup("orders", "p", 5), NewGroup("orders", "p", 9), NewGroup("pay", "p", 7)
	value, claimed := Claims([]*Group{small, large, pay})
	if words := strings.Fields(value); len(words) != 2 || len(claimed) != 3 ||
		!strings.Contains(value, large.key+fmt.Sprintf(":%016x:9", large.self.Hash)) || strings.Contains(value, ":5") {
		t.Errorf("%q for %d groups, want the larger subset of orders, and pay", value, len(claimed))
	}
	var many []*Group
	for i := range MaxClaims + 10 {
		many = append(many, NewGroup(fmt.Sprint("service-", i), "p", 100_000))
	}
	value, claimed = Claims(many)
	if len(claimed) != MaxClaims || len(strings.Fields(value)) != MaxClaims {
		t.Errorf("%d groups are claimed with %d words, want %d", len(claimed), len(strings.Fields(value)), MaxClaims)
	}
	if g := many[3]; !g.Claims(snapshotOf(t, claiming("x", value)).Nodes()[0]) {
		t.Error("the longest claims are not believed")
	}
	if value, claimed := Claims(nil); value != "" || claimed != nil {
		t.Errorf("%q for no groups", value)
	}
}

// TestLiars has a record claim to be a proxy that uses everything: what it costs is one
// share.
func TestLiars(t *testing.T) {
	const proxies, fleet = 4, 100
	liar := claiming("liar", claimOf(NewGroup("orders", "liar", discovery.MaxNodes)))
	records := []discovery.Node{liar}
	for i := range proxies {
		id := fmt.Sprint("proxy-", i)
		records = append(records, claiming(id, claimOf(NewGroup("orders", id, 1))))
	}
	for _, n := range plain(fleet) {
		n.Metadata[discovery.KeyService] = "orders"
		records = append(records, n)
	}
	s := snapshotOf(t, records...)
	used := make(map[string]bool)
	for i := range proxies {
		b := newBuilder()
		b.Subset, b.ProxyID = 1, fmt.Sprint("proxy-", i)
		b.Group = joined("orders", b.ProxyID, 1)
		members := b.Build(s, &Query{ByService: true, Service: "orders"}).First()
		if len(members) != fleet/(proxies+1) {
			t.Errorf("a proxy uses %d nodes, want %d", len(members), fleet/(proxies+1))
		}
		for _, e := range members {
			used[e.Node.ID] = true
		}
	}
	if idle := fleet - len(used); idle > fleet/(proxies+1) {
		t.Errorf("%d nodes are idle, want at most %d", idle, fleet/(proxies+1))
	}
}

// TestIdle holds the share that chance leaves idle against what was simulated elsewhere.
func TestIdle(t *testing.T) {
	for _, test := range []struct {
		nodes, subset int
		want          float64
	}{{1000, 100, 0.349}, {200, 25, 0.344}, {10, 10, 0}, {10, 20, 0}, {100, 99, 0.0001}, {100_000, 1, 0.368}} {
		if got := Idle(test.nodes, test.subset); got < test.want-0.001 || got > test.want+0.001 {
			t.Errorf("%d of %d nodes leave %.3f idle, want %.3f", test.subset, test.nodes, got, test.want)
		}
	}
}

// TestSharingOutIsPaid has a group whose nodes take long to share out, and one of them
// leave and one come: for a while the others stay as they are, and then it is exact again.
func TestSharingOutIsPaid(t *testing.T) {
	b := newBuilder()
	b.Subset, b.ProxyID = 10, "self"
	b.Group = joined("orders", "self", 10)
	claims := claiming("other", claimOf(NewGroup("orders", "other", 10)))
	query := &Query{ByService: true, Service: "orders"}
	var nodes []discovery.Node
	for _, n := range plain(21) {
		n.Metadata[discovery.KeyService] = "orders"
		nodes = append(nodes, n)
	}
	first := b.Build(snapshotOf(t, append(nodes[1:], claims)...), query)
	shared := first.tiers[0].shared
	if len(first.First()) != 10 || first.expired() {
		t.Fatalf("%d members, expired %v", len(first.First()), first.expired())
	}
	shared.took = maxShareGap // a fortune
	lost := first.First()[3].Node.ID
	var changed []discovery.Node
	for _, n := range append(nodes, claims) {
		if n.ID != lost {
			changed = append(changed, n)
		}
	}
	s := snapshotOf(t, changed...)
	second := b.succeed(first, s, query)
	if got := ids(second.First()); len(got) != 9 || missing(got, ids(first.First())) > 0 {
		t.Errorf("meanwhile the members are %v, want those that are left of %v", got, ids(first.First()))
	}
	if second.until.IsZero() || second.expired() {
		t.Errorf("it is good until %v", second.until)
	}
	second.tiers[0].shared.made = shared.made.Add(-2 * maxShareGap) // which has passed
	third := b.succeed(second, s, query)
	if got, want := ids(third.First()), ids(b.Build(s, query).First()); missing(got, want) > 0 || len(got) != 10 || !third.until.IsZero() {
		t.Errorf("then the members are %v, want %v", got, want)
	}
	if again := b.succeed(third, s, query); again.tiers[0].shared.prices == nil || &again.tiers[0].shared.mine[0] != &third.tiers[0].shared.mine[0] {
		t.Error("the same nodes are shared out again")
	}
}
