package redis

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// harness gives the conformance suite a server of its own.
type harness struct {
	config  Config
	stop    func()
	restart func()
}

func (h *harness) Open(t *testing.T) discovery.Registry {
	t.Helper()
	r, err := Open(h.config)
	if err != nil {
		t.Fatal(err)
	}
	if h.config.Layout == LayoutKeys {
		// The suite takes a Historian at its word, and this layout has no past.
		return struct {
			discovery.Registry
			discovery.Verifier
			discovery.Overrider
			discovery.Reader
		}{r, r, r, r}
	}
	return r
}

// Write replaces a member as the fleets in the wild do, in two steps.
func (h *harness) Write(t *testing.T, id, record string) {
	t.Helper()
	r, err := Open(h.config)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, client := context.Background(), r.client.commands
	if keys, ok := r.layout.(*keysLayout); ok {
		err = client.Set(ctx, keys.prefix+id, record, patience).Err()
	} else {
		set := r.client.config.Key
		for _, m := range client.ZRange(ctx, set, 0, -1).Val() {
			if n, _ := discovery.ParseNode([]byte(m)); n.ID == id {
				err = errors.Join(err, client.ZRem(ctx, set, m).Err())
			}
		}
		err = errors.Join(err, client.ZAdd(ctx, set, goredis.Z{Score: float64(time.Now().UnixMilli()), Member: record}).Err())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (h *harness) Break(*testing.T) { h.stop() }

func (h *harness) Restore(*testing.T) { h.restart() }

// single is the harness of one server, which is the only one that is named.
type single struct {
	harness
	server *redistest.Server
}

func (h *single) Addr() string { return h.server.Addr() }

func (h *single) OpenVia(t *testing.T, address string) discovery.Registry {
	via := h.harness
	via.config.URLs = []string{strings.Replace(h.server.URL(), h.server.Addr(), address, 1)}
	return via.Open(t)
}

var _ discoverytest.RemoteHarness = (*single)(nil)

// conformSingle runs the suite against a single server.
func conformSingle(t *testing.T, c Config, options func(t *testing.T, c *Config) []redistest.Option) {
	t.Helper()
	discoverytest.Run(t, func(t *testing.T) discoverytest.Harness {
		c := c
		var o []redistest.Option
		if options != nil {
			o = options(t, &c)
		}
		s := redistest.Start(t, o...)
		c.URLs = []string{s.URL()}
		return &single{harness{config: c, stop: s.Stop, restart: s.Restart}, s}
	})
}

func notify(flags string) func(*testing.T, *Config) []redistest.Option {
	return func(*testing.T, *Config) []redistest.Option { return []redistest.Option{redistest.Notify(flags)} }
}

func TestConformance(t *testing.T) {
	t.Parallel()
	// The suite drains for 100 ms, which a poll must not miss.
	keys := Config{Layout: LayoutKeys, Poll: minPoll}
	for _, c := range []struct {
		name    string
		config  Config
		options func(*testing.T, *Config) []redistest.Option
	}{
		{"SortedSet", Config{}, nil},
		{"SortedSetNotificationsRESP2", Config{Protocol: 2, DB: 3, Name: "somebody"}, notify("Kz")},
		{"SortedSetMutualTLS", Config{Key: "fleet{tag}:nodes:"}, func(t *testing.T, c *Config) []redistest.Option {
			certs := certtest.New(t)
			c.TLSCA, c.TLSCert, c.TLSKey = certs.CA, certs.ClientCert, certs.ClientKey
			return []redistest.Option{redistest.TLS(certs, true), redistest.Password("p@ss:w/rd")}
		}},
		{"Keys", keys, nil},
		{"KeysNotifications", Config{Layout: LayoutKeys, Key: "odd[*]?:"}, notify("K$gx")},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			conformSingle(t, c.config, c.options)
		})
	}
}

// killAndRestartOf kills and restarts several servers together.
func killAndRestartOf(servers ...*redistest.Server) (stop, restart func()) {
	return func() {
			for _, s := range servers {
				s.Kill()
			}
		}, func() {
			for _, s := range servers {
				s.Restart()
			}
		}
}

func TestConformanceSentinel(t *testing.T) {
	t.Parallel()
	s := redistest.StartSentinel(t, 1, "sentinel-pw", redistest.Password("pw"))
	stop, restart := killAndRestartOf(append(append([]*redistest.Server(nil), s.Servers...), s.Sentinels...)...)
	n := 0
	discoverytest.Run(t, func(*testing.T) discoverytest.Harness {
		n++
		return &harness{stop: stop, restart: restart, config: Config{
			URLs: s.URLs(), Password: "pw", Key: fmt.Sprint("nodes", n),
			SentinelMaster: redistest.SentinelMaster, SentinelPassword: "sentinel-pw",
		}}
	})
}

func TestConformanceCluster(t *testing.T) {
	t.Parallel()
	eachLayout(t, func(t *testing.T, layout string) {
		cluster := redistest.StartCluster(t, 0, redistest.Notify("KA"))
		stop, restart := killAndRestartOf(cluster.Masters...)
		n := 0
		discoverytest.Run(t, func(*testing.T) discoverytest.Harness {
			n++
			return &harness{stop: stop, restart: restart, config: Config{
				URLs: cluster.URLs()[:1], Layout: layout, Key: fmt.Sprint("nodes", n),
			}}
		})
	})
}
