package traffic

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// fleet is a directory whose nodes the test lists.
type fleet struct {
	t testing.TB
	*discoverytest.Memory
	*discovery.Directory
}

func newFleet(t testing.TB) *fleet {
	f := &fleet{t, discoverytest.NewMemory(), nil}
	registry := f.Open()
	f.Directory = discovery.NewDirectory(registry, discovery.Options{LossGuard: new(int)})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = f.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
		registry.Close()
	})
	<-f.Synced()
	return f
}

// node lists a node of a service, and returns it.
func (f *fleet) node(id, service string) *discovery.Entry {
	f.t.Helper()
	endpoint, err := discovery.ParseEndpoint("http://10.0.0.1:80")
	if err != nil {
		f.t.Fatal(err)
	}
	record, err := discovery.AppendRecord(nil, discovery.Node{ID: id, Endpoint: endpoint, Metadata: map[string]string{"service": service}}, time.Now())
	if err != nil {
		f.t.Fatal(err)
	}
	f.Put(id, record)
	var e *discovery.Entry
	f.until(func() bool {
		e = f.Snapshot().Node(id)
		return e != nil && e.Node.Service() == service
	})
	return e
}

func (f *fleet) leave(id string) {
	f.Expire(id)
	f.until(func() bool { return f.Snapshot().Node(id) == nil })
}

func (f *fleet) until(ok func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			f.t.Fatal("waited in vain")
		}
	}
}

func (f *fleet) tally() *Tally {
	return NewTally(func(service, node string) bool {
		if node == "" {
			return len(f.Snapshot().Service(service)) > 0
		}
		e := f.Snapshot().Node(node)
		return e != nil && Label(e.Node.Service()) == service
	})
}

// one has an observer see an exchange that ends with a status, at a time.
func one(o Observer, e *discovery.Entry, status int, at time.Duration) {
	x := &Exchange{Node: e, SentAt: at}
	o.Sent(x)
	x.Status, x.AnsweredAt, x.DoneAt = status, at, at
	o.Done(x)
}

// shown returns what a tally shows: how many exchanges of which service and node.
func shown(t *Tally) string {
	var all []string
	for _, c := range t.All() {
		_, n, _ := c.Durations()
		all = append(all, fmt.Sprintf("%s/%s:%d", c.Service, c.Node, n))
	}
	return strings.Join(all, " ")
}

