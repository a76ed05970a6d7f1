package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// zone is what host names stand for in tests.
type zone struct {
	mu    sync.Mutex
	names map[string]string // addresses, separated by spaces
	asked map[string]int
	delay time.Duration
	now   int
	most  int
}

func newZone(pairs ...string) *zone {
	z := &zone{names: make(map[string]string), asked: make(map[string]int)}
	for i := 0; i < len(pairs); i += 2 {
		z.names[pairs[i]] = pairs[i+1]
	}
	return z
}

func (z *zone) set(name, addresses string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.names[name] = addresses
}

func (z *zone) lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	z.mu.Lock()
	z.asked[name]++
	z.now++
	z.most = max(z.most, z.now)
	delay := z.delay
	z.mu.Unlock()
	defer func() {
		z.mu.Lock()
		defer z.mu.Unlock()
		z.now--
	}()
	if delay > 0 {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(delay):
		}
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	var addresses []netip.Addr
	for _, a := range strings.Fields(z.names[name]) {
		addresses = append(addresses, netip.MustParseAddr(a))
	}
	if len(addresses) == 0 {
		return nil, errors.New("no such host")
	}
	return addresses, nil
}

func atEndpoint(n discovery.Node, endpoint string) discovery.Node {
	var err error
	if n.Endpoint, err = discovery.ParseEndpoint(endpoint); err != nil {
		panic(err)
	}
	return n
}

// addresses are those of a node, and the one that is dialled.
func addresses(d *discovery.Directory, id string) string {
	e := d.Snapshot().Node(id)
	return fmt.Sprint(e.Addresses(), " ", e.Address())
}

func TestHostNamesAreFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone("orders.internal", "10.0.0.9 fd00::1 10.0.0.8 ::ffff:10.0.0.9")
		m := discoverytest.NewMemory()
		write(m, newNode("literal"), atEndpoint(newNode("named"), "http://Orders.internal:80"), atEndpoint(newNode("other"), "http://nowhere:80"))
		d := follow(t, m.Open(), discovery.Options{TTL: 24 * time.Hour, Lookup: z.lookup})
		check := func(want, when string) {
			t.Helper()
			time.Sleep(coalesced)
			synctest.Wait()
			if got := addresses(d, "named"); got != want {
				t.Fatalf("%s: %s, want %s", when, got, want)
			}
		}
		if got := addresses(d, "literal"); got != "[10.0.0.7] 10.0.0.7:5001" {
			t.Errorf("an address: %s", got)
		}
		check("[10.0.0.8 10.0.0.9 fd00::1] 10.0.0.8:80", "listed")
		if got := addresses(d, "other"); got != "[] " {
			t.Errorf("a name that is not there: %s", got)
		}

		snapshot := d.Snapshot()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if d.Snapshot() != snapshot {
			t.Error("a lookup that found nothing new published a snapshot")
		}
		if z.asked["orders.internal"] < 10 || z.asked["orders.internal"] > 30 {
			t.Errorf("looked up %d times in ten minutes", z.asked["orders.internal"])
		}

		z.set("orders.internal", "10.0.0.9")
		z.set("nowhere", "10.0.0.1")
		time.Sleep(40 * time.Second)
		check("[10.0.0.9] 10.0.0.9:80", "moved")
		if got := addresses(d, "other"); got != "[10.0.0.1] 10.0.0.1:80" {
			t.Errorf("a name that came: %s", got)
		}

		// What it stood for was checked, and is what is dialled.
		z.set("orders.internal", "")
		time.Sleep(10 * time.Minute)
		check("[10.0.0.9] 10.0.0.9:80", "not resolved any more")

		// A heartbeat changes nothing, another record may.
		write(m, atEndpoint(newNode("named"), "http://orders.internal:80"))
		check("[10.0.0.9] 10.0.0.9:80", "heard")
		write(m, atEndpoint(newNode("named", "zone", "x"), "http://orders.internal:81"))
		check("[10.0.0.9] 10.0.0.9:81", "another port")
		write(m, atEndpoint(newNode("named"), "http://10.0.0.3:81"))
		check("[10.0.0.3] 10.0.0.3:81", "an address")
		write(m, atEndpoint(newNode("named"), "http://nowhere:81"))
		check("[10.0.0.1] 10.0.0.1:81", "a known name")

		// Names that nobody uses are forgotten.
		m.Expire("named")
		m.Expire("other")
		time.Sleep(2 * time.Second)
		before := z.asked["nowhere"]
		time.Sleep(time.Hour)
		synctest.Wait()
		if z.asked["nowhere"] != before || z.asked["orders.internal"] > 100 {
			t.Errorf("names that nobody uses are looked up: %v", z.asked)
		}
	})
}

