package discoverytest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// patience bounds every wait of the suite. It is far beyond what a backend
// needs, so that a busy machine fails nothing.
const patience = 30 * time.Second

// Run runs the suite that every backend passes. Each part gets a harness, and
// so a registry, of its own. Suites of several registries may run at once.
func Run(t *testing.T, newHarness func(t *testing.T) Harness) {
	parts := []struct {
		name string
		test func(s *suite)
	}{
		{"EmptyRegistry", emptyRegistry},
		{"ListThenSynced", listThenSynced},
		{"List", list},
		{"Join", join},
		{"RecordSurvives", recordSurvives},
		{"OddIDs", oddIDs},
		{"Update", update},
		{"HeartbeatPublishesNothing", heartbeatPublishesNothing},
		{"Leave", leave},
		{"WithdrawLeavesOthersAlone", withdrawLeavesOthersAlone},
		{"Drain", drain},
		{"DrainLeavesOthersAlone", drainLeavesOthersAlone},
		{"SuccessorStays", successorStays},
		{"LeaveBeforeListed", leaveBeforeListed},
		{"Lapse", lapse},
		{"Verify", verify},
		{"SurvivesBreak", survivesBreak},
		{"Resync", resync},
		{"ManyAtOnce", manyAtOnce},
		{"Cancel", cancel},
		{"UnreachableAtFirst", unreachableAtFirst},
		{"History", history},
		{"Record", record},
		{"Registrar", registrar},
		{"Unreadable", unreadable},
		{"Overrides", overrides},
		{"OverridesOutliveRestart", overridesOutliveRestart},
	}
	for _, p := range parts {
		t.Run(p.name, func(t *testing.T) {
			s := &suite{T: t, h: newHarness(t)}
			left := startedBy(t.Name(), patience, func() {
				p.test(s)
				s.finish()
			})
			if left != "" {
				t.Errorf("goroutines are left:\n%s", left)
			}
		})
	}
}

// suite is one part of the suite under way.
type suite struct {
	*testing.T
	h       Harness
	closers []func()
}

// finish ends what the part started, last first, as a program would.
func (s *suite) finish() {
	for i := len(s.closers) - 1; i >= 0; i-- {
		s.closers[i]()
	}
}

func (s *suite) open() discovery.Registry {
	s.Helper()
	return s.closing(s.h.Open(s.T))
}

func (s *suite) closing(r discovery.Registry) discovery.Registry {
	s.closers = append(s.closers, func() {
		if err := r.Close(); err != nil {
			s.Errorf("Close: %v", err)
		}
	})
	return r
}

// openFar returns a connection whose other end is that far away. It reports false
// where that cannot be had.
func (s *suite) openFar(roundTrip time.Duration) (discovery.Registry, bool) {
	s.Helper()
	h, ok := s.h.(Distant)
	if !ok {
		return nil, false
	}
	way, err := newDistance(h.Addr(), roundTrip)
	if err != nil {
		s.Fatal(err)
	}
	s.closers = append(s.closers, way.close)
	return s.closing(h.OpenVia(s.T, way.address())), true
}

// directory runs a directory on a connection of its own until the part ends.
func (s *suite) directory() *discovery.Directory {
	s.Helper()
	d, stop := s.start(discovery.Options{Probe: Refuse})
	s.closers = append(s.closers, stop)
	return d
}

func (s *suite) logger() *slog.Logger { return slog.New(slog.NewTextHandler(s.Output(), nil)) }

// start runs a directory on a connection of its own until stop is called.
func (s *suite) start(o discovery.Options) (d *discovery.Directory, stop func()) {
	s.Helper()
	o.Logger = s.logger()
	d = discovery.NewDirectory(s.open(), o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	return d, func() {
		cancel()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				s.Errorf("Run returned %v, want the context's error", err)
			}
		case <-time.After(patience):
			s.Errorf("Run did not return after its context ended")
		}
	}
}

func (s *suite) synced(d *discovery.Directory) {
	s.Helper()
	select {
	case <-d.Synced():
	case <-time.After(patience):
		s.Fatalf("not synced: %+v", d.Status())
	}
}

