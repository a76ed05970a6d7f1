package benchmarks

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// planeNodes is the fleet that changes while nobody is served.
const planeNodes = 10_000

// A plane is what following a fleet costs.
type plane struct {
	idle, heartbeats, bursts, changes, doubled stretch
	// With some requests a second, for which each snapshot is made into pools.
	servedIdle, served stretch
}

// A stretch is what was measured while records came at a steady rate.
type stretch struct {
	records   float64 // a second
	cpu       float64 // of one core
	bare      float64 // of a watcher that does nothing with the records
	snapshots float64 // a second
}

// trickle is how many requests a second there are where there are some.
const trickle = 50

// burst is how long heartbeats are held back to come together. What is saved by
// that is what it costs to wake up for a single one.
const burst = 20 * time.Millisecond

// stretchLength is how long is measured.
const stretchLength = 6 * time.Second

// measurePlane has Caddy follow a fleet: at rest, with heartbeats, and with nodes
// that join and leave.
func measurePlane(b *testing.B, f *fleet) plane {
	b.Helper()
	f.renew(planeNodes, 0)
	admin, port := "127.0.0.1:"+freeport.String(b), freeport.String(b)
	w := startWatcher(b, f)
	p := startCaddy(b, admin, "http://127.0.0.1:"+port+" {\nreverse_proxy {\ndynamic discovery "+f.url+" {\nservice orders\npick 2\n}\nlb_policy least_conn\n}\n}\n")
	awaitNodes(b, admin, planeNodes)
	// A fleet that has been there for a while: what repeats a record is read once
	// for all when it comes for the second time.
	f.renew(planeNodes, 1)
	f.renew(planeNodes, 2)

	// The nodes are those with the numbers from first up to, but not with, next.
	first, next := 0, planeNodes
	beat := func(i int) { f.announce(first+i%(next-first), float64(i)) }
	// Every second record is a node that leaves, the others are new ones.
	change := func(int) {
		if next-first == planeNodes {
			f.withdraw(first)
			first++
		} else {
			f.announce(next, 0)
			next++
		}
	}
	measure := func(rate int, every time.Duration, send func(int)) stretch {
		b.Helper()
		s := pace(b, admin, p, w, stretchLength, rate, every, send)
		f.settle()
		awaitNodes(b, admin, next-first)
		return s
	}
	var result plane
	result.idle = measure(0, 0, nil)
	result.heartbeats = measure(1_000, time.Millisecond, beat)
	result.bursts = measure(1_000, burst, beat)
	result.changes = measure(1_000, time.Millisecond, change)
	result.doubled = measure(2_000, time.Millisecond, change)

	c := dial(b, "127.0.0.1:"+port) // not before: Caddy closes what asks for nothing
	var asking sync.WaitGroup
	stop := make(chan struct{})
	asking.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Second / trickle):
			}
			if status := c.get(b, ""); status != 200 {
				b.Errorf("status %d while nodes come and go", status)
				return
			}
		}
	})
	result.servedIdle = measure(0, 0, nil)
	result.served = measure(1_000, time.Millisecond, change)
	close(stop)
	asking.Wait()
	if b.Failed() {
		b.FailNow()
	}
	return result
}

// pace sends records at a steady rate, those of a short while together, and
// measures once that has gone on for some time.
func pace(b *testing.B, admin string, p, watcher *program, length time.Duration, rate int, every time.Duration, send func(int)) stretch {
	b.Helper()
	const runIn = 3 * time.Second // the list is on disk by then
	var group sync.WaitGroup
	began, sent := time.Now(), 0
	if rate > 0 {
		group.Go(func() {
			ticker := time.NewTicker(every)
			defer ticker.Stop()
			for range ticker.C {
				since := time.Since(began)
				for float64(sent) < since.Seconds()*float64(rate) {
					send(sent)
					sent++
				}
				if since > runIn+length+100*time.Millisecond {
					return
				}
			}
		})
	}
	time.Sleep(runIn)
	snapshots := scrape(b, admin, "caddy_discovery_snapshots_total")
	used, bare, from := p.cpu(b), watcher.cpu(b), time.Now()
	time.Sleep(length)
	used, bare, took := p.cpu(b)-used, watcher.cpu(b)-bare, time.Since(from)
	snapshots = scrape(b, admin, "caddy_discovery_snapshots_total") - snapshots
	group.Wait()
	return stretch{
		records:   float64(sent) / time.Since(began).Seconds(),
		cpu:       used.Seconds() / took.Seconds(),
		bare:      bare.Seconds() / took.Seconds(),
		snapshots: snapshots / took.Seconds(),
	}
}

// envWatcher is set in the process that is a bare watcher: the URL of its bucket.
const envWatcher = "BENCHMARK_WATCHER"

// startWatcher starts a program that watches the fleet's bucket by the client
// library, and does nothing with what comes: what any watcher pays.
func startWatcher(b *testing.B, f *fleet) *program {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envWatcher+"="+f.url)
	cmd.Stderr = os.Stderr
	return startProgram(b, cmd, syscall.SIGKILL)
}

// watcherChild watches if this process is that of [startWatcher]. It returns false
// if it is not.
func watcherChild() bool {
	bucket, err := url.Parse(os.Getenv(envWatcher))
	if err != nil || bucket.Host == "" {
		return false
	}
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "watcher:", err)
		os.Exit(1)
	}
	conn, err := nats.Connect("nats://" + bucket.Host)
	if err != nil {
		fail(err)
	}
	js, err := jetstream.New(conn)
	if err != nil {
		fail(err)
	}
	kv, err := js.KeyValue(context.Background(), strings.TrimPrefix(bucket.Path, "/"))
	if err != nil {
		fail(err)
	}
	w, err := kv.WatchAll(context.Background())
	if err != nil {
		fail(err)
	}
	for range w.Updates() {
	}
	return true
}

// over returns the processor time beyond that of another stretch.
func (s stretch) over(other stretch) float64 { return s.cpu - other.cpu }

// awaitNodes waits until Caddy lists so many nodes.
func awaitNodes(b *testing.B, admin string, nodes int) {
	b.Helper()
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(10 * time.Millisecond) {
		if scrape(b, admin, `caddy_discovery_nodes{state="up"}`) == float64(nodes) {
			return
		}
	}
	b.Fatalf("Caddy does not come to %d nodes", nodes)
}

// scrape returns the sum of a metric over all registries, of the samples that have
// the label if the name has one.
func scrape(b *testing.B, admin, name string) float64 {
	b.Helper()
	response, err := http.Get("http://" + admin + "/metrics")
	if err != nil {
		b.Fatal(err)
	}
	defer response.Body.Close()
	name, label, _ := strings.Cut(strings.TrimSuffix(name, "}"), "{")
	total := 0.0
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		sample := lines.Text()
		if !strings.HasPrefix(sample, name+"{") || !strings.Contains(sample, label) {
			continue
		}
		v, err := strconv.ParseFloat(sample[strings.LastIndexByte(sample, ' ')+1:], 64)
		if err != nil {
			b.Fatal(fmt.Errorf("metric %q: %w", sample, err))
		}
		total += v
	}
	if err := lines.Err(); err != nil {
		b.Fatal(err)
	}
	return total
}
