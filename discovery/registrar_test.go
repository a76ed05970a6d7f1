package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// recorder is an Announcer that notes what passes through it.
type recorder struct {
	discovery.Registry
	mu    sync.Mutex
	calls []call
}

type call struct {
	at       time.Time
	withdraw bool
	node     discovery.Node
	err      error
}

func (r *recorder) note(c call) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, c)
}

func (r *recorder) taken() []call {
	r.mu.Lock()
	defer r.mu.Unlock()
	calls := r.calls
	r.calls = nil
	return calls
}

func (r *recorder) Announce(ctx context.Context, n discovery.Node) error {
	at := time.Now()
	err := r.Registry.Announce(ctx, n)
	r.note(call{at: at, node: n, err: err})
	return err
}

func (r *recorder) Drain(ctx context.Context, n discovery.Node) (bool, error) {
	at := time.Now()
	own, err := r.Registry.Drain(ctx, n)
	r.note(call{at: at, node: n, err: err})
	return own, err
}

func (r *recorder) Withdraw(ctx context.Context, n discovery.Node) error {
	at := time.Now()
	err := r.Registry.Withdraw(ctx, n)
	r.note(call{at: at, withdraw: true, node: n, err: err})
	return err
}

// registration is a Registrar that runs.
type registration struct {
	*discovery.Registrar
	cancel context.CancelFunc
	done   chan error
	ended  bool
}

func (r *registration) leave() error {
	r.ended = true
	r.cancel()
	return <-r.done
}

func register(t *testing.T, a discovery.Announcer, n discovery.Node, o discovery.RegistrarOptions) *registration {
	t.Helper()
	registrar, err := discovery.NewRegistrar(a, n, o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &registration{Registrar: registrar, cancel: cancel, done: make(chan error, 1)}
	go func() { r.done <- registrar.Run(ctx) }()
	t.Cleanup(func() {
		if !r.ended {
			_ = r.leave()
		}
	})
	synctest.Wait()
	return r
}

// record returns the record that stands in the registry, nil if none does.
func record(t *testing.T, m *discoverytest.Memory, id string) *discovery.Node {
	t.Helper()
	data := m.Record(id)
	if data == nil {
		return nil
	}
	n, err := discovery.ParseNode(data)
	if err != nil {
		t.Fatal(err)
	}
	return &n
}

func TestRegistrarHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		a := &recorder{Registry: m.Open()}
		given := newNode("a")
		r := register(t, a, given, discovery.RegistrarOptions{})
		n := record(t, m, "a")
		if n == nil {
			t.Fatal("not announced at once")
		}
		if n.Lease() != 30*time.Second || n.Instance() != r.Instance() || n.Instance() == "" || n.Service() != "orders" {
			t.Errorf("announced %+v", n)
		}
		if len(given.Metadata) != 1 {
			t.Errorf("the caller's metadata was changed: %v", given.Metadata)
		}
		time.Sleep(1000 * time.Second)
		calls := a.taken()
		if len(calls) < 100 || len(calls) > 112 {
			t.Errorf("%d heartbeats in 1000 seconds", len(calls))
		}
		different := map[time.Duration]bool{}
		for i := range len(calls) - 1 {
			pause := calls[i+1].at.Sub(calls[i].at)
			if pause < 9*time.Second || pause > 10*time.Second {
				t.Errorf("%v between two heartbeats", pause)
			}
			different[pause] = true
		}
		if len(different) < 10 {
			t.Errorf("the heartbeats are not spread: %v", different)
		}
	})
}

