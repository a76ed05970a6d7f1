package redistest

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
)

// SentinelMaster is the name under which Sentinels know the master.
const SentinelMaster = "fleet"

// A Sentinel is a master, its replicas and three Sentinels that watch them.
type Sentinel struct {
	t         testing.TB
	Servers   []*Server // the first is the master at the start
	Sentinels []*Server
	password  string
}

// SecureURLs returns the Sentinels' URLs at the ports where they speak TLS, if they
// do.
func (s *Sentinel) SecureURLs() []string {
	var urls []string
	for _, sentinel := range s.Sentinels {
		urls = append(urls, fmt.Sprint("redis+sentinel://127.0.0.1:", sentinel.tlsPort))
	}
	return urls
}

// StartSecureSentinel is StartSentinel with Sentinels that speak TLS at a port of
// their own as well, and with servers that were given the option TLS.
func StartSecureSentinel(t testing.TB, c certtest.Certificates, options ...Option) *Sentinel {
	t.Helper()
	return startSentinel(t, 0, "", &c, options...)
}

// StartSentinel starts a master with replicas and three Sentinels. A Sentinel
// asks for the password if there is one; the options are the data servers'.
func StartSentinel(t testing.TB, replicas int, password string, options ...Option) *Sentinel {
	t.Helper()
	return startSentinel(t, replicas, password, nil, options...)
}

func startSentinel(t testing.TB, replicas int, password string, certs *certtest.Certificates, options ...Option) *Sentinel {
	t.Helper()
	s := &Sentinel{t: t, password: password}
	for i := range 1 + replicas {
		server := newServer(t, options...)
		if i > 0 {
			server.lines = append(server.lines, fmt.Sprint("replicaof 127.0.0.1 ", s.Servers[0].port))
		}
		s.Servers = append(s.Servers, server)
	}
	for _, server := range s.Servers {
		server.Restart()
	}
	master := s.Servers[0]
	for range 3 {
		sentinel := newServer(t)
		sentinel.sentinel, sentinel.password = true, password
		sentinel.lines = []string{
			fmt.Sprintf("sentinel monitor %s 127.0.0.1 %d 2", SentinelMaster, master.port),
			fmt.Sprintf("sentinel down-after-milliseconds %s 1000", SentinelMaster),
			fmt.Sprintf("sentinel failover-timeout %s 3000", SentinelMaster),
		}
		if master.password != "" {
			sentinel.lines = append(sentinel.lines, fmt.Sprintf("sentinel auth-pass %s %s", SentinelMaster, master.password))
		}
		if certs != nil {
			sentinel.tlsPort = freePort(t)
			sentinel.lines = append(sentinel.lines, fmt.Sprint("tls-port ", sentinel.tlsPort), "tls-auth-clients no",
				"tls-ca-cert-file "+certs.CA, "tls-cert-file "+certs.ServerCert, "tls-key-file "+certs.ServerKey)
			if master.tls != nil {
				sentinel.lines = append(sentinel.lines, "tls-replication yes")
			}
		}
		if password != "" {
			sentinel.lines = append(sentinel.lines, "requirepass "+password, "sentinel sentinel-pass "+password)
		}
		sentinel.Restart()
		s.Sentinels = append(s.Sentinels, sentinel)
	}
	// A failover needs Sentinels that know each other and the replicas, and
	// replicas that have the data.
	for _, sentinel := range s.Sentinels {
		s.until("the Sentinels know the fleet", func(ctx context.Context) bool {
			m, err := s.ask(sentinel).Master(ctx, SentinelMaster).Result()
			return err == nil && m["num-other-sentinels"] == "2" && m["num-slaves"] == fmt.Sprint(replicas)
		})
	}
	for _, replica := range s.Servers[1:] {
		s.until("the replicas are in step", func(ctx context.Context) bool {
			info, err := replica.Client().Info(ctx, "replication").Result()
			return err == nil && strings.Contains(info, "master_link_status:up")
		})
	}
	return s
}

// URLs returns the Sentinels' URLs.
func (s *Sentinel) URLs() []string {
	var urls []string
	for _, sentinel := range s.Sentinels {
		urls = append(urls, "redis+sentinel://"+sentinel.Addr())
	}
	return urls
}

// Master returns the server that the Sentinels agree is the master.
func (s *Sentinel) Master() *Server {
	s.t.Helper()
	var master *Server
	s.until("the Sentinels agree on a master", func(ctx context.Context) bool {
		master = nil
		for _, sentinel := range s.Sentinels {
			addr, err := s.ask(sentinel).GetMasterAddrByName(ctx, SentinelMaster).Result()
			if err != nil {
				return false
			}
			for _, server := range s.Servers {
				if fmt.Sprint(server.port) == addr[1] {
					if master != nil && master != server {
						return false
					}
					master = server
				}
			}
		}
		return master != nil
	})
	return master
}

func (s *Sentinel) ask(sentinel *Server) *goredis.SentinelClient {
	c := goredis.NewSentinelClient(&goredis.Options{
		Addr: sentinel.Addr(), Password: s.password, DisableIdentity: true, MaxRetries: -1,
	})
	s.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (s *Sentinel) until(what string, ok func(context.Context) bool) { until(s.t, what, ok) }

func until(t testing.TB, what string, ok func(context.Context) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for !ok(ctx) {
		if ctx.Err() != nil {
			t.Fatalf("waited in vain until %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