// until waits for a snapshot that fulfils a condition.
func (s *suite) until(d *discovery.Directory, what string, ok func(*discovery.Snapshot) bool) *discovery.Snapshot {
	s.Helper()
	deadline := time.After(patience)
	for {
		snapshot := d.Snapshot()
		if ok(snapshot) {
			return snapshot
		}
		select {
		case <-snapshot.Superseded():
		case <-deadline:
			s.Fatalf("waited in vain for: %s; have %v, %+v", what, ids(snapshot), d.Status())
		}
	}
}

// eventually waits for a condition that no snapshot tells.
func (s *suite) eventually(what string, ok func() bool) {
	s.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			s.Fatalf("waited in vain for: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func (s *suite) announce(r discovery.Announcer, nodes ...discovery.Node) {
	s.Helper()
	for _, n := range nodes {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := r.Announce(ctx, n)
		cancel()
		if err != nil {
			s.Fatalf("Announce(%q): %v", n.ID, err)
		}
	}
}

func (s *suite) withdraw(r discovery.Announcer, n discovery.Node) {
	s.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := r.Withdraw(ctx, n); err != nil {
		s.Fatalf("Withdraw(%q): %v", n.ID, err)
	}
}

// node returns a node of the service "orders"; pairs are further metadata.
func (s *suite) node(id string, pairs ...string) discovery.Node {
	s.Helper()
	endpoint, err := discovery.ParseEndpoint("http://10.0.0.7:5001")
	if err != nil {
		s.Fatal(err)
	}
	n := discovery.Node{ID: id, Endpoint: endpoint, Metadata: map[string]string{
		discovery.KeyService: "orders", discovery.KeyInstance: "instance-of-" + id,
	}}
	for i := 0; i < len(pairs); i += 2 {
		n.Metadata[pairs[i]] = pairs[i+1]
	}
	return n
}

func ids(s *discovery.Snapshot) []string {
	var ids []string
	for _, e := range s.Nodes() {
		ids = append(ids, e.Node.ID)
	}
	return ids
}

func has(id string) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return s.Node(id) != nil }
}

func lacks(id string) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return s.Node(id) == nil }
}

func emptyRegistry(s *suite) {
	d := s.directory()
	s.synced(d)
	if got := d.Snapshot().Nodes(); len(got) != 0 {
		s.Errorf("an empty registry lists %v", ids(d.Snapshot()))
	}
	if status := d.Status(); !status.Connected || !status.Synced {
		s.Errorf("status after the first listing: %+v", status)
	}
}

// listThenSynced holds a raw watch against the contract of Watcher.
func listThenSynced(s *suite) {
	writer := s.open()
	s.announce(writer, s.node("a"), s.node("b"))

	ctx, cancel := context.WithCancel(context.Background())
	events := make(chan discovery.Event, 1000)
	done := make(chan error, 1)
	var active sync.Mutex // emit is called from one goroutine at a time
	watcher := s.open()
	go func() {
		done <- watcher.Watch(ctx, func(e discovery.Event) {
			if !active.TryLock() {
				s.Error("emit was called concurrently")
				return
			}
			defer active.Unlock()
			events <- e
		})
	}()
	next := func() discovery.Event {
		select {
		case e := <-events:
			return e
		case err := <-done:
			s.Fatalf("Watch returned early: %v", err)
		case <-time.After(patience):
			s.Fatal("no event")
		}
		panic("unreachable")
	}
	listed := map[string]bool{}
	if _, ok := watcher.(discovery.Overrider); ok {
		if e := next(); e.Type != discovery.Overridden || len(e.Overrides) != 0 {
			s.Errorf("the watch of a registry that keeps overrides begins with %v %v, want that there are none", e.Type, e.Overrides)
		}
	}
	for {
		e := next()
		if e.Type == discovery.Synced {
			break
		}
		if e.Type != discovery.Put {
			s.Fatalf("event %v in the listing", e.Type)
		}
		if e.ID != e.Node.ID {
			s.Errorf("event of %q carries the node %q", e.ID, e.Node.ID)
		}
		if e.Age < 0 || e.Age > patience {
			s.Errorf("a fresh record of %q is %v old", e.ID, e.Age)
		}
		listed[e.ID] = true
	}
	if !listed["a"] || !listed["b"] || len(listed) != 2 {
		s.Errorf("listed %v, want a and b", listed)
	}
	s.announce(writer, s.node("c"))
	if e := next(); e.Type != discovery.Put || e.ID != "c" {
		s.Errorf("after the listing came %v %q, want the put of c", e.Type, e.ID)
	}
	s.withdraw(writer, s.node("c"))
	if e := next(); e.Type != discovery.Left || e.ID != "c" {
		s.Errorf("then came %v %q, want that c left", e.Type, e.ID)
	}
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			s.Errorf("Watch returned %v, want the context's error", err)
		}
	case <-time.After(patience):
		s.Fatal("Watch did not return after its context ended")
	}
}

