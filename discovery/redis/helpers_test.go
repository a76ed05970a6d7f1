package redis

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// patience bounds every wait, far beyond what any takes.
const patience = 30 * time.Second

// TestMain runs more tests at once than there are processors: they mostly wait for
// servers, each for its own.
func TestMain(m *testing.M) {
	flag.Parse()
	if parallel := flag.Lookup("test.parallel"); parallel.Value.String() == parallel.DefValue {
		_ = parallel.Value.Set(strconv.Itoa(4 * runtime.GOMAXPROCS(0)))
	}
	goleak.VerifyTestMain(m)
}

// openRegistry opens a registry that is closed with the test.
func openRegistry(t testing.TB, c Config) *Registry {
	t.Helper()
	r, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// startDirectory runs a directory of a registry until the test ends.
func startDirectory(t testing.TB, w discovery.Watcher, o discovery.Options) *discovery.Directory {
	t.Helper()
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	o.Probe = discoverytest.RefuseConnection
	d := discovery.NewDirectory(w, o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = d.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return d
}

func waitSynced(t testing.TB, d *discovery.Directory) {
	t.Helper()
	select {
	case <-d.Synced():
	case <-time.After(patience):
		t.Fatalf("not synced: %+v", d.Status())
	}
}

// waitUntil waits for a snapshot.
func waitUntil(t testing.TB, d *discovery.Directory, what string, ok func(*discovery.Snapshot) bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		s := d.Snapshot()
		if ok(s) {
			return
		}
		select {
		case <-s.Superseded():
		case <-deadline:
			t.Fatalf("waited in vain for: %s; %d nodes, %+v", what, len(s.Nodes()), d.Status())
		}
	}
}

func has(id string) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return s.Node(id) != nil }
}

func lacks(id string) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return s.Node(id) == nil }
}

func count(n int) func(*discovery.Snapshot) bool {
	return func(s *discovery.Snapshot) bool { return len(s.Nodes()) == n }
}

// eventually waits for what no snapshot tells.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func newNode(id string, pairs ...string) discovery.Node {
	endpoint, err := discovery.ParseEndpoint("http://10.0.0.7:5001")
	if err != nil {
		panic(err)
	}
	n := discovery.Node{ID: id, Endpoint: endpoint, Metadata: map[string]string{
		discovery.KeyService: "orders", discovery.KeyInstance: "instance-of-" + id,
	}}
	for i := 0; i < len(pairs); i += 2 {
		n.Metadata[pairs[i]] = pairs[i+1]
	}
	return n
}

func announce(t testing.TB, r discovery.Announcer, nodes ...discovery.Node) {
	t.Helper()
	for _, n := range nodes {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := r.Announce(ctx, n)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
	}
}

// announceUntil announces a node to a registry that may still be away.
func announceUntil(t testing.TB, r discovery.Announcer, n discovery.Node) {
	t.Helper()
	var err error
	defer func() {
		if t.Failed() {
			t.Log("the last error:", err)
		}
	}()
	eventually(t, "the registry takes the node", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		err = r.Announce(ctx, n)
		return err == nil
	})
}

// watchEvents runs a bare watch, and returns its events, after the listing.
func watchEvents(t testing.TB, r *Registry) (listed []discovery.Event, events chan discovery.Event, done chan error) {
	t.Helper()
	events, done = make(chan discovery.Event, 10_000), make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		done <- r.Watch(ctx, func(e discovery.Event) { events <- e })
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	for {
		e := nextEvent(t, events, done)
		if listed = append(listed, e); e.Type == discovery.Synced {
			return listed, events, done
		}
	}
}

func nextEvent(t testing.TB, events chan discovery.Event, done chan error) discovery.Event {
	t.Helper()
	select {
	case e := <-events:
		return e
	case err := <-done:
		t.Fatalf("the watch ended: %v", err)
	case <-time.After(patience):
		t.Fatal("no event")
	}
	panic("unreachable")
}

