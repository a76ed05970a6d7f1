package caddydiscovery

import (
	"math/rand/v2"
	"net/http"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
)

// seeded makes the draws of a source repeatable.
func seeded(u *Upstreams) *Upstreams {
	u.builder.Random = rand.New(rand.NewPCG(1, 2)).Uint64
	return u
}

// picked returns the ids of the nodes that a request gets, in order. Their
// addresses come from at.
func picked(t *testing.T, u *Upstreams, r *http.Request) []string {
	t.Helper()
	upstreams, err := u.GetUpstreams(r)
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]string, len(upstreams))
	for i, up := range upstreams {
		id, ok := nodeAt.Load(up.Dial)
		if !ok {
			t.Fatalf("picked %s, where no node is", up.Dial)
		}
		ids[i] = id.(string)
	}
	return ids
}

// TestOverridesReachRequests holds that what an operator says decides about requests.
func TestOverridesReachRequests(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", at("a"))
	list(t, m, "b", at("b"), "weight", "2")
	u := seeded(source(t, "registry memory "+name+"\npick 1"))
	operator := m.Open().(discovery.Overrider)
	tenth := 0.1
	for _, step := range []struct {
		override discovery.Override
		want     map[string]float64
	}{
		{discovery.Override{State: discovery.StateDraining}, map[string]float64{"a": 11_000}},
		{discovery.Override{Weight: &tenth}, map[string]float64{"a": 10_000 / 1.2 * 1.1, "b": 2_000 / 1.2 * 1.1}},
		{discovery.Override{Weight: new(float64)}, map[string]float64{"a": 11_000}},
	} {
		if err := operator.SetOverride(t.Context(), "b", step.override); err != nil {
			t.Fatal(err)
		}
		eventually(t, step.override.String(), func() bool {
			return u.directory.Snapshot().Node("b").Override().String() == step.override.String()
		})
		counts := make(map[string]int)
		for range 11_000 {
			counts[picked(t, u, request())[0]]++
		}
		chancetest.Check(t, step.override.String(), counts, step.want)
	}
}
