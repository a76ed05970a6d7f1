package discovery

import (
	"sync/atomic"
	"time"
)

// clockNoise is by how much clocks may differ and still count as alike.
const clockNoise = time.Second

// A RegistryClock converts times between the clock of a registry and that of this
// machine. A registry that keeps overrides has one, and lets it [RegistryClock.Observe]
// the registry's time. The zero value is a clock that is not known, and counts as like
// ours. It may be used by many goroutines.
type RegistryClock struct {
	ahead atomic.Int64 // whole seconds, as a duration
}

// Observe takes up what the registry's clock said at some moment between asked and
// answered, by ours. The zero time says nothing. What a question took blurs its
// answer: how far the clock is ahead changes only when that is wrong by a second for
// certain, so that two looks at the same clocks give the same times.
func (c *RegistryClock) Observe(registry, asked, answered time.Time) {
	if registry.IsZero() {
		return
	}
	// Without the monotonic clock, which does not see that ours is set.
	asked, answered = asked.Round(0), answered.Round(0)
	if answered.Before(asked) {
		asked, answered = answered, asked
	}
	least, most := registry.Sub(answered), registry.Sub(asked)
	if held := c.Ahead(); held-most < clockNoise && least-held < clockNoise {
		return
	}
	// Whole seconds are what whoever writes and whoever reads can agree on.
	c.ahead.Store(int64((least + (most-least)/2).Round(time.Second)))
}

// Ahead returns how far the registry's clock is ahead of ours.
func (c *RegistryClock) Ahead() time.Duration { return time.Duration(c.ahead.Load()) }

// ByRegistry returns the override as it is to be written, with its end by the
// registry's clock.
func (c *RegistryClock) ByRegistry(o Override) Override { return o.shifted(c.Ahead()) }

// Locally returns overrides that were read, with their ends by our clock. It leaves
// the given ones alone.
func (c *RegistryClock) Locally(all map[string]Override) map[string]Override {
	local, ahead := make(map[string]Override, len(all)), c.Ahead()
	for id, o := range all {
		local[id] = o.shifted(-ahead)
	}
	return local
}

// shifted returns the override with another end, if it has one.
func (o Override) shifted(by time.Duration) Override {
	if !o.Until.IsZero() {
		o.Until = o.Until.Add(by)
	}
	return o
}
