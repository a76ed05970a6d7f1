package discovery_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A node that is in use though nobody hears it goes when another one announces its
// address for another service, and only then.
func TestAddressTakenByAnotherService(t *testing.T) {
	old := func() discovery.Node { return atEndpoint(newNode("old", "service", "orders"), "http://10.0.0.1:80") }
	next := func(pairs ...string) discovery.Node {
		return atEndpoint(newNode("new", append([]string{"service", "pay"}, pairs...)...), "10.0.0.1:80")
	}
	others := fleet(3)
	for _, test := range []struct {
		name string
		days func(t *testing.T, w *scripted, d *discovery.Directory, s *stream)
		want string
	}{
		{"held", func(_ *testing.T, _ *scripted, _ *discovery.Directory, s *stream) {
			time.Sleep(40 * time.Second) // all lapse
			s.put("", 0, next())
		}, "n0:held n1:held n2:held new"},
		{"held, and another service comes back", func(_ *testing.T, _ *scripted, _ *discovery.Directory, s *stream) {
			s.put("", 0, next())
			time.Sleep(40 * time.Second)
			s.put("", 0, next())
		}, "n0:held n1:held n2:held new old:held"},
		{"held, and the same service moves there", func(_ *testing.T, _ *scripted, _ *discovery.Directory, s *stream) {
			time.Sleep(40 * time.Second)
			s.put("", 0, next("service", "orders"))
		}, "n0:held n1:held n2:held new old:held"},
		{"held, by a node that moves", func(_ *testing.T, _ *scripted, _ *discovery.Directory, s *stream) {
			time.Sleep(40 * time.Second)
			s.put("", 0, atEndpoint(next(), "10.0.0.9:80"))
			s.put("", 0, next())
		}, "n0:held n1:held n2:held new"},
		{"lapses after the other has come", func(_ *testing.T, _ *scripted, _ *discovery.Directory, s *stream) {
			time.Sleep(20 * time.Second)
			s.put("", 0, next())
			time.Sleep(15 * time.Second)
		}, "n0:held n1:held n2:held new"},
		{"live", func(_ *testing.T, _ *scripted, _ *discovery.Directory, s *stream) {
			time.Sleep(20 * time.Second)
			s.put("", 0, next())
		}, "n0 n1 n2 new old"},
		{"awaited, by what the listing shows", func(t *testing.T, w *scripted, _ *discovery.Directory, s *stream) {
			s.end <- discovery.ErrBroken
			time.Sleep(time.Hour)
			s = <-w.streams
			s.put("", 0, next())
			s.sync(discovery.Listing{})
		}, "n0 n1 n2 new"},
		{"awaited, by one that joins", func(t *testing.T, w *scripted, _ *discovery.Directory, s *stream) {
			s.end <- discovery.ErrBroken
			time.Sleep(time.Hour)
			s = <-w.streams
			s.sync(discovery.Listing{})
			s.put("", 0, next())
		}, "n0 n1 n2 new"},
		{"awaited, beside one that was there all along", func(t *testing.T, w *scripted, _ *discovery.Directory, s *stream) {
			s.put("", 0, next())
			time.Sleep(time.Second)
			s.put("", 0, old())
			s.end <- discovery.ErrBroken
			time.Sleep(time.Hour)
			s = <-w.streams
			s.put("", 0, next())
			s.sync(discovery.Listing{})
		}, "n0 n1 n2 new old"},
		{"it is heard after all", func(t *testing.T, w *scripted, _ *discovery.Directory, s *stream) {
			time.Sleep(40 * time.Second)
			s.put("", 0, next())
			s.put("", 0, old())
		}, "n0:held n1:held n2:held new old"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newScripted()
				d := follow(t, w, discovery.Options{Probe: newNetwork(append(others, old())...).probe})
				s := <-w.streams
				for _, n := range append(others, old()) {
					s.put("", 0, n)
				}
				s.sync(discovery.Listing{})
				synctest.Wait()
				test.days(t, w, d, s)
				time.Sleep(coalesced)
				expectStates(t, d, test.want, "in the end")
			})
		})
	}
}

// What is remembered of an address that is another node's now is not used any more
// once the registry shows that.
func TestAddressOfRestoredNodeTaken(t *testing.T) {
	for _, together := range []bool{false, true} {
		t.Run(fmt.Sprint("together=", together), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				file := warmFile(t)
				a := newNode("a", "service", "orders")
				b := newNode("b", "service", "pay")
				watcher := newScripted()
				once(t, watcher, discovery.Options{WarmStart: file}, func(*discovery.Directory) {
					s := <-watcher.streams
					s.put("ka", 3, a)
					if together {
						s.put("kb", 4, b)
					}
					s.sync(discovery.Listing{Epoch: "e", Revision: 7})
					synctest.Wait()
				})
				time.Sleep(time.Minute)
				watcher = newScripted()
				d := follow(t, watcher, discovery.Options{WarmStart: file, Probe: newNetwork(a).probe})
				s := <-watcher.streams
				d.Restore()
				time.Sleep(time.Second)
				s.put("kb", 9, b)
				s.sync(discovery.Listing{Epoch: "e", Revision: 9})
				time.Sleep(coalesced)
				expectStates(t, d, map[bool]string{false: "b", true: "a:restored b"}[together], "listed")
			})
		})
	}
}

// A listing that shows another node at an address first says nothing of the one that is
// there as well, and is listed next.
func TestAddressInAListing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 1, atEndpoint(newNode("old"), "http://10.0.0.1:80"))
		s.sync(discovery.Listing{Revision: 1})
		synctest.Wait()
		time.Sleep(time.Second)
		s.end <- discovery.ErrBroken
		s = <-w.streams
		s.put("", 2, atEndpoint(newNode("new", "service", "pay"), "http://10.0.0.1:80"))
		s.put("", 3, atEndpoint(newNode("old"), "http://10.0.0.1:80"))
		s.sync(discovery.Listing{Revision: 3})
		time.Sleep(coalesced)
		expect(t, d, "new old", "both are listed")
		if changes, _ := d.Journal().Counts(); changes[discovery.ChangeLapsed] > 0 {
			t.Errorf("changes %v, want that nobody lapsed", changes)
		}
	})
}
