package natspubsub_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
)

// announceMany announces n nodes, some at a time.
func announceMany(t testing.TB, r *natspubsub.Registry, n int) {
	t.Helper()
	const workers = 16
	var group sync.WaitGroup
	for w := range workers {
		group.Go(func() {
			for i := w; i < n; i += workers {
				if err := r.Announce(t.Context(), node(t, fmt.Sprintf("orders-%05d", i), "service", "orders", "zone", "eu-1")); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

func TestAnnounceAndWithdraw(t *testing.T) {
	t.Parallel()
	s := start(t)
	said := listen(t, s.Conn(), "catga.nodes.*")
	r := open(t, config(s))
	n := node(t, "a", "service", "orders", "instance", "1")
	n.Load = 0.5
	for i, subject := range []string{"join", "heartbeat", "heartbeat", "leave", "join"} {
		if subject == "leave" {
			withdraw(t, r, n)
		} else {
			announce(t, r, n)
		}
		m := next(t, said)
		if m.Subject != "catga.nodes."+subject {
			t.Fatalf("message %d is %s, want %s", i, m.Subject, subject)
		}
		if subject == "leave" {
			if got, want := string(m.Data), `{"NodeId":"a","instance":"1"}`; got != want {
				t.Errorf("the goodbye is %s, want %s", got, want)
			}
			continue
		}
		got, err := discovery.ParseNode(m.Data)
		if err != nil || got.ID != "a" || got.Load != 0.5 || got.Service() != "orders" || got.Endpoint != n.Endpoint {
			t.Errorf("the %s is %s: %v", subject, m.Data, err)
		}
		// Readers of lean heartbeats find in ours what they look for.
		var lean struct {
			NodeID    string    `json:"nodeId"`
			Load      float64   `json:"load"`
			Timestamp time.Time `json:"timestamp"`
		}
		if err := json.Unmarshal(m.Data, &lean); err != nil || lean.NodeID != "a" || lean.Load != 0.5 ||
			lean.Timestamp.IsZero() != (subject == "join") {
			t.Errorf("the %s is %s: %v", subject, m.Data, err)
		}
	}
	// Who leaves without having come says so: it may have come through another
	// connection.
	withdraw(t, r, node(t, "never"))
	if m := next(t, said); string(m.Data) != `{"NodeId":"never"}` {
		t.Errorf("the goodbye is %s", m.Data)
	}
}

// After a reload the new registrar has announced before the old one leaves.
func TestWithdrawAfterReload(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	announce(t, r, node(t, "a", "instance", "1"), node(t, "a", "instance", "2"))
	said := listen(t, s.Conn(), "catga.nodes.*")
	withdraw(t, r, node(t, "a", "instance", "1"))
	announce(t, r, node(t, "a", "instance", "2"))
	if m := next(t, said); m.Subject != "catga.nodes.heartbeat" {
		t.Errorf("%s was said of a record of another instance", m.Subject)
	}
	if listed, _ := watch(t, open(t, config(s))).Listing(); len(listed) != 1 || listed[0].Node.Instance() != "2" {
		t.Errorf("listed %v", listed)
	}
}

// What an old process says when it leaves is not sent where its successor shares the
// connection, and not heard by those who know the successor; its answers to those
// who come late do not cover it either.
func TestDrainOfAnotherInstance(t *testing.T) {
	t.Parallel()
	s := start(t)
	shared, other := open(t, config(s)), open(t, config(s))
	w := watch(t, open(t, config(s)))
	w.Listing()
	leaving := func(instance string) discovery.Node { return node(t, "a", "instance", instance, "state", "draining") }
	announce(t, shared, node(t, "a", "instance", "1"))
	w.Want(discovery.Put, "a")
	announce(t, other, node(t, "a", "instance", "2"))
	w.Want(discovery.Put, "a")
	announce(t, shared, node(t, "a", "instance", "3"))
	w.Want(discovery.Put, "a")
	for r, n := range map[*natspubsub.Registry]discovery.Node{shared: leaving("1"), other: leaving("2")} {
		own, err := r.Drain(t.Context(), n)
		if err != nil || own != (r == other) {
			t.Errorf("Drain of instance %s = %v, %v", n.Instance(), own, err)
		}
	}
	withdraw(t, other, leaving("2"))
	// Nor where nobody said which process it is.
	nc := s.Conn()
	publish(t, nc, "catga.nodes.join", `{"nodeId":"b","endpoint":"http://10.0.0.1:80"}`)
	w.Want(discovery.Put, "b")
	if _, err := other.Drain(t.Context(), node(t, "b", "instance", "1", "state", "draining")); err != nil {
		t.Fatal(err)
	}
	// One that says nothing of instances is believed.
	publish(t, nc, "catga.nodes.heartbeat", `{"nodeId":"a","endpoint":"http://10.0.0.1:80","metadata":{"state":"draining"}}`)
	if e := w.Want(discovery.Put, "a"); e.Node.State() != discovery.StateDraining || e.Node.Instance() != "" {
		t.Errorf("got %+v", e.Node)
	}
	// And a process that comes back draining.
	announce(t, open(t, config(s)), leaving("4"))
	if e := w.Want(discovery.Put, "a"); e.Node.Instance() != "4" {
		t.Errorf("got %+v", e.Node)
	}
}

func TestLongestRecord(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	n := node(t, "a", "x", "")
	empty, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	n.Metadata["x"] = strings.Repeat("x", discovery.MaxRecord-len(empty))
	w := watch(t, r)
	w.Listing()
	for range 2 { // the join, and a heartbeat
		announce(t, r, n)
		w.Want(discovery.Put, "a")
	}
	n.Metadata["x"] += "x"
	wantError(t, r.Announce(t.Context(), n), discovery.ErrInvalid)
}

func TestInvalidNodes(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	for _, id := range []string{"", "a\nb", strings.Repeat("x", discovery.MaxID+1)} {
		n := node(t, id)
		if err := r.Announce(t.Context(), n); !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("Announce of %q: %v", id, err)
		}
		if err := r.Withdraw(t.Context(), n); !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("Withdraw of %q: %v", id, err)
		}
	}
	if n := s.NumClients(); n != 0 {
		t.Errorf("%d connections for nothing", n)
	}
}