func TestRegistrarOptions(t *testing.T) {
	a := discoverytest.NewMemory().Open()
	pairs := func(n int) discovery.Node {
		node := newNode("a")
		for i := range n - 1 {
			node.Metadata[fmt.Sprint(i)] = ""
		}
		return node
	}
	for _, test := range []struct {
		name string
		node discovery.Node
		o    discovery.RegistrarOptions
		ok   bool
	}{
		{"defaults", newNode("a"), discovery.RegistrarOptions{}, true},
		{"ttl just above the heartbeat", newNode("a"), discovery.RegistrarOptions{Heartbeat: time.Second, TTL: time.Second + 1}, true},
		{"ttl equals the heartbeat", newNode("a"), discovery.RegistrarOptions{Heartbeat: time.Second, TTL: time.Second}, false},
		{"ttl under the default heartbeat", newNode("a"), discovery.RegistrarOptions{TTL: time.Second}, false},
		{"ttl too short", newNode("a"), discovery.RegistrarOptions{Heartbeat: time.Millisecond}, false},
		{"ttl too long", newNode("a"), discovery.RegistrarOptions{TTL: 25 * time.Hour}, false},
		{"heartbeat beyond all bounds", newNode("a"), discovery.RegistrarOptions{Heartbeat: math.MaxInt64}, false},
		{"negative heartbeat", newNode("a"), discovery.RegistrarOptions{Heartbeat: -1, TTL: time.Second}, false},
		{"negative ttl", newNode("a"), discovery.RegistrarOptions{TTL: -1}, false},
		{"negative drain", newNode("a"), discovery.RegistrarOptions{Drain: new(time.Duration(-1))}, false},
		{"no drain", newNode("a"), discovery.RegistrarOptions{Drain: new(time.Duration(0))}, true},
		{"no id", newNode(""), discovery.RegistrarOptions{}, false},
		{"no endpoint", discovery.Node{ID: "a"}, discovery.RegistrarOptions{}, false},
		{"negative load", discovery.Node{ID: "a", Endpoint: newNode("a").Endpoint, Load: -1}, discovery.RegistrarOptions{}, false},
		{"no metadata", discovery.Node{ID: "a", Endpoint: newNode("a").Endpoint}, discovery.RegistrarOptions{}, true},
		// Lease, instance and the state of the last record need room.
		{"as much metadata as may be", pairs(discovery.MaxMetadata - 3), discovery.RegistrarOptions{}, true},
		{"no room for the state", pairs(discovery.MaxMetadata - 2), discovery.RegistrarOptions{}, false},
		{"no room for the lease", pairs(discovery.MaxMetadata), discovery.RegistrarOptions{}, false},
	} {
		_, err := discovery.NewRegistrar(a, test.node, test.o)
		if test.ok && err != nil || !test.ok && !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("%s: %v", test.name, err)
		}
		if valid := test.o.Validate(test.node); fmt.Sprint(valid) != fmt.Sprint(err) {
			t.Errorf("%s: NewRegistrar: %v, Validate: %v", test.name, err, valid)
		}
	}
}

func TestRegistrarNeedsAnAnnouncer(t *testing.T) {
	if _, err := discovery.NewRegistrar(nil, newNode("a"), discovery.RegistrarOptions{}); !errors.Is(err, discovery.ErrInvalid) {
		t.Errorf("without an announcer: %v", err)
	}
}

func TestRegistrarUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{})
		time.Sleep(time.Second)
		if err := r.Update(newNode("a", discovery.KeyService, "pay"), discovery.RegistrarOptions{Heartbeat: time.Second}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		n := record(t, m, "a")
		if n.Service() != "pay" || n.Lease() != 3*time.Second || n.Instance() != r.Instance() {
			t.Errorf("announced %+v", n)
		}
		writes := m.Writes()
		time.Sleep(10 * time.Second)
		if got := m.Writes() - writes; got < 10 || got > 12 {
			t.Errorf("%d heartbeats in 10 seconds, want one a second", got)
		}
		for name, err := range map[string]error{
			"another id":   r.Update(newNode("b"), discovery.RegistrarOptions{}),
			"no id":        r.Update(newNode(""), discovery.RegistrarOptions{}),
			"a bad lease":  r.Update(newNode("a"), discovery.RegistrarOptions{TTL: 1}),
			"bad metadata": r.Update(newNode("a", "x", "\n"), discovery.RegistrarOptions{}),
		} {
			if !errors.Is(err, discovery.ErrInvalid) {
				t.Errorf("update with %s: %v", name, err)
			}
		}
		time.Sleep(time.Second)
		if n := record(t, m, "a"); n.Service() != "pay" || n.Lease() != 3*time.Second || m.Record("b") != nil {
			t.Errorf("a refused update had an effect: %+v", n)
		}
	})
}

func TestRegistrarUpdateConcurrently(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{Heartbeat: 50 * time.Millisecond, Load: func() float64 { return 1 }})
		var group sync.WaitGroup
		for i := range 8 {
			group.Go(func() {
				for j := range 100 {
					n := newNode("a", "writer", fmt.Sprint(i))
					if err := r.Update(n, discovery.RegistrarOptions{Heartbeat: 50 * time.Millisecond}); err != nil {
						t.Error(err)
					}
					n.Metadata["writer"] = "changed by its owner, which is its right"
					time.Sleep(time.Duration(i*j) * time.Microsecond)
				}
			})
		}
		group.Wait()
		if err := r.leave(); err != nil {
			t.Error(err)
		}
		if m.Record("a") != nil {
			t.Error("still listed")
		}
	})
}

