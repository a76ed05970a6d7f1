package redis

import (
	"context"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// TestConnections counts them on the server.
func TestConnections(t *testing.T) {
	t.Parallel()
	eachLayout(t, func(t *testing.T, layout string) {
		s := redistest.Start(t, redistest.Notify("KA"))
		r := openRegistry(t, Config{URLs: []string{s.URL()}, Layout: layout, Name: "counted", Poll: 10 * time.Millisecond})
		d := startDirectory(t, r, discovery.Options{})
		waitSynced(t, d)
		var nodes []discovery.Node
		for i := range 8 {
			nodes = append(nodes, newNode(strconv.Itoa(i)))
		}
		keepAlive(t, r, 5*time.Millisecond, nodes...)
		ctx, cancel := context.WithCancel(context.Background())
		var group sync.WaitGroup
		for range 4 {
			group.Go(func() {
				for ctx.Err() == nil {
					_ = r.Verify(ctx)
					_, _ = r.History(ctx, "1", 0)
				}
			})
		}
		waitUntil(t, d, "all join", count(len(nodes)))
		most := 0
		for range 100 {
			list, err := s.Client().ClientList(context.Background()).Result()
			if err != nil {
				t.Fatal(err)
			}
			most = max(most, strings.Count(list, "name=counted"))
		}
		cancel()
		group.Wait()
		if most > 3 || most < 2 {
			t.Errorf("%d connections, want at most 3", most)
		}
	})
}

// TestWithoutHello talks to a server, or a proxy, that knows RESP2 only.
func TestWithoutHello(t *testing.T) {
	t.Parallel()
	eachLayout(t, func(t *testing.T, layout string) {
		s := redistest.Start(t, redistest.Config("rename-command", `HELLO ""`), redistest.Password("pw"), redistest.Notify("KA"))
		r := openRegistry(t, Config{URLs: []string{s.URL()}, Layout: layout})
		d := startDirectory(t, r, discovery.Options{})
		waitSynced(t, d)
		if !strings.HasSuffix(r.Changes(), "notifications") {
			t.Errorf("pushed by %q", r.Changes())
		}
		announce(t, r, newNode("a"))
		waitUntil(t, d, "a joins", has("a"))
		if err := r.Withdraw(context.Background(), newNode("a")); err != nil {
			t.Fatal(err)
		}
		waitUntil(t, d, "a leaves", lacks("a"))
		if status := d.Status(); status.Restarts != 0 {
			t.Errorf("the watch broke: %v", status.LastError)
		}
	})
}

// The files of an authority and of a client are replaced while a registry is open,
// and the next connection goes by what is there then.
func TestReplacedCertificates(t *testing.T) {
	t.Parallel()
	for name, layout := range map[string]string{"sorted_set": LayoutSortedSet, "keys": LayoutKeys} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			before, after := certtest.New(t), certtest.New(t)
			s := redistest.Start(t, redistest.TLS(before, true))
			r := openRegistry(t, Config{URLs: []string{s.URL()}, Layout: layout,
				TLSCA: before.CA, TLSCert: before.ClientCert, TLSKey: before.ClientKey})
			d := startDirectory(t, r, discovery.Options{})
			waitSynced(t, d)
			announce(t, r, newNode("early"))
			waitUntil(t, d, "the node from before", has("early"))

			s.Stop()
			after.Replace(t, before)
			s.RenewCertificates()
			s.Restart()
			announceUntil(t, r, newNode("late"))
			waitUntil(t, d, "a node from after the files were replaced", has("late"))
		})
	}
}

// Sentinels and servers need not both speak TLS.
func TestSentinelTLS(t *testing.T) {
	t.Parallel()
	certs := certtest.New(t)
	for name, c := range map[string]struct {
		servers []redistest.Option
		urls    func(*redistest.Sentinel) []string
		tls     string
	}{
		"Sentinels alone": {nil, (*redistest.Sentinel).SecureURLs, TLSOn},
		"servers alone": {[]redistest.Option{redistest.TLS(certs, false)}, func(s *redistest.Sentinel) []string {
			var urls []string
			for _, u := range s.URLs() {
				urls = append(urls, strings.Replace(u, "redis+", "rediss+", 1))
			}
			return urls
		}, TLSOff},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.StartSecureSentinel(t, certs, c.servers...)
			config := Config{URLs: c.urls(s), SentinelMaster: redistest.SentinelMaster, TLSCA: certs.CA, SentinelTLS: c.tls}
			r := openRegistry(t, config)
			d := startDirectory(t, r, discovery.Options{})
			waitSynced(t, d)
			announce(t, r, newNode("a"))
			waitUntil(t, d, "the node", has("a"))

			// Not asked for, it is the same for both.
			config.SentinelTLS = ""
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if err := openRegistry(t, config).Announce(ctx, newNode("b")); err == nil {
				t.Error("without the option a node is announced")
			}
		})
	}
}
