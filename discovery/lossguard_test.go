package discovery_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// Of too many nodes that fall silent at once those stay that accept connections.
func TestLossGuardHoldsWhoAccepts(t *testing.T) {
	for _, test := range []struct {
		name string
		// A letter for each node: h is heard on, s falls silent and accepts connections,
		// d falls silent and accepts none.
		fleet string
		guard *int
		want  string
	}{
		{"a few", "hhhhhsssss", nil, "n0 n1 n2 n3 n4"},
		{"too many", "hhhhssssss", nil, "n0 n1 n2 n3 n4:held n5:held n6:held n7:held n8:held n9:held"},
		{"too many, some dead", "hhhhddddss", nil, "n0 n1 n2 n3 n8:held n9:held"},
		{"all", "ssss", nil, "n0:held n1:held n2:held n3:held"},
		{"all, all dead", "dddd", nil, ""},
		{"a small fleet", "ss", nil, "n0:held n1:held"},
		{"a small fleet, one dead", "ds", nil, "n1:held"},
		{"a small fleet, one silent", "hs", nil, "n0"},
		{"a fleet of one", "s", nil, "n0:held"},
		{"a fleet of one, dead", "d", nil, ""},
		{"a strict guard", "hhhhhhhsss", new(20), "n0 n1 n2 n3 n4 n5 n6 n7:held n8:held n9:held"},
		{"a strict guard, its floor", "hhhhhhhhss", new(1), "n0 n1 n2 n3 n4 n5 n6 n7"},
		{"no guard", "ssss", new(0), ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes, n, heard := fleet(len(test.fleet)), newNetwork(), 0
				for i, letter := range test.fleet {
					n.set(letter != 'd', nodes[i])
					if letter == 'h' {
						heard = i + 1
					}
				}
				m := discoverytest.NewMemory()
				write(m, nodes...)
				d := follow(t, m.Open(), discovery.Options{LossGuard: test.guard, Probe: n.probe})
				time.Sleep(20 * time.Second)
				write(m, nodes[:heard]...)
				time.Sleep(10*time.Second + coalesced)
				expectStates(t, d, test.want, "a lease after they fell silent")
			})
		})
	}
}

// A fleet does not lapse in one instant: its heartbeats are spread. Those that went
// before there were too many come back.
func TestLossGuardBringsBackWhoWentBefore(t *testing.T) {
	for _, marker := range []bool{false, true} {
		t.Run(fmt.Sprint("by expiry markers ", marker), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := fleet(10)
				n := newNetwork(nodes...)
				n.set(false, nodes[1])
				m := discoverytest.NewMemory()
				d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
				for _, node := range nodes {
					write(m, node)
					time.Sleep(time.Second)
				}
				start := time.Now()
				// lapse lets the node lapse that was heard longest ago.
				lapse := func(i int) {
					if marker {
						m.Expire(nodes[i].ID)
					}
					time.Sleep(time.Until(start.Add(20*time.Second + time.Duration(i)*time.Second)))
				}
				for i := range 5 {
					lapse(i)
				}
				expectStates(t, d, "n5 n6 n7 n8 n9", "half of them lapsed")
				if n.total() != 0 {
					t.Errorf("%d probes before there was a mass lapse", n.total())
				}
				lapse(5)
				time.Sleep(coalesced)
				expectStates(t, d, "n0:held n2:held n3:held n4:held n5:held n6 n7 n8 n9", "most of them lapsed")
				for i := 6; i < 10; i++ {
					lapse(i)
				}
				time.Sleep(coalesced)
				expectStates(t, d, "n0:held n2:held n3:held n4:held n5:held n6:held n7:held n8:held n9:held", "all of them lapsed")
				if n.total() != 10 {
					t.Errorf("%d probes of 10 nodes", n.total())
				}
			})
		})
	}
}

