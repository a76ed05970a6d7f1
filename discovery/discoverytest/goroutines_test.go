package discoverytest

import (
	"strings"
	"testing"
)

// TestStartedBy: a goroutine that ends is awaited, one that does not is shown, and those
// of others do not count.
func TestStartedBy(t *testing.T) {
	t.Parallel()
	stop := make(chan struct{})
	defer close(stop)
	go func() { <-stop }()
	if left := startedBy(t.Name(), patience, func() { go func() {}() }); left != "" {
		t.Errorf("left: %s", left)
	}
	if left := startedBy(t.Name(), 0, func() { go func() { <-stop }() }); !strings.Contains(left, "TestStartedBy") {
		t.Errorf("left: %q, want the one that waits", left)
	}
}