// sample returns a record as writers in the wild put it.
func sample(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile("../testdata/wire/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// serverTime returns the server's time in ms, plus something.
func serverTime(t testing.TB, c *goredis.Client, plus time.Duration) float64 {
	t.Helper()
	at, err := c.Time(context.Background()).Result()
	if err != nil {
		t.Fatal(err)
	}
	return float64(at.Add(plus).UnixMilli())
}

func addMember(t testing.TB, c *goredis.Client, record string, age time.Duration) {
	t.Helper()
	if err := c.ZAdd(context.Background(), DefaultKey, goredis.Z{Score: serverTime(t, c, -age), Member: record}).Err(); err != nil {
		t.Fatal(err)
	}
}

// replaceMember replaces a member of the set as the fleets in the wild do, in two steps.
func replaceMember(t testing.TB, c *goredis.Client, old, record string) {
	t.Helper()
	if err := c.ZRem(context.Background(), DefaultKey, old).Err(); err != nil {
		t.Fatal(err)
	}
	addMember(t, c, record, 0)
}

func foreignRecord(id string, seen int) string {
	return fmt.Sprintf(`{"nodeId":%q,"endpoint":"http://127.0.0.1:5001","lastSeen":"2025-10-10T12:00:00.%07dZ","load":0,"metadata":{"service":"orders"},"isOnline":true}`, id, seen)
}

func wantError(t testing.TB, err error, kinds ...error) {
	t.Helper()
	for _, kind := range kinds {
		if !errors.Is(err, kind) {
			t.Errorf("error %v, want one that wraps %q", err, kind)
		}
	}
}

func wantBroken(t *testing.T, done chan error) {
	t.Helper()
	select {
	case err := <-done:
		wantError(t, err, discovery.ErrBroken)
	case <-time.After(patience):
		t.Fatal("the watch did not end")
	}
}

// keepAlive announces nodes until the test ends, as registrars do: it never
// gives up.
func keepAlive(t testing.TB, r discovery.Announcer, every time.Duration, nodes ...discovery.Node) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	for _, n := range nodes {
		group.Go(func() {
			tick := time.NewTicker(every)
			defer tick.Stop()
			for {
				callCtx, stop := context.WithTimeout(ctx, 2*time.Second)
				_ = r.Announce(callCtx, n)
				stop()
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		group.Wait()
	})
}

// neverLose fails the test if the directory is ever without one of the nodes,
// waitUntil the returned function is called.
func neverLose(t testing.TB, d *discovery.Directory, ids ...string) (stop func()) {
	t.Helper()
	done := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		for {
			s := d.Snapshot()
			for _, id := range ids {
				if s.Node(id) == nil {
					t.Errorf("%s was dropped", id)
					return
				}
			}
			select {
			case <-s.Superseded():
			case <-done:
				return
			}
		}
	})
	return sync.OnceFunc(func() {
		close(done)
		group.Wait()
	})
}

// commandCalls returns how often the server was asked something, and for how long that
// kept it busy.
func commandCalls(t testing.TB, c *goredis.Client, command string) (n int, busy time.Duration) {
	t.Helper()
	info, err := c.Info(context.Background(), "commandstats").Result()
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`cmdstat_` + command + `:calls=(\d+),usec=(\d+)`).FindStringSubmatch(info)
	if m == nil {
		return 0, 0
	}
	n, _ = strconv.Atoi(m[1])
	us, _ := strconv.Atoi(m[2])
	return n, time.Duration(us) * time.Microsecond
}

// bytesSent returns how many bytes the server has sent to everybody.
func bytesSent(t testing.TB, c *goredis.Client) int {
	t.Helper()
	info, err := c.Info(context.Background(), "stats").Result()
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(info, "total_net_output_bytes:")
	line, _, _ := strings.Cut(rest, "\r")
	n, err := strconv.Atoi(line)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// bytesAllocated returns how many bytes this process has ever allocated.
func bytesAllocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

func portOf(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

// freeAddr returns a port that nobody listens on.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return portOf(l.Addr().String())
}

// eachLayout runs a test with each layout, both at once.
func eachLayout(t *testing.T, test func(t *testing.T, layout string)) {
	for _, layout := range []string{LayoutSortedSet, LayoutKeys} {
		t.Run(layout, func(t *testing.T) {
			t.Parallel()
			test(t, layout)
		})
	}
}
