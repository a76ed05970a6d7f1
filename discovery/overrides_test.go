package discovery

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

func TestUsableOverrides(t *testing.T) {
	good, bad := Override{State: StateDraining}, Override{State: "gone"}
	all := map[string]Override{"a": good, "b": bad, "c\n": good, "": good}
	if got := usable(all); len(got) != 1 || got["a"] != good || len(all) != 4 {
		t.Errorf("%v are usable, want that of a", got)
	}
	for i := range MaxNodes + 1 {
		all[fmt.Sprintf("n%06d", i)] = good
	}
	if got := usable(all); len(got) != MaxNodes || got["a"] != good || got[fmt.Sprintf("n%06d", MaxNodes-1)] != (Override{}) {
		t.Errorf("%d are usable, want the first %d", len(got), MaxNodes)
	}
}

// An override ends by itself, and the timer tells when one does, or looks in time
// whether the clock was set.
func TestOverridesEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		soon := Override{State: StateDraining, Until: time.Now().Add(time.Second)}
		later := Override{State: StateMaintenance, Until: time.Now().Add(time.Hour)}
		o := overrides{all: map[string]Override{"soon": soon, "later": later, "never": {State: StateUp}}, end: stoppedTimer()}
		for _, want := range []time.Duration{time.Second, time.Minute} {
			began := time.Now()
			o.armEnd()
			<-o.end.C
			if took := time.Since(began); took != want {
				t.Errorf("looked after %v, want %v", took, want)
			}
		}
		if !o.of("soon").IsZero() || o.of("later") != later || o.of("never").IsZero() {
			t.Error("it is not so that one has ended and two have not")
		}
	})
}