// Records that run out in the registry in one burst are one mass lapse, of which
// no part is believed.
func TestBurstOfExpiriesIsOneMassLapse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(100)
		n := newNetwork(nodes...)
		n.delay = time.Second
		w := newScripted()
		d := follow(t, w, discovery.Options{Probe: n.probe})
		s := <-w.streams
		for _, node := range nodes {
			s.put("node."+node.ID, 0, node)
		}
		s.sync(discovery.Listing{})
		synctest.Wait()
		for _, node := range nodes {
			s.emit(discovery.Event{Type: discovery.Expired, ID: node.ID, Key: "node." + node.ID})
		}
		// What of the burst is taken in before most of the fleet has expired may
		// be gone for as long as it takes to ask, and is back then.
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if nodes, held := d.Status().Nodes, inState(d, discovery.StateHeld); held != 100 || nodes != 100 {
			t.Errorf("%d nodes, %d held", nodes, held)
		}
	})
}

// A node whose record ran out and is there again in the same burst has not lapsed.
func TestExpiredAndHeardInOneBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var busy sync.Mutex
		w := newScripted()
		d := follow(t, w, discovery.Options{Permit: func(*discovery.Entry) bool {
			busy.Lock()
			defer busy.Unlock()
			return true
		}})
		s := <-w.streams
		s.put("ka", 1, newNode("a"))
		s.put("kb", 2, newNode("b"))
		s.sync(discovery.Listing{})
		synctest.Wait()
		busy.Lock()
		s.put("kc", 3, newNode("c")) // the loop waits with that
		s.emit(discovery.Event{Type: discovery.Expired, ID: "a", Key: "ka", Revision: 4})
		s.put("ka", 5, newNode("a"))
		busy.Unlock()
		expect(t, d, "a b c", "heard again")
	})
}

// A held node is asked once a lease, and is heard, leaves, refuses or is given up as the
// exception.
func TestHeldNodesAreAskedEachLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(4)
		n := newNetwork(nodes...)
		m := discoverytest.NewMemory()
		conn := m.Open()
		write(m, nodes...)
		d := follow(t, conn, discovery.Options{Probe: n.probe})
		start := time.Now()
		time.Sleep(discovery.DefaultTTL + coalesced)
		expectStates(t, d, "n0:held n1:held n2:held n3:held", "all lapsed")
		for _, e := range d.Snapshot().Nodes() {
			if !e.Serves() || e.LeaseEnd().Sub(start) != 2*discovery.DefaultTTL {
				t.Errorf("%s serves: %v, its lease ends in %v", e.Node.ID, e.Serves(), time.Until(e.LeaseEnd()))
			}
		}

		time.Sleep(10 * time.Second)
		write(m, nodes[0])
		expectStates(t, d, "n0 n1:held n2:held n3:held", "one is heard")
		n.set(false, nodes[1])
		if err := conn.Withdraw(context.Background(), nodes[2]); err != nil {
			t.Fatal(err)
		}
		expectStates(t, d, "n0 n1:held n3:held", "one left by its own word")

		time.Sleep(time.Until(start.Add(2*discovery.DefaultTTL)) - time.Nanosecond)
		expectStates(t, d, "n0 n1:held n3:held", "just before they are asked again")
		time.Sleep(time.Nanosecond)
		expectStates(t, d, "n0 n3:held", "one of them refuses")
		if got := n.count(nodes[3]); got != 2 {
			t.Errorf("a held node was dialled %d times in a lease, want once more", got)
		}
		// The other one is the exception from now on, and stays for one lease more.
		for time.Since(start) < 4*discovery.DefaultTTL-10*time.Second {
			write(m, nodes[0])
			time.Sleep(10 * time.Second)
		}
		expectStates(t, d, "n0 n3:held", "while the rest has not been heard for a lease")
		write(m, nodes[0])
		time.Sleep(10*time.Second + coalesced)
		expectStates(t, d, "n0", "the rest has been heard for a lease")
		write(m, nodes...)
		time.Sleep(coalesced)
		expectStates(t, d, "n0 n1 n2 n3", "all are heard")
	})
}