// The first listing waits a moment for its names, so that the first requests find
// their nodes, and no longer.
func TestFirstListingWaitsForNames(t *testing.T) {
	for _, test := range []struct {
		delay, want time.Duration
	}{
		{0, 0},
		{100 * time.Millisecond, 100 * time.Millisecond},
		{3 * time.Second, 500 * time.Millisecond},
	} {
		t.Run(test.delay.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				z := newZone("orders", "10.0.0.9")
				z.delay = test.delay
				m := discoverytest.NewMemory()
				write(m, atEndpoint(newNode("a"), "http://orders:80"))
				start := time.Now()
				d := follow(t, m.Open(), discovery.Options{Lookup: z.lookup})
				<-d.Synced()
				if took := time.Since(start); took != test.want {
					t.Errorf("synced after %v, want %v", took, test.want)
				}
				time.Sleep(test.delay + coalesced)
				if got := addresses(d, "a"); got != "[10.0.0.9] 10.0.0.9:80" {
					t.Errorf("in the end: %s", got)
				}
			})
		})
	}
}

func TestLookupsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone()
		z.delay = 10 * time.Millisecond
		m := discoverytest.NewMemory()
		for i := range 1000 {
			z.names[fmt.Sprint("h", i)] = "10.0.0.1"
			// Many nodes behind one name are one lookup.
			write(m, atEndpoint(newNode(fmt.Sprint("a", i)), fmt.Sprintf("http://h%d:80", i)),
				atEndpoint(newNode(fmt.Sprint("b", i)), fmt.Sprintf("http://h%d:81", i)))
		}
		d := follow(t, m.Open(), discovery.Options{Lookup: z.lookup})
		time.Sleep(time.Second)
		synctest.Wait()
		for _, e := range d.Snapshot().Nodes() {
			if e.Address() == "" {
				t.Fatalf("%s is not resolved", e.Node.ID)
			}
		}
		if z.most > 32 || z.asked["h0"] != 1 {
			t.Errorf("%d lookups at once, %d of one name", z.most, z.asked["h0"])
		}
		z.mu.Lock()
		z.delay = time.Hour // Run ends all the same
		z.mu.Unlock()
		time.Sleep(time.Minute)
	})
}

// A name that was allowed is denied once it points where nothing may go, each
// of its addresses counted, and allowed again when it points elsewhere.
func TestRebindingIsDenied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone("orders", "10.0.0.9")
		m := discoverytest.NewMemory()
		write(m, atEndpoint(newNode("a"), "http://orders:80"))
		d := follow(t, m.Open(), discovery.Options{TTL: 24 * time.Hour, Lookup: z.lookup})
		rules, err := discovery.NewRules(discovery.Access{Deny: []string{"10.6.0.0/16"}, LocalPorts: []uint16{80}})
		if err != nil {
			t.Fatal(err)
		}
		for _, to := range []struct{ addresses, want string }{
			{"10.0.0.9", ""},
			{"169.254.169.254", "denied: link-local"},
			{"10.0.0.9 169.254.169.254", "denied: link-local"},
			{"10.0.0.9 ::ffff:169.254.169.254", "denied: link-local"},
			{"127.0.0.1", "denied: loopback"},
			{"10.0.0.9 10.6.0.1", "denied: by deny 10.6.0.0/16"},
			{"64:ff9b::a06:1", "denied: by deny 10.6.0.0/16"},
			{"10.0.0.5", "denied: the registry itself"},
			{"10.0.0.10", ""},
		} {
			z.set("orders", to.addresses)
			time.Sleep(time.Minute)
			synctest.Wait()
			e := d.Snapshot().Node("a")
			if got := rules.Check(e, []netip.AddrPort{netip.MustParseAddrPort("10.0.0.5:80")}); got != to.want {
				t.Errorf("at %s: %q, want %q", to.addresses, got, to.want)
			}
			if to.want == "" && e.Address() != to.addresses+":80" {
				t.Errorf("at %s: %s is dialled", to.addresses, e.Address())
			}
		}
	})
}

