package discovery_test

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// once runs a directory until the function ends.
func once(t *testing.T, w discovery.Watcher, o discovery.Options, do func(d *discovery.Directory)) {
	t.Helper()
	d := discovery.NewDirectory(w, isolate(o))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	synctest.Wait()
	do(d)
	cancel()
	<-done
}

// warmFile returns where a directory may keep its list.
func warmFile(t *testing.T) discovery.WarmStart {
	t.Helper()
	return discovery.WarmStart{Path: filepath.Join(t.TempDir(), "discovery", "orders.json"), Registry: "test"}
}

// saveList leaves a file as a directory of the nodes writes it.
func saveList(t *testing.T, w discovery.WarmStart, nodes ...discovery.Node) {
	t.Helper()
	m := discoverytest.NewMemory()
	write(m, nodes...)
	once(t, m.Open(), discovery.Options{WarmStart: w}, func(*discovery.Directory) { time.Sleep(coalesced) })
}

// unreachable is a registry that cannot be reached.
func unreachable() *discoverytest.Memory {
	m := discoverytest.NewMemory()
	m.Break()
	return m
}

func TestWarmStartUsesWhoAccepts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warmFile(t)
		nodes := fleet(4)
		nodes[2].Metadata[discovery.KeyState] = "draining"
		nodes[3] = atEndpoint(nodes[3], "http://orders:80")
		z := newZone("orders", "10.0.0.9")
		n := newNetwork(nodes...)
		n.set(false, nodes[1])
		n.up["10.0.0.9:80"] = true
		saveList(t, w, nodes...)
		time.Sleep(time.Hour)

		m := unreachable()
		d := follow(t, m.Open(), discovery.Options{WarmStart: w, Probe: n.probe, Lookup: z.lookup})
		time.Sleep(time.Second)
		expectStates(t, d, "", "nobody asked")
		if n.total() != 0 || d.Stale() != 0 {
			t.Errorf("%d probes before anybody asked; the view is %v old", n.total(), d.Stale())
		}
		d.Restore()
		time.Sleep(coalesced)
		expectStates(t, d, "n0:restored n2:draining n3:restored", "restored")
		if s := d.Snapshot(); s.Synced || len(s.Service("orders")) != 3 || !s.Node("n0").Serves() || s.Node("n2").Serves() {
			t.Errorf("the snapshot: %+v", s)
		}
		if s := d.Status(); s.Synced || s.Connected || inState(d, discovery.StateRestored) != 2 || s.Nodes != 3 {
			t.Errorf("the status: %+v", s)
		}
		if got := addresses(d, "n3"); got != "[10.0.0.9] 10.0.0.9:80" {
			t.Errorf("a host name: %s", got)
		}
		if age := d.Stale().Round(time.Minute); age != time.Hour {
			t.Errorf("the view is %v old, want an hour", age)
		}

		// Nodes come and go although the registry stays away.
		n.set(true, nodes[1])
		n.set(false, nodes[0])
		d.Restore()
		time.Sleep(31 * time.Second)
		expectStates(t, d, "n1:restored n2:draining n3:restored", "a lease later")
		if n.count(nodes[0]) != 2 {
			t.Errorf("a node was dialled %d times in a lease, want once more", n.count(nodes[0]))
		}

		// The registry knows better.
		write(m, nodes[3], newNode("new"))
		m.Restore()
		reconnect(t, d)
		back := d.Status().Since
		expectStates(t, d, "n1:restored n2:draining n3 new", "the registry is back")
		n.set(false, nodes...)
		time.Sleep(10 * time.Second)
		write(m, nodes[1], nodes[3], newNode("new"))
		time.Sleep(time.Until(back.Add(discovery.DefaultTTL - time.Nanosecond)))
		expectStates(t, d, "n1 n2:draining n3 new", "heard")
		time.Sleep(coalesced)
		expectStates(t, d, "n1 n3 new", "not heard")
		if d.Stale() != 0 || inState(d, discovery.StateRestored) != 0 {
			t.Errorf("the view is %v old, %+v", d.Stale(), d.Status())
		}
	})
}

// A registry that answers soon is all that counts.
func TestWarmStartNotNeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := warmFile(t)
		nodes := fleet(2)
		saveList(t, w, nodes...)
		n := newNetwork(nodes...)
		m := discoverytest.NewMemory()
		write(m, newNode("new"))
		d := follow(t, m.Open(), discovery.Options{WarmStart: w, Probe: n.probe})
		d.Restore()
		time.Sleep(time.Minute)
		expectStates(t, d, "", "a lease after the node was heard")
		if got := n.count(nodes[0]) + n.count(nodes[1]); got != 0 {
			t.Errorf("%d probes of what was remembered", got)
		}
	})
}

