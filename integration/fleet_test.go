// Package integration runs the binary that users build against real registries,
// under traffic whose every response is checked.
package integration

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// camel and pascal are records as the two kinds of writers in the wild write
// them, the second with its own spelling of every name.
func camel(id, endpoint, metadata string) string {
	return fmt.Sprintf(`{"nodeId":%q,"endpoint":%q,"lastSeen":"2025-10-10T12:00:00.1234567Z","load":0.35,"metadata":{%s},"isOnline":true}`, id, endpoint, metadata)
}

func pascal(id, endpoint, metadata string) string {
	return fmt.Sprintf(`{"NodeId":%q,"Endpoint":%q,"LastSeen":"2025-10-10T12:00:00.1234567","Load":1E-05,"Metadata":{%s},"IsOnline":false}`, id, endpoint, metadata)
}

// site is a site on a port with one reverse_proxy.
func site(port, source, rest string) string {
	return "http://127.0.0.1:" + port + " {\nreverse_proxy {\ndynamic discovery {\n" + source + "\n}\n" + rest + "\n}\n}\n"
}

func all(services []*service) string {
	want := make(map[string]int)
	for _, s := range services {
		want[s.id]++
	}
	return fmt.Sprint(want)
}

// TestFleet is the main job: ten services list themselves, one joins, moves,
// drains, leaves, crashes, and traffic follows.
func TestFleet(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		var fleet []*service
		beat := func() {
			for i, s := range fleet {
				write := camel
				if i%2 == 1 {
					write = pascal
				}
				r.put(s.id, write(s.id, "http://"+s.address, `"service":"orders"`))
			}
		}
		for i := range 10 {
			fleet = append(fleet, newService(t, fmt.Sprintf("orders-%d", i)))
		}
		beat()
		port := freeport.String(t)
		start(t, "", site(port, r.block("ttl 2s")+"\nservice orders", "lb_policy round_robin"))
		url := "http://127.0.0.1:" + port
		expect := func(what string, services []*service) {
			t.Helper()
			eventually(t, what, func() bool {
				beat() // everybody who is in the fleet lives
				return fmt.Sprint(round(t, len(services), url)) == all(services)
			})
		}
		expect("all ten serve, by records of both kinds", fleet)

		joined := newService(t, "orders-10")
		fleet = append(fleet, joined)
		expect("a node that joins serves", fleet)

		moved := newService(t, "orders-10")
		fleet[10] = moved
		joined.close()
		expect("a node that moves serves at its new address", fleet)

		draining := fleet[10]
		fleet = fleet[:10]
		r.put(draining.id, camel(draining.id, "http://"+draining.address, `"service":"orders","state":"draining"`))
		expect("a draining node gets no more requests", fleet)

		leaving := fleet[9]
		fleet = fleet[:9]
		r.remove(leaving.id)
		expect("a node that leaves gets no more requests", fleet)

		// It crashes: nobody says goodbye, the heartbeats just end.
		fleet = fleet[:8]
		expect("a crashed node lapses", fleet)

		r.put("pay-1", camel("pay-1", "http://"+leaving.address, `"service":"pay"`))
		r.put("orders-bad", `{"nodeId":"orders-bad","endpoint":"http://{env.HOME}:80"`)
		expect("another service and a broken record change nothing", fleet)
	})
}

// TestServicePlaceholder serves a whole fleet with one route.
func TestServicePlaceholder(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		port := freeport.String(t)
		start(t, "", site(port, r.block("ttl 1h")+"\nservice {header.X-Service}", "lb_policy round_robin"))
		url := "http://127.0.0.1:" + port
		for _, name := range []string{"orders", "pay"} {
			for i := range 2 {
				s := newService(t, fmt.Sprintf("%s-%d", name, i))
				r.put(s.id, camel(s.id, "http://"+s.address, `"service":"`+name+`"`))
			}
		}
		for service, want := range map[string]string{
			"orders": "map[orders-0:1 orders-1:1]", "pay": "map[pay-0:1 pay-1:1]", "unknown": "map[503:2]", "": "map[503:2]",
		} {
			eventually(t, "service "+service, func() bool {
				return fmt.Sprint(round(t, 2, url, "X-Service", service)) == want
			})
		}
	})
}

// registrar is a global option that lists the proxy, with short times.
func registrar(r registry, id, endpoint string) string {
	return "registrar {\n" + r.block("ttl 1h") + "\nnode_id " + id + "\nendpoint " + endpoint +
		"\nheartbeat 100ms\nttl 2s\ndrain 1s\nmetadata service edge\n}"
}

