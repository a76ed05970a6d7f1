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