// A probe goes where requests may go, and nowhere else.
func TestProbesGoWhereRequestsMay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(5)
		nodes[3] = atEndpoint(nodes[3], "http://good:80")
		nodes[4] = atEndpoint(nodes[4], "http://evil:80")
		z := newZone("good", "10.1.0.3", "evil", "169.254.169.254")
		n := newNetwork(nodes[:3]...)
		n.up["10.1.0.3:80"], n.up["169.254.169.254:80"] = true, true
		rules, err := discovery.NewRules(discovery.Access{Deny: []string{"10.1.0.1"}})
		if err != nil {
			t.Fatal(err)
		}
		o := discovery.Options{Lookup: z.lookup, Probe: n.probe, Permit: func(e *discovery.Entry) bool { return rules.Check(e, nil) == "" }}
		m := discoverytest.NewMemory()
		write(m, nodes...)
		d := follow(t, m.Open(), o)
		time.Sleep(discovery.DefaultTTL + coalesced)
		expectStates(t, d, "n0:held n2:held n3:held", "asked")
		if n.dials["10.1.0.1:5001"]+n.dials["169.254.169.254:80"] != 0 {
			t.Errorf("dialled %v", n.dials)
		}
		// A proxy that starts now has resolved no name when it asks.
		d = follow(t, m.Open(), o)
		time.Sleep(coalesced)
		expectStates(t, d, "n0:held n2:held n3:held", "asked at the start")
		if got := addresses(d, "n3"); got != "[10.1.0.3] 10.1.0.3:80" {
			t.Errorf("the held node's address: %s", got)
		}
		if n.dials["10.1.0.1:5001"]+n.dials["169.254.169.254:80"] != 0 {
			t.Errorf("dialled %v", n.dials)
		}
	})
}

// What the names of others cost must not keep a good node from being used.
func TestNamesOfOthersDelayNobody(t *testing.T) {
	silent := func(z *zone) func(context.Context, string) ([]netip.Addr, error) {
		return func(ctx context.Context, name string) ([]netip.Addr, error) {
			if strings.HasPrefix(name, "silent") {
				z.mu.Lock()
				z.asked[name]++
				z.mu.Unlock()
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return z.lookup(ctx, name)
		}
	}
	// resolves writes a good node and returns after how long it can be reached.
	resolves := func(t *testing.T, m *discoverytest.Memory, d *discovery.Directory, id string) time.Duration {
		t.Helper()
		start := time.Now()
		write(m, atEndpoint(newNode(id), "http://"+id+":80"))
		for {
			synctest.Wait()
			if e := d.Snapshot().Node(id); e != nil && e.Address() != "" {
				return time.Since(start)
			}
			if time.Since(start) > time.Hour {
				t.Fatal("it is never resolved")
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	t.Run("one node with a new name each time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			z := newZone("good-1", "10.0.0.1", "good-2", "10.0.0.2")
			m := discoverytest.NewMemory()
			write(m, newNode("other"))
			d := follow(t, m.Open(), discovery.Options{TTL: 24 * time.Hour, Lookup: silent(z)})
			stop := make(chan struct{})
			defer close(stop)
			go func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					case <-time.After(100 * time.Millisecond):
						write(m, atEndpoint(newNode("bad"), fmt.Sprintf("http://silent-%d:80", i)))
					}
				}
			}()
			time.Sleep(10 * time.Minute)
			if took := resolves(t, m, d, "good-1"); took > time.Second {
				t.Errorf("a good node is reached after %v", took)
			}
			z.mu.Lock()
			asked := len(z.asked)
			z.mu.Unlock()
			if asked > 100 {
				t.Errorf("one node had %d names looked up in ten minutes", asked)
			}
			// The names of a node that settles are looked up like those of any.
			write(m, atEndpoint(newNode("bad"), "http://good-2:80"))
		})
	})
	t.Run("many nodes whose name server is silent", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			z := newZone("good-1", "10.0.0.1", "good-2", "10.0.0.2", "good-3", "10.0.0.3")
			z.delay = 20 * time.Millisecond
			m := discoverytest.NewMemory()
			for i := range 5000 {
				write(m, atEndpoint(newNode(fmt.Sprint("bad", i)), fmt.Sprintf("http://silent-%d:80", i)))
			}
			d := follow(t, m.Open(), discovery.Options{TTL: 24 * time.Hour, Lookup: silent(z)})
			<-d.Synced()
			took := resolves(t, m, d, "good-1")
			t.Logf("behind 5000 new names it took %v", took)
			if took > time.Minute {
				t.Errorf("behind 5000 new names a good node is reached after %v", took)
			}
			for _, wait := range []time.Duration{0, 10 * time.Minute, time.Hour} {
				time.Sleep(wait)
			}
			if took = resolves(t, m, d, "good-2"); took > 2*time.Second {
				t.Errorf("beside 5000 names that failed a good node is reached after %v", took)
			}
			// The good ones are followed as ever.
			z.set("good-1", "10.0.0.9")
			time.Sleep(40 * time.Second)
			synctest.Wait()
			if got := addresses(d, "good-1"); got != "[10.0.0.9] 10.0.0.9:80" {
				t.Errorf("40 s after it moved: %s", got)
			}
			// And so are those whose server speaks again, though the others do not.
			write(m, atEndpoint(newNode("bad7"), "http://good-3:80"))
			time.Sleep(2 * time.Second)
			synctest.Wait()
			if got := addresses(d, "bad7"); got != "[10.0.0.3] 10.0.0.3:80" {
				t.Errorf("with another record: %s", got)
			}
		})
	})
}