// Those that are most of a service stay for as long as they accept.
func TestHeldNodesStayWhileTheyAreMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(4)
		n := newNetwork(nodes...)
		m := discoverytest.NewMemory()
		write(m, nodes...)
		d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
		beat := func(spell time.Duration) {
			for start := time.Now(); time.Since(start) < spell; time.Sleep(10 * time.Second) {
				write(m, nodes[0])
			}
		}
		time.Sleep(discovery.DefaultTTL + coalesced)
		beat(time.Hour)
		expectStates(t, d, "n0 n1:held n2:held n3:held", "an hour later")
		n.set(false, nodes[3])
		beat(2 * discovery.DefaultTTL)
		expectStates(t, d, "n0 n1:held n2:held", "one refuses")
		n.set(false, nodes[2])
		beat(discovery.DefaultTTL)
		expectStates(t, d, "n0 n1:held", "two refuse")
		beat(3 * discovery.DefaultTTL)
		expectStates(t, d, "n0", "the last one is the exception")
	})
}

// A guard that doubts only the lapse of all nodes holds them for as long as all are
// silent, like any other.
func TestHeldNodesStayByTheLaxestGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(4)
		n := newNetwork(nodes...)
		m := discoverytest.NewMemory()
		write(m, nodes...)
		d := follow(t, m.Open(), discovery.Options{LossGuard: new(100), Probe: n.probe})
		time.Sleep(time.Hour)
		expectStates(t, d, "n0:held n1:held n2:held n3:held", "an hour of silence")
		for range 10 {
			write(m, nodes[0])
			time.Sleep(10 * time.Second)
		}
		expectStates(t, d, "n0", "one has been heard for some leases")
	})
}

// Nodes that would be given up in the very moment in which all others lapse, or
// just before it, are part of that mass lapse.
func TestHeldNodesBelongToTheNextMassLapse(t *testing.T) {
	const all = "n0:held n1:held n2:held n3:held n4:held n5:held n6:held n7:held n8:held n9:held"
	for _, test := range []struct {
		name   string
		before time.Duration // so long before the others their fate is decided
	}{
		{"in the same moment", 0},
		{"just before", time.Millisecond},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := fleet(10)
				n := newNetwork(nodes...)
				w := newScripted()
				d := follow(t, w, discovery.Options{Probe: n.probe})
				s := <-w.streams
				for i, node := range nodes {
					s.put(fmt.Sprint("k", i), 0, node)
				}
				s.sync(discovery.Listing{})
				start := time.Now()
				at := func(leases time.Duration) { time.Sleep(time.Until(start.Add(leases * discovery.DefaultTTL))) }
				beat := func(from int) {
					synctest.Wait()
					for i := from; i < 10; i++ {
						s.emit(discovery.Event{Type: discovery.Beat, ID: nodes[i].ID, Key: fmt.Sprint("k", i)})
					}
				}
				time.Sleep(20 * time.Second)
				beat(6)
				at(1)
				time.Sleep(10 * time.Second)
				beat(6)
				expectStates(t, d, "n0:held n1:held n2:held n3:held n4:held n5:held n6 n7 n8 n9", "six are held")
				time.Sleep(10 * time.Second)
				beat(4)
				at(2)
				time.Sleep(test.before)
				beat(4)
				expectStates(t, d, "n0:held n1:held n2:held n3:held n4 n5 n6 n7 n8 n9", "two are back")
				at(3)
				time.Sleep(coalesced)
				expectStates(t, d, all, "all lapsed")
			})
		})
	}
}

