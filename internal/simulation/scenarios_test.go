package simulation

import (
	"flag"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

var (
	report = flag.String("report", "", "folder of the documents into which TestSimulation writes its table and pictures")
	seed   = flag.Uint64("seed", 1, "of all chances in TestSimulation")
)

// policies are those that are compared, by their strategies.
var policies = []struct {
	name     string
	strategy picker.Strategy
}{
	{"random", picker.Draw(1)},
	{"round_robin", picker.Turns(1)},
	{"least_conn", picker.LeastBusy(1)},
	{"least_load", picker.Shares(1)},
	{"least_latency", picker.Soonest(1)},
}

// even returns so many equal machines, and has the first of them differ.
func even(n int, differs func(*machine)) func() []*machine {
	return func() []*machine {
		var all []*machine
		for range n {
			all = append(all, &machine{workers: 8, takes: 10 * time.Millisecond})
		}
		if differs != nil {
			differs(all[0])
		}
		return all
	}
}

// uneven returns four machines each of the power of two, four and eight workers.
func uneven() []*machine {
	var all []*machine
	for i := range 12 {
		all = append(all, &machine{workers: 2 << (i / 4), takes: 10 * time.Millisecond})
	}
	return all
}

const (
	healthy  = "five equal nodes"
	slowNode = "one of five takes 200 ms more"
	failing  = "one of five fails at once"
	weak     = "one of five has a quarter of the power"
	mixed    = "twelve, of one, two and four times the power"
	gauged   = "the same, with a count of requests for load"
	changing = "one of five loses three quarters of its power for 40 s"
	joining  = "a sixth node joins"
)

// scenarios use about half of what their fleets can serve: 60 % where nodes are uneven.
var scenarios = []scenario{
	{name: healthy, machines: even(5, nil), proxies: 4, rate: 2000, warm: 30 * time.Second, lasts: 90 * time.Second, beat: 5 * time.Second},
	{name: slowNode, machines: even(5, func(m *machine) { m.extra = 200 * time.Millisecond }),
		proxies: 4, rate: 2000, warm: 10 * time.Second, lasts: 70 * time.Second, beat: 5 * time.Second},
	{name: failing, machines: even(5, func(m *machine) { m.fails = true }),
		proxies: 4, rate: 2000, warm: 10 * time.Second, lasts: 70 * time.Second, beat: 5 * time.Second},
	{name: weak, machines: even(5, func(m *machine) { m.workers = 2 }),
		proxies: 4, rate: 2000, warm: 60 * time.Second, lasts: 120 * time.Second, beat: 5 * time.Second},
	{name: mixed, machines: uneven, proxies: 8, rate: 3400, warm: 60 * time.Second, lasts: 120 * time.Second, beat: 10 * time.Second},
	{name: gauged, machines: uneven, proxies: 8, rate: 3400, warm: 60 * time.Second, lasts: 120 * time.Second, beat: 10 * time.Second, gauge: true},
	{name: changing, machines: even(5, nil), proxies: 4, rate: 2000, warm: 20 * time.Second, lasts: 120 * time.Second, beat: 5 * time.Second,
		change: map[time.Duration]func(*world){
			40 * time.Second: func(w *world) { w.nodes[0].workers = 2 },
			80 * time.Second: func(w *world) { w.nodes[0].workers = 8; w.work(w.nodes[0]) },
		}},
	{name: joining, machines: even(6, nil), proxies: 4, rate: 2000, warm: 30 * time.Second, lasts: 60 * time.Second, beat: 5 * time.Second, late: true},
}

// simulate runs a scenario under a policy.
func (s scenario) simulate(t *testing.T, strategy picker.Strategy) result {
	t.Helper()
	w := newWorld(t, s, strategy, *seed)
	w.run()
	return w.result()
}

// shorter returns the scenario with half of what passes before it is counted, and a third
// of what is.
func (s scenario) shorter() scenario {
	if len(s.change) == 0 {
		s.lasts = s.warm/2 + (s.lasts-s.warm)/3
		s.warm /= 2
	}
	return s
}

// TestSimulation holds what the policies promise. With -report it compares all of them at
// length, and writes the table and the pictures.
func TestSimulation(t *testing.T) {
	results := make(map[string]map[string]result) // by scenario and policy
	for _, s := range scenarios {
		results[s.name] = make(map[string]result)
		for _, p := range policies {
			if *report == "" {
				if p.name == "random" || p.name == "round_robin" {
					continue // which queues grow under for as long as it lasts
				}
				results[s.name][p.name] = s.shorter().simulate(t, p.strategy)
			} else {
				results[s.name][p.name] = s.simulate(t, p.strategy)
			}
			r := results[s.name][p.name]
			t.Logf("%s, %s: share %.1f %%, errors %.2f %%, p50 %v, p95 %v, p99 %v, peak %.1f", s.name, p.name,
				100*r.share, 100*r.errors, r.p50, r.p95, r.p99, r.peak)
		}
	}
	bounds(t, results)
	if *report != "" && !t.Failed() {
		if err := writeReport(*report, results); err != nil {
			t.Fatal(err)
		}
	}
}

// bounds holds the results against what is promised.
func bounds(t *testing.T, results map[string]map[string]result) {
	t.Helper()
	most := func(what string, got, most float64) {
		t.Helper()
		if got > most {
			t.Errorf("%s: %.3f, want at most %.3f", what, got, most)
		}
	}
	ratio := func(scenario, policy string, quantile func(result) time.Duration, base result) float64 {
		return float64(quantile(results[scenario][policy])) / float64(quantile(base))
	}
	p95 := func(r result) time.Duration { return r.p95 }
	p99 := func(r result) time.Duration { return r.p99 }
	best := results[healthy]["least_conn"]

	most("the share of a slow node under least_latency", results[slowNode]["least_latency"].share, 0.03)
	most("p95 beside a slow node under least_latency, of that of a healthy fleet", ratio(slowNode, "least_latency", p95, best), 2)
	most("the share of a failing node under least_latency", results[failing]["least_latency"].share, 0.01)
	most("the share of a failing node under least_load", results[failing]["least_load"].share, 0.05)
	for _, policy := range []string{"least_load", "least_latency"} {
		for _, s := range []string{healthy, failing, weak, mixed, gauged, changing, joining} {
			bound := 1.25
			if s == gauged { // a count at an instant, ten seconds ago, says little
				bound = 2
			}
			most("p99 of "+s+" under "+policy+", of that under least_conn", ratio(s, policy, p99, results[s]["least_conn"]), bound)
			// Nobody is sent everything at once: with all of some 30 requests in flight at a
			// weak node this would be 25 and more.
			most("the most requests at one node of "+s+" under "+policy, results[s][policy].peak, 20)
		}
		most("the share of a weak node under "+policy+", where its part of the power is 1 in 17", results[weak][policy].share, 0.12)
		most("the share of a node that has just joined under "+policy, results[joining][policy].share, 1.5/6)
		if got := results[joining][policy].share; got < 0.5/6 {
			t.Errorf("%s: a node that has joined gets %.3f of the requests, want about a sixth", policy, got)
		}
	}
	for _, s := range []string{mixed, gauged} {
		shares := results[s]["least_load"].shares
		if strong, small := shares[8]+shares[9]+shares[10]+shares[11], shares[0]+shares[1]+shares[2]+shares[3]; strong < 2*small {
			t.Errorf("%s under least_load: nodes of four times the power get %.2f, the others %.2f, want twice as much", s, strong, small)
		}
	}
}
