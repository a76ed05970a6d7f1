// Package natstest runs a real NATS server inside a test: it listens on
// 127.0.0.1, can be stopped and brought back on the same port with the same
// store, and is gone when the test ends. Tests that use it may run in parallel.
package natstest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// ready is how long a server may take to start or a client to connect. It is
// long because a machine that runs the whole suite is slow, and nothing is
// measured by it.
const ready = 30 * time.Second

// A Server is one running server. Its methods belong to the goroutine of the
// test that started it.
type Server struct {
	// Port is where the server listens; it stays the same across restarts.
	Port int

	// TLS are the files of a server that was started with TLS or MutualTLS.
	TLS certtest.Certificates
	// Seed is the file that holds the seed of the user of NKey.
	Seed string
	// Creds is the credentials file of the user of Operator.
	Creds string

	t       testing.TB
	options *server.Options
	running *server.Server
	scheme  string
	login   []nats.Option // what Conn needs to be let in
}

// Start starts a server with JetStream on a free port, and stops it when the
// test ends. It ends the test if that fails.
func Start(t testing.TB, options ...Option) *Server {
	t.Helper()
	s := prepare(t, options...)
	if err := s.start(); err != nil {
		t.Fatalf("starting a NATS server: %v", err)
	}
	return s
}

func prepare(t testing.TB, options ...Option) *Server {
	t.Helper()
	s := &Server{
		t:       t,
		scheme:  "nats",
		options: defaults(t.TempDir()),
	}
	s.options.Port = freeport.Get(t)
	for _, option := range options {
		option(s)
	}
	t.Cleanup(s.Stop)
	return s
}

func defaults(store string) *server.Options {
	return &server.Options{
		ServerName: "natstest",
		Host:       "127.0.0.1",
		NoLog:      true,
		NoSigs:     true,
		JetStream:  true,
		StoreDir:   store,
		// The store of a test need not survive a power cut.
		SyncInterval: time.Hour,
	}
}

// StartCluster starts servers that keep buckets of several replicas together,
// and returns when they do. Options apply to each.
func StartCluster(t testing.TB, size int, options ...Option) []*Server {
	t.Helper()
	// Each must know all the others before any of them runs.
	var routes []string
	for range size {
		routes = append(routes, net.JoinHostPort("127.0.0.1", freeport.String(t)))
	}
	servers := make([]*Server, size)
	var group sync.WaitGroup
	for i := range servers {
		join := Configure(func(o *server.Options) {
			_, port, _ := net.SplitHostPort(routes[i])
			number, _ := strconv.Atoi(port)
			o.ServerName = fmt.Sprintf("natstest-%d", i)
			o.Cluster = server.ClusterOpts{Name: "natstest", Host: "127.0.0.1", Port: number}
			o.Routes = server.RoutesFromStr("nats-route://" + strings.Join(routes, ",nats-route://"))
		})
		servers[i] = prepare(t, append([]Option{join}, options...)...)
	}
	errs := make([]error, size)
	for i, s := range servers {
		group.Go(func() { errs[i] = s.start() })
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatalf("starting a NATS cluster: %v", err)
	}
	deadline := time.Now().Add(ready)
	js := servers[0].JetStream()
	for {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		// It is only when all have met that one can have all replicas.
		_, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "probe", Replicas: size, Storage: jetstream.MemoryStorage})
		if err == nil {
			err = js.DeleteStream(ctx, "probe")
		}
		cancel()
		if err == nil && !met(servers) {
			err = errors.New("its members have not all met")
		}
		if err == nil {
			return servers
		}
		if time.Now().After(deadline) {
			t.Fatalf("the NATS cluster is not ready after %v: %v", ready, err)
		}
	}
}

// met reports whether the leader of the cluster sees all its members.
func met(servers []*Server) bool {
	for _, s := range servers {
		info, err := s.running.Jsz(nil)
		if err != nil || info.Meta == nil || info.Meta.Leader != s.Name() {
			continue
		}
		for _, peer := range info.Meta.Replicas {
			if peer.Offline || !peer.Current {
				return false
			}
		}
		return len(info.Meta.Replicas) == len(servers)-1
	}
	return false
}

