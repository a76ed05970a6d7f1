package caddydiscovery

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/health"
)

func TestColdStartWaits(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL)
	m.Break()
	port := freeport.String(t)
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy {
			dynamic discovery {
				registry memory `+name+`
				sync_timeout 20s
			}
		}
	}`)
	answer := make(chan string, 1)
	go func() {
		_, body := get(t, "http://127.0.0.1:"+port)
		answer <- body
	}()
	// The request is waiting: it has opened the directory, or found it opened,
	// and there is no answer.
	select {
	case body := <-answer:
		t.Fatalf("answered %q before the registry was there", body)
	case <-time.After(200 * time.Millisecond):
	}
	m.Restore()
	if body := <-answer; body != "a" {
		t.Errorf("answered %q after the registry came, want the node", body)
	}
}

// TestReloadWhileRequestsWait takes the registry for which a request waits out of
// the configuration: the request has been accepted, and is served.
func TestReloadWhileRequestsWait(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL)
	for _, checks := range []string{"", "health {\nuri /\n}"} {
		m.Break()
		port, other := freeport.String(t), freeport.String(t)
		load(t, "http://127.0.0.1:"+port+" {\nreverse_proxy {\ndynamic discovery {\nregistry memory "+name+"\nsync_timeout 20s\n"+checks+"\n}\n}\n}")
		source := runningSource(t)
		answer := make(chan string, 1)
		go func() {
			_, body := get(t, "http://127.0.0.1:"+port)
			answer <- body
		}()
		eventually(t, "the request waits", func() bool {
			return source.waiting.Load() == 1
		})
		load(t, "http://127.0.0.1:"+other+" {\nrespond here\n}")
		m.Restore()
		if body := <-answer; body != "a" {
			t.Errorf("answered %q after a reload, want the node", body)
		}
		eventually(t, "the directory has ended", func() bool { return len(runningDirectories()) == 0 })
	}
}

func TestSyncTimeoutEndsTheWait(t *testing.T) {
	name, m := newMemory(t)
	m.Break()
	port := freeport.String(t)
	static := service(t, "static")
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy `+static.URL+` {
			dynamic discovery {
				registry memory `+name+`
				sync_timeout 100ms
			}
		}
	}`)
	if _, body := get(t, "http://127.0.0.1:"+port); body != "static" {
		t.Errorf("answered %q, want the static upstream", body)
	}
}

// fakeChecks are health checks of which a test says what they have shown.
type fakeChecks map[string]struct {
	state health.State
	since time.Time
}

func (c fakeChecks) Of(e *discovery.Entry) (health.State, time.Time) {
	return c[e.Node.ID].state, c[e.Node.ID].since
}

func (fakeChecks) Superseded() <-chan struct{} { return nil }

// TestUncheckedNodes holds when nodes serve that were not checked yet, and when that is
// asked again.
func TestUncheckedNodes(t *testing.T) {
	name, m := newMemory(t)
	for _, id := range []string{"a", "b"} {
		list(t, m, id, "http://"+at(id))
	}
	nodes := source(t, "registry memory "+name).directory.Snapshot().Nodes()
	const timeout = time.Hour
	now := time.Now()
	for _, test := range []struct {
		what  string
		a, b  health.State
		since [2]time.Duration // ago; negative: not yet
		want  string
		next  time.Duration // from now; 0: never
	}{
		{"the checks are about to begin", health.Unchecked, health.Unchecked, [2]time.Duration{-1, -1}, "", time.Hour},
		{"both wait", health.Unchecked, health.Unchecked, [2]time.Duration{20 * time.Minute, 40 * time.Minute}, "", 20 * time.Minute},
		{"one has waited long enough", health.Unchecked, health.Unchecked, [2]time.Duration{20 * time.Minute, 61 * time.Minute}, "b", 0},
		{"one is ill, and the other may be well", health.Unhealthy, health.Unchecked, [2]time.Duration{30 * time.Minute, 10 * time.Minute}, "", 30 * time.Minute},
		{"one is ill for long, and the other joined", health.Unhealthy, health.Unchecked, [2]time.Duration{2 * time.Hour, 10 * time.Minute}, "", 0},
		{"one is ill, and the other has waited", health.Unhealthy, health.Unchecked, [2]time.Duration{2 * time.Hour, 2 * time.Hour}, "", 0},
		{"both are ill", health.Unhealthy, health.Unhealthy, [2]time.Duration{time.Minute, time.Minute}, "", 0},
	} {
		checks := make(fakeChecks)
		for i, id := range []string{"a", "b"} {
			c := checks[id]
			if c.state = []health.State{test.a, test.b}[i]; test.since[i] >= 0 {
				c.since = now.Add(-test.since[i])
			}
			checks[id] = c
		}
		c := coldStart{timeout: timeout, checks: checks}
		got, next := c.unchecked(nodes)
		var ids []string
		for _, e := range got {
			ids = append(ids, e.Node.ID)
		}
		if strings.Join(ids, " ") != test.want {
			t.Errorf("%s: %v serve, want %q", test.what, ids, test.want)
		}
		if wait := next.Sub(now); next.IsZero() != (test.next == 0) || test.next > 0 && (wait < test.next || wait > test.next+time.Minute) {
			t.Errorf("%s: next at %v, want in %v", test.what, next, test.next)
		}
	}
}

// TestRequestsWaitForTheListing has a registry that is away: requests wait for as long
// as they may, or until they are given up.
func TestRequestsWaitForTheListing(t *testing.T) {
	for _, test := range []struct {
		what   string
		cancel time.Duration // of the request; 0: never
		back   time.Duration // the registry is; 0: never
		most   time.Duration // how long the request waits
	}{
		{"it stays away", 0, 0, 10 * time.Second},
		{"the client goes", 3 * time.Second, 0, 3 * time.Second},
		{"it comes back", 0, time.Second, 9 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			m := discoverytest.NewMemory()
			list(t, m, "a", "http://"+at("a"))
			m.Break()
			d := discovery.NewDirectory(m.Open(), discovery.Options{})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- d.Run(ctx) }()
			defer func() {
				cancel()
				<-done
			}()
			c := coldStart{directory: d, timeout: 10 * time.Second}
			c.begin(time.Now())
			defer c.end()
			request, give := context.WithCancel(t.Context())
			defer give()
			if test.cancel > 0 {
				time.AfterFunc(test.cancel, give)
			}
			if test.back > 0 {
				time.AfterFunc(test.back, m.Restore)
			}
			began := time.Now()
			s := c.awaitListing(request, func(*discovery.Snapshot) bool { return false })
			if waited := time.Since(began); s.Synced != (test.back > 0) || waited > test.most || !s.Synced && waited < test.most {
				t.Errorf("%s: listed %v after %v, want at most %v", test.what, s.Synced, waited, test.most)
			}
		})
	}
}
