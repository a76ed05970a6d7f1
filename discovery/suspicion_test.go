package discovery

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// suspects returns a suspicion of nodes in use, so many of each service, with ids such
// as orders-0.
func suspects(guard int, usable func(*Entry) bool, services map[string]int) (*suspicion, map[string]*tracked) {
	s, nodes := newSuspicion(guard, usable), make(map[string]*tracked)
	for service, size := range services {
		for i := range size {
			t := &tracked{entry: newLapsed(fmt.Sprintf("%s-%d", service, i), service, 0).entry}
			s.count(t)
			nodes[t.id()] = t
		}
	}
	return s, nodes
}

func everybody(*Entry) bool { return true }

func TestSuspicionDecides(t *testing.T) {
	small := map[string]int{"orders": 2, "billing": 8}
	for _, test := range []struct {
		name     string
		guard    int
		services map[string]int
		before   string // nodes that are suspect already
		lapsing  string
		kept     string
		outages  string
		mass     bool
	}{
		{"one of many", 50, small, "", "billing-0", "", "", false},
		{"half of all", 50, small, "", "billing-0 billing-1 billing-2 billing-3 orders-0", "", "", false},
		{"most of all", 50, small, "", "billing-0 billing-1 billing-2 billing-3 billing-4 orders-0",
			"billing-0 billing-1 billing-2 billing-3 billing-4 orders-0", "", true},
		{"most of all, one by one", 50, small, "billing-0 billing-1 billing-2 billing-3 billing-4", "orders-0", "orders-0", "", true},
		{"most of a service", 50, small, "", "billing-0 billing-1 billing-2 billing-3 billing-4",
			"billing-0 billing-1 billing-2 billing-3 billing-4", "billing", false},
		{"the last of a service", 50, small, "", "orders-0 orders-1 billing-0", "orders-0 orders-1", "orders", false},
		{"the last of a service, one by one", 50, small, "orders-1", "orders-0", "orders-0", "orders", false},
		{"most of two", 10, small, "", "orders-0", "", "", false},
		{"most, by a laxer guard", 100, small, "", "billing-0 billing-1 billing-2 billing-3 billing-4 orders-0", "", "", false},
		{"without a guard", 0, small, "", "orders-0 orders-1", "", "", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, nodes := suspects(test.guard, everybody, test.services)
			for _, id := range strings.Fields(test.before) {
				nodes[id].presence = held
				s.count(nodes[id])
			}
			var lapsing []*tracked
			for _, id := range strings.Fields(test.lapsing) {
				lapsing = append(lapsing, nodes[id])
			}
			v := s.decide(lapsing, 0)
			var kept []string
			for _, t := range v.keep {
				kept = append(kept, t.id())
			}
			if got := strings.Join(kept, " "); got != test.kept || v.mass != test.mass || strings.Join(v.outages, " ") != test.outages {
				t.Errorf("kept [%s], mass lapse %v, outages of %v", got, v.mass, v.outages)
			}
			if len(v.keep)+len(v.remove) != len(lapsing) {
				t.Errorf("of %d nodes %d are kept and %d removed", len(lapsing), len(v.keep), len(v.remove))
			}
			if begins := test.before == ""; v.mass && v.all.begins() != begins {
				t.Errorf("it begins: %v", !begins)
			}
		})
	}
}

// Nodes that no request would reach are no loss, whoever else lapses.
func TestSuspicionLeavesOutWhomNobodyUses(t *testing.T) {
	s, nodes := suspects(50, func(e *Entry) bool { return e.Node.Service() != "strangers" }, map[string]int{"orders": 3, "strangers": 5})
	if s.counts.all.nodes != 3 {
		t.Errorf("%d nodes count", s.counts.all.nodes)
	}
	lapsing := []*tracked{nodes["orders-0"]}
	for i := range 5 {
		lapsing = append(lapsing, nodes[fmt.Sprint("strangers-", i)])
	}
	if v := s.decide(lapsing, 0); len(v.keep) != 0 || v.mass || len(v.outages) != 0 {
		t.Errorf("%d are kept, mass lapse %v, outages of %v", len(v.keep), v.mass, v.outages)
	}
}

