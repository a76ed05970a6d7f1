package main

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// The demo is a check too: what must not happen has to be seen.
func TestSettle(t *testing.T) {
	start := time.Now()
	at := func(d time.Duration) time.Time { return start.Add(d) }
	for _, c := range []struct {
		name       string
		happens    func(a *account, n *node)
		incomplete bool
		want       string // part of the only problem, "" for none
	}{
		{name: "served", happens: func(a *account, n *node) { a.served(n.id, start) }},
		{name: "failed", want: "1 requests failed", happens: func(a *account, n *node) {
			a.served(n.id, start)
			a.failure(errors.New("no"))
		}},
		{name: "never served", want: "never served", happens: func(a *account, _ *node) { a.served("another", start) }},
		{name: "never served, interrupted", incomplete: true, happens: func(*account, *node) {}},
		{name: "served before it left", happens: func(a *account, n *node) {
			a.served(n.id, at(0))
			n.leftAt = at(time.Second)
		}},
		{name: "served as it left", happens: func(a *account, n *node) {
			n.leftAt = at(time.Second)
			a.served(n.id, at(time.Second+allowance))
		}},
		{name: "served after it left", want: "100ms after it had left", happens: func(a *account, n *node) {
			n.leftAt = at(time.Second)
			a.served(n.id, at(1100*time.Millisecond))
			a.served(n.id, at(0)) // answered late, but sent in time
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, n := newAccount(), &node{id: "orders-1", registered: start}
			c.happens(a, n)
			_, problems := a.settle([]*node{n}, !c.incomplete)
			if c.want == "" {
				if len(problems) > 0 {
					t.Errorf("problems %v, want none", problems)
				}
				return
			}
			if len(problems) != 1 || !strings.Contains(problems[0].Error(), c.want) {
				t.Errorf("problems %v, want one with %q", problems, c.want)
			}
		})
	}
}
