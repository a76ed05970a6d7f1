// Package simulation has several proxies send requests to one fleet, in virtual time, and
// compares the policies. What chooses is the real code: the strategies of the picker, and
// what they go by.
package simulation

import (
	"cmp"
	"container/heap"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/balance"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// A machine is a node: so many workers, who take requests one after the other.
type machine struct {
	workers int
	takes   time.Duration // a request, on average; each takes as long as chance has it
	extra   time.Duration // on top, while no worker is busy
	fails   bool          // at once

	busy    int
	queue   []*request
	flying  int // requests in it, of all proxies
	peak    int
	served  int
	worked  time.Duration // since the last heartbeat
	load    float64       // as it reported it last
	beat    time.Duration // when
	counted time.Duration // until when worked is
}

// A request is under way.
type request struct {
	came  time.Duration
	proxy *proxy
	node  int
}

// A proxy knows what it has seen itself, and what the nodes report.
type proxy struct {
	picker  *picker.Picker
	renew   func() // the picker, for a new snapshot
	choice  picker.Choice
	flying  []int
	latency []balance.Latency
	usage   []balance.Usage
	into    []*discovery.Entry
}

// A scenario is a fleet and what happens to it. The first node is the one that is looked at.
type scenario struct {
	name     string
	machines func() []*machine
	proxies  int
	rate     float64       // requests a second, of all proxies
	warm     time.Duration // not counted
	lasts    time.Duration // with that
	beat     time.Duration // between heartbeats
	gauge    bool          // the load is a count at one instant, not a utilization
	late     bool          // the first node joins when what is counted begins
	change   map[time.Duration]func(*world)
}

// A world is one run.
type world struct {
	scenario
	nodes   []*machine
	fleet   []*proxy
	index   map[string]int
	random  *rand.Rand
	now     time.Duration
	events  events
	waited  []time.Duration // of requests that were counted
	failed  int
	counted []int   // requests by node
	seconds [][]int // the same, by second

	snapshot func() *discovery.Snapshot
	join     func()
}

type event struct {
	at  time.Duration
	seq int
	do  func()
}

type events struct {
	all []event
	seq int
}

func (e *events) Len() int { return len(e.all) }
func (e *events) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(e.all[i].at, e.all[j].at), cmp.Compare(e.all[i].seq, e.all[j].seq)) < 0
}
func (e *events) Swap(i, j int) { e.all[i], e.all[j] = e.all[j], e.all[i] }
func (e *events) Push(x any)    { e.all = append(e.all, x.(event)) }
func (e *events) Pop() any {
	last := e.all[len(e.all)-1]
	e.all = e.all[:len(e.all)-1]
	return last
}

func (w *world) after(d time.Duration, do func()) {
	w.events.seq++
	heap.Push(&w.events, event{w.now + d, w.events.seq, do})
}

// exponential draws a time of this mean.
func (w *world) exponential(mean time.Duration) time.Duration {
	return time.Duration(w.random.ExpFloat64() * float64(mean))
}

const decay = 10 * time.Second

