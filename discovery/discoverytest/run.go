package discoverytest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// patience bounds every wait of the suite. It is far beyond what a backend
// needs, so that a busy machine fails nothing.
const patience = 30 * time.Second

// Run runs the suite that every backend passes. Each part gets a harness, and
// so a registry, of its own, and fails if a goroutine that it started is left. What a
// registry cannot do (see [discovery.As]) is not asked of it. Suites of several
// registries may run at once.
func Run(t *testing.T, newHarness func(t *testing.T) Harness) {
	for _, p := range []struct {
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
	} {
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

func (s *suite) logger() *slog.Logger { return slog.New(slog.NewTextHandler(s.Output(), nil)) }

// within returns a context for calls that must not take longer than patience.
func (s *suite) within() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	s.closers = append(s.closers, cancel)
	return ctx
}

// open returns a connection that is closed when the part ends.
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
	h, ok := s.h.(RemoteHarness)
	if !ok {
		return nil, false
	}
	proxy, err := newDelayProxy(h.Addr(), roundTrip)
	if err != nil {
		s.Fatal(err)
	}
	s.closers = append(s.closers, proxy.close)
	return s.closing(h.OpenVia(s.T, proxy.address())), true
}

// directory runs a directory on a connection of its own until the part ends.
func (s *suite) directory() *discovery.Directory {
	s.Helper()
	d, stop := s.start(discovery.Options{Probe: RefuseConnection})
	s.closers = append(s.closers, stop)
	return d
}

// syncedDirectory is directory, once the registry is listed.
func (s *suite) syncedDirectory() *discovery.Directory {
	s.Helper()
	d := s.directory()
	s.synced(d)
	return d
}

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
		s.canceled("Run", done)
	}
}

// canceled waits for the end of a call whose context has ended.
func (s *suite) canceled(call string, done <-chan error) {
	s.Helper()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			s.Errorf("%s returned %v, want the context's error", call, err)
		}
	case <-time.After(patience):
		s.Errorf("%s did not return after its context ended", call)
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

func (s *suite) drain(r discovery.Announcer, n discovery.Node) (own bool) {
	s.Helper()
	own, err := r.Drain(s.within(), n)
	if err != nil {
		s.Fatalf("Drain(%q): %v", n.ID, err)
	}
	return own
}

func (s *suite) withdraw(r discovery.Announcer, n discovery.Node) {
	s.Helper()
	if err := r.Withdraw(s.within(), n); err != nil {
		s.Fatalf("Withdraw(%q): %v", n.ID, err)
	}
}

// node returns a node of the service "orders"; pairs are further metadata.
func (s *suite) node(id string, pairs ...string) discovery.Node {
	s.Helper()
	n := discovery.Node{ID: id, Endpoint: s.endpoint("http://10.0.0.7:5001"), Metadata: map[string]string{
		discovery.KeyService: "orders", discovery.KeyInstance: "instance-of-" + id,
	}}
	for i := 0; i < len(pairs); i += 2 {
		n.Metadata[pairs[i]] = pairs[i+1]
	}
	return n
}

// drainingNode is the node of an instance as it is announced before it leaves.
func (s *suite) drainingNode(id, instance string) discovery.Node {
	s.Helper()
	return s.node(id, discovery.KeyInstance, instance, discovery.KeyState, string(discovery.StateDraining))
}

func (s *suite) endpoint(text string) discovery.Endpoint {
	s.Helper()
	e, err := discovery.ParseEndpoint(text)
	if err != nil {
		s.Fatal(err)
	}
	return e
}

// A registration is a registrar that runs.
type registration struct {
	*discovery.Registrar
	suite *suite
	stop  context.CancelFunc
	done  chan error
}

// register runs a registrar of a node.
func (s *suite) register(a discovery.Announcer, n discovery.Node, o discovery.RegistrarOptions) *registration {
	s.Helper()
	o.Logger = s.logger()
	registrar, err := discovery.NewRegistrar(a, n, o)
	if err != nil {
		s.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &registration{registrar, s, cancel, make(chan error, 1)}
	s.closers = append(s.closers, cancel)
	go func() { r.done <- registrar.Run(ctx) }()
	return r
}

// left waits for the end of a registrar that was stopped.
func (r *registration) left() {
	r.suite.Helper()
	if err := <-r.done; err != nil {
		r.suite.Errorf("Run returned %v", err)
	}
}

// A watch is one call of Watch. It holds that emit is called from one goroutine at a
// time, and not after Watch has returned.
type watch struct {
	suite    *suite
	events   chan discovery.Event
	done     chan error
	stop     context.CancelFunc
	emitting sync.Mutex
	returned atomic.Bool
}

func (s *suite) watch(r discovery.Watcher) *watch {
	ctx, cancel := context.WithCancel(context.Background())
	w := &watch{suite: s, events: make(chan discovery.Event, 1000), done: make(chan error, 1), stop: cancel}
	s.closers = append(s.closers, cancel)
	go func() {
		err := r.Watch(ctx, w.emit)
		w.returned.Store(true)
		w.done <- err
	}()
	return w
}

func (w *watch) emit(e discovery.Event) {
	if !w.emitting.TryLock() {
		w.suite.Error("emit was called concurrently")
		return
	}
	defer w.emitting.Unlock()
	if w.returned.Load() {
		w.suite.Errorf("emit of %v after Watch returned", e.Type)
	}
	w.events <- e
}

// next returns the next event.
func (w *watch) next(what string) discovery.Event {
	w.suite.Helper()
	select {
	case e := <-w.events:
		return e
	case err := <-w.done:
		w.done <- err
		w.suite.Fatalf("Watch returned early: %v", err)
	case <-time.After(patience):
		w.suite.Fatalf("waited in vain for: %s", what)
	}
	panic("unreachable")
}

// until returns the next event that fulfils a condition.
func (w *watch) until(what string, ok func(discovery.Event) bool) discovery.Event {
	w.suite.Helper()
	for {
		if e := w.next(what); ok(e) {
			return e
		}
	}
}

// synced waits for the end of the listing.
func (w *watch) synced() {
	w.suite.Helper()
	w.until("the listing", func(e discovery.Event) bool { return e.Type == discovery.Synced })
}

// end ends the watch, and holds that it says why.
func (w *watch) end() {
	w.suite.Helper()
	w.stop()
	w.suite.canceled("Watch", w.done)
}

func ids(s *discovery.Snapshot) []string {
	var ids []string
	for _, e := range s.Nodes() {
		ids = append(ids, e.Node.ID)
	}
	return ids
}

// has, lacks, lists, inState and at are conditions of a snapshot.
func has(id string) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return s.Node(id) != nil }
}

func lacks(id string) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return s.Node(id) == nil }
}

func lists(number int) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return len(s.Nodes()) == number }
}

func inState(id string, state discovery.State) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return s.Node(id) != nil && s.Node(id).State() == state }
}

func at(id string, endpoint discovery.Endpoint) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return s.Node(id) != nil && s.Node(id).Node.Endpoint == endpoint }
}

// keepsRecords reports whether a registry knows whose record stands in it.
func keepsRecords(r discovery.Registry) bool {
	_, keeps := discovery.As[discovery.Reader](r)
	return keeps
}

// nodeID numbers the nodes of a part that needs many.
func nodeID(i int) string { return fmt.Sprintf("n%d", i) }
