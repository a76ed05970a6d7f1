package picker

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/balance"
	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
)

// loaded returns a builder by loads, which the test sets, and its clock.
func loaded() (b *Builder, loads map[string]float64, now *time.Duration) {
	b, loads, now = newBuilder(), make(map[string]float64), new(time.Duration)
	b.Strategy = Shares(1)
	b.InFlight = func(*discovery.Entry) int { return 0 }
	b.Clock = func() time.Duration { return *now }
	b.Usage = func(e *discovery.Entry, _ time.Duration) balance.Member {
		return balance.Member{Weight: e.Weight(), Load: loads[e.Node.ID]}
	}
	return b, loads, now
}

// TestSharesGoByLoad has shares be those of the loads, and be computed once a second.
func TestSharesGoByLoad(t *testing.T) {
	b, loads, now := loaded()
	loads["a"], loads["b"], loads["c"] = 0.9, 0.3, 0.1
	p := b.Build(snapshotOf(t, node("a"), node("b"), node("c")), &Query{})
	shares := func(what string, want map[string]float64) {
		t.Helper()
		counts, _ := runs(p, 13_000)
		chancetest.Check(t, what, counts, want)
	}
	first := map[string]float64{"a": 1000, "b": 3000, "c": 9000}
	shares("at first", first)
	loads["c"] = 0.9
	*now += sharesCount - 1
	shares("within a second", first)
	*now++
	shares("after it", map[string]float64{"a": 2600, "b": 7800, "c": 2600})
}

// TestSharesYieldToWhatIsInFlight has a node that gets a large share keep its requests.
func TestSharesYieldToWhatIsInFlight(t *testing.T) {
	b, loads, _ := loaded()
	flying := map[string]int{"a": 50, "b": 1}
	b.InFlight = func(e *discovery.Entry) int { return flying[e.Node.ID] }
	loads["a"], loads["b"] = 0.1, 0.9
	p := b.Build(snapshotOf(t, node("a"), node("b")), &Query{})
	// Of two that are drawn, one is the other in 18 of 100.
	counts, _ := runs(p, 10_000)
	chancetest.Check(t, "stuck", counts, map[string]float64{"a": 8_100, "b": 1_900})
	flying["b"] = 10
	counts, _ = runs(p, 10_000)
	chancetest.Check(t, "as busy as its share", counts, map[string]float64{"a": 9_900, "b": 100})
}

// TestSharesAreComputedByOne has many requests find them old.
func TestSharesAreComputedByOne(t *testing.T) {
	b, loads, _ := loaded()
	began := time.Now()
	b.Clock = func() time.Duration { return time.Since(began) * 1000 }
	b.Random = func() uint64 { return 1 << 40 }
	for i := range 100 {
		loads[fmt.Sprintf("n%05d", i)] = float64(i)
	}
	p := b.Build(snapshotOf(t, plain(100)...), &Query{})
	var users sync.WaitGroup
	for range 8 {
		users.Go(func() {
			for range 1000 {
				if len(p.Pick(nil, Choice{Strategy: b.Strategy}, nil)) != 1 {
					t.Error("nothing was picked")
					return
				}
			}
		})
	}
	users.Wait()
}