// What the first listing lacks leaves at once where that proves something, and has
// a lease to be heard where it does not.
func TestFirstListingEndsWarmStart(t *testing.T) {
	for _, test := range []struct {
		name  string
		after time.Duration
		then  discovery.Listing
		say   func(s *stream)
		stays bool
	}{
		{"it went on", time.Second, discovery.Listing{Epoch: "e", Revision: 9}, nil, false},
		{"long ago", time.Minute, discovery.Listing{Epoch: "e", Revision: 9}, nil, true},
		{"records run out soon", 10 * time.Second, discovery.Listing{Epoch: "e", Revision: 9, Expiry: 5 * time.Second}, nil, true},
		{"partial", time.Second, discovery.Listing{Epoch: "e", Revision: 9, Partial: true}, nil, true},
		{"wiped", time.Second, discovery.Listing{Epoch: "f", Revision: 9}, nil, true},
		{"went backwards", time.Second, discovery.Listing{Epoch: "e", Revision: 2}, nil, true},
		{"left", time.Minute, discovery.Listing{Epoch: "e", Revision: 9}, func(s *stream) {
			s.emit(discovery.Event{Type: discovery.Left, ID: "a", Key: "ka", Revision: 8})
		}, false},
		{"rejected", time.Minute, discovery.Listing{Epoch: "e", Revision: 9}, func(s *stream) {
			s.emit(discovery.Event{Type: discovery.Rejected, Key: "ka", Err: discovery.Forbid(discovery.ErrInvalid)})
		}, false},
		{"not understood", time.Second, discovery.Listing{Epoch: "e", Revision: 9}, func(s *stream) {
			s.emit(discovery.Event{Type: discovery.Rejected, Key: "ka", Err: discovery.ErrInvalid})
		}, true},
		{"not understood, and then run out", time.Second, discovery.Listing{Epoch: "e", Revision: 9}, func(s *stream) {
			s.emit(discovery.Event{Type: discovery.Rejected, Key: "ka", Err: discovery.ErrInvalid})
			s.emit(discovery.Event{Type: discovery.Expired, Key: "ka"})
		}, false},
		{"not understood, as many others", time.Second, discovery.Listing{Epoch: "e", Revision: 9}, func(s *stream) {
			for i := range 1000 {
				s.emit(discovery.Event{Type: discovery.Rejected, Key: fmt.Sprint("junk-", i), Err: discovery.ErrInvalid})
			}
			s.emit(discovery.Event{Type: discovery.Rejected, Key: "ka", Err: discovery.ErrInvalid})
		}, true},
		{"another node under its key", time.Minute, discovery.Listing{Epoch: "e", Revision: 9}, func(s *stream) {
			s.put("ka", 8, newNode("b"))
		}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				file := warmFile(t)
				watcher := newScripted()
				once(t, watcher, discovery.Options{WarmStart: file}, func(*discovery.Directory) {
					s := <-watcher.streams
					s.put("ka", 3, newNode("a"))
					s.sync(discovery.Listing{Epoch: "e", Revision: 7})
					synctest.Wait()
				})
				time.Sleep(test.after - time.Second)
				watcher = newScripted()
				d := follow(t, watcher, discovery.Options{WarmStart: file, Probe: newNetwork(newNode("a")).probe})
				s := <-watcher.streams
				d.Restore()
				time.Sleep(time.Second)
				expectStates(t, d, "a:restored", "restored")
				if test.say != nil {
					test.say(s)
				}
				s.sync(test.then)
				time.Sleep(coalesced)
				got := strings.ReplaceAll(states(d), "b", "")
				if want := map[bool]string{true: "a:restored"}[test.stays]; got != want {
					t.Fatalf("nodes [%s], want [%s]", got, want)
				}
				if test.stays {
					time.Sleep(discovery.DefaultTTL)
					expectStates(t, d, "", "a lease later")
				}
			})
		})
	}
}

func TestRunEndsWhileRestoring(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := warmFile(t)
		nodes := fleet(300)
		saveList(t, file, nodes...)
		n := newNetwork(nodes...)
		n.delay = time.Hour
		once(t, unreachable().Open(), discovery.Options{WarmStart: file, Probe: n.probe}, func(d *discovery.Directory) {
			d.Restore()
			time.Sleep(time.Second)
		})
		once(t, unreachable().Open(), discovery.Options{WarmStart: file, Probe: n.probe}, func(d *discovery.Directory) {})
	})
}
