package health

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// fleet is a registry in memory, and what its nodes answer to checks. Tests use it in
// a bubble of testing/synctest, where time costs nothing and is exact.
type fleet struct {
	t         *testing.T
	registry  *discoverytest.Memory
	directory *discovery.Directory

	mu      sync.Mutex
	answers map[string]int         // by host:port; 0: refused, < 0: never
	asked   map[string][]time.Time // by host:port
	last    *http.Request
	closed  int
}

func newFleet(t *testing.T) *fleet {
	f := &fleet{t: t, registry: discoverytest.NewMemory(), answers: make(map[string]int), asked: make(map[string][]time.Time)}
	f.directory = discovery.NewDirectory(f.registry.Open(), discovery.Options{TTL: discovery.MaxLease, RecordsOnly: true})
	background(t, func(ctx context.Context) { _ = f.directory.Run(ctx) })
	synctest.Wait()
	return f
}

// background runs f until the test ends.
func background(t *testing.T, f func(context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { f(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
}

// list puts a node into the registry that answers checks with the status.
func (f *fleet) list(id string, status int, pairs ...string) {
	f.t.Helper()
	endpoint, err := discovery.ParseEndpoint("http://" + f.address(id))
	if err != nil {
		f.t.Fatal(err)
	}
	n := discovery.Node{ID: id, Endpoint: endpoint, Metadata: make(map[string]string)}
	for i := 0; i < len(pairs); i += 2 {
		n.Metadata[pairs[i]] = pairs[i+1]
	}
	record, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		f.t.Fatal(err)
	}
	f.answer(id, status)
	f.registry.Put(id, record)
	synctest.Wait()
}

// address returns where the node with the id is; ids are of one letter and a number.
func (f *fleet) address(id string) string {
	var n int
	_, _ = fmt.Sscanf(id[1:], "%d", &n)
	return fmt.Sprintf("10.%d.%d.%d:80", id[0], n/200, n%200+1)
}

func (f *fleet) answer(id string, status int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answers[f.address(id)] = status
}

// checks returns when the node was checked.
func (f *fleet) checks(id string) []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked[f.address(id)]
}

func (f *fleet) Do(req *http.Request, _ *discovery.Entry) (*http.Response, error) {
	status, err := f.ask(req.Context(), req.URL.Host)
	f.mu.Lock()
	f.last = req
	f.mu.Unlock()
	return &http.Response{StatusCode: status, Body: http.NoBody}, err
}

func (f *fleet) Dial(ctx context.Context, address string) (net.Conn, error) {
	if _, err := f.ask(ctx, address); err != nil {
		return nil, err
	}
	conn, other := net.Pipe()
	_ = other.Close()
	return conn, nil
}

func (f *fleet) ask(ctx context.Context, address string) (int, error) {
	f.mu.Lock()
	status := f.answers[address]
	f.asked[address] = append(f.asked[address], time.Now())
	f.mu.Unlock()
	switch {
	case status == 0:
		return 0, errors.New("connection refused")
	case status < 0:
		<-ctx.Done()
		return 0, ctx.Err()
	}
	return status, nil
}

func (f *fleet) Close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed++
}

// checker runs a checker of all nodes until the test ends. What the options leave out
// is as Caddy's configuration has it.
func (f *fleet) checker(o Options, others ...*Checker) *Checker {
	if o.URI == "" {
		o.URI = "/"
	}
	if o.Status == "" {
		o.Status = "2xx"
	}
	if o.Interval == 0 {
		o.Interval = 10 * time.Second
	}
	if o.Timeout == 0 {
		o.Timeout = 5 * time.Second
	}
	if o.Passes == 0 {
		o.Passes = 1
	}
	if o.Fails == 0 {
		o.Fails = 2
	}
	if o.Count == nil {
		o.Count = func(bool) {}
	}
	o.Logger = slog.New(slog.DiscardHandler)
	c := New(f.directory, o)
	c.Use(f)
	c.Subscribe(func(*discovery.Entry) bool { return true }, others)
	background(f.t, c.Run)
	synctest.Wait()
	return c
}

// expect compares what the checks have shown of a node.
func (f *fleet) expect(c *Checker, id string, want State, when string) {
	f.t.Helper()
	synctest.Wait()
	if got, _ := c.Of(f.directory.Snapshot().Node(id)); got != want {
		f.t.Fatalf("%s: state %d of %s, want %d", when, got, id, want)
	}
}

// inBubble runs a test with a fleet in a bubble of testing/synctest.
func inBubble(t *testing.T, test func(*testing.T, *fleet)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, newFleet(t)) })
}

func TestOneResultDecidesAboutAnUncheckedNode(t *testing.T) {
	inBubble(t, func(_ *testing.T, f *fleet) {
		f.list("a1", 200)
		f.list("b1", 500)
		f.list("c1", 0)
		c := f.checker(Options{Passes: 9, Fails: 9})
		f.expect(c, "a1", Healthy, "after the first check")
		f.expect(c, "b1", Unhealthy, "after the first check")
		f.expect(c, "c1", Unhealthy, "after the first check")
	})
}

