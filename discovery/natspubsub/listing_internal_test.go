package natspubsub

import (
	"testing"
	"testing/synctest"
	"time"
)

// A listing ends when no further answer comes, and in any case when its time is over.
func TestListingEnds(t *testing.T) {
	t.Parallel()
	const listen = 10 * time.Second
	for name, test := range map[string]struct {
		answers []time.Duration // after which pause each comes
		want    time.Duration
	}{
		"no answers":     {nil, listen},
		"one answer":     {[]time.Duration{20 * time.Millisecond}, 120 * time.Millisecond},
		"far away":       {[]time.Duration{300 * time.Millisecond}, 900 * time.Millisecond},
		"several":        {[]time.Duration{20 * time.Millisecond, 90 * time.Millisecond, 90 * time.Millisecond}, 300 * time.Millisecond},
		"very far away":  {[]time.Duration{6 * time.Second}, listen},
		"until the last": {[]time.Duration{4 * time.Second, 5 * time.Second}, listen},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				l := newListing(time.Now(), listen)
				for _, pause := range test.answers {
					time.Sleep(pause)
					l.answered()
				}
				<-l.timer.C
				if took := time.Since(l.asked); took != test.want {
					t.Errorf("it ended after %v, want %v", took, test.want)
				}
				l.over = true
				l.answered()
				time.Sleep(listen)
				select {
				case <-l.timer.C:
					t.Error("it ended twice")
				default:
				}
			})
		})
	}
}