func list(s *suite) {
	writer := s.open()
	s.announce(writer, s.node("a"), s.node("b"), s.node("c"))
	s.withdraw(writer, s.node("b"))
	d := s.directory()
	s.synced(d)
	if got := fmt.Sprint(ids(d.Snapshot())); got != "[a c]" {
		s.Errorf("the first listing has %s, want [a c]", got)
	}
}

func join(s *suite) {
	d := s.directory()
	s.synced(d)
	s.announce(s.open(), s.node("a"))
	s.until(d, "a joins", has("a"))
}

func recordSurvives(s *suite) {
	d := s.directory()
	s.synced(d)
	n := s.node("a", discovery.KeyZone, "eu-1", discovery.KeyWeight, "0.5", "note", "ümläut ✓ \" \\ <b>")
	n.Endpoint, _ = discovery.ParseEndpoint("https://[2001:db8::1]:8443")
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
	d := s.directory()
	s.synced(d)
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
		if err := writer.Announce(context.Background(), s.node(id)); !errors.Is(err, discovery.ErrInvalid) {
			s.Errorf("Announce of the id %q: %v, want ErrInvalid", id, err)
		}
	}
}

func update(s *suite) {
	writer, d := s.open(), s.directory()
	s.synced(d)
	n := s.node("a")
	s.announce(writer, n)
	s.until(d, "a joins", has("a"))
	n.Endpoint, _ = discovery.ParseEndpoint("http://10.0.0.8:5002")
	s.announce(writer, n)
	s.until(d, "a moves", func(snap *discovery.Snapshot) bool {
		return snap.Node("a") != nil && snap.Node("a").Node.Endpoint == n.Endpoint
	})
	n = s.node("a", discovery.KeyState, "draining")
	s.announce(writer, n)
	snapshot := s.until(d, "a drains", func(snap *discovery.Snapshot) bool {
		return snap.Node("a") != nil && snap.Node("a").State() == discovery.StateDraining
	})
	if len(snapshot.Nodes()) != 1 {
		s.Errorf("an update left %v", ids(snapshot))
	}
}

func heartbeatPublishesNothing(s *suite) {
	writer, d := s.open(), s.directory()
	s.synced(d)
	n := s.node("a")
	s.announce(writer, n)
	snapshot := s.until(d, "a joins", has("a"))
	e := snapshot.Node("a")
	before := e.LastHeard()
	n.Load = 0.75
	s.announce(writer, n)
	s.eventually("the heartbeat arrives", func() bool { return e.Load() == 0.75 && e.LastHeard().After(before) })
	if d.Snapshot() != snapshot {
		s.Error("a heartbeat published a snapshot")
	}
}

func leave(s *suite) {
	writer, d := s.open(), s.directory()
	s.announce(writer, s.node("a"), s.node("b"))
	s.until(d, "both join", func(snap *discovery.Snapshot) bool { return len(snap.Nodes()) == 2 })
	s.withdraw(writer, s.node("a"))
	s.until(d, "a leaves", lacks("a"))
	if d.Snapshot().Node("b") == nil {
		s.Error("b went with a")
	}
	// A goodbye of somebody who is not there is none of our business.
	s.withdraw(writer, s.node("a"))
	s.withdraw(writer, s.node("never-there"))
}

func withdrawLeavesOthersAlone(s *suite) {
	writer, d := s.open(), s.directory()
	s.synced(d)
	s.announce(writer, s.node("a", discovery.KeyInstance, "new"))
	s.until(d, "a joins", has("a"))
	s.withdraw(s.open(), s.node("a", discovery.KeyInstance, "old"))
	// The marker comes after the withdrawal, so once it is here the withdrawal
	// has had its effect, if any.
	s.announce(writer, s.node("marker"))
	s.until(d, "the marker joins", has("marker"))
	if d.Snapshot().Node("a") == nil {
		s.Error("a withdrawal removed the record of another instance")
	}
}