func TestPassesAndFailsInARow(t *testing.T) {
	inBubble(t, func(_ *testing.T, f *fleet) {
		f.list("a1", 200)
		c := f.checker(Options{Passes: 3, Fails: 2})
		time.Sleep(15 * time.Second) // from the second check on they come every 10 s
		n := len(f.checks("a1"))
		next := func() {
			for n++; len(f.checks("a1")) < n; {
				time.Sleep(time.Second)
			}
		}
		for _, step := range []struct {
			status int
			want   State
		}{
			{500, Healthy}, {200, Healthy}, {500, Healthy}, {500, Unhealthy},
			{200, Unhealthy}, {200, Unhealthy}, {500, Unhealthy}, {200, Unhealthy}, {200, Unhealthy}, {200, Healthy},
		} {
			f.answer("a1", step.status)
			next()
			f.expect(c, "a1", step.want, fmt.Sprintf("after check %d, which got %d", n, step.status))
		}
	})
}

func TestChecksOfAFleetAreSpread(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		for i := range 100 {
			f.list(fmt.Sprintf("a%d", i), 200)
		}
		f.checker(Options{})
		time.Sleep(21 * time.Second)
		at := make(map[time.Time]int)
		for i := range 100 {
			checks := f.checks(fmt.Sprintf("a%d", i))
			if first := checks[1].Sub(checks[0]); first > 10*time.Second {
				t.Errorf("the second check came after %v, want within the interval", first)
			}
			if second := checks[2].Sub(checks[1]); second != 10*time.Second {
				t.Errorf("the third check came %v after the second, want the interval", second)
			}
			at[checks[2]]++
		}
		if len(at) < 90 {
			t.Errorf("100 nodes are checked at %d instants", len(at))
		}
	})
}

// More nodes hang than checks may be under way: the others are checked in time all the
// same.
func TestHangingChecksHarmNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		for i := range maxUnderWay {
			f.list(fmt.Sprintf("h%d", i), -1)
		}
		c := f.checker(Options{Interval: time.Second, Timeout: time.Minute})
		time.Sleep(2*time.Minute + time.Second) // the first 256 share the only queue that there is at first
		f.expect(c, fmt.Sprintf("h%d", maxUnderWay-1), Unhealthy, "once all have been checked")
		f.list("a1", 200)
		f.expect(c, "a1", Healthy, "as soon as it is listed")
		f.answer("a1", 500)
		time.Sleep(3 * time.Second)
		f.expect(c, "a1", Unhealthy, "after two intervals")
	})
}

func TestTimeoutFailsACheck(t *testing.T) {
	inBubble(t, func(_ *testing.T, f *fleet) {
		f.list("a1", -1)
		c := f.checker(Options{Timeout: 3 * time.Second})
		time.Sleep(3*time.Second - 1)
		f.expect(c, "a1", Unchecked, "before the timeout")
		time.Sleep(time.Millisecond)
		f.expect(c, "a1", Unhealthy, "at the timeout")
	})
}

func TestResultOfAReplacedNodeIsDropped(t *testing.T) {
	for what, pairs := range map[string][]string{"another process": {discovery.KeyInstance, "second"}, "another address": nil} {
		t.Run(what, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fleet) {
				f.list("a1", -1, discovery.KeyInstance, "first")
				c := f.checker(Options{Timeout: 3 * time.Second})
				if pairs == nil {
					record := strings.Replace(string(f.registry.Record("a1")), f.address("a1"), f.address("b1"), 1)
					f.answer("b1", 200)
					f.registry.Put("a1", []byte(record))
				} else {
					f.list("a1", 200, pairs...)
				}
				f.expect(c, "a1", Healthy, "after the check of the successor")
				time.Sleep(4 * time.Second)
				f.expect(c, "a1", Healthy, "when the check of the predecessor has failed")
			})
		})
	}
}

func TestOfTellsSinceWhen(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		f.list("a1", -1)
		stray := f.directory.Snapshot().Node("a1")
		c := New(f.directory, Options{})
		if state, since := c.Of(stray); state != Unchecked || !since.IsZero() {
			t.Errorf("before Run: %d since %v", state, since)
		}
		c = f.checker(Options{})
		began := time.Now()
		time.Sleep(time.Hour)
		if _, since := c.Of(f.directory.Snapshot().Node("a1")); !since.Equal(began) {
			t.Errorf("checked since %v, want %v", since, began)
		}
	})
}