// newWorld makes the proxies and the fleet.
func newWorld(t testing.TB, s scenario, strategy picker.Strategy, seed uint64) *world {
	w := &world{scenario: s, nodes: s.machines(), index: make(map[string]int), random: rand.New(rand.NewPCG(seed, 1))}
	w.counted = make([]int, len(w.nodes))
	m := discoverytest.NewMemory()
	for i := range w.nodes {
		id := fmt.Sprintf("node-%02d", i)
		w.index[id] = i
		e, err := discovery.ParseEndpoint(fmt.Sprintf("10.0.0.%d:80", i+1))
		if err != nil {
			t.Fatal(err)
		}
		record, err := discovery.AppendRecord(nil, discovery.Node{ID: id, Endpoint: e}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 || !s.late {
			m.Put(id, record)
		} else {
			w.join = func() { m.Put(id, record) }
		}
	}
	d := discovery.NewDirectory(m.Open(), discovery.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = d.Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	<-d.Synced()
	w.snapshot = d.Snapshot
	for range s.proxies {
		w.fleet = append(w.fleet, w.newProxy(strategy))
	}
	return w
}

func (w *world) newProxy(strategy picker.Strategy) *proxy {
	n := len(w.nodes)
	p := &proxy{flying: make([]int, n), latency: make([]balance.Latency, n), usage: make([]balance.Usage, n)}
	node := func(e *discovery.Entry) int { return w.index[e.Node.ID] }
	b := &picker.Builder{
		Filter: picker.Filter{
			Scheme: "http",
			Own:    func(string) bool { return false },
			Denied: func(*discovery.Entry) picker.Reason { return "" },
		},
		Strategy: strategy,
		Random:   w.random.Uint64,
		InFlight: func(e *discovery.Entry) int { return p.flying[node(e)] },
		Clock:    func() time.Duration { return w.now },
		Cost: func(e *discovery.Entry, now time.Duration) (float64, int) {
			return p.latency[node(e)].Cost(now, decay), p.flying[node(e)]
		},
		Usage: func(e *discovery.Entry, now time.Duration) balance.Member {
			i := node(e)
			return p.usage[i].Member(now, e.Weight(), w.nodes[i].load, time.Time{})
		},
	}
	p.renew = func() { p.picker = b.Build(w.snapshot(), &picker.Query{}) }
	p.renew()
	p.choice = picker.Choice{Strategy: strategy}
	return p
}

// joins has the first node join, and waits until all proxies know it.
func (w *world) joins() {
	before := w.snapshot()
	w.join()
	<-before.Superseded()
	for _, p := range w.fleet {
		p.renew()
	}
}

// run has everything happen.
func (w *world) run() {
	w.now = time.Hour // since the clock began
	began := w.now
	var arrive func()
	arrive = func() {
		w.send(w.fleet[w.random.IntN(len(w.fleet))])
		w.after(w.exponential(time.Duration(float64(time.Second)/w.rate)), arrive)
	}
	w.after(0, arrive)
	for i := range w.nodes {
		var beat func()
		beat = func() {
			w.report(w.nodes[i])
			w.after(w.beat, beat)
		}
		w.nodes[i].beat, w.nodes[i].counted = w.now, w.now
		w.after(time.Duration(w.random.Float64()*float64(w.beat)), beat)
	}
	for at, do := range w.change {
		w.after(at, func() { do(w) })
	}
	w.after(w.warm, func() {
		w.waited, w.failed = nil, 0
		clear(w.counted)
		for _, n := range w.nodes {
			n.peak = 0
		}
		if w.late {
			w.joins()
		}
	})
	for w.events.Len() > 0 {
		e := heap.Pop(&w.events).(event)
		if w.now = e.at; w.now-began > w.lasts {
			return
		}
		if second := int((w.now - began) / time.Second); second >= len(w.seconds) {
			w.seconds = append(w.seconds, make([]int, len(w.nodes)))
		}
		e.do()
	}
}

// send sends a request of a proxy to the node of its choice.
func (w *world) send(p *proxy) {
	p.into = p.picker.Pick(nil, p.choice, p.into[:0])
	i := w.index[p.into[0].Node.ID]
	n := w.nodes[i]
	p.flying[i]++
	p.latency[i].Sent(w.now)
	w.counted[i]++
	w.seconds[len(w.seconds)-1][i]++
	n.flying++
	n.peak = max(n.peak, n.flying)
	r := &request{came: w.now, proxy: p, node: i}
	if n.fails {
		w.after(time.Millisecond, func() { w.end(r, true) })
		return
	}
	n.queue = append(n.queue, r)
	w.work(n)
}

// work has the workers of a node that are free begin.
func (w *world) work(n *machine) {
	for n.busy < n.workers && len(n.queue) > 0 {
		r := n.queue[0]
		n.queue = n.queue[1:]
		n.tick(w.now)
		n.busy++
		w.after(w.exponential(n.takes), func() {
			n.tick(w.now)
			n.busy--
			w.after(n.extra, func() { w.end(r, false) })
			w.work(n)
		})
	}
}

// tick adds up what the workers have worked.
func (n *machine) tick(now time.Duration) {
	n.worked += time.Duration(n.busy) * (now - n.counted)
	n.counted = now
}

func (w *world) report(n *machine) {
	n.tick(w.now)
	n.load = float64(n.worked) / float64(w.now-n.beat) / float64(n.workers)
	if w.gauge {
		n.load = float64(n.busy + len(n.queue))
	}
	n.worked, n.beat = 0, w.now
}

// end has the answer of a request come.
func (w *world) end(r *request, failed bool) {
	took := w.now - r.came
	n := w.nodes[r.node]
	n.flying--
	n.served++
	r.proxy.flying[r.node]--
	r.proxy.latency[r.node].Answered(w.now, took, decay, failed)
	r.proxy.usage[r.node].Served(w.now, failed)
	if failed {
		w.failed++
		return
	}
	w.waited = append(w.waited, took)
}

// result is what a run came to.
type result struct {
	share, errors float64 // of all requests: at the node that is looked at, that failed
	p50, p95, p99 time.Duration
	peak          float64   // the most requests in flight at one node, in parts of its fair share of all
	shares        []float64 // of the requests, by node
	seconds       []float64 // the share of the node that is looked at, by second
}

func (w *world) result() (r result) {
	slices.Sort(w.waited)
	quantile := func(q float64) time.Duration { return w.waited[int(q*float64(len(w.waited)-1))] }
	r.p50, r.p95, r.p99 = quantile(0.5), quantile(0.95), quantile(0.99)
	total, sum := len(w.waited)+w.failed, time.Duration(0)
	for _, d := range w.waited {
		sum += d
	}
	r.errors = float64(w.failed) / float64(total)
	for _, n := range w.counted {
		r.shares = append(r.shares, float64(n)/float64(total))
	}
	r.share = r.shares[0]
	workers := 0
	for _, n := range w.nodes {
		workers += n.workers
	}
	flying := float64(sum) / float64(w.lasts-w.warm) // on average
	for _, n := range w.nodes {
		r.peak = max(r.peak, float64(n.peak)/max(flying*float64(n.workers)/float64(workers), 1))
	}
	for _, counts := range w.seconds {
		all := 0
		for _, n := range counts {
			all += n
		}
		r.seconds = append(r.seconds, float64(counts[0])/float64(max(all, 1)))
	}
	return r
}