// A load that is not known is never announced as 0, which would look idler than
// everybody else.
func TestRegistrarLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		log, logs := newLog(slog.LevelInfo)
		var load float64
		n := newNode("a")
		n.Load = 7
		r := register(t, m.Open(), n, discovery.RegistrarOptions{})
		if got := record(t, m, "a").Load; got != 7 {
			t.Errorf("without a function: load %v, want the node's", got)
		}
		for _, test := range []struct{ given, want float64 }{
			{math.NaN(), 7}, {-1, 7}, {0.5, 0.5}, {math.NaN(), 0.5}, {math.Inf(1), 0.5}, {math.Inf(-1), 0.5}, {-1, 0.5},
			{12, 12}, {-1, 12}, {0, 0}, {math.NaN(), 0},
		} {
			load = test.given
			if err := r.Update(n, discovery.RegistrarOptions{Load: func() float64 { return load }, Logger: log}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if got := record(t, m, "a").Load; got != test.want {
				t.Errorf("load %v was announced as %v, want %v", test.given, got, test.want)
			}
		}
		if n := len(logs.containing("announcing another")); n != 4 {
			t.Errorf("warned %d times, want once each of four times: %v", n, logs.all())
		}
	})
}

func TestRegistrarReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		log, logs := newLog(slog.LevelInfo)
		var ready atomic.Bool
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{
			Logger: log,
			Ready: func(context.Context) error {
				if ready.Load() {
					return nil
				}
				return errors.New("warming up")
			},
		})
		for range 2 {
			time.Sleep(time.Minute)
			synctest.Wait()
			if m.Record("a") != nil {
				t.Fatal("listed although it is not ready")
			}
			ready.Store(true)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if m.Record("a") == nil {
				t.Fatal("not listed 5 seconds after it was ready")
			}
			ready.Store(false)
			time.Sleep(10 * time.Second)
			synctest.Wait()
		}
		start := time.Now()
		if err := r.leave(); err != nil || time.Since(start) != 0 {
			t.Errorf("a node that is not listed left after %v, %v", time.Since(start), err)
		}
		if n := len(logs.warnings()); n != 3 {
			t.Errorf("%d warnings, want one for each of three times", n)
		}
	})
}

// Ready may hang. It has a deadline, and ends with the Registrar.
func TestRegistrarReadyHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		asked := 0
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{Ready: func(ctx context.Context) error {
			asked++
			if asked == 1 {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		}})
		if m.Record("a") == nil {
			t.Fatal("not listed")
		}
		time.Sleep(15 * time.Second)
		synctest.Wait()
		if m.Record("a") != nil {
			t.Error("listed although nobody says that it is ready")
		}
		start := time.Now()
		if err := r.leave(); err != nil || time.Since(start) > 0 {
			t.Errorf("left after %v, %v", time.Since(start), err)
		}
	})
}

// An announcement that failed may have arrived: a node that is not ready must
// not stay listed by it.
func TestRegistrarNotReadyAfterDoubt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		a := &doubtful{Registry: m.Open()}
		var ready atomic.Bool
		ready.Store(true)
		register(t, a, newNode("a"), discovery.RegistrarOptions{Ready: func(context.Context) error {
			if ready.Load() {
				return nil
			}
			return errors.New("broken")
		}})
		if m.Record("a") == nil {
			t.Fatal("the announcement did not arrive")
		}
		ready.Store(false)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if m.Record("a") != nil {
			t.Error("listed although it is not ready")
		}
	})
}

// doubtful delivers announcements and says that it failed.
type doubtful struct{ discovery.Registry }

func (d *doubtful) Announce(ctx context.Context, n discovery.Node) error {
	_ = d.Registry.Announce(ctx, n)
	return discovery.ErrUnreachable
}

func TestRegistrarOutage(t *testing.T) {
	for _, test := range []struct {
		name string
		fail func(m *discoverytest.Memory)
		mend func(m *discoverytest.Memory)
	}{
		{"broken", (*discoverytest.Memory).Break, (*discoverytest.Memory).Restore},
		{"silent", func(m *discoverytest.Memory) { m.Silence(true) }, func(m *discoverytest.Memory) { m.Silence(false) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := discoverytest.NewMemory()
				log, logs := newLog(slog.LevelInfo)
				a := &recorder{Registry: m.Open()}
				register(t, a, newNode("a"), discovery.RegistrarOptions{Logger: log})
				test.fail(m)
				m.Drop("a")
				time.Sleep(24 * time.Hour)
				if n := len(a.taken()); n < 5_000 || n > 60_000 {
					t.Errorf("%d attempts in a day", n)
				}
				test.mend(m)
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if m.Record("a") == nil {
					t.Error("not announced again within 10 seconds")
				}
				if n := len(logs.warnings()); n == 0 || n > 2 {
					t.Errorf("%d warnings about one outage", n)
				}
				if n := len(logs.containing("announced again")); n != 1 {
					t.Errorf("the end of the outage was told %d times", n)
				}
			})
		})
	}
}

