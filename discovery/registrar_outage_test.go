package discovery_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestRegistrarOutage(t *testing.T) {
	for _, test := range []struct {
		name string
		fail func(m *discoverytest.Memory)
		mend func(m *discoverytest.Memory)
	}{
		{"broken", (*discoverytest.Memory).Break, (*discoverytest.Memory).Restore},
		{"silent", func(m *discoverytest.Memory) { m.Silence(true) }, func(m *discoverytest.Memory) { m.Silence(false) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := discoverytest.NewMemory()
				log, logs := newLog(slog.LevelInfo)
				a := &recorder{Registry: m.Open()}
				register(t, a, newNode("a"), discovery.RegistrarOptions{Logger: log})
				test.fail(m)
				m.Drop("a")
				time.Sleep(24 * time.Hour)
				if n := len(a.taken()); n < 5_000 || n > 60_000 {
					t.Errorf("%d attempts in a day", n)
				}
				test.mend(m)
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if m.Record("a") == nil {
					t.Error("not announced again within 10 seconds")
				}
				if n := len(logs.warnings()); n == 0 || n > 2 {
					t.Errorf("%d warnings about one outage", n)
				}
				if n := len(logs.containing("announced again")); n != 1 {
					t.Errorf("the end of the outage was told %d times", n)
				}
			})
		})
	}
}

func TestRegistrarWipe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{})
		for range 5 {
			m.Wipe()
			if m.Record("a") != nil {
				t.Fatal("not wiped")
			}
			time.Sleep(discovery.DefaultHeartbeat)
			synctest.Wait()
			if m.Record("a") == nil {
				t.Fatal("not announced again within a heartbeat")
			}
		}
	})
}

// forbidden is a registry whose permission to write can be revoked.
type forbidden struct {
	discovery.Registry
	revoked atomic.Bool
}

func (f *forbidden) Announce(ctx context.Context, n discovery.Node) error {
	if f.revoked.Load() {
		return fmt.Errorf("%w to write: a test took it away", discovery.ErrPermission)
	}
	return f.Registry.Announce(ctx, n)
}

// A permission may come back, and until then it is one warning.
func TestRegistrarPermissionRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		log, logs := newLog(slog.LevelInfo)
		a := &forbidden{Registry: m.Open()}
		register(t, a, newNode("a"), discovery.RegistrarOptions{Logger: log})
		for range 3 {
			a.revoked.Store(true)
			time.Sleep(time.Hour)
			m.Expire("a")
			a.revoked.Store(false)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if record(t, m, "a") == nil {
				t.Fatal("not announced within 5 seconds after the permission was back")
			}
		}
		warnings := logs.warnings()
		if len(warnings) != 3 || !strings.Contains(fmt.Sprint(warnings[0].fields["error"]), "no permission") {
			t.Errorf("warned %v, want once each time, with the reason", warnings)
		}
	})
}

// A hundred registrars that lose their registry at once do not all come back at
// once, nor knock at the door in step while it is closed.
func TestRegistrarsReconnectSpreadOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const registrars = 100
		m := discoverytest.NewMemory()
		a := &recorder{Registry: m.Open()}
		for i := range registrars {
			register(t, a, newNode(fmt.Sprintf("n%03d", i)), discovery.RegistrarOptions{Drain: new(time.Duration(0))})
		}
		// burst returns the most calls that fall into any tenth of a second.
		burst := func(calls []call) int {
			slices.SortFunc(calls, func(a, b call) int { return a.at.Compare(b.at) })
			most := 0
			for i := range calls {
				n := i
				for n < len(calls) && calls[n].at.Sub(calls[i].at) < 100*time.Millisecond {
					n++
				}
				most = max(most, n-i)
			}
			return most
		}
		m.Break()
		time.Sleep(time.Minute) // the heartbeats and the first tries fall apart
		a.taken()
		time.Sleep(time.Minute)
		if n := burst(a.taken()); n > registrars/5 {
			t.Errorf("%d of %d tried within a tenth of a second during the outage", n, registrars)
		}
		m.Wipe()
		m.Restore()
		time.Sleep(2 * discovery.DefaultHeartbeat)
		synctest.Wait()
		if n := burst(a.taken()); n > registrars/5 {
			t.Errorf("%d of %d came back within a tenth of a second", n, registrars)
		}
		for i := range registrars {
			if m.Record(fmt.Sprintf("n%03d", i)) == nil {
				t.Errorf("n%03d is not back within two heartbeats", i)
			}
		}
	})
}
