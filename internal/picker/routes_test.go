package picker

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// routed is a fleet whose nodes announce hosts, and the pickers of these.
type routed struct {
	t         *testing.T
	memory    *discoverytest.Memory
	directory *discovery.Directory
	state     RouteState
	built     int
	Routes
}

func newRouted(t *testing.T, b *Builder) *routed {
	t.Helper()
	r := &routed{t: t, memory: discoverytest.NewMemory()}
	r.directory = follow(t, r.memory)
	rules, err := discovery.NewHostRules(discovery.HostOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r.directory.SetHostRules(rules)
	r.Builder, r.State, r.Charge = b, func(*discovery.Snapshot) RouteState { return r.state }, func(time.Duration) { r.built++ }
	r.Built = func(*discovery.Route) {}
	return r
}

// announce has a node announce hosts, and waits until it does.
func (r *routed) announce(id, hosts string, pairs ...string) {
	r.t.Helper()
	n := node(id, append(pairs, "hosts", hosts)...)
	put(r.t, r.memory, n)
	awaitSnapshot(r.t, r.directory, func(s *discovery.Snapshot) bool {
		e := s.Node(id)
		return e != nil && e.Node.Metadata["hosts"] == hosts && e.Node.Metadata["paths"] == n.Metadata["paths"] && s.Hosts() != nil
	})
}

func awaitSnapshot(t *testing.T, d *discovery.Directory, done func(*discovery.Snapshot) bool) {
	t.Helper()
	for s := d.Snapshot(); !done(s); s = d.Snapshot() {
		select {
		case <-s.Superseded():
		case <-time.After(10 * time.Second):
			t.Fatal("waited in vain for a snapshot")
		}
	}
}

// ask returns the picker of a host and path, which somebody announces.
func (r *routed) ask(host, path string) *Picker {
	r.t.Helper()
	s := r.directory.Snapshot()
	h := s.Hosts().Find(host)
	if h == nil || h.Route(path) == nil {
		r.t.Fatalf("nobody announces %s%s", host, path)
	}
	return r.Picker(s, h, h.Route(path))
}

// TestRoutesKeepPickers holds that a change costs the routes that it touches, and that what
// was derived for a route goes on with its next nodes.
func TestRoutesKeepPickers(t *testing.T) {
	b := newBuilder()
	b.Strategy = Turns(1)
	r := newRouted(t, b)
	r.announce("a1", "a.example")
	r.announce("a2", "a.example")
	r.announce("b", "b.example", "paths", "/x /y")
	a, bx, by := r.ask("a.example", "/"), r.ask("b.example", "/x"), r.ask("b.example", "/y")
	if bx == by || r.built != 3 {
		t.Errorf("%d pickers were made of three routes", r.built)
	}
	r.announce("c", "c.example")
	if r.ask("a.example", "/") != a || r.ask("b.example", "/x") != bx || r.built != 3 {
		t.Error("a picker was made anew because of another route")
	}
	first := pick(a, nil, "")[0]
	r.announce("a3", "a.example")
	next := r.ask("a.example", "/")
	if next == a || len(next.First()) != 3 || r.built != 4 {
		t.Errorf("%d nodes after a third has joined, %d pickers made", len(next.First()), r.built)
	}
	if again := pick(next, nil, "")[0]; again == first {
		t.Errorf("the turns began anew with %s", first)
	}
	if r.ask("b.example", "/x") != bx {
		t.Error("a picker was made anew because of another route")
	}
	for _, state := range []RouteState{{Version: 1}, {Version: 1, Registry: new(netip.AddrPort)}, {Version: 1, Proxies: new(Proxy)}} {
		was := r.ask("a.example", "/")
		r.state = state
		if r.ask("a.example", "/") == was {
			t.Errorf("the picker stays although the state is %+v", state)
		}
	}
}

// TestRoutesAreSwept has ever other hosts come and go: what is kept is of those that are
// there, and of no more others.
func TestRoutesAreSwept(t *testing.T) {
	r := newRouted(t, newBuilder())
	r.announce("a", "a.example")
	a := r.ask("a.example", "/")
	for i := range 3 * leastSweep {
		host := fmt.Sprintf("b%d.example", i)
		r.announce("b", host)
		r.ask(host, "/")
	}
	if len(r.routes) > leastSweep+2 || r.routes[hostPath{"a.example", "/*"}] == nil || r.ask("a.example", "/") != a {
		t.Errorf("%d pickers are kept, of them that of the host which is there: %v", len(r.routes), r.ask("a.example", "/") == a)
	}
	bytes, kept := 0, 0
	r.pickers.Range(func(_, p any) bool {
		kept++
		bytes += p.(*routePicker).bytes
		return true
	})
	if kept != len(r.routes) || bytes != r.bytes {
		t.Errorf("%d pickers of %d bytes, counted are %d of %d", kept, bytes, len(r.routes), r.bytes)
	}
}

// TestRoutesAreBounded has large pickers made one after the other.
func TestRoutesAreBounded(t *testing.T) {
	r := newRouted(t, newBuilder())
	r.announce("a", "a.example")
	r.announce("b", "b.example")
	r.ask("a.example", "/")
	r.bytes += maxPickerBytes // as if it were that large
	for _, p := range r.routes {
		r.of(p).bytes += maxPickerBytes
	}
	r.ask("b.example", "/")
	if len(r.routes) != 1 || r.bytes > maxPickerBytes {
		t.Errorf("%d pickers of %d bytes are kept, want the newest", len(r.routes), r.bytes)
	}
}
