package discovery_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// located is a registry that tells of servers which were not configured.
type located struct {
	discovery.Registry
	servers atomic.Pointer[[]string]
}

func (l *located) Located() []string { return *l.servers.Load() }

// Where the registry is follows its name, too.
func TestRegistryByName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone("nats", "10.0.0.5")
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{Lookup: z.lookup, Addresses: []string{"nats:4222", "10.0.0.6:4222", "[::1]:4222", "bad"}})
		time.Sleep(coalesced)
		if got := fmt.Sprint(d.RegistryAddresses()); got != "[10.0.0.5:4222 10.0.0.6:4222 [::1]:4222]" {
			t.Errorf("the registry is at %s", got)
		}
		snapshot := d.Snapshot()
		z.set("nats", "10.0.0.4")
		<-snapshot.Superseded()
		if got := fmt.Sprint(d.RegistryAddresses()); got != "[10.0.0.4:4222 10.0.0.6:4222 [::1]:4222]" {
			t.Errorf("the registry is at %s", got)
		}
	})
}

// A name that cannot be resolved is asked for no more often because another one of the
// registry keeps changing.
func TestRegistryNameThatFailsWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone("nats-1", "10.0.0.1")
		follow(t, discoverytest.NewMemory().Open(), discovery.Options{Lookup: z.lookup, Addresses: []string{"nats-1:4222", "nats-2:4222"}})
		pass := func(d time.Duration) (asked int) {
			before := z.asked["nats-2"]
			for i := range int(d / time.Second) {
				z.set("nats-1", fmt.Sprintf("10.0.0.%d", 1+i%200))
				time.Sleep(time.Second)
			}
			synctest.Wait()
			return z.asked["nats-2"] - before
		}
		pass(2 * time.Minute) // until it is asked for as seldom as one that is known
		if asked := pass(10 * time.Minute); asked < 15 || asked > 26 {
			t.Errorf("a name that fails was asked for %d times in ten minutes, want about 20", asked)
		}
	})
}

// A server of the registry is no node, whoever named it.
func TestRegistryTellsWhereItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone("replica", "10.0.0.7")
		m := discoverytest.NewMemory()
		l := &located{Registry: m.Open()}
		l.servers.Store(&[]string{"10.0.0.5:4222", "10.0.0.6:4222"})
		d := follow(t, l, discovery.Options{Lookup: z.lookup, Addresses: []string{"10.0.0.4:4222", "10.0.0.5:4222"}})
		<-d.Synced()
		if got := fmt.Sprint(d.RegistryAddresses()); got != "[10.0.0.4:4222 10.0.0.5:4222 10.0.0.6:4222]" {
			t.Errorf("once it is listed the registry is at %s", got)
		}
		for _, change := range []struct {
			servers []string
			want    string
		}{
			{[]string{"replica:4222"}, "[10.0.0.4:4222 10.0.0.5:4222 10.0.0.7:4222]"},
			{nil, "[10.0.0.4:4222 10.0.0.5:4222]"},
		} {
			l.servers.Store(&change.servers)
			time.Sleep(10 * time.Second)
			synctest.Wait()
			if got := fmt.Sprint(d.RegistryAddresses()); got != change.want {
				t.Errorf("told of %q, the registry is at %s, want %s", change.servers, got, change.want)
			}
		}
		snapshot := d.Snapshot()
		time.Sleep(time.Minute)
		synctest.Wait()
		if d.Snapshot() != snapshot {
			t.Error("a registry that stays where it is published a snapshot")
		}
	})
}
