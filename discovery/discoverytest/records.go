package discoverytest

import (
	"errors"
	"fmt"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// What becomes of a record: what is read is what was written, and what cannot be read
// costs no more than it must.

func recordSurvives(s *suite) {
	d := s.syncedDirectory()
	n := s.node("a", discovery.KeyZone, "eu-1", discovery.KeyWeight, "0.5", "note", "ümläut ✓ \" \\ <b>")
	n.Endpoint = s.endpoint("https://[2001:db8::1]:8443")
	n.Load = 0.25
	s.announce(s.open(), n)
	e := s.until(d, "a joins", has("a")).Node("a")
	if e.Node.Endpoint != n.Endpoint || e.Load() != n.Load || fmt.Sprint(e.Node.Metadata) != fmt.Sprint(n.Metadata) {
		s.Errorf("read %+v with load %v, want %+v", e.Node, e.Load(), n)
	}
}

func oddIDs(s *suite) {
	odd := []string{"web.example.com", "a b", "a/b", "=41", "*", ">", "ünï", ".", "-x-", "orders:1", "{a}", "node.x", "%41", "a.", ".a", "a..b"}
	writer := s.open()
	for _, id := range odd {
		s.announce(writer, s.node(id))
	}
	d := s.syncedDirectory()
	for _, id := range odd {
		if d.Snapshot().Node(id) == nil {
			s.Errorf("the id %q did not survive; have %q", id, ids(d.Snapshot()))
		}
	}
	for _, id := range odd {
		s.withdraw(writer, s.node(id))
		s.until(d, "leave of "+id, lacks(id))
	}
	for _, id := range []string{"", "a\nb", string(make([]byte, discovery.MaxID+1))} {
		if err := writer.Announce(s.within(), s.node(id)); !errors.Is(err, discovery.ErrInvalid) {
			s.Errorf("Announce of the id %q: %v, want ErrInvalid", id, err)
		}
	}
}

// unreadable holds that a record which cannot be read costs its node the update, and
// one that names what no record may costs the node.
func unreadable(s *suite) {
	writer, d := s.open(), s.syncedDirectory()
	s.announce(writer, s.node("a"), s.node("b"))
	s.until(d, "both join", lists(2))
	refused := func(snap *discovery.Snapshot) bool {
		if snap.Node("a") == nil {
			s.Fatal("a record that cannot be read took its node out of service")
		}
		return snap.Node("a").Refused() != nil
	}
	accepted := func(snap *discovery.Snapshot) bool { return snap.Node("a") != nil && snap.Node("a").Refused() == nil }
	for _, bad := range []string{
		`{"nodeId":"a","endpoint":"http://10.0.0.7:5001","load":0,"metadata":["service","orders"]}`,
		`{"nodeId":"a","endpoint":"http://10.0.0.7:5001","load":{"cpu":0.5},"metadata":{"service":"orders"}}`,
	} {
		s.h.Write(s.T, "a", bad)
		s.until(d, "it is told of "+bad, refused)
		// Whatever stood there before is gone for good: that must not count either.
		s.announce(writer, s.node("marker"))
		s.until(d, "a marker joins", has("marker"))
		<-time.After(time.Second)
		if s.until(d, "it still stands", refused); !d.Snapshot().Node("a").Serves() {
			s.Errorf("the node is %s", d.Snapshot().Node("a").State())
		}
		s.announce(writer, s.node("a"))
		s.until(d, "it is accepted again", accepted)
		s.withdraw(writer, s.node("marker"))
	}
	s.h.Write(s.T, "a", `{"nodeId":"a","endpoint":"http://10.0.0.7:5001/path","load":0,"metadata":{"service":"orders"}}`)
	s.until(d, "a forbidden record ends its node", lacks("a"))
	if d.Snapshot().Node("b") == nil {
		s.Error("it took another one with it")
	}
}

// record holds that a Reader reads the record that stands, whoever wrote it.
func record(s *suite) {
	r, other := s.open(), s.open()
	reader, ok := discovery.As[discovery.Reader](r)
	if !ok {
		return
	}
	stands := func(when, want string) {
		s.Helper()
		switch n, err := reader.Record(s.within(), "a"); {
		case err != nil:
			s.Fatalf("%s: %v", when, err)
		case want == "" && n.ID != "", want != "" && (n.ID != "a" || n.Instance() != want):
			s.Errorf("%s: the record is %+v, want that of instance %q", when, n, want)
		}
	}
	mine, theirs := s.node("a", discovery.KeyInstance, "mine"), s.node("a", discovery.KeyInstance, "theirs")
	stands("never announced", "")
	s.announce(r, mine)
	stands("announced", "mine")
	s.announce(other, theirs)
	stands("announced by another", "theirs")
	s.announce(r, mine)
	stands("announced again", "mine")
	s.withdraw(r, mine)
	stands("withdrawn", "")
}

// history holds that a Historian tells the past of a node, newest first.
func history(s *suite) {
	r := s.open()
	h, ok := discovery.As[discovery.Historian](r)
	if !ok {
		return
	}
	ctx := s.within()
	revisions, err := h.History(ctx, "never-there", 0)
	if err != nil || len(revisions) != 0 {
		s.Errorf("history of an unknown node: %v, %v", revisions, err)
	}
	n := s.node("a")
	s.announce(r, n)
	n.Load = 1
	s.announce(r, n)
	s.withdraw(r, n)
	if revisions, err = h.History(ctx, "a", 0); err != nil {
		s.Fatal(err)
	}
	if len(revisions) != 3 {
		s.Fatalf("history has %d revisions, want 3: %+v", len(revisions), revisions)
	}
	if revisions[0].Type != discovery.Left || revisions[1].Type != discovery.Put || revisions[1].Node.Load != 1 || revisions[2].Node.Load != 0 {
		s.Errorf("history is not newest first: %+v", revisions)
	}
	for i := range 2 {
		if revisions[i].Number <= revisions[i+1].Number || revisions[i].Time.Before(revisions[i+1].Time) {
			s.Errorf("history is not in order: %+v", revisions)
		}
	}
	if revisions, err = h.History(ctx, "a", 1); err != nil || len(revisions) != 1 || revisions[0].Type != discovery.Left {
		s.Errorf("history limited to 1: %+v, %v", revisions, err)
	}
}
