package discovery

import (
	"testing"
	"time"
)

func TestRegistryClock(t *testing.T) {
	t.Parallel()
	var c RegistryClock
	now := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	for _, step := range []struct {
		what              string
		ahead, took, want time.Duration
	}{
		{"alike", 0, 0, 0},
		{"less than a second", 999 * time.Millisecond, 0, 0},
		{"alike, as far as a slow answer tells", 3 * time.Second, 10 * time.Second, 0},
		{"ahead", 20 * time.Minute, 10 * time.Millisecond, 20 * time.Minute},
		{"ahead, with some jitter", 20*time.Minute + 900*time.Millisecond, 20 * time.Millisecond, 20 * time.Minute},
		{"ahead, with some jitter the other way", 20*time.Minute - 900*time.Millisecond, 20 * time.Millisecond, 20 * time.Minute},
		{"a slow answer", 20*time.Minute + 4*time.Second, 10 * time.Second, 20 * time.Minute},
		{"drifted away", 20*time.Minute + 1400*time.Millisecond, 0, 20*time.Minute + time.Second},
		{"drifted by less", 20*time.Minute + 1600*time.Millisecond, 0, 20*time.Minute + time.Second},
		{"behind", -20 * time.Minute, 0, -20 * time.Minute},
		{"put right", 400 * time.Millisecond, 0, 0},
	} {
		// The answer is from the middle of the question.
		c.Observe(now.Add(step.ahead), now.Add(-step.took/2), now.Add(step.took/2))
		if got := c.Ahead(); got != step.want {
			t.Errorf("%s: %v ahead, want %v", step.what, got, step.want)
		}
	}
	c.Observe(now.Add(time.Minute), now, now)
	c.Observe(time.Time{}, now, now)
	if got := c.Ahead(); got != time.Minute {
		t.Errorf("%v ahead after an answer without the time, want what was known before", got)
	}
	// Our clock is set back while the question is under way: both ends are possible.
	c = RegistryClock{}
	c.Observe(now, now.Add(time.Hour), now)
	if got := c.Ahead(); got != 0 {
		t.Errorf("%v ahead when our clock was set, want nothing that is not certain", got)
	}
}

func TestRegistryClockConverts(t *testing.T) {
	t.Parallel()
	var c RegistryClock
	now := time.Date(2026, 11, 26, 12, 0, 0, 123456789, time.UTC)
	drained := Override{State: StateDraining, Until: now}
	forever := Override{State: StateMaintenance}
	if got := c.ByRegistry(drained); !got.Equal(drained) {
		t.Errorf("by a clock like ours: %v, want %v", got, drained)
	}
	c.Observe(now.Add(20*time.Minute), now, now)
	written := c.ByRegistry(drained)
	if want := now.Add(20 * time.Minute); !written.Until.Equal(want) || written.State != StateDraining {
		t.Errorf("written until %v, want %v", written.Until, want)
	}
	if got := c.ByRegistry(forever); !got.Equal(forever) {
		t.Errorf("what has no end got one: %v", got)
	}
	all := map[string]Override{"a": written, "b": forever}
	local := c.Locally(all)
	if !local["a"].Equal(drained) || !local["b"].Equal(forever) || len(local) != 2 {
		t.Errorf("read %v, want what was written", local)
	}
	if !all["a"].Equal(written) {
		t.Error("what was given was changed")
	}
}