// However many nodes a first listing shows as overdue: each that accepts
// connections is used.
func TestFirstListingOfManyOverdue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 66_000 // more than are remembered of nodes that lapsed
		w := newScripted()
		d := follow(t, w, discovery.Options{Probe: func(context.Context, string) error { return nil }})
		s := <-w.streams
		for i := range size {
			node := newNode(fmt.Sprint("n", i))
			var err error
			if node.Endpoint, err = discovery.ParseEndpoint(fmt.Sprintf("http://10.%d.%d.%d:5001", i/62_500, i/250%250, i%250)); err != nil {
				t.Fatal(err)
			}
			s.emit(discovery.Event{
				Type: discovery.Put, ID: node.ID, Key: "node." + node.ID, Node: node, Age: discovery.DefaultTTL + time.Second,
			})
		}
		s.sync(discovery.Listing{})
		time.Sleep(discovery.DefaultTTL / 2)
		synctest.Wait()
		if nodes, held := d.Status().Nodes, inState(d, discovery.StateHeld); nodes != size || held != size {
			t.Errorf("%d nodes, %d held; want %d", nodes, held, size)
		}
	})
}

// A service may be cut off from the registry while all others are not, however few
// of the nodes are its own.
func TestLossGuardOfEachService(t *testing.T) {
	for _, test := range []struct {
		name    string
		silent  int // of the ten of orders
		accept  int
		hang    bool // what does not accept does not answer at all
		want    string
		later   string // a minute later
		dialled int
	}{
		{"one", 1, 1, false, "n1 n2 n3 n4 n5 n6 n7 n8 n9", "n1 n2 n3 n4 n5 n6 n7 n8 n9", 0},
		{"half", 5, 5, false, "n5 n6 n7 n8 n9", "n5 n6 n7 n8 n9", 0},
		{"most", 6, 6, false, "n0:held n1:held n2:held n3:held n4:held n5:held n6 n7 n8 n9", "n0:held n1:held n2:held n3:held n4:held n5:held n6 n7 n8 n9", 18},
		{"all", 10, 10, false, "n0:held n1:held n2:held n3:held n4:held n5:held n6:held n7:held n8:held n9:held",
			"n0:held n1:held n2:held n3:held n4:held n5:held n6:held n7:held n8:held n9:held", 30},
		{"all, most dead", 10, 2, false, "n0:held n1:held", "n0:held n1:held", 14},
		{"all dead", 10, 0, false, "", "", 10},
		{"all gone without a word", 10, 0, true, "", "", 10},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := fleet(100)
				for i := range nodes {
					if i >= 10 {
						nodes[i].Metadata = map[string]string{discovery.KeyService: fmt.Sprint("other-", i%7)}
					}
				}
				n := newNetwork(nodes[:test.accept]...)
				if test.hang {
					n.delay = time.Hour
				}
				m := discoverytest.NewMemory()
				write(m, nodes...)
				d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
				orders := func() string {
					synctest.Wait()
					var words []string
					for _, e := range d.Snapshot().Service("orders") {
						word := e.Node.ID
						if e.State() != discovery.StateUp {
							word += ":" + string(e.State())
						}
						words = append(words, word)
					}
					return strings.Join(words, " ")
				}
				beat := func(until time.Duration) {
					for end := time.Now().Add(until); time.Now().Before(end); time.Sleep(min(10*time.Second, time.Until(end))) {
						write(m, nodes[test.silent:]...)
					}
				}
				beat(discovery.DefaultTTL + 3*time.Second)
				if got := orders(); got != test.want {
					t.Errorf("after a lease: [%s], want [%s]", got, test.want)
				}
				beat(2 * discovery.DefaultTTL)
				if got := orders(); got != test.later {
					t.Errorf("two leases later: [%s], want [%s]", got, test.later)
				}
				if got := n.total(); got != test.dialled {
					t.Errorf("%d probes, want %d", got, test.dialled)
				}
				if got := len(d.Snapshot().Nodes()); got < 90 {
					t.Errorf("%d nodes left of the other services", got)
				}
			})
		})
	}
}