func (s *Server) start() error {
	// NewServer keeps and changes what it is given.
	srv, err := server.NewServer(s.options.Clone())
	if err != nil {
		return err
	}
	srv.Start()
	if !srv.ReadyForConnections(ready) {
		srv.Shutdown()
		srv.WaitForShutdown()
		return fmt.Errorf("it is not ready after %v", ready)
	}
	s.running = srv
	port := strings.TrimPrefix(srv.Addr().String(), "127.0.0.1:")
	if _, err := fmt.Sscan(port, &s.Port); err != nil {
		return fmt.Errorf("reading its port: %w", err)
	}
	s.options.Port = s.Port
	return nil
}

// Stop shuts the server down and returns when it is. A stopped server keeps
// its store and its port.
func (s *Server) Stop() {
	if s.running == nil {
		return
	}
	s.running.Shutdown()
	s.running.WaitForShutdown()
	s.running = nil
}

// Restart stops the server if it runs, and starts it again on the same port
// with the same store.
func (s *Server) Restart() {
	s.t.Helper()
	s.Stop()
	// Another process may hold the port for a moment: it was free meanwhile.
	deadline := time.Now().Add(ready)
	for {
		err := s.start()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("restarting the NATS server: %v", err)
		}
	}
}

// URL returns where the server is, without any credentials.
func (s *Server) URL() string { return s.scheme + "://" + s.Addr() }

// Addr returns "127.0.0.1:port".
func (s *Server) Addr() string { return fmt.Sprintf("127.0.0.1:%d", s.Port) }

// URLWith returns where the server is, with user info.
func (s *Server) URLWith(user *url.Userinfo) string {
	return (&url.URL{Scheme: s.scheme, User: user, Host: s.Addr()}).String()
}

// Name returns the name of the server in its cluster.
func (s *Server) Name() string { return s.options.ServerName }

// NumClients returns how many clients are connected.
func (s *Server) NumClients() int { return s.running.NumClients() }

// Server returns the server itself, nil while it is stopped.
func (s *Server) Server() *server.Server { return s.running }

// Conn returns a connection with every right the server grants. It reconnects
// by itself, and is closed when the test ends.
func (s *Server) Conn() *nats.Conn {
	s.t.Helper()
	options := append([]nats.Option{
		nats.MaxReconnects(-1),
		nats.ReconnectWait(10 * time.Millisecond),
		nats.Timeout(ready),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
	}, s.login...)
	nc, err := nats.Connect(s.URL(), options...)
	if err != nil {
		s.t.Fatalf("connecting to the NATS server: %v", err)
	}
	s.t.Cleanup(nc.Close)
	return nc
}

// JetStream returns the JetStream of a new connection.
func (s *Server) JetStream() jetstream.JetStream {
	s.t.Helper()
	nc := s.Conn()
	var (
		js  jetstream.JetStream
		err error
	)
	if domain := s.options.JetStreamDomain; domain != "" {
		js, err = jetstream.NewWithDomain(nc, domain)
	} else {
		js, err = jetstream.New(nc)
	}
	if err != nil {
		s.t.Fatalf("opening JetStream: %v", err)
	}
	return js
}

// Bucket creates a bucket and returns it, on a new connection.
func (s *Server) Bucket(config jetstream.KeyValueConfig) jetstream.KeyValue {
	s.t.Helper()
	kv, err := s.JetStream().CreateKeyValue(s.t.Context(), config)
	if err != nil {
		s.t.Fatalf("creating bucket %q: %v", config.Bucket, err)
	}
	return kv
}

// KeyValue returns a bucket that exists, on a new connection.
func (s *Server) KeyValue(bucket string) jetstream.KeyValue {
	s.t.Helper()
	kv, err := s.JetStream().KeyValue(s.t.Context(), bucket)
	if err != nil {
		s.t.Fatalf("opening bucket %q: %v", bucket, err)
	}
	return kv
}
