package discovery_test

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// A load that is not known is never announced as 0, which would look idler than
// everybody else.
func TestRegistrarLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		log, logs := newLog(slog.LevelInfo)
		var load float64
		n := newNode("a")
		n.Load = 7
		r := register(t, m.Open(), n, discovery.RegistrarOptions{})
		if got := record(t, m, "a").Load; got != 7 {
			t.Errorf("without a function: load %v, want the node's", got)
		}
		for _, test := range []struct{ given, want float64 }{
			{math.NaN(), 7}, {-1, 7}, {0.5, 0.5}, {math.NaN(), 0.5}, {math.Inf(1), 0.5}, {math.Inf(-1), 0.5}, {-1, 0.5},
			{12, 12}, {-1, 12}, {0, 0}, {math.NaN(), 0},
		} {
			load = test.given
			if err := r.Update(n, discovery.RegistrarOptions{Load: func() float64 { return load }, Logger: log}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if got := record(t, m, "a").Load; got != test.want {
				t.Errorf("load %v was announced as %v, want %v", test.given, got, test.want)
			}
		}
		if n := len(logs.containing("announcing another")); n != 4 {
			t.Errorf("warned %d times, want once each of four times: %v", n, logs.all())
		}
	})
}

func TestRegistrarReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		log, logs := newLog(slog.LevelInfo)
		var ready atomic.Bool
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{
			Logger: log,
			Ready: func(context.Context) error {
				if ready.Load() {
					return nil
				}
				return errors.New("warming up")
			},
		})
		for range 2 {
			time.Sleep(time.Minute)
			synctest.Wait()
			if m.Record("a") != nil {
				t.Fatal("listed although it is not ready")
			}
			ready.Store(true)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if m.Record("a") == nil {
				t.Fatal("not listed 5 seconds after it was ready")
			}
			ready.Store(false)
			time.Sleep(10 * time.Second)
			synctest.Wait()
		}
		start := time.Now()
		if err := r.leave(); err != nil || time.Since(start) != 0 {
			t.Errorf("a node that is not listed left after %v, %v", time.Since(start), err)
		}
		if n := len(logs.warnings()); n != 3 {
			t.Errorf("%d warnings, want one for each of three times", n)
		}
	})
}

// Ready may hang. It has a deadline, and ends with the Registrar.
func TestRegistrarReadyHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		asked := 0
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{Ready: func(ctx context.Context) error {
			asked++
			if asked == 1 {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		}})
		if m.Record("a") == nil {
			t.Fatal("not listed")
		}
		time.Sleep(15 * time.Second)
		synctest.Wait()
		if m.Record("a") != nil {
			t.Error("listed although nobody says that it is ready")
		}
		start := time.Now()
		if err := r.leave(); err != nil || time.Since(start) > 0 {
			t.Errorf("left after %v, %v", time.Since(start), err)
		}
	})
}

// An announcement that failed may have arrived: a node that is not ready must
// not stay listed by it.
func TestRegistrarNotReadyAfterUncertainAnnouncement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		a := &uncertain{Registry: m.Open()}
		var ready atomic.Bool
		ready.Store(true)
		register(t, a, newNode("a"), discovery.RegistrarOptions{Ready: func(context.Context) error {
			if ready.Load() {
				return nil
			}
			return errors.New("broken")
		}})
		if m.Record("a") == nil {
			t.Fatal("the announcement did not arrive")
		}
		ready.Store(false)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if m.Record("a") != nil {
			t.Error("listed although it is not ready")
		}
	})
}

// uncertain delivers announcements and says that it failed.
type uncertain struct{ discovery.Registry }

func (d *uncertain) Announce(ctx context.Context, n discovery.Node) error {
	_ = d.Registry.Announce(ctx, n)
	return discovery.ErrUnreachable
}