// A node that hangs, and was held only because strangers vanished at the same time,
// does not stay for ever; and strangers that no request would reach do not count.
func TestHeldNodesDoNotDependOnStrangers(t *testing.T) {
	for _, test := range []struct {
		name   string
		permit bool
	}{{"that may be used", true}, {"that may not be used", false}} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := fleet(10)
				n := newNetwork(nodes...)
				w := newScripted()
				d := follow(t, w, discovery.Options{Probe: n.probe, Permit: func(e *discovery.Entry) bool {
					return test.permit || e.Node.Service() != "strangers"
				}})
				s := <-w.streams
				for i, node := range nodes {
					s.put(fmt.Sprint("k", i), 0, node)
				}
				for i := range 20 {
					stranger := newNode(fmt.Sprint("s", i))
					stranger.Metadata = map[string]string{discovery.KeyService: "strangers", discovery.KeyLease: "24h"}
					s.put(fmt.Sprint("s", i), 0, stranger)
				}
				s.sync(discovery.Listing{})
				for i := range 20 {
					s.emit(discovery.Event{Type: discovery.Expired, Key: fmt.Sprint("s", i)})
				}
				beat := func(spell time.Duration) string {
					for end := time.Now().Add(spell); time.Now().Before(end); time.Sleep(10 * time.Second) {
						for i := 1; i < 10; i++ {
							s.emit(discovery.Event{Type: discovery.Beat, ID: nodes[i].ID, Key: fmt.Sprint("k", i)})
						}
					}
					synctest.Wait()
					return states(d)
				}
				const rest = "n1 n2 n3 n4 n5 n6 n7 n8 n9"
				want := map[bool]string{true: "n0:held " + rest, false: rest}[test.permit]
				if got := beat(discovery.DefaultTTL + 10*time.Second); got != want {
					t.Errorf("after a lease: [%s], want [%s]", got, want)
				}
				if got := beat(24 * time.Hour); got != rest {
					t.Errorf("later: [%s], want [%s]", got, rest)
				}
				if !test.permit && n.total() != 0 {
					t.Errorf("%d probes", n.total())
				}
			})
		})
	}
}

// That a node's old record is listed again after an outage is no heartbeat.
func TestHeldNodesStayThroughAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(3)
		n := newNetwork(nodes...)
		m := discoverytest.NewMemory()
		write(m, nodes...)
		d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
		time.Sleep(35 * time.Second)
		expectStates(t, d, "n0:held n1:held n2:held", "all lapsed")
		m.Break()
		time.Sleep(time.Hour)
		expectStates(t, d, "n0:held n1:held n2:held", "the registry is away")
		if n.total() != 3 {
			t.Errorf("%d probes while leases were suspended", n.total())
		}
		m.Restore()
		reconnect(t, d)
		expectStates(t, d, "n0:held n1:held n2:held", "the registry is back")
		write(m, nodes[0])
		expectStates(t, d, "n0 n1:held n2:held", "one is heard")
		n.set(false, nodes[1])
		time.Sleep(40 * time.Second)
		expectStates(t, d, "n0:held n2:held", "a lease later")
	})
}