// drainingNode is the node as it is announced before it leaves.
func (s *suite) drainingNode(id, instance string) discovery.Node {
	s.Helper()
	return s.node(id, discovery.KeyInstance, instance, discovery.KeyState, string(discovery.StateDraining))
}

func (s *suite) drain(r discovery.Announcer, n discovery.Node) (own bool) {
	s.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	own, err := r.Drain(ctx, n)
	if err != nil {
		s.Fatalf("Drain(%q): %v", n.ID, err)
	}
	return own
}

func stateOf(id string, state discovery.State) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return s.Node(id) != nil && s.Node(id).State() == state }
}

func drain(s *suite) {
	writer, d := s.open(), s.directory()
	s.synced(d)
	if _, keeps := writer.(discovery.Reader); keeps && s.drain(writer, s.drainingNode("a", "1")) {
		s.Error("a record that is not there was the caller's own")
	}
	s.announce(writer, s.node("a", discovery.KeyInstance, "1"))
	s.until(d, "a joins", stateOf("a", discovery.StateUp))
	if !s.drain(writer, s.drainingNode("a", "1")) {
		s.Error("the record was not the caller's own")
	}
	s.until(d, "a drains", stateOf("a", discovery.StateDraining))
	// Another connection of the same process has the same right.
	s.announce(writer, s.node("b", discovery.KeyInstance, "1"))
	s.until(d, "b joins", stateOf("b", discovery.StateUp))
	if !s.drain(s.open(), s.drainingNode("b", "1")) {
		s.Error("the record was not the caller's own, by another connection")
	}
	s.until(d, "b drains", stateOf("b", discovery.StateDraining))
	s.withdraw(writer, s.node("a", discovery.KeyInstance, "1"))
	s.until(d, "a leaves", lacks("a"))
}

// drainLeavesOthersAlone lets a successor announce while its predecessor drains and
// withdraws: whoever is faster, the successor's record stands, and is up.
func drainLeavesOthersAlone(s *suite) {
	old, successor, d := s.open(), s.open(), s.directory()
	s.synced(d)
	for i := range 30 {
		id := fmt.Sprintf("n%d", i)
		mine, theirs := s.node(id, discovery.KeyInstance, "old"), s.node(id, discovery.KeyInstance, "new")
		s.announce(old, mine)
		var group sync.WaitGroup
		group.Go(func() { s.announce(successor, theirs) })
		if i%2 == 0 { // else it may come between the drain and the withdrawal
			group.Wait()
		}
		if own := s.drain(old, s.drainingNode(id, "old")); own && i%2 == 0 {
			if _, keeps := old.(discovery.Reader); keeps {
				s.Error("the record of another instance was the caller's own")
			}
		}
		s.withdraw(old, mine)
		group.Wait()
	}
	// The marker comes after all of that.
	s.announce(successor, s.node("marker"))
	s.announce(old, s.node("other-marker"))
	snapshot := s.until(d, "the markers join", func(snap *discovery.Snapshot) bool {
		return snap.Node("marker") != nil && snap.Node("other-marker") != nil
	})
	for i := range 30 {
		e := snapshot.Node(fmt.Sprintf("n%d", i))
		if e == nil || e.State() != discovery.StateUp || e.Instance() != "new" {
			s.Errorf("the successor of n%d, announced at the same time: %v, is %+v", i, i%2 != 0, e)
		}
	}
}