// A name server that is merely slow delays its own names, and they are resolved in
// the end, however many.
func TestSlowNamesAreResolved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone()
		z.delay = 3 * time.Second
		m := discoverytest.NewMemory()
		for i := range 300 {
			z.names[fmt.Sprint("h", i)] = "10.0.0.1"
			write(m, atEndpoint(newNode(fmt.Sprint("a", i)), fmt.Sprintf("http://h%d:80", i)))
		}
		d := follow(t, m.Open(), discovery.Options{TTL: 24 * time.Hour, Lookup: z.lookup})
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		for _, e := range d.Snapshot().Nodes() {
			if e.Address() == "" {
				t.Fatalf("%s is not resolved", e.Node.ID)
			}
		}
	})
}

// sockets are what accepts connections in tests.
type sockets struct {
	mu    sync.Mutex
	up    map[string]bool // the others refuse
	lost  map[string]bool // what is sent there gets no answer
	tried int
}

func (s *sockets) probe(ctx context.Context, address string) error {
	s.mu.Lock()
	s.tried++
	up, lost := s.up[address], s.lost[address]
	s.mu.Unlock()
	if lost {
		<-ctx.Done()
		return ctx.Err()
	}
	if !up {
		return errors.New("connection refused")
	}
	return nil
}

func (s *sockets) set(address string, up bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.up[address] = up
}

// A name with several addresses is dialled at one that answers, and stays there.
func TestAddressThatAnswersIsUsed(t *testing.T) {
	const first, second, third = "10.0.0.8:80", "10.0.0.9:80", "[fd00::1]:80"
	for name, test := range map[string]struct {
		up, lost []string
		want     string
	}{
		"all":                   {[]string{first, second, third}, nil, first},
		"the second":            {[]string{second, third}, nil, second},
		"IPv6 only":             {[]string{third}, nil, third},
		"IPv6, the others lost": {[]string{third}, []string{first, second}, third},
		"none":                  {nil, nil, first},
		"none, silently":        {nil, []string{first, second, third}, first},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &sockets{up: make(map[string]bool), lost: make(map[string]bool)}
				for _, a := range test.up {
					s.up[a] = true
				}
				for _, a := range test.lost {
					s.lost[a] = true
				}
				m := discoverytest.NewMemory()
				write(m, atEndpoint(newNode("a"), "http://orders:80"))
				z := newZone("orders", "10.0.0.8 10.0.0.9 fd00::1")
				d := follow(t, m.Open(), discovery.Options{TTL: 24 * time.Hour, Lookup: z.lookup, Probe: s.probe})
				time.Sleep(3 * time.Second)
				synctest.Wait()
				if got := d.Snapshot().Node("a").Address(); got != test.want {
					t.Errorf("%s is dialled, want %s", got, test.want)
				}
				// What answers is remembered, over another record too.
				s.set(first, true)
				time.Sleep(5 * time.Minute)
				write(m, atEndpoint(newNode("a", "zone", "x"), "http://orders:80"))
				time.Sleep(coalesced)
				synctest.Wait()
				want := test.want
				if len(test.lost) > 0 && len(test.up) == 0 {
					want = first
				}
				if got := d.Snapshot().Node("a").Address(); got != want {
					t.Errorf("later %s is dialled, want %s", got, want)
				}
			})
		})
	}
	t.Run("told of a failure", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := &sockets{up: map[string]bool{first: true, second: true}}
			m := discoverytest.NewMemory()
			write(m, atEndpoint(newNode("a"), "http://orders:80"), atEndpoint(newNode("b"), "10.0.0.8:80"))
			z := newZone("orders", "10.0.0.8 10.0.0.9")
			d := follow(t, m.Open(), discovery.Options{TTL: 24 * time.Hour, Lookup: z.lookup, Probe: s.probe})
			<-d.Synced()
			snapshot := d.Snapshot()
			e := snapshot.Node("a")
			if e.Address() != first {
				t.Fatalf("%s is dialled", e.Address())
			}
			tried := map[string]bool{first: true}
			if got := e.AddressBeside(func(a string) bool { return tried[a] }); got != second {
				t.Errorf("beside the first: %s", got)
			}
			tried[second] = true
			if got := e.AddressBeside(func(a string) bool { return tried[a] }); got != first {
				t.Errorf("where all were tried: %s", got)
			}
			// It answers after all.
			d.Failed(e, first)
			time.Sleep(coalesced)
			synctest.Wait()
			if d.Snapshot() != snapshot {
				t.Error("a failure of something else changed the address")
			}
			s.set(first, false)
			d.Failed(e, first)
			time.Sleep(coalesced)
			synctest.Wait()
			if got := d.Snapshot().Node("a").Address(); got != second {
				t.Errorf("told that it fails, %s is dialled", got)
			}
			if got := d.Snapshot().Node("b").Address(); got != first {
				t.Errorf("a node that names an address is dialled at %s", got)
			}
		})
	})
}