// TestOneConnection has two handlers and the registrar share what there is to
// share.
func TestOneConnection(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		one, two := freeport.String(t), freeport.String(t)
		s := newService(t, "a")
		r.put("a", camel("a", "http://"+s.address, ""))
		start(t, registrar(r, "edge-1", "http://127.0.0.1:"+one),
			site(one, r.block("ttl 1h"), "")+site(two, r.block("ttl 1h")+"\nprefer zone x", ""))
		for _, port := range []string{one, two} {
			eventually(t, "it serves", func() bool {
				r.put("a", camel("a", "http://"+s.address, ""))
				body, err := ask("http://127.0.0.1:" + port)
				return err == nil && body == "a"
			})
		}
		eventually(t, "the proxy is listed", func() bool { return r.record("edge-1") != "" })
		if n := r.clients(); n < 1 || n > r.maxClients() {
			t.Errorf("the registry counts %d connections for two handlers and the registrar, want at most %d", n, r.maxClients())
		}
	})
}

// TestReloads reloads under load: nothing fails, connects anew or is announced
// anew.
func TestReloads(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		const reloads = 50
		port := freeport.String(t)
		var services []*service
		for i := range 3 {
			services = append(services, newService(t, fmt.Sprintf("orders-%d", i)))
		}
		options := registrar(r, "edge-1", "http://127.0.0.1:"+port)
		sites := site(port, r.block("ttl 1h")+"\nservice orders", "lb_policy round_robin")
		p := start(t, options, sites)
		eventually(t, "all serve", func() bool {
			for _, s := range services {
				r.put(s.id, camel(s.id, "http://"+s.address, `"service":"orders"`))
			}
			return len(round(t, 3, "http://127.0.0.1:"+port)) == 3
		})
		eventually(t, "the proxy is listed", func() bool { return r.record("edge-1") != "" })

		before := r.accepted()
		instance := instanceOf(t, r.record("edge-1"))
		var gaps []string
		ctx, cancel := context.WithCancel(context.Background())
		var watching sync.WaitGroup
		watching.Go(func() {
			for ctx.Err() == nil {
				if record := r.record("edge-1"); record == "" || instanceOf(t, record) != instance {
					gaps = append(gaps, record)
				}
			}
		})
		l := traffic(t, "http://127.0.0.1:"+port)
		for i := range reloads {
			p.reload(options, sites+fmt.Sprintf("http://127.0.0.1:%s/%d {\n}\n", port, i))
		}
		l.stop(t)
		cancel()
		watching.Wait()
		if n := r.accepted() - before; n != 0 {
			t.Errorf("%d reloads made %d new connections to the registry, want none", reloads, n)
		}
		if len(gaps) > 0 {
			t.Errorf("the proxy's own record was gone or somebody else's %d times, first: %q", len(gaps), gaps[0])
		}

		p.reload("", sites)
		eventually(t, "a reload without the registrar leaves", func() bool { return r.record("edge-1") == "" })
	})
}

func instanceOf(t *testing.T, record string) string {
	n, err := discovery.ParseNode([]byte(record))
	if err != nil {
		t.Errorf("the proxy's own record: %v", err)
	}
	return n.Instance()
}

// TestNextTier stops one of two proxies that a front proxy finds by their
// records: by SIGTERM, which costs no request, and by SIGKILL, after which the
// record lapses.
func TestNextTier(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		a := newService(t, "a")
		r.put("a", camel("a", "http://"+a.address, `"service":"orders"`))
		edge := func(id string) (*proxy, string) {
			port := freeport.String(t)
			p := start(t, registrar(r, id, "http://127.0.0.1:"+port),
				"http://127.0.0.1:"+port+" {\nheader X-Edge "+id+"\nreverse_proxy {\ndynamic discovery {\n"+r.block("ttl 1h")+"\nservice orders\n}\n}\n}\n")
			eventually(t, id+" is listed", func() bool { return r.record(id) != "" })
			return p, port
		}
		terminated, port := edge("edge-1")
		killed, _ := edge("edge-2")

		front := freeport.String(t)
		start(t, "", site(front, r.block("ttl 1h")+"\nservice edge",
			"lb_policy round_robin\nlb_try_duration 5s\nlb_try_interval 50ms\nfail_duration 5s"))
		url := "http://127.0.0.1:" + front
		eventually(t, "both edges serve", func() bool {
			edges := make(map[string]bool)
			for range 2 {
				resp, err := client.Get(url)
				if err != nil {
					t.Fatal(err)
				}
				_ = resp.Body.Close()
				edges[resp.Header.Get("X-Edge")] = true
			}
			return edges["edge-1"] && edges["edge-2"]
		})

		l := traffic(t, url)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			terminated.kill(syscall.SIGTERM)
		}()
		// The proxy itself goes on answering while it is announced as draining.
		answered := 0
		for waiting := true; waiting; {
			select {
			case <-ended:
				waiting = false
			default:
				if record := r.record("edge-1"); strings.Contains(record, "draining") {
					if body, err := ask("http://127.0.0.1:" + port); err == nil && body == "a" {
						answered++
					} else if r.record("edge-1") != "" {
						t.Errorf("the listener closed before the record went: %q, %v", body, err)
					}
				}
			}
		}
		if answered == 0 {
			t.Error("the proxy was never seen draining and answering")
		}
		// Half of its lease, so that it was removed and has not run out.
		within(t, time.Second, "SIGTERM leaves no record", func() bool { return r.record("edge-1") == "" })
		if l.failed() > 0 {
			t.Errorf("SIGTERM of one of two proxies failed %d requests, the first with %s", l.failed(), l.failures[0])
		}
		killed.kill(syscall.SIGKILL)
		eventually(t, "the record of the killed proxy lapses, so that nobody is left", func() bool { return l.failed() > 0 })
		l.cancel()
		l.group.Wait()
		for _, f := range l.failures {
			if f != "status 503" && f != "status 502" {
				t.Errorf("a request failed with %s", f)
			}
		}
	})
}

