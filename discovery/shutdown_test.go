package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// follow checks that Run ends at once, goleak and the bubble that nothing is
// left. This leads it into the states in which it may have to.
func TestRunEnds(t *testing.T) {
	for _, test := range []struct {
		name string
		lead func(t *testing.T)
	}{
		{"while the registry is away", func(t *testing.T) {
			m := discoverytest.NewMemory()
			m.Break()
			follow(t, m.Open(), discovery.Options{})
		}},
		{"during the listing", func(t *testing.T) {
			w := newScripted()
			follow(t, w, discovery.Options{})
			s := <-w.streams
			s.put("", 0, newNode("a"))
		}},
		{"while events flood in", func(t *testing.T) {
			follow(t, watchFunc(func(ctx context.Context, emit func(discovery.Event)) error {
				emit(discovery.Event{Type: discovery.Synced})
				for {
					emit(discovery.Event{Type: discovery.Put, ID: "a", Node: newNode("a")})
					select {
					case <-ctx.Done():
						return ctx.Err()
					case <-time.After(time.Microsecond):
					}
				}
			}), discovery.Options{})
			time.Sleep(time.Millisecond)
		}},
		{"while a publication waits", func(t *testing.T) {
			m := discoverytest.NewMemory()
			follow(t, m.Open(), discovery.Options{})
			for i := range 10 {
				write(m, newNode(fmt.Sprint(i)))
				synctest.Wait()
			}
		}},
		{"during a verification", func(t *testing.T) {
			m := discoverytest.NewMemory()
			write(m, newNode("a"))
			follow(t, m.Open(), discovery.Options{})
			m.Silence(true)
			time.Sleep(discovery.DefaultTTL + 500*time.Millisecond)
		}},
		{"while silent", func(t *testing.T) {
			m := discoverytest.NewMemory()
			write(m, newNode("a"))
			follow(t, m.Open(), discovery.Options{})
			m.Silence(true)
			time.Sleep(time.Hour)
		}},
	} {
		t.Run(test.name, func(t *testing.T) { synctest.Test(t, test.lead) })
	}
}

// A watch may be inside emit, with nobody to hear it, when all ends.
func TestRunEndsWhileEmitBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		slow, logs := newLog(slog.LevelInfo)
		logs.before = func(message string) {
			if message == "node joined" {
				<-gate
			}
		}
		d := discovery.NewDirectory(watchFunc(func(ctx context.Context, emit func(discovery.Event)) error {
			emit(discovery.Event{Type: discovery.Synced})
			for i := 0; ctx.Err() == nil; i++ {
				emit(discovery.Event{Type: discovery.Put, ID: fmt.Sprint(i), Node: newNode(fmt.Sprint(i))})
			}
			return ctx.Err()
		}), discovery.Options{Logger: slow, Probe: nobodyThere})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- d.Run(ctx) }()
		synctest.Wait() // the channel is full, and Run is held up
		cancel()
		synctest.Wait()
		close(gate)
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
}

// That the context ended is neither the registry's fault nor news.
func TestShutdownIsNoOutage(t *testing.T) {
	for range 20 { // a select takes either of two cases
		synctest.Test(t, func(t *testing.T) {
			busy, logs := newLog(slog.LevelInfo)
			ctx, cancel := context.WithCancel(context.Background())
			logs.before = func(message string) {
				if message == "node joined" {
					cancel()
					time.Sleep(time.Second) // by then the watch has ended
				}
			}
			m := discoverytest.NewMemory()
			d := discovery.NewDirectory(m.Open(), discovery.Options{Logger: busy})
			done := make(chan error, 1)
			go func() { done <- d.Run(ctx) }()
			synctest.Wait()
			write(m, newNode("a"))
			<-done
			if s := d.Status(); s.Restarts != 0 || s.LastError != nil {
				t.Errorf("status %+v", s)
			}
			if warnings := logs.warnings(); len(warnings) != 0 {
				t.Errorf("warned: %v", warnings)
			}
		})
	}
}
