package discovery_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestAwaitListing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		m.Break()
		d := discovery.NewDirectory(m.Open(), isolate(discovery.Options{}))
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := d.AwaitListing(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("before Run: %v, want the error of the context", err)
		}
		running, end := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = d.Run(running)
		}()
		defer func() { end(); <-ended }()
		failed := d.AwaitListing(context.Background())
		if failed == nil || d.Status().LastError != failed {
			t.Errorf("while the registry is away: %v, want %v", failed, d.Status().LastError)
		}
		m.Restore()
		<-d.Synced()
		if err := d.AwaitListing(context.Background()); err != nil {
			t.Errorf("once it is listed: %v", err)
		}
		m.Break()
		synctest.Wait()
		if err := d.AwaitListing(context.Background()); err != nil {
			t.Errorf("when it is lost again: %v", err)
		}
	})
}