func TestOnlyWantedNodesAreChecked(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		f.list("a1", 200)
		f.list("b1", 200)
		f.list("c1", 200)
		c := New(f.directory, f.checker(Options{}).options)
		c.Use(f)
		only := func(id string) func(*discovery.Entry) bool {
			return func(e *discovery.Entry) bool { return e.Node.ID == id }
		}
		c.Subscribe(only("a1"), nil)
		cancel := c.Subscribe(only("b1"), nil)
		background(t, c.Run)
		f.expect(c, "a1", Healthy, "wanted by the first")
		f.expect(c, "b1", Healthy, "wanted by the second")
		f.expect(c, "c1", Unchecked, "wanted by nobody")
		cancel()
		f.expect(c, "a1", Healthy, "still wanted")
		f.expect(c, "b1", Unchecked, "wanted no more")
	})
}

// A checker that nobody uses any more keeps its results for the one that comes next.
func TestResultsStayWithoutSubscribers(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		f.list("a1", 200)
		c := New(f.directory, f.checker(Options{}).options)
		c.Use(f)
		cancel := c.Subscribe(func(*discovery.Entry) bool { return true }, nil)
		background(t, c.Run)
		synctest.Wait()
		cancel()
		f.expect(c, "a1", Healthy, "after the last subscriber left")
	})
}

func TestResultsOfOthers(t *testing.T) {
	for _, test := range []struct {
		what     string
		question string
		status   int
		want     State
	}{
		{"the same question, healthy", "q", 200, Healthy},
		{"the same question, unhealthy", "q", 500, Unhealthy},
		{"another question, healthy", "other", 200, Presumed},
		{"another question, unhealthy", "other", 500, Unchecked},
	} {
		t.Run(test.what, func(t *testing.T) {
			inBubble(t, func(t *testing.T, f *fleet) {
				f.list("a1", test.status)
				first := f.checker(Options{Question: test.question})
				f.answer("a1", -1)
				second := f.checker(Options{Question: "q", Timeout: time.Hour}, first)
				f.expect(second, "a1", test.want, "before its own first result")
				f.answer("a1", 200)
				f.list("b1", 200)
				f.expect(first, "b1", Healthy, "as it joined")
				f.answer("c1", -1)
				f.list("c1", -1)
				f.expect(second, "c1", Unchecked, "joined after the others were looked at")
			})
		})
	}
}

// One result ends what was presumed, however many a known node would need.
func TestPresumedUntilTheFirstResult(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		f.list("a1", 200)
		first := f.checker(Options{Question: "first", Interval: time.Hour})
		f.answer("a1", 500)
		second := f.checker(Options{Question: "second", Fails: 9}, first)
		f.expect(second, "a1", Unhealthy, "after its first result")
	})
}

func TestChangesArePublishedTogether(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		f.list("a1", 200)
		c := f.checker(Options{})
		version, superseded := c.Version(), c.Superseded()
		if version != 1 {
			t.Errorf("version %d after the first results, want 1", version)
		}
		for i := range 3 {
			f.list(fmt.Sprintf("b%d", i), 200)
			time.Sleep(time.Millisecond)
		}
		select {
		case <-superseded:
			t.Error("published before the interval is over")
		default:
		}
		time.Sleep(publishInterval)
		<-superseded
		if v := c.Version(); v != version+1 {
			t.Errorf("%d versions for the changes of 3 ms, want 1", v-version)
		}
		time.Sleep(time.Minute)
		if v := c.Version(); v != version+1 {
			t.Errorf("version %d without a change, want %d", v, version+1)
		}
	})
}

func TestJournalTellsOfChanges(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		f.list("a1", 200)
		f.list("b1", 500)
		var passed, failed int
		f.checker(Options{Count: func(ok bool) {
			if ok {
				passed++
			} else {
				failed++
			}
		}})
		time.Sleep(time.Minute)
		f.answer("a1", 503)
		time.Sleep(time.Minute)
		f.answer("a1", 204)
		time.Sleep(time.Minute)
		var lines []string
		for _, c := range f.directory.Journal().Newest(0, func(c *discovery.Change) bool {
			return c.Type == discovery.ChangeEjected || c.Type == discovery.ChangeRestored
		}) {
			lines = append(lines, fmt.Sprintf("%s %s: %s %v", c.ID, c.Type, c.Reason, c.Entry != nil))
		}
		want := "a1 restored: it passes its health checks again true\n" +
			"a1 ejected: it fails its health checks: status 503, want 2xx true\n" +
			"b1 ejected: it fails its health checks: status 500, want 2xx true"
		if got := strings.Join(lines, "\n"); got != want {
			t.Errorf("the journal says\n%s\nwant\n%s", got, want)
		}
		synctest.Wait()
		if total := len(f.checks("a1")) + len(f.checks("b1")); passed+failed != total || passed == 0 {
			t.Errorf("counted %d passed and %d failed of %d checks", passed, failed, total)
		}
	})
}

func TestClientsAreClosed(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		c := New(f.directory, Options{})
		c.Use(f)
		c.Use(f)
		if f.closed != 1 {
			t.Errorf("closed %d times, want once", f.closed)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		c.Run(ctx)
		if f.closed != 2 {
			t.Errorf("closed %d times after the end, want twice", f.closed)
		}
	})
}
