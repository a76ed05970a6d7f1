package discovery_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestFight(t *testing.T) {
	a, b := newNode("x", "instance", "a"), newNode("x", "instance", "b")
	c, d := atEndpoint(newNode("x"), "http://10.0.0.1:80"), atEndpoint(newNode("x"), "http://10.0.0.2:80")
	for _, test := range []struct {
		name    string
		records []discovery.Node // one every 5 seconds
		lines   int
	}{
		{"one process", []discovery.Node{a, a, a, a}, 0},
		{"replaced", []discovery.Node{a, a, b, b, b}, 0},
		{"changed by itself", []discovery.Node{a, newNode("x", "instance", "a", "zone", "z"), a, a}, 0},
		{"two", []discovery.Node{a, b, a, b, a, b}, 1},
		{"two that do not say who they are", []discovery.Node{c, d, c, d, c}, 1},
		{"back after more than a lease", []discovery.Node{a, b, b, b, b, b, b, b, b, a}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				core, logs := observer.New(zapcore.WarnLevel)
				m := discoverytest.NewMemory()
				follow(t, m.Open(), discovery.Options{Logger: zap.New(core)})
				for _, n := range test.records {
					write(m, n)
					time.Sleep(5 * time.Second)
				}
				if got := logs.FilterMessageSnippet("two processes").Len(); got != test.lines {
					t.Errorf("%d lines, want %d: %v", got, test.lines, logs.All())
				}
			})
		})
	}
}

// A hundred thousand keys of junk cost a bounded list, a bounded number of lines,
// and no node.
func TestFloodOfJunk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.InfoLevel)
		w := newScripted()
		d := follow(t, w, discovery.Options{Logger: zap.New(core)})
		s := <-w.streams
		s.put("node.a", 1, newNode("a"))
		s.sync(discovery.Listing{Revision: 1})
		synctest.Wait()
		snapshot := d.Snapshot()
		for round := range 2 {
			for i := range 100_000 {
				s.emit(discovery.Event{
					Type: discovery.Rejected, ID: fmt.Sprint("junk", i), Key: fmt.Sprint("junk", i), Revision: uint64(2 + i),
					Err: fmt.Errorf("%w record: junk %d", discovery.ErrInvalid, round),
				})
			}
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if d.Snapshot() != snapshot {
			t.Error("junk published a snapshot")
		}
		if got := len(d.Status().Rejections); got > 1000 {
			t.Errorf("%d rejections are remembered", got)
		}
		if logs.Len() > 200 {
			t.Errorf("%d lines", logs.Len())
		}
		s.put("node.a", 200_000, newNode("a", "zone", "z"))
		time.Sleep(coalesced)
		synctest.Wait()
		if d.Snapshot().Node("a").Node.Metadata["zone"] != "z" {
			t.Error("a good record did not get through")
		}
	})
}

// A flood of nodes, of which each is another, fills the directory and no more,
// whatever becomes of them.
func TestFloodOfNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		w := newScripted()
		d := follow(t, w, discovery.Options{Probe: n.probe})
		s := <-w.streams
		s.sync(discovery.Listing{})
		node := newNode("")
		for i := range discovery.MaxNodes + 1000 {
			node.ID = fmt.Sprintf("n%06d", i)
			s.put("", 0, node)
		}
		time.Sleep(coalesced)
		synctest.Wait()
		if got := d.Status(); got.Nodes != discovery.MaxNodes || len(got.Rejections) != 1000 {
			t.Errorf("%d nodes, %d rejections", got.Nodes, len(got.Rejections))
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := d.Status(); got.Nodes != 0 {
			t.Errorf("%d nodes a lease later", got.Nodes)
		}
		if n.most > 1024 {
			t.Errorf("%d probes at once", n.most)
		}
	})
}