// What the registry says of a node while it is being asked, or since it lapsed,
// outweighs that it answers.
func TestRegistryOutweighsAnAnswer(t *testing.T) {
	for _, test := range []struct {
		name string
		say  func(s *stream, nodes []discovery.Node)
		want string
	}{
		{"nothing", func(*stream, []discovery.Node) {}, "n0:held n1:held n2:held n3:held n4:held"},
		{"heard", func(s *stream, nodes []discovery.Node) {
			s.put("k0", 9, nodes[0])
			s.put("k4", 9, nodes[4])
			s.emit(discovery.Event{Type: discovery.Beat, ID: "n3", Key: "k3"})
		}, "n0 n1:held n2:held n3 n4"},
		{"left", func(s *stream, nodes []discovery.Node) {
			s.emit(discovery.Event{Type: discovery.Left, ID: "n0", Key: "k0"})
			s.emit(discovery.Event{Type: discovery.Left, ID: "n4", Key: "k4"})
		}, "n1:held n2:held n3:held"},
		{"rejected", func(s *stream, nodes []discovery.Node) {
			s.emit(discovery.Event{Type: discovery.Rejected, Key: "k0", Err: discovery.Forbid(discovery.ErrInvalid)})
			s.emit(discovery.Event{Type: discovery.Rejected, Key: "k4", Err: discovery.Forbid(discovery.ErrInvalid)})
		}, "n1:held n2:held n3:held"},
		{"not understood", func(s *stream, nodes []discovery.Node) {
			s.emit(discovery.Event{Type: discovery.Rejected, Key: "k0", Err: discovery.ErrInvalid})
			s.emit(discovery.Event{Type: discovery.Rejected, Key: "k4", Err: discovery.ErrInvalid})
		}, "n0:held n1:held n2:held n3:held n4:held"},
		{"replaced", func(s *stream, nodes []discovery.Node) {
			s.put("k0", 9, newNode("other-0"))
			s.put("k4", 9, newNode("other-4"))
		}, "n1:held n2:held n3:held other-0 other-4"},
		{"under another key", func(s *stream, nodes []discovery.Node) {
			s.emit(discovery.Event{Type: discovery.Left, ID: "n0", Key: "another"})
			s.put("another", 9, nodes[4])
		}, "n0:held n1:held n2:held n3:held n4"},
		{"lost", func(s *stream, nodes []discovery.Node) { s.end <- discovery.ErrBroken }, "n0:held n1:held n2:held n3:held n4:held"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := fleet(5)
				n := newNetwork(nodes...)
				n.delay = time.Second
				w := newScripted()
				d := follow(t, w, discovery.Options{Probe: n.probe})
				s := <-w.streams
				for i, node := range nodes {
					s.put(fmt.Sprint("k", i), uint64(i), node)
				}
				s.sync(discovery.Listing{})
				s.emit(discovery.Event{Type: discovery.Expired, ID: "n0", Key: "k0"})
				s.emit(discovery.Event{Type: discovery.Expired, ID: "n1", Key: "k1"})
				expectStates(t, d, "n2 n3 n4", "two expired")
				time.Sleep(discovery.DefaultTTL - time.Millisecond)
				for i := 2; i < 5; i++ {
					s.emit(discovery.Event{Type: discovery.Expired, ID: nodes[i].ID, Key: fmt.Sprint("k", i)})
				}
				synctest.Wait() // they are being asked
				test.say(s, nodes)
				time.Sleep(time.Second + coalesced)
				expectStates(t, d, test.want, "asked")
			})
		})
	}
}

// Where the registry is lost while nodes are asked, this machine's network may be
// what is wrong: that they do not answer proves nothing.
func TestLossGuardWithoutNetwork(t *testing.T) {
	for _, test := range []struct {
		name  string
		err   error
		lost  bool
		stays bool
	}{
		{"refused", syscall.ECONNREFUSED, false, false},
		{"no route", syscall.EHOSTUNREACH, false, false},
		{"refused and the registry lost", syscall.ECONNREFUSED, true, true},
		{"no sockets left", &net.OpError{Op: "dial", Err: syscall.EMFILE}, false, true},
		{"no ports left", &net.OpError{Op: "dial", Err: syscall.EADDRNOTAVAIL}, false, true},
		{"forbidden by this machine", &net.OpError{Op: "dial", Err: syscall.EPERM}, false, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := fleet(3)
				n := newNetwork()
				n.err, n.delay = test.err, time.Second
				w := newScripted()
				d := follow(t, w, discovery.Options{Probe: n.probe})
				s := <-w.streams
				for _, node := range nodes {
					s.put("", 0, node)
				}
				s.sync(discovery.Listing{})
				time.Sleep(discovery.DefaultTTL)
				synctest.Wait()
				if test.lost {
					s.end <- discovery.ErrBroken
				}
				time.Sleep(2 * time.Second)
				if want := map[bool]string{true: "n0 n1 n2"}[test.stays]; want != "" {
					expect(t, d, want, "asked")
				} else {
					expect(t, d, "", "asked")
				}
			})
		})
	}
}

