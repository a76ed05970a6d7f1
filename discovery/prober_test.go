package discovery

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
)

// answers lets a prober work until nothing is asked any more.
func answers(ctx context.Context, p *prober, fleet int) {
	for p.dialWaiting(ctx, fleet); p.busy(); p.dialWaiting(ctx, fleet) {
		p.take(<-p.done, answer.deliver)
	}
}

func entryAt(id, address string) *Entry {
	endpoint, err := ParseEndpoint(address)
	if err != nil {
		panic(err)
	}
	n := Node{ID: id, Endpoint: endpoint, Metadata: map[string]string{KeyService: "orders"}}
	return newEntry(n, DefaultTTL, new(liveness))
}

func TestProberGivesEachAnswerToWhoeverAsked(t *testing.T) {
	down := errors.New("down")
	p := newProber(newDialer(Options{Probe: func(_ context.Context, address string) error {
		if strings.HasPrefix(address, "10.0.0.2:") {
			return down
		}
		return nil
	}}))
	var got []string
	ask := func(e *Entry) *probe {
		return p.ask(func() *Entry { return e }, func(a answer) { got = append(got, fmt.Sprint(e.Node.ID, " ", a.err)) })
	}
	ask(entryAt("up", "http://10.0.0.1:80"))
	ask(entryAt("down", "http://10.0.0.2:80"))
	// A node that moves while it waits is asked where it is when its turn comes.
	moving := entryAt("moving", "http://10.0.0.2:80")
	p.ask(func() *Entry { return moving }, func(a answer) { got = append(got, fmt.Sprint("moving ", a.err)) })
	moving = entryAt("moving", "http://10.0.0.3:80")
	ask(entryAt("withdrawn", "http://10.0.0.1:80")).withdraw()
	answers(t.Context(), p, 4)
	slices.Sort(got)
	if want := "down down, moving <nil>, up <nil>"; strings.Join(got, ", ") != want {
		t.Errorf("answers [%s], want [%s]", strings.Join(got, ", "), want)
	}
}

// However many wait, so many are asked at once as the fleet is worth; and who has
// withdrawn a question hears no answer, nor is it asked if it still waits.
func TestProberIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		p := newProber(newDialer(Options{Probe: func(ctx context.Context, _ string) error {
			<-ctx.Done()
			return ctx.Err()
		}}))
		e, answered := entryAt("a", "http://10.0.0.1:80"), 0
		var probes []*probe
		for range 3000 {
			probes = append(probes, p.ask(func() *Entry { return e }, func(answer) { answered++ }))
		}
		for _, test := range []struct{ fleet, want int }{{0, 128}, {2560, 128}, {10_000, 500}, {100_000, 1024}} {
			if p.dialWaiting(ctx, test.fleet); p.running != test.want {
				t.Errorf("of a fleet of %d nodes %d are asked at once, want %d", test.fleet, p.running, test.want)
			}
		}
		for _, q := range probes[1000:] {
			q.withdraw()
		}
		answers(ctx, p, 100_000) // each ends in time
		if answered != 1000 {
			t.Errorf("%d answers, want 1000", answered)
		}
		p.ask(func() *Entry { return e }, func(answer) { answered++ })
		p.dialWaiting(ctx, 0)
		cancel()
		if p.wait(); answered != 1000 || p.running != 0 {
			t.Errorf("after its end %d answers, %d are asked", answered, p.running)
		}
	})
}