// successorStays has a process take over an id, and then its predecessor leave:
// nobody hears anything of that, however far away the registry is.
func successorStays(s *suite) {
	events := make(chan discovery.Event, 1000)
	watcher := s.open()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- watcher.Watch(ctx, func(e discovery.Event) { events <- e }) }()
	defer func() {
		cancel()
		if err := <-done; err == nil {
			s.Error("Watch ended without saying why")
		}
	}()
	next := func(what string, ok func(discovery.Event) bool) discovery.Event {
		s.Helper()
		for {
			select {
			case e := <-events:
				if ok(e) {
					return e
				}
			case err := <-done:
				done <- err
				s.Fatalf("Watch returned early: %v", err)
			case <-time.After(patience):
				s.Fatalf("waited in vain for: %s", what)
			}
		}
	}
	next("the listing", func(e discovery.Event) bool { return e.Type == discovery.Synced })
	run := func(r discovery.Registry, id string) (instance string, leave func()) {
		s.Helper()
		listed := make(chan struct{})
		var once sync.Once
		registrar, err := discovery.NewRegistrar(r, s.node(id), discovery.RegistrarOptions{
			Drain: new(time.Second), Logger: s.logger(),
			OnHeartbeat: func(err error) {
				if err == nil {
					once.Do(func() { close(listed) })
				}
			},
		})
		if err != nil {
			s.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- registrar.Run(ctx) }()
		s.closers = append(s.closers, cancel)
		next(id+" joins", func(e discovery.Event) bool {
			return e.Type == discovery.Put && e.ID == id && e.Node.Instance() == registrar.Instance()
		})
		select {
		case <-listed:
		case <-time.After(patience):
			s.Fatalf("%s does not know that it is listed", id)
		}
		return registrar.Instance(), func() {
			cancel()
			if err := <-ended; err != nil {
				s.Errorf("leaving %s: %v", id, err)
			}
		}
	}
	together := func(leave []func()) {
		var group sync.WaitGroup
		for _, f := range leave {
			group.Go(f)
		}
		group.Wait()
	}
	writer := s.open()
	instances := make(map[string]string) // of the successors, by id
	var predecessors, successors []func()
	for _, roundTrip := range []time.Duration{0, 80 * time.Millisecond, 150 * time.Millisecond} {
		old, ok := s.openFar(roundTrip)
		if !ok && roundTrip > 0 {
			continue
		}
		if !ok {
			old = s.open()
		}
		id := "at-" + roundTrip.String()
		_, leave := run(old, id)
		predecessors = append(predecessors, leave)
		instance, leave := run(writer, id)
		instances[id] = instance
		successors = append(successors, leave)
	}
	together(predecessors)
	s.announce(writer, s.node("marker"))
	next("the marker", func(e discovery.Event) bool {
		if instance := instances[e.ID]; instance != "" && (e.Type != discovery.Put || e.Node.Instance() != instance) {
			s.Errorf("a predecessor's leaving told of its successor %s: %v %q of instance %q", e.ID, e.Type, e.Node.State(), e.Node.Instance())
		}
		return e.ID == "marker"
	})
	together(successors)
}

