package natspubsub

import (
	"fmt"
	"strings"
	"testing"

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