func TestRegistrarWipe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{})
		for range 5 {
			m.Wipe()
			if m.Record("a") != nil {
				t.Fatal("not wiped")
			}
			time.Sleep(discovery.DefaultHeartbeat)
			synctest.Wait()
			if m.Record("a") == nil {
				t.Fatal("not announced again within a heartbeat")
			}
		}
	})
}

func TestRegistrarLeaves(t *testing.T) {
	for _, drain := range []*time.Duration{nil, new(time.Duration(0)), new(100 * time.Millisecond), new(10 * time.Second)} {
		wait := discovery.DefaultDrain
		if drain != nil {
			wait = *drain
		}
		for _, test := range []struct {
			name  string
			fail  func(m *discoverytest.Memory)
			err   error
			atAll time.Duration // beyond the drain
		}{
			{"reachable", func(*discoverytest.Memory) {}, nil, 0},
			{"broken", (*discoverytest.Memory).Break, discovery.ErrUnreachable, time.Second},
			{"silent", func(m *discoverytest.Memory) { m.Silence(true) }, context.DeadlineExceeded, time.Second},
			{"silent for a while", func(m *discoverytest.Memory) {
				m.Silence(true)
				time.Sleep(time.Minute)
			}, context.DeadlineExceeded, time.Second},
		} {
			t.Run(fmt.Sprint(test.name, " drain ", wait), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := discoverytest.NewMemory()
					a := &recorder{Registry: m.Open()}
					r := register(t, a, newNode("a"), discovery.RegistrarOptions{Drain: drain})
					test.fail(m)
					synctest.Wait()
					a.taken()
					start := time.Now()
					err := r.leave()
					took := time.Since(start)
					if !errors.Is(err, test.err) {
						t.Errorf("Run returned %v, want %v", err, test.err)
					}
					if took < wait || took > wait+test.atAll {
						t.Errorf("leaving took %v, want %v and at most %v more", took, wait, test.atAll)
					}
					if test.err != nil {
						return
					}
					calls := a.taken()
					if wait > 0 {
						if len(calls) != 2 || calls[0].node.State() != discovery.StateDraining || calls[0].at != start {
							t.Fatalf("calls %+v", calls)
						}
						calls = calls[1:]
					}
					if len(calls) != 1 || !calls[0].withdraw || calls[0].at.Sub(start) != wait || m.Record("a") != nil {
						t.Errorf("calls %+v", calls)
					}
				})
			})
		}
	}
}

// The context may have ended before anything was done.
func TestRegistrarEndedBefore(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			m := discoverytest.NewMemory()
			a := &recorder{Registry: m.Open()}
			r, err := discovery.NewRegistrar(a, newNode("a"), discovery.RegistrarOptions{})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			start := time.Now()
			if err := r.Run(ctx); err != nil || time.Since(start) != 0 {
				t.Errorf("Run took %v, %v", time.Since(start), err)
			}
			for _, c := range a.taken() {
				if !c.withdraw {
					t.Errorf("announced after the end: %+v", c)
				}
			}
		})
	}
}

// Another process took the id over, as when a container is replaced. Its record
// is left alone: neither is it deleted, nor does the old process say goodbye in
// its name.
func TestRegistrarTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{})
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{})
		successor := newNode("a", discovery.KeyInstance, "successor")
		write(m, successor)
		synctest.Wait()
		snapshot := d.Snapshot()
		start := time.Now()
		if err := r.leave(); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took != discovery.DefaultDrain {
			t.Errorf("leaving took %v; requests under way have a right to the drain", took)
		}
		if n := record(t, m, "a"); n == nil || n.Instance() != "successor" {
			t.Errorf("the record is %+v", n)
		}
		if d.Snapshot() != snapshot {
			t.Errorf("the successor was disturbed: %+v", d.Snapshot().Node("a"))
		}
	})
}