// leaveBeforeListed has a registrar leave while it waits for the answer to its first
// announcement, which has arrived: it drains all the same.
func leaveBeforeListed(s *suite) {
	d := s.directory()
	s.synced(d)
	r, err := discovery.NewRegistrar(&slowAnswer{Announcer: s.open()}, s.node("a"), discovery.RegistrarOptions{Drain: new(100 * time.Millisecond)})
	if err != nil {
		s.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	s.until(d, "a joins", has("a"))
	cancel()
	s.until(d, "a drains", stateOf("a", discovery.StateDraining))
	s.until(d, "a leaves", lacks("a"))
	if err := <-done; err != nil {
		s.Errorf("Run returned %v", err)
	}
}

// slowAnswer delivers announcements at once, and the answers to them never.
type slowAnswer struct{ discovery.Announcer }

func (a *slowAnswer) Announce(ctx context.Context, n discovery.Node) error {
	if err := a.Announcer.Announce(ctx, n); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

func lapse(s *suite) {
	writer, d := s.open(), s.directory()
	s.synced(d)
	short := s.node("short", discovery.KeyLease, "1s")
	s.announce(writer, short, s.node("long"))
	s.until(d, "both join", func(snap *discovery.Snapshot) bool { return len(snap.Nodes()) == 2 })
	snapshot := s.until(d, "the lease runs out", lacks("short"))
	if snapshot.Node("long") == nil {
		s.Error("a node lapsed before its lease ran out")
	}
	s.announce(writer, short)
	s.until(d, "it comes back when it is heard", has("short"))
}

func verify(s *suite) {
	writer, watcher := s.open(), s.open()
	v, ok := watcher.(discovery.Verifier)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := v.Verify(ctx); err == nil {
		s.Error("verified without a watch")
	}
	var mu sync.Mutex
	emitted := map[string]bool{}
	synced := make(chan struct{})
	watchCtx, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		done <- watcher.Watch(watchCtx, func(e discovery.Event) {
			mu.Lock()
			defer mu.Unlock()
			if e.Type == discovery.Synced {
				close(synced)
			}
			emitted[e.ID] = true
		})
	}()
	select {
	case <-synced:
	case err := <-done:
		s.Fatalf("Watch returned early: %v", err)
	}
	for i := range 20 {
		id := fmt.Sprintf("node-%d", i)
		s.announce(writer, s.node(id))
		if err := v.Verify(ctx); err != nil {
			s.Fatalf("Verify: %v", err)
		}
		mu.Lock()
		if !emitted[id] {
			s.Errorf("verified before %s was emitted", id)
		}
		mu.Unlock()
	}
	stop()
	<-done
}

func survivesBreak(s *suite) {
	writer, d := s.open(), s.directory()
	s.synced(d)
	n := s.node("a", discovery.KeyLease, "1s")
	s.announce(writer, n)
	s.until(d, "a joins", has("a"))
	s.h.Break(s.T)
	s.eventually("the break is noticed", func() bool { return !d.Status().Connected })
	// Three leases of silence are no evidence while the registry is away.
	<-time.After(3 * time.Second)
	if d.Snapshot().Node("a") == nil {
		s.Fatal("a node was dropped because its registry was away")
	}
	s.h.Restore(s.T)
	s.eventually("the registry is found again", func() bool { return d.Status().Connected })
	if d.Snapshot().Node("a") == nil {
		s.Fatal("a node was dropped when its registry came back")
	}
	s.until(d, "the lease runs out, now that the registry is there", lacks("a"))
}

func resync(s *suite) {
	writer, d := s.open(), s.directory()
	s.synced(d)
	leaves := s.node("leaves")
	if f, ok := s.h.(Forgetful); ok && f.Forgetful() {
		leaves = s.node("leaves", discovery.KeyLease, "2s")
	}
	s.announce(writer, s.node("stays"), leaves, s.node("moves"))
	s.until(d, "three join", func(snap *discovery.Snapshot) bool { return len(snap.Nodes()) == 3 })
	s.h.Break(s.T)
	s.eventually("the break is noticed", func() bool { return !d.Status().Connected })
	s.h.Restore(s.T)

	// These come while the directory waits for its next try, or lists, or has
	// listed: it must not matter.
	moved := s.node("moves")
	moved.Endpoint, _ = discovery.ParseEndpoint("http://10.0.0.9:5009")
	s.eventually("the registry takes records again", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return writer.Announce(ctx, moved) == nil
	})
	s.announce(writer, s.node("joins"), s.node("stays"))
	s.withdraw(writer, leaves)
	s.until(d, "the view equals the registry", func(snap *discovery.Snapshot) bool {
		return fmt.Sprint(ids(snap)) == "[joins moves stays]" && snap.Node("moves").Node.Endpoint == moved.Endpoint
	})
}

func manyAtOnce(s *suite) {
	const n = 500
	d := s.directory()
	s.synced(d)
	writer := s.open()
	var group sync.WaitGroup
	for i := range 10 {
		group.Go(func() {
			for j := range n / 10 {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				if err := writer.Announce(ctx, s.node(fmt.Sprintf("node-%d-%d", i, j))); err != nil {
					s.Errorf("Announce: %v", err)
				}
				cancel()
			}
		})
	}
	group.Wait()
	snapshot := s.until(d, "all join", func(snap *discovery.Snapshot) bool { return len(snap.Nodes()) == n })
	if got := len(snapshot.Service("orders")); got != n {
		s.Errorf("the service has %d nodes, want %d", got, n)
	}
}

