package natspubsub

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Whoever may write may give a node an instance of tens of KiB, and then another node.
// What is kept of that is bounded.
func TestInstancesAreBounded(t *testing.T) {
	t.Parallel()
	tr := newTranslator(func(discovery.Event) {})
	put := func(id, instance string) {
		tr.event(discovery.Event{Type: discovery.Put, ID: id, Node: discovery.Node{
			ID: id, Metadata: map[string]string{discovery.KeyInstance: instance},
		}})
	}
	put("a", "1")
	if !tr.replaced("a", "2") || tr.replaced("a", "1") {
		t.Error("it is not known whose record was seen last")
	}
	large := strings.Repeat("x", 60<<10)
	for i := range 2*maxInstancesBytes/len(large) + 2 {
		put(fmt.Sprintf("flood-%d", i), large)
	}
	if tr.replaced("a", "2") {
		t.Error("all instances of a flood are kept, and the one before it as well")
	}
}

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
