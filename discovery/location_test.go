package discovery

import (
	"fmt"
	"net/netip"
	"testing"
)

type locatorFunc func() []string

func (f locatorFunc) Located() []string { return f() }

func TestLocation(t *testing.T) {
	reported := []string(nil)
	l := newLocation([]string{"Registry.internal:4222", "10.0.0.1:4222", "[::ffff:10.0.0.1]:4222", "no-port", "h:99999"}, locatorFunc(func() []string { return reported }))
	of := func(name string) []netip.Addr {
		return map[string][]netip.Addr{
			"registry.internal": {netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("10.0.0.1")},
			"other.internal":    {netip.MustParseAddr("10.0.0.8")},
		}[name]
	}
	check := func(names, sockets string) {
		t.Helper()
		if got := fmt.Sprint(l.names()); got != names {
			t.Errorf("names %s, want %s", got, names)
		}
		if got := fmt.Sprint(l.sockets(of)); got != sockets {
			t.Errorf("sockets %s, want %s", got, sockets)
		}
	}
	check("[registry.internal]", "[10.0.0.1:4222 10.0.0.9:4222]")
	if l.ask() {
		t.Error("it is news that there is none")
	}
	reported = []string{"other.internal:6222"}
	if !l.ask() || l.ask() {
		t.Error("what the registry reports is not news once")
	}
	check("[other.internal registry.internal]", "[10.0.0.1:4222 10.0.0.8:6222 10.0.0.9:4222]")
}