func cancel(s *suite) {
	watcher := s.open()
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	ended := false
	synced := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		done <- watcher.Watch(ctx, func(e discovery.Event) {
			mu.Lock()
			defer mu.Unlock()
			if ended {
				s.Errorf("emit of %v after Watch returned", e.Type)
			}
			if e.Type == discovery.Synced {
				close(synced)
			}
		})
	}()
	<-synced
	// Changes are under way while the watch is cancelled.
	var group sync.WaitGroup
	writer := s.open()
	s.announce(writer, s.node("warm"))
	for i := range 4 {
		group.Go(func() { s.announce(writer, s.node(fmt.Sprintf("n%d", i))) })
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		s.Errorf("Watch returned %v, want the context's error", err)
	}
	mu.Lock()
	ended = true
	mu.Unlock()
	group.Wait()

	// A context that has ended already is not even tried.
	if err := watcher.Watch(ctx, func(discovery.Event) {}); !errors.Is(err, context.Canceled) {
		s.Errorf("Watch with an ended context returned %v", err)
	}
}

func unreachableAtFirst(s *suite) {
	s.h.Break(s.T)
	r := s.open()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := r.Announce(ctx, s.node("a")); !errors.Is(err, discovery.ErrUnreachable) {
		s.Errorf("Announce returned %v, want ErrUnreachable", err)
	}
	if err := r.Watch(ctx, func(discovery.Event) {}); !errors.Is(err, discovery.ErrUnreachable) {
		s.Errorf("Watch returned %v, want ErrUnreachable", err)
	}
	d := s.directory()
	s.eventually("the failure is known", func() bool { return d.Status().LastError != nil })
	s.h.Restore(s.T)
	s.synced(d)
	s.announce(r, s.node("a"))
	s.until(d, "a joins", has("a"))
}

