package discovery_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// A record that cannot be read costs its node the update: it stays as it was last
// known, for the rest of its lease, which such a record does not renew.
func TestRecordThatCannotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{})
		write(m, newNode("a"), newNode("b"))
		heard := time.Now()
		expect(t, d, "a b", "joined")
		for range 5 {
			time.Sleep(5 * time.Second)
			m.Put("a", []byte(`{"nodeId":"a","endpoint":"http://10.0.0.7:5001","metadata":["release 2"]}`))
			write(m, newNode("b"))
		}
		time.Sleep(coalesced)
		expect(t, d, "a b", "a cannot be read")
		e := d.Snapshot().Node("a")
		if !errors.Is(e.Refused(), discovery.ErrInvalid) || e.State() != discovery.StateUp || !e.Serves() {
			t.Errorf("a is %s, serves: %v, because %v", e.State(), e.Serves(), e.Refused())
		}
		if r := d.Status().Rejections; len(r) != 1 || r[0].ID != "a" || r[0].Err.Error() != e.Refused().Error() {
			t.Errorf("rejections %+v", r)
		}
		if c := d.Journal().Newest(1, nil); len(c) != 1 || c[0].Type != discovery.ChangeRejected || c[0].ID != "a" || c[0].Entry != nil {
			t.Errorf("the journal says %+v", c)
		}
		lapsesAt(t, d, "a", heard.Add(discovery.DefaultTTL))
		expect(t, d, "b", "its lease ran out")

		write(m, newNode("a"))
		time.Sleep(coalesced)
		expect(t, d, "a b", "it can be read again")
		m.Put("a", []byte(`{"nodeId":"a","endpoint":"http://10.0.0.7:5001","load":{}}`))
		synctest.Wait()
		write(m, newNode("a"))
		time.Sleep(coalesced)
		if e := d.Snapshot().Node("a"); e == nil || e.Refused() != nil {
			t.Errorf("a good record after a bad one: %+v", e)
		}
		// An outage makes no difference: the record is listed, so the node is not gone.
		m.Put("a", []byte(`{"nodeId":"a","endpoint":"http://10.0.0.7:5001","load":{}}`))
		m.Break()
		time.Sleep(time.Second)
		m.Restore()
		reconnect(t, d)
		expect(t, d, "a b", "listed again")
	})
}

// What forbids itself goes at once.
func TestRecordThatForbidsItself(t *testing.T) {
	for _, endpoint := range []string{"http://10.0.0.7:5001/path", "http://{env.HOME}:80", "http://u:p@10.0.0.7:1", "http://10.0.0.7:1?q", "unix//run/x", "ftp://h:1", "h:1-9"} {
		synctest.Test(t, func(t *testing.T) {
			m := discoverytest.NewMemory()
			d := follow(t, m.Open(), discovery.Options{})
			write(m, newNode("a"))
			expect(t, d, "a", "joined")
			m.Put("a", []byte(`{"nodeId":"a","endpoint":"`+endpoint+`"}`))
			time.Sleep(coalesced)
			expect(t, d, "", endpoint)
		})
	}
}
