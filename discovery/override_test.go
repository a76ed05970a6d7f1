package discovery_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func weight(w float64) *float64 { return &w }

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
		set("b", discovery.Override{Weight: weight(0.25)})
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

func TestJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		conn := m.Open()
		write(m, newNode("first"))
		d := follow(t, conn, discovery.Options{TTL: time.Hour})
		joined := func(id string) time.Time {
			t.Helper()
			time.Sleep(time.Second)
			synctest.Wait()
			return d.Snapshot().Node(id).Joined()
		}
		if at := joined("first"); !at.IsZero() {
			t.Errorf("a node of the first listing counts as new since %v", at)
		}
		began := time.Now()
		write(m, newNode("second"))
		if at := joined("second"); at.Before(began) || time.Since(at) > time.Minute {
			t.Errorf("a node that joined counts as new since %v, want from %v", at, began)
		}
		before := joined("second")
		write(m, newNode("second", discovery.KeyVersion, "2"))
		if at := joined("second"); at != before {
			t.Errorf("an update made the node new again")
		}
		for what, n := range map[string]discovery.Node{
			"another process":    newNode("second", discovery.KeyInstance, "x"),
			"back from draining": newNode("second", discovery.KeyInstance, "x", discovery.KeyWeight, "2"),
		} {
			write(m, newNode("second", discovery.KeyState, "draining"))
			before = joined("second")
			write(m, n)
			if at := joined("second"); !at.After(before) {
				t.Errorf("%s: it counts as new since %v, want from later on", what, at)
			}
		}
		m.Wipe()
		write(m, newNode("third"))
		if at := joined("third"); !at.IsZero() {
			t.Errorf("a node that is first heard after the registry was wiped counts as new since %v", at)
		}
		time.Sleep(2 * time.Hour)
		write(m, newNode("fourth"))
		if at := joined("fourth"); at.IsZero() {
			t.Error("a node that joined long after the registry was wiped does not count as new")
		}
	})
}

func TestAttached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"))
		d := follow(t, m.Open(), discovery.Options{})
		type mine struct{ n atomic.Int64 }
		type theirs struct{ n atomic.Int64 }
		attached := func() (*mine, *theirs) {
			e := d.Snapshot().Node("a")
			return discovery.Attached[mine](e), discovery.Attached[theirs](e)
		}
		a, b := attached()
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				a, b := attached()
				a.n.Add(1)
				b.n.Add(2)
			})
		}
		group.Wait()
		if a.n.Load() != 8 || b.n.Load() != 16 {
			t.Errorf("two users meet, or lose what they attached: %d, %d", a.n.Load(), b.n.Load())
		}
		write(m, newNode("a", discovery.KeyZone, "eu"))
		expect(t, d, "a", "updated")
		if c, d := attached(); c != a || d != b {
			t.Error("an update of the record lost what was attached")
		}
	})
}

func TestParseOverride(t *testing.T) {
	until := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for data, want := range map[string]discovery.Override{
		`{}`:                   {},
		`{"state":"draining"}`: {State: discovery.StateDraining},
		`{"State":"Maintenance","Weight":0.5,"Until":"2026-01-02T03:04:05Z"}`: {State: discovery.StateMaintenance, Weight: weight(0.5), Until: until},
		`{"weight":0,"by":"ann"}`: {Weight: weight(0)},
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