func history(s *suite) {
	r := s.open()
	h, ok := r.(discovery.Historian)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
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

func registrar(s *suite) {
	d := s.directory()
	s.synced(d)
	n := s.node("a")
	r, err := discovery.NewRegistrar(s.open(), n, discovery.RegistrarOptions{
		Heartbeat: 100 * time.Millisecond, TTL: time.Second, Drain: new(100 * time.Millisecond),
		Logger: s.logger(),
	})
	if err != nil {
		s.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	e := s.until(d, "a joins", has("a")).Node("a")
	heard := e.LastHeard()
	s.eventually("it is renewed", func() bool { return e.LastHeard().After(heard) })

	n.Endpoint, _ = discovery.ParseEndpoint("http://10.0.0.8:5002")
	if err := r.Update(n, discovery.RegistrarOptions{Heartbeat: 100 * time.Millisecond, Drain: new(100 * time.Millisecond)}); err != nil {
		s.Fatal(err)
	}
	s.until(d, "a moves", func(snap *discovery.Snapshot) bool {
		return snap.Node("a") != nil && snap.Node("a").Node.Endpoint == n.Endpoint
	})
	cancel()
	s.until(d, "a drains", func(snap *discovery.Snapshot) bool {
		return snap.Node("a") != nil && snap.Node("a").State() == discovery.StateDraining
	})
	s.until(d, "a leaves", lacks("a"))
	if err := <-done; err != nil {
		s.Errorf("Run returned %v", err)
	}
}

// unreadable holds that a record which cannot be read costs its node the update, and
// one that names what no record may costs the node.
func unreadable(s *suite) {
	h, ok := s.h.(Scribe)
	if !ok {
		s.Fatal("the harness cannot write records of others")
	}
	writer, d := s.open(), s.directory()
	s.synced(d)
	s.announce(writer, s.node("a"), s.node("b"))
	s.until(d, "both join", func(snap *discovery.Snapshot) bool { return len(snap.Nodes()) == 2 })
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
		h.Write(s.T, "a", bad)
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
	h.Write(s.T, "a", `{"nodeId":"a","endpoint":"http://10.0.0.7:5001/path","load":0,"metadata":{"service":"orders"}}`)
	s.until(d, "a forbidden record ends its node", lacks("a"))
	if d.Snapshot().Node("b") == nil {
		s.Error("it took another one with it")
	}
}

// overrides holds that a watch begins with what operators decided, and tells of
// what they decide while it runs.
func overrides(s *suite) {
	r := s.open()
	operator, ok := r.(discovery.Overrider)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s.announce(r, s.node("a"), s.node("b"))
	half := 0.5
	if err := errors.Join(
		operator.SetOverride(ctx, "a", discovery.Override{State: discovery.StateDraining}),
		operator.SetOverride(ctx, "not-listed", discovery.Override{Weight: &half}),
	); err != nil {
		s.Fatal(err)
	}
	events := make(chan discovery.Event, 1000)
	done := make(chan error, 1)
	watchCtx, stop := context.WithCancel(ctx)
	watcher := s.open()
	go func() { done <- watcher.Watch(watchCtx, func(e discovery.Event) { events <- e }) }()
	told := func(want string) {
		s.Helper()
		for first := true; ; first = false {
			select {
			case e := <-events:
				if e.Type == discovery.Overridden && fmt.Sprint(e.Overrides) == want {
					if !first && want == "map[a:state draining not-listed:weight × 0.5]" {
						s.Error("something came before the overrides")
					}
					return
				}
			case err := <-done:
				s.Fatalf("Watch returned early: %v", err)
			case <-ctx.Done():
				s.Fatalf("waited in vain for the overrides %s", want)
			}
		}
	}
	told("map[a:state draining not-listed:weight × 0.5]")
	if err := operator.ClearOverride(ctx, "not-listed"); err != nil {
		s.Fatal(err)
	}
	told("map[a:state draining]")
	if err := operator.ClearOverride(ctx, "a"); err != nil {
		s.Fatal(err)
	}
	told("map[]")
	// On one machine there is one clock, and no question can make it two: what has an
	// end keeps it to the nanosecond.
	ends := discovery.Override{State: discovery.StateDraining, Until: time.Now().Add(15 * time.Minute)}
	if err := operator.SetOverride(ctx, "a", ends); err != nil {
		s.Fatal(err)
	}
	if all, err := operator.Overrides(ctx); err != nil || !all["a"].Equal(ends) {
		s.Errorf("read %v, %v, want %v", all, err, ends)
	}
	for told := false; !told; {
		select {
		case e := <-events:
			if told = e.Type == discovery.Overridden; told && !e.Overrides["a"].Equal(ends) {
				s.Errorf("told until %v, want %v", e.Overrides["a"].Until, ends.Until)
			}
		case err := <-done:
			s.Fatalf("Watch returned early: %v", err)
		case <-ctx.Done():
			s.Fatal("waited in vain for an override with an end")
		}
	}
	stop()
	<-done
}

// overridesOutliveRestart holds that a node which an operator drained gets no
// requests from a proxy that starts while the registry is away, nor when it is back.
func overridesOutliveRestart(s *suite) {
	r := s.open()
	operator, ok := r.(discovery.Overrider)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s.announce(r, s.node("a"), s.node("b"))
	if err := operator.SetOverride(ctx, "a", discovery.Override{State: discovery.StateDraining}); err != nil {
		s.Fatal(err)
	}
	o := discovery.Options{
		WarmStart: discovery.WarmStart{Path: filepath.Join(s.TempDir(), "nodes.json"), Registry: "suite"},
		Probe:     func(context.Context, string) error { return nil },
	}
	// rest follows a directory until a condition holds, and holds that a never serves.
	rest := func(d *discovery.Directory, what string, ok func(*discovery.Snapshot) bool) {
		s.Helper()
		s.until(d, what, func(snap *discovery.Snapshot) bool {
			if e := snap.Node("a"); e != nil && e.Serves() {
				s.Errorf("%s: the drained node serves", what)
			}
			return ok(snap)
		})
	}
	both := func(snap *discovery.Snapshot) bool { return snap.Node("a") != nil && snap.Node("b") != nil }
	d, stop := s.start(o)
	rest(d, "both are listed", both)
	stop()
	s.h.Break(s.T)
	d, stop = s.start(o)
	defer func() { stop() }()
	d.Restore()
	rest(d, "both are restored", both)
	s.h.Restore(s.T)
	rest(d, "the registry is back", func(snap *discovery.Snapshot) bool { return snap.Synced && both(snap) })
	s.eventually("the override is taken back", func() bool { return operator.ClearOverride(ctx, "a") == nil })
	s.until(d, "a serves again", func(snap *discovery.Snapshot) bool { return snap.Node("a") != nil && snap.Node("a").Serves() })
}

// record holds that a Reader reads the record that stands, whoever wrote it.
func record(s *suite) {
	r, other := s.open(), s.open()
	reader, ok := r.(discovery.Reader)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stands := func(when, want string) {
		s.Helper()
		switch n, err := reader.Record(ctx, "a"); {
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