// The answer to the first announcement is still on its way when the process ends:
// the record may stand, and drains like any other. Where it does not, nobody waits.
func TestRegistrarLeavesBeforeAnswer(t *testing.T) {
	for _, arrives := range []bool{true, false} {
		t.Run(fmt.Sprint("it arrived: ", arrives), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := discoverytest.NewMemory()
				a := &recorder{Registry: &unanswered{Registry: m.Open(), arrives: arrives}}
				r := register(t, a, newNode("a"), discovery.RegistrarOptions{})
				start, want := time.Now(), time.Duration(0)
				if arrives {
					want = discovery.DefaultDrain
				}
				if err := r.leave(); err != nil || time.Since(start) != want {
					t.Errorf("leaving took %v, want %v: %v", time.Since(start), want, err)
				}
				calls := a.taken()
				if len(calls) != 3 || calls[1].node.State() != discovery.StateDraining || !calls[2].withdraw {
					t.Errorf("calls %+v, want that it is announced, drains, and goes", calls)
				}
				if m.Record("a") != nil {
					t.Error("still listed")
				}
			})
		})
	}
}

// unanswered is a registry whose answers to announcements never arrive.
type unanswered struct {
	discovery.Registry
	arrives bool
}

func (u *unanswered) Announce(ctx context.Context, n discovery.Node) error {
	if u.arrives {
		_ = u.Registry.Announce(ctx, n)
	}
	<-ctx.Done()
	return ctx.Err()
}

func TestRegistrarLogsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		log, logs := newLog(slog.LevelInfo)
		r := register(t, m.Open(), newNode("a"), discovery.RegistrarOptions{Logger: log})
		time.Sleep(time.Hour)
		_ = r.leave()
		var told []string
		for _, e := range logs.all() {
			told = append(told, e.message)
		}
		if got := strings.Join(told, ", "); got != "announced, draining, left" {
			t.Errorf("told %s", got)
		}
	})
}

// forbidden is a registry whose permission to write can be revoked.
type forbidden struct {
	discovery.Registry
	revoked atomic.Bool
}

func (f *forbidden) Announce(ctx context.Context, n discovery.Node) error {
	if f.revoked.Load() {
		return fmt.Errorf("%w to write: a test took it away", discovery.ErrPermission)
	}
	return f.Registry.Announce(ctx, n)
}

// A permission may come back, and until then it is one warning.
func TestRegistrarPermissionRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		log, logs := newLog(slog.LevelInfo)
		a := &forbidden{Registry: m.Open()}
		register(t, a, newNode("a"), discovery.RegistrarOptions{Logger: log})
		for range 3 {
			a.revoked.Store(true)
			time.Sleep(time.Hour)
			m.Expire("a")
			a.revoked.Store(false)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if record(t, m, "a") == nil {
				t.Fatal("not announced within 5 seconds after the permission was back")
			}
		}
		warnings := logs.warnings()
		if len(warnings) != 3 || !strings.Contains(fmt.Sprint(warnings[0].fields["error"]), "no permission") {
			t.Errorf("warned %v, want once each time, with the reason", warnings)
		}
	})
}

// A hundred registrars that lose their registry at once do not all come back at
// once, nor knock at the door in step while it is closed.
func TestRegistrarsReconnectSpreadOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const registrars = 100
		m := discoverytest.NewMemory()
		a := &recorder{Registry: m.Open()}
		for i := range registrars {
			register(t, a, newNode(fmt.Sprintf("n%03d", i)), discovery.RegistrarOptions{Drain: new(time.Duration(0))})
		}
		// burst returns the most calls that fall into any tenth of a second.
		burst := func(calls []call) int {
			slices.SortFunc(calls, func(a, b call) int { return a.at.Compare(b.at) })
			most := 0
			for i := range calls {
				n := i
				for n < len(calls) && calls[n].at.Sub(calls[i].at) < 100*time.Millisecond {
					n++
				}
				most = max(most, n-i)
			}
			return most
		}
		m.Break()
		time.Sleep(time.Minute) // the heartbeats and the first tries fall apart
		a.taken()
		time.Sleep(time.Minute)
		if n := burst(a.taken()); n > registrars/5 {
			t.Errorf("%d of %d tried within a tenth of a second during the outage", n, registrars)
		}
		m.Wipe()
		m.Restore()
		time.Sleep(2 * discovery.DefaultHeartbeat)
		synctest.Wait()
		if n := burst(a.taken()); n > registrars/5 {
			t.Errorf("%d of %d came back within a tenth of a second", n, registrars)
		}
		for i := range registrars {
			if m.Record(fmt.Sprintf("n%03d", i)) == nil {
				t.Errorf("n%03d is not back within two heartbeats", i)
			}
		}
	})
}