// Whatever keeps this machine from asking a node, a hold for want of an answer ends,
// unless it is that nothing at all can be asked.
func TestHoldForWantOfAnAnswer(t *testing.T) {
	for _, test := range []struct {
		name string
		err  error
		want string
	}{
		{"forbidden", &net.OpError{Op: "dial", Err: syscall.EACCES}, ""},
		{"no sockets left", &net.OpError{Op: "dial", Err: syscall.EMFILE}, "n0:held n1:held n2:held"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newNetwork()
				n.err = test.err
				m := discoverytest.NewMemory()
				write(m, fleet(3)...)
				d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
				time.Sleep(3*discovery.DefaultTTL + coalesced)
				expectStates(t, d, "n0:held n1:held n2:held", "three leases without an answer")
				time.Sleep(time.Hour)
				expectStates(t, d, test.want, "an hour without one")
			})
		})
	}
}

// What this machine does not let out counts anew once a node has accepted a connection.
func TestForbiddenProbesCountInARow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(3)
		n := newNetwork()
		n.err = &net.OpError{Op: "dial", Err: syscall.EACCES}
		m := discoverytest.NewMemory()
		write(m, nodes...)
		d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
		const held = "n0:held n1:held n2:held"
		time.Sleep(3*discovery.DefaultTTL + coalesced)
		expectStates(t, d, held, "forbidden three times")
		n.set(true, nodes...)
		time.Sleep(discovery.DefaultTTL)
		expectStates(t, d, held, "they accept")
		n.set(false, nodes...)
		time.Sleep(3 * discovery.DefaultTTL)
		expectStates(t, d, held, "forbidden three times more")
		time.Sleep(discovery.DefaultTTL)
		expectStates(t, d, "", "and once more")
	})
}

// A proxy may start in the middle of a mass lapse, or after it.
func TestFirstListingThatIsMostlyOverdue(t *testing.T) {
	for _, test := range []struct {
		name    string
		nodes   int
		overdue int // of which so many are overdue
		by      time.Duration
		want    string
	}{
		{"half", 6, 3, time.Second, "n3 n4 n5"},
		{"most", 6, 4, time.Second, "n0:held n1:held n3:held n4 n5"},
		{"all", 3, 3, 10 * time.Minute, "n0:held n1:held"},
		{"two of two", 2, 2, time.Second, "n0:held"},
		{"one of two", 2, 1, time.Second, "n1"},
		{"since the day before yesterday", 6, 4, 48 * time.Hour, "n4 n5"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := fleet(test.nodes)
				n := newNetwork(nodes...)
				n.set(false, nodes[min(2, len(nodes)-1)])
				m := discoverytest.NewMemory()
				write(m, nodes...)
				for _, node := range nodes[:test.overdue] {
					m.Age(node.ID, discovery.DefaultTTL+test.by)
				}
				d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
				time.Sleep(coalesced)
				expectStates(t, d, test.want, "listed")
				write(m, nodes...)
				time.Sleep(time.Second)
				if nodes, held := d.Status().Nodes, inState(d, discovery.StateHeld); nodes != test.nodes || held != 0 {
					t.Errorf("after all were heard: %d nodes, %d held", nodes, held)
				}
			})
		})
	}
}

// Whoever only looks dials nobody and looks no name up.
func TestRecordsOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(6)
		for i, name := range []string{"http://a.example:80", "http://b.example:80"} {
			var err error
			if nodes[i].Endpoint, err = discovery.ParseEndpoint(name); err != nil {
				t.Fatal(err)
			}
		}
		m := discoverytest.NewMemory()
		write(m, nodes...)
		for _, i := range []int{0, 2, 3, 4} {
			m.Age(nodes[i].ID, discovery.DefaultTTL+time.Second)
		}
		var asked atomic.Int64
		d := follow(t, m.Open(), discovery.Options{
			RecordsOnly: true,
			Probe:       func(context.Context, string) error { asked.Add(1); return nil },
			Lookup:      func(context.Context, string) ([]netip.Addr, error) { asked.Add(1); return nil, nil },
		})
		time.Sleep(coalesced)
		expectStates(t, d, "n0:held n1 n2:held n3:held n4:held n5", "listed")
		time.Sleep(2 * discovery.DefaultTTL)
		expectStates(t, d, "n0:held n1:held n2:held n3:held n4:held n5:held", "later")
		if n := asked.Load(); n > 0 {
			t.Errorf("somebody was asked %d times", n)
		}
		for _, c := range d.Journal().Newest(0, nil) {
			if strings.Contains(c.Reason, "accepts connections") {
				t.Errorf("the journal says %q, and nobody asked", c.Reason)
			}
		}
	})
}