// TestCountsAreBounded has more nodes than there may be counts of, and as some leave.
func TestCountsAreBounded(t *testing.T) {
	f := newFleet(t)
	tally := f.tally()
	o := tally.ByNode(2)
	nodes := make(map[string]*discovery.Entry)
	for _, id := range []string{"a", "b", "c", "d"} {
		nodes[id] = f.node(id, "orders")
		one(o, nodes[id], 200, time.Hour)
	}
	want := func(what, want string) {
		t.Helper()
		if got := shown(tally); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	want("four nodes", "orders/a:1 orders/b:1 orders/other:2")

	// Nobody reads, so that those who need room look for it, once a second.
	f.leave("a")
	one(o, nodes["c"], 200, time.Hour+time.Millisecond)
	want("at once", "orders/a:1 orders/b:1 orders/other:3")
	one(o, nodes["c"], 200, time.Hour+2*sweepEvery)
	one(o, nodes["c"], 200, time.Hour+2*sweepEvery)
	want("later", "orders/b:1 orders/c:2 orders/other:3")

	// Somebody reads: what he has read of a node that is gone goes, unless it is busy.
	busy := &Exchange{Node: nodes["b"]}
	o.Sent(busy)
	f.leave("b")
	tally.Sweep(tally.All())
	want("b is busy", "orders/b:1 orders/c:2 orders/other:3")
	o.Done(busy)
	tally.Sweep(tally.All())
	want("b is gone", "orders/c:2 orders/other:3")

	// One that comes again begins anew, also for who still knows the old one.
	one(o, f.node("b", "orders"), 200, time.Hour)
	want("b is back", "orders/b:1 orders/c:2 orders/other:3")
	one(o, f.node("b", "pay"), 200, time.Hour+4*sweepEvery)
	want("b is of another service", "orders/c:2 orders/other:3 pay/b:1")
	for _, id := range []string{"b", "c", "d"} {
		f.leave(id)
	}
	tally.Sweep(tally.All())
	want("all are gone", "")
}

// TestServicesAreBounded has records name services as they like.
func TestServicesAreBounded(t *testing.T) {
	f := newFleet(t)
	tally := f.tally()
	for i := range maxServices + 10 {
		e := f.node(fmt.Sprint(i), strings.Repeat("s", 1000)+fmt.Sprint(i)) // all the same when clipped
		one(tally.ByService(), e, 200, time.Hour)
		one(tally.ByNode(10), e, 200, time.Hour)
		e = f.node(fmt.Sprint(i), fmt.Sprint("s", i))
		one(tally.ByService(), e, 200, time.Hour)
		one(tally.ByNode(10), e, 200, time.Hour)
	}
	services, byNode := make(map[string]bool), 0
	for _, c := range tally.All() {
		services[c.Service] = true
		if c.Node != "" && c.Node != Other {
			byNode++
		}
		if len(c.Service) > 70 {
			t.Errorf("a label has %d bytes", len(c.Service))
		}
	}
	if len(services) > maxServices+1 || !services["s0"] || !services[Other] || byNode > 10 {
		t.Errorf("%d services and %d nodes are counted", len(services), byNode)
	}
}

// TestWhatIsCounted holds into what exchanges go by how they end.
func TestWhatIsCounted(t *testing.T) {
	f := newFleet(t)
	e := f.node("a", "orders")
	tally := f.tally()
	o := tally.ByService()
	x := func(status int, outcome Outcome, took time.Duration) {
		x := &Exchange{Node: e, Retry: 1}
		o.Sent(x)
		x.Status, x.Outcome, x.AnsweredAt, x.DoneAt = status, outcome, time.Millisecond, took
		o.Done(x)
	}
	x(200, Answered, 20*time.Millisecond)
	x(302, Answered, 20*time.Second)
	x(404, Aborted, time.Millisecond)
	x(503, BrokeOff, time.Millisecond)
	x(999, Answered, time.Millisecond)
	x(101, Answered, time.Hour)
	x(0, NoConnection, time.Millisecond)
	x(0, NoAnswer, time.Millisecond)
	x(0, Aborted, time.Hour)
	c := tally.All()[0]
	var codes []string
	for i, code := range Codes {
		codes = append(codes, fmt.Sprint(code, ":", c.Code(i)))
	}
	if got, want := strings.Join(codes, " "), "1xx:1 2xx:1 3xx:1 4xx:1 5xx:2 error:2 aborted:1"; got != want {
		t.Errorf("counted %s, want %s", got, want)
	}
	upTo, n, sum := c.Durations()
	if n != 8 || upTo[.001] != 6 || upTo[.01] != 6 || upTo[.025] != 7 || upTo[10] != 7 || sum < 20.02 || sum > 20.03 || c.Retries() != 9 || c.InFlight() != 0 {
		t.Errorf("%d took %v s: %v, %d retries, %d in flight", n, sum, upTo, c.Retries(), c.InFlight())
	}
}

// TestCountingWhileNodesComeAndGo loses nothing that is not of a node that is gone, for
// the race detector too.
func TestCountingWhileNodesComeAndGo(t *testing.T) {
	f := newFleet(t)
	tally := f.tally()
	stays := f.node("stays", "orders")
	o := tally.ByNode(3)
	var running sync.WaitGroup
	for range 4 {
		running.Go(func() {
			for i := range 5000 {
				x := new(Exchange)
				x.Prepare(stays, 0, []Observer{o})
				x.client = t.Context()
				x.SentAt = time.Duration(i) * time.Millisecond
				for _, o := range x.observers {
					o.Sent(x)
				}
				if i%2 == 0 {
					x.received(nil, errors.New("no answer"))
				} else {
					x.received(&http.Response{StatusCode: 200, Body: http.NoBody}, nil)
				}
			}
		})
	}
	for i := range 50 {
		id := fmt.Sprint("n", i)
		one(o, f.node(id, "orders"), 200, time.Duration(i)*time.Second)
		f.leave(id)
		tally.Sweep(tally.All())
	}
	running.Wait()
	if got := shown(tally); got != "orders/stays:20000" {
		t.Errorf("counted %s", got)
	}
}