// However many addresses a name has, and however often its node fails, that costs a
// bounded number of connections.
func TestAddressesAreTriedWithinBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &sockets{up: make(map[string]bool)}
		var many []string
		for i := range 250 {
			many = append(many, fmt.Sprint("10.0.1.", i))
		}
		z := newZone("many", strings.Join(many, " "))
		m := discoverytest.NewMemory()
		write(m, atEndpoint(newNode("a"), "http://many:80"))
		d := follow(t, m.Open(), discovery.Options{TTL: 24 * time.Hour, Lookup: z.lookup, Probe: s.probe})
		<-d.Synced()
		for range 1000 {
			d.Failed(d.Snapshot().Node("a"), "10.0.1.0:80")
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.tried > 100 {
			t.Errorf("%d connections for one node", s.tried)
		}
	})
}

// A node that is replaced under its host name is followed at once: a new instance, a
// changed record and a failure have the name looked up anew, within bounds.
func TestNamesAreAskedAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone("orders", "10.0.0.1")
		m := discoverytest.NewMemory()
		instance := func(id, i string) discovery.Node {
			return atEndpoint(newNode(id, discovery.KeyInstance, i), "http://orders:80")
		}
		write(m, instance("a", "1"))
		d := follow(t, m.Open(), discovery.Options{TTL: 24 * time.Hour, Lookup: z.lookup})
		soon := func(id, want, when string) {
			t.Helper()
			time.Sleep(2500 * time.Millisecond)
			synctest.Wait()
			if got := d.Snapshot().Node(id).Address(); got != want {
				t.Errorf("%s: %s is dialled, want %s", when, got, want)
			}
		}
		soon("a", "10.0.0.1:80", "listed")
		z.set("orders", "10.0.0.2")
		write(m, instance("a", "2"))
		soon("a", "10.0.0.2:80", "a new instance")
		z.set("orders", "10.0.0.3")
		d.Failed(d.Snapshot().Node("a"), "10.0.0.2:80")
		soon("a", "10.0.0.3:80", "a failure")
		z.set("orders", "10.0.0.4")
		write(m, instance("b", "1"))
		soon("b", "10.0.0.4:80", "another node of the name")
		soon("a", "10.0.0.4:80", "the first node")

		count := func() int {
			z.mu.Lock()
			defer z.mu.Unlock()
			return z.asked["orders"]
		}
		time.Sleep(5 * time.Minute)
		before := count()
		for i := range 100 {
			write(m, instance("a", fmt.Sprint("x", i)))
			d.Failed(d.Snapshot().Node("a"), "10.0.0.4:80")
			time.Sleep(100 * time.Millisecond)
		}
		if asked := count() - before; asked > 6 {
			t.Errorf("a node that changes ten times a second had its name looked up %d times in ten seconds", asked)
		}
	})
}