// TestStaticFallback loses the last node while a static upstream stands by.
func TestStaticFallback(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		fallBack(t, r, "dynamic discovery {\n"+r.block("ttl 1h")+"\n}")
	})
}

// TestStaticFallbackBehindMulti does so with two sources, neither of which has a node
// in the end.
func TestStaticFallbackBehindMulti(t *testing.T) {
	r := newKV(t)
	fallBack(t, r, "dynamic multi {\ndiscovery {\n"+r.block("ttl 1h")+"\nservice other\n}\ndiscovery {\n"+r.block("ttl 1h")+"\n}\n}")
}

func fallBack(t *testing.T, r registry, source string) {
	t.Helper()
	port := freeport.String(t)
	static, a := newService(t, "static"), newService(t, "a")
	p := start(t, "", "http://127.0.0.1:"+port+" {\nreverse_proxy http://"+static.address+" {\n"+source+"\n}\n}\n")
	url := "http://127.0.0.1:" + port
	serves := func(id string) func() bool {
		return func() bool {
			body, err := ask(url)
			return err == nil && body == id
		}
	}
	eventually(t, "the static upstream serves an empty fleet", serves("static"))
	l := traffic(t, url)
	r.put("a", camel("a", "http://"+a.address, ""))
	eventually(t, "the node takes over", serves("a"))
	r.remove("a")
	eventually(t, "the static upstream takes over", serves("static"))
	l.stop(t)
	// What falls back for each request is told once.
	if log := p.log.String(); strings.Contains(log, "failed getting dynamic upstreams") || strings.Contains(log, "source returned error") {
		t.Errorf("requests that fell back are logged as errors:\n%s", log)
	}
}

// TestColdStart has the registry come up one second after the proxy: the first
// requests wait for it and are served.
func TestColdStart(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		a := newService(t, "a")
		r.put("a", camel("a", "http://"+a.address, ""))
		r.stop()
		port := freeport.String(t)
		start(t, "", site(port, r.block("ttl 1h")+"\nsync_timeout 20s", ""))
		began := time.Now()
		var group sync.WaitGroup
		answers := make([]string, 20)
		for i := range answers {
			group.Go(func() {
				body, err := ask("http://127.0.0.1:" + port)
				if err != nil {
					body = err.Error()
				}
				answers[i] = body
			})
		}
		time.AfterFunc(time.Second, r.restart)
		group.Wait()
		for _, body := range answers {
			if body != "a" && r.persistent() {
				t.Errorf("a request of the cold start got %q, want the node", body)
			}
		}
		// Where nothing is kept, a proxy that is back before the fleet is learns of it
		// later.
		eventually(t, "the node serves", func() bool {
			r.put("a", camel("a", "http://"+a.address, ""))
			body, err := ask("http://127.0.0.1:" + port)
			return err == nil && body == "a"
		})
		t.Logf("the first %d requests were answered %v after the start, the registry came after 1s", len(answers), time.Since(began).Round(time.Millisecond))
	})
}

// TestRegistryRestart keeps serving while the registry is gone, and sees what
// changed when it is back.
func TestRegistryRestart(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		port := freeport.String(t)
		url := "http://127.0.0.1:" + port
		a, b := newService(t, "a"), newService(t, "b")
		r.put("a", camel("a", "http://"+a.address, ""))
		p := start(t, "", site(port, r.block("ttl 1s"), "lb_policy round_robin"))
		eventually(t, "a serves", func() bool {
			r.put("a", camel("a", "http://"+a.address, ""))
			body, err := ask(url)
			return err == nil && body == "a"
		})
		l := traffic(t, url)
		r.stop()
		eventually(t, "the loss is noticed", func() bool { return strings.Contains(p.log.String(), "lost the registry") })
		served := l.served()
		<-time.After(3 * time.Second) // three leases
		if l.served() == served {
			t.Error("nothing was served while the registry was away")
		}
		r.restart()
		eventually(t, "what joined after the restart serves", func() bool {
			r.put("a", camel("a", "http://"+a.address, ""))
			r.put("b", camel("b", "http://"+b.address, ""))
			return slices.Equal(slices.Sorted(maps.Keys(round(t, 2, url))), []string{"a", "b"})
		})
		l.stop(t)
	})
}
