package discovery_test

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestRejected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"))
		m.Put("bad", []byte(`{"nodeId":"bad","endpoint":"unix//x"}`))
		d := follow(t, m.Open(), discovery.Options{})
		expect(t, d, "a b", "listed")
		rejected := func(want, when string) {
			t.Helper()
			synctest.Wait()
			var ids []string
			for _, r := range d.Status().Rejections {
				ids = append(ids, r.ID)
				if !errors.Is(r.Err, discovery.ErrInvalid) || r.Time.IsZero() {
					t.Errorf("rejection %+v", r)
				}
			}
			if got := strings.Join(ids, " "); got != want {
				t.Fatalf("%s: rejected [%s], want [%s]", when, got, want)
			}
		}
		rejected("bad", "listed")
		m.Put("a", []byte(`{"nodeId":"a","endpoint":"h:1","load":-1}`))
		expect(t, d, "a b", "a cannot be read")
		rejected("a bad", "a cannot be read")
		m.Put("a", []byte(`{"nodeId":"a","endpoint":"http://h:1/path"}`))
		expect(t, d, "b", "a names what no record may")
		rejected("a bad", "a names what no record may")
		write(m, newNode("a"))
		expect(t, d, "a b", "a is good again")
		rejected("bad", "a is good again")
		m.Expire("bad")
		rejected("", "bad ran out")
		m.Put("bad", []byte(`{`))
		rejected("bad", "bad again")
		m.Break()
		m.Drop("bad")
		m.Restore()
		synctest.Wait()
		reconnect(t, d)
		rejected("", "it is not listed any more")
	})
}

// A record that cannot be read at all has a key and no id.
func TestRejectedWithoutID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("node.a", 1, newNode("a"))
		s.put("node.b", 2, newNode("b"))
		s.sync(discovery.Listing{})
		s.emit(discovery.Event{Type: discovery.Rejected, Key: "node.a", Revision: 3, Err: discovery.ErrInvalid})
		expect(t, d, "a b", "a cannot be read")
		if err := d.Snapshot().Node("a").Refused(); !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("a is in use with the record before, because %v", err)
		}
		s.emit(discovery.Event{Type: discovery.Rejected, Key: "node.a", Revision: 3, Err: discovery.Forbid(discovery.ErrInvalid)})
		expect(t, d, "b", "a is forbidden")
		if r := d.Status().Rejections; len(r) != 1 || r[0].Key != "node.a" {
			t.Errorf("rejections %+v", r)
		}
		s.put("node.a", 4, newNode("a"))
		expect(t, d, "a b", "a is good again")
		if r := d.Status().Rejections; len(r) != 0 {
			t.Errorf("rejections %+v", r)
		}
		// One record cannot be two nodes.
		s.put("node.a", 5, newNode("c"))
		expect(t, d, "b c", "another node took the key")
		s.emit(discovery.Event{Type: discovery.Left, ID: "a", Key: "node.a", Revision: 6})
		expect(t, d, "b", "the key is gone")
	})
}

// A third party's backend may forget a reason. It must not end the program.
func TestRejectedWithoutReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 1, newNode("a"))
		s.sync(discovery.Listing{})
		s.emit(discovery.Event{Type: discovery.Rejected, ID: "a"})
		expect(t, d, "a", "rejected")
		if r := d.Status().Rejections; len(r) != 1 || !errors.Is(r[0].Err, discovery.ErrInvalid) {
			t.Errorf("rejections %+v", r)
		}
	})
}

// A bad record that is written again and again is news once.
func TestRejectedAgainIsNoNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, logs := newLog(slog.LevelInfo)
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{Logger: log})
		for range 100 {
			m.Put("bad", []byte(`{`))
			time.Sleep(10 * time.Second)
		}
		if n := len(logs.containing("record rejected")); n != 1 {
			t.Errorf("%d lines about one bad record", n)
		}
		if r := d.Status().Rejections; len(r) != 1 {
			t.Errorf("rejections %+v", r)
		}
	})
}

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

// What is rejected reaches logs, the journal and the status with nothing in it that a
// terminal would obey or a reader not see, and no longer than an id may be.
func TestRejectedIsVisible(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, logs := newLog(slog.LevelInfo)
		w := newScripted()
		d := follow(t, w, discovery.Options{Logger: log})
		s := <-w.streams
		s.sync(discovery.Listing{})
		for _, odd := range []string{"a\x7fb", "a\u0085b", "a\u009b31mb", "a\u202eb", "a\u2028b", "a\nb", "a\xffb", strings.Repeat("x", 1<<20)} {
			s.emit(discovery.Event{Type: discovery.Rejected, ID: odd, Key: "key." + odd, Err: discovery.ValidateID(odd)})
		}
		time.Sleep(coalesced)
		synctest.Wait()
		var shown []string
		for _, e := range logs.containing("record rejected") {
			fields := e.fields
			shown = append(shown, fields["id"].(string), fields["key"].(string), fields["error"].(string))
		}
		for _, r := range d.Status().Rejections {
			shown = append(shown, r.ID, r.Key, r.Err.Error())
		}
		for _, c := range d.Journal().Newest(0, nil) {
			shown = append(shown, c.ID, c.Reason)
		}
		if len(shown) < 8*8 {
			t.Fatalf("only %d texts: %q", len(shown), shown)
		}
		for _, text := range shown {
			if len(text) > 1000 || !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("shown: %.100q", text)
			}
		}
	})
}