// What was overdue in the first listing, but not for long, is part of the mass
// lapse that goes on after it.
func TestFirstListingInMassLapse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(8)
		n := newNetwork(nodes...)
		m := discoverytest.NewMemory()
		write(m, nodes...)
		for i := range nodes {
			m.Age(nodes[i].ID, discovery.DefaultTTL+time.Duration(3-i)*time.Second)
		}
		d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
		expectStates(t, d, "n4 n5 n6 n7", "listed")
		time.Sleep(1500 * time.Millisecond)
		expectStates(t, d, "n0:held n1:held n2:held n3:held n4:held n5 n6 n7", "one more lapsed")
	})
}

// Nodes stay in use while a bounded number of them is asked at once.
func TestNodesStayWhileTheyAreAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(1000)
		n := newNetwork()
		n.delay = time.Hour // nothing comes back at all
		m := discoverytest.NewMemory()
		write(m, nodes...)
		d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
		time.Sleep(discovery.DefaultTTL)
		synctest.Wait()
		if got := len(d.Snapshot().Nodes()); got != 1000 {
			t.Errorf("%d nodes left while they are asked", got)
		}
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if got := len(d.Snapshot().Nodes()); got != 0 {
			t.Errorf("%d nodes left", got)
		}
		if n.most > 128 || n.total() != 1000 {
			t.Errorf("%d probes at once, %d in all", n.most, n.total())
		}
	})
}

func TestRunEndsWhileProbing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(500)
		n := newNetwork()
		n.delay = time.Hour
		m := discoverytest.NewMemory()
		write(m, nodes...)
		follow(t, m.Open(), discovery.Options{Probe: n.probe})
		time.Sleep(discovery.DefaultTTL + time.Second)
	})
}

// A node that takes no new requests takes none for being held either.
func TestHeldNodesKeepTheirOwnState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nodes := fleet(3)
		nodes[1].Metadata[discovery.KeyState] = "draining"
		nodes[2].Metadata[discovery.KeyWeight] = "0"
		n := newNetwork(nodes...)
		m := discoverytest.NewMemory()
		write(m, nodes...)
		d := follow(t, m.Open(), discovery.Options{Probe: n.probe})
		time.Sleep(discovery.DefaultTTL + coalesced)
		expectStates(t, d, "n0:held n1:draining n2:held", "held")
		for i, want := range []bool{true, false, false} {
			if e := d.Snapshot().Node(nodes[i].ID); e.Serves() != want {
				t.Errorf("%s serves: %v", e.Node.ID, e.Serves())
			}
		}
	})
}

// A mass lapse is one line, not one for each node of a large fleet.
func TestMassLapseIsOneLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, logs := newLog(slog.LevelInfo)
		nodes := fleet(1000)
		n := newNetwork(nodes...)
		m := discoverytest.NewMemory()
		write(m, nodes...)
		follow(t, m.Open(), discovery.Options{Probe: n.probe, Logger: log})
		time.Sleep(10 * discovery.DefaultTTL)
		if got := len(logs.containing("most nodes lapsed at once")); got != 1 {
			t.Errorf("%d lines about one mass lapse", got)
		}
		if len(logs.all()) > 30 {
			t.Errorf("%d lines", len(logs.all()))
		}
	})
}
