package discovery_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestOverride(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		conn := m.Open()
		operator := conn.(discovery.Overrider)
		set := func(id string, o discovery.Override) {
			t.Helper()
			if err := operator.SetOverride(context.Background(), id, o); err != nil {
				t.Fatal(err)
			}
		}
		set("a", discovery.Override{State: discovery.StateDraining})
		write(m, newNode("a"), newNode("b", discovery.KeyWeight, "4"), newNode("c", discovery.KeyState, "maintenance"))
		d := follow(t, conn, discovery.Options{TTL: time.Hour})
		want := func(when, id string, state discovery.State, weight float64) {
			t.Helper()
			time.Sleep(time.Second) // what the rate of snapshots allows
			synctest.Wait()
			e := d.Snapshot().Node(id)
			if e == nil || e.State() != state || e.Weight() != weight {
				t.Fatalf("%s: %s is %+v, want it %s with weight %v", when, id, e, state, weight)
			}
		}
		want("an override from before", "a", discovery.StateDraining, 1)
		set("b", discovery.Override{Weight: new(0.25)})
		want("a weight", "b", discovery.StateUp, 1)
		write(m, newNode("b", discovery.KeyWeight, "8"))
		want("another record", "b", discovery.StateUp, 2)
		set("c", discovery.Override{State: discovery.StateUp, Until: time.Now().Add(90 * time.Second)})
		want("the operator against the record", "c", discovery.StateUp, 1)
		set("late", discovery.Override{State: discovery.StateMaintenance})
		write(m, newNode("late"))
		want("an override before its node", "late", discovery.StateMaintenance, 1)
		if err := operator.ClearOverride(context.Background(), "a"); err != nil {
			t.Fatal(err)
		}
		want("cleared", "a", discovery.StateUp, 1)
		m.Wipe()
		write(m, newNode("b", discovery.KeyWeight, "8"))
		want("the registry was wiped", "b", discovery.StateUp, 2)
		time.Sleep(100 * time.Second)
		want("its time is over", "c", discovery.StateMaintenance, 1)
		if got := d.Snapshot().Node("c").Override(); !got.IsZero() {
			t.Errorf("the override that has ended is still there: %v", got)
		}
	})
}

func TestParseOverride(t *testing.T) {
	until := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for data, want := range map[string]discovery.Override{
		`{}`:                   {},
		`{"state":"draining"}`: {State: discovery.StateDraining},
		`{"State":"Maintenance","Weight":0.5,"Until":"2026-01-02T03:04:05Z"}`: {State: discovery.StateMaintenance, Weight: new(0.5), Until: until},
		`{"weight":0,"by":"ann"}`: {Weight: new(0.0)},
	} {
		o, err := discovery.ParseOverride([]byte(data))
		if err != nil || o.String() != want.String() || !o.Until.Equal(want.Until) {
			t.Errorf("%s is %v, %v, want %v", data, o, err, want)
			continue
		}
		again, err := discovery.AppendOverride(nil, o)
		if err != nil {
			t.Errorf("writing %v: %v", o, err)
		} else if back, err := discovery.ParseOverride(again); err != nil || back.String() != o.String() {
			t.Errorf("%v came back as %v, %v", o, back, err)
		}
	}
	for _, data := range []string{
		"", "null", "[]", `"up"`, `{"state":"gone"}`, `{"weight":-1}`, `{"weight":1e99}`, `{"until":"tomorrow"}`,
		`{"state":"` + strings.Repeat("x", 5000) + `"}`,
	} {
		if o, err := discovery.ParseOverride([]byte(data)); !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("%.40q is %v, %v, want an error that wraps ErrInvalid", data, o, err)
		}
	}
}