// A node that is held goes when it has been the exception for a lease, and what is said
// of others at the same time begins that lease anew.
func TestSuspicionGivesUpTheException(t *testing.T) {
	s, nodes := suspects(50, everybody, map[string]int{"orders": 6})
	one := nodes["orders-0"]
	one.presence = held
	at := time.Duration(1)
	decide := func(want bool, when string) {
		t.Helper()
		v := s.decide([]*tracked{one}, at)
		if kept := len(v.keep) == 1; kept != want {
			t.Errorf("%s: kept %v, want %v", when, kept, want)
		}
		at += DefaultTTL
	}
	decide(true, "alone")
	for i := 1; i < 5; i++ {
		nodes[fmt.Sprint("orders-", i)].presence = held
		s.count(nodes[fmt.Sprint("orders-", i)])
	}
	decide(true, "a lease later, with most others")
	for i := 1; i < 5; i++ {
		nodes[fmt.Sprint("orders-", i)].presence = alive
		s.count(nodes[fmt.Sprint("orders-", i)])
	}
	decide(true, "alone again")
	decide(false, "for a lease")
}

// Those that lapsed one by one before there were too many belong to the same event, and
// are asked once.
func TestSuspicionAsksWhoLapsedBefore(t *testing.T) {
	s, nodes := suspects(50, everybody, map[string]int{"orders": 6, "billing": 20})
	lapse := func(id string) (asked string) {
		v := s.decide([]*tracked{nodes[id]}, 0)
		for _, r := range v.remove {
			s.uncount(r.t)
			n := r.t.lapsed()
			n.counts = DefaultTTL
			s.lapsed.add(n, 0, r.asked)
		}
		for _, t := range v.keep {
			t.presence = suspect
			s.count(t)
		}
		return ids(s.askLapsed(v))
	}
	for _, id := range []string{"billing-0", "orders-0", "orders-1", "orders-2"} {
		if asked := lapse(id); asked != "" {
			t.Errorf("%s are asked when %s lapses", asked, id)
		}
	}
	if asked := lapse("orders-3"); asked != "orders-0 orders-1 orders-2" {
		t.Errorf("[%s] are asked when most of their service lapses", asked)
	}
	if asked := lapse("orders-4"); asked != "" {
		t.Errorf("[%s] are asked again", asked)
	}
}

// What a first listing shows as overdue is decided together: of too many each is asked.
func TestSuspicionDecidesAboutTheOverdue(t *testing.T) {
	overdue := func(s *suspicion, size int) {
		for i := range size {
			n := newLapsed(fmt.Sprint("overdue-", i), "orders", 0)
			n.entry.liveness.renewed.Store(int64(-DefaultTTL))
			s.addOverdue(n)
		}
	}
	for _, test := range []struct{ overdue, asked int }{{3, 0}, {4, 4}} {
		s, nodes := suspects(50, everybody, map[string]int{"orders": 3})
		overdue(s, test.overdue)
		v, asked := s.decideOverdue(nodes, 0)
		if len(asked) != test.asked || v.mass != (test.asked > 0) || len(s.lapsed.byID) != test.overdue || len(s.overdue) != 0 {
			t.Errorf("of %d overdue nodes beside 3 that are not, %d are asked; %d are kept", test.overdue, len(asked), len(s.lapsed.byID))
		}
	}
	s, nodes := suspects(50, everybody, map[string]int{"overdue": 4}) // listed again since
	overdue(s, 4)
	if v, asked := s.decideOverdue(nodes, 0); len(asked)+len(s.lapsed.byID) != 0 || v.mass {
		t.Errorf("%d nodes in use are asked, %d are kept as lapsed", len(asked), len(s.lapsed.byID))
	}
}
