package redis

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

const (
	dialTimeout = 2 * time.Second
	// A list of 100,000 nodes is 30 MB; within this it arrives over a slow line.
	readTimeout = 3 * time.Second
	// For how long a server counts that is not heard of any more: a replica that
	// is being replaced, or a master that is down, may come back.
	locatedFor = time.Hour
	// maxLocated bounds what a server may add.
	maxLocated = 1024
)

// A connector makes connections. Its dial functions never fail: they return a
// connection that does. A pool of the client library that failed to dial as
// often as it has places stops dialling for a second or more, logs a line for
// each try to a logger of its own, and leaves a goroutine behind when it is
// closed (internal/pool/pool.go, tryDial); and all of that comes from the
// dialler's error.
type connector struct {
	config    Config
	addresses []string
	servers   servers
	sentinels sentinels // none but in mode sentinel
}

func newConnector(c Config) *connector {
	d := &connector{config: c, addresses: c.Addresses()}
	d.servers = servers{named: d.addresses, seen: make(map[string]time.Time)}
	if c.Mode == ModeSentinel {
		d.sentinels.add(c, d.addresses, d.dialer(c.sentinelsSecure()))
	}
	return d
}

// options are those of every connection to servers. The pool has one place: a
// registry uses one connection for its commands.
func (d *connector) options(addresses ...string) *goredis.UniversalOptions {
	dial := d.dialer(d.config.secure())
	if d.config.Mode == ModeSentinel {
		dial = d.sentinels.dialer(dial)
	}
	return &goredis.UniversalOptions{
		Addrs: addresses, Dialer: neverFailing(dial), Protocol: d.config.Protocol,
		Username: d.config.Username, Password: d.config.Password, DB: d.config.DB, ClientName: d.config.Name,
		// Retrying is the Directory's and the Registrar's.
		MaxRetries: -1, DialerRetries: 1,
		DialTimeout: dialTimeout, ReadTimeout: readTimeout, PoolTimeout: readTimeout,
		PoolSize: 1, PipelinePoolSize: -1,
		ContextTimeoutEnabled: true, DisableIdentity: true,
		MaintNotificationsConfig: noMaintenance(),
	}
}

// server returns a client of one server, which dials when it is used.
func (d *connector) server(address string) *goredis.Client {
	return goredis.NewClient(d.options(address).Simple())
}

// commands returns the client for everything but what blocks.
func (d *connector) commands() goredis.UniversalClient {
	if d.config.Mode != ModeCluster {
		return d.server(d.addresses[0])
	}
	o := d.options(d.addresses...).Cluster()
	// With the default of a minute a client stayed with a dead master for 55 s.
	o.ClusterStateReloadInterval = time.Second
	return goredis.NewClusterClient(o)
}

// A dialer opens a connection.
type dialer func(ctx context.Context, network, address string) (net.Conn, error)

// neverFailing returns a dialer whose connections fail in its place.
func neverFailing(dial dialer) dialer {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			// Wrapped once more: the client library unwraps the error of a handshake
			// (redis.go, initConn), which would leave of a net.OpError only what the
			// system said.
			return failedConn{fmt.Errorf("%w", err)}, nil
		}
		return conn, nil
	}
}

// dialer returns what opens connections, with TLS or without.
func (d *connector) dialer(secured bool) dialer {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		d.servers.add(address)
		conn, err := (&net.Dialer{KeepAlive: 15 * time.Second}).DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		if !secured {
			return limit(conn), nil
		}
		host, _, _ := net.SplitHostPort(address)
		config, err := d.config.files().Config(host)
		if err != nil {
			_ = conn.Close()
			return nil, err
		}
		secure := tls.Client(conn, config)
		if err := secure.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			if errors.Is(err, context.DeadlineExceeded) {
				// A server that does not speak TLS waits for the rest of a command.
				err = tls.RecordHeaderError{Msg: "TLS handshake: no answer in time"}
			}
			return nil, fmt.Errorf("connecting to %s: %w", address, err)
		}
		return limit(tlsConn{secure}), nil
	}
}

// A tlsConn is a connection that can say why the server closed it. One that refuses
// the client's certificate says so after the handshake, and a write that comes
// later learns only that the connection is gone.
type tlsConn struct{ *tls.Conn }

func (c tlsConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err != nil {
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, e := c.Read(make([]byte, 1)); saidByServer(e) {
			err = e
		}
	}
	return n, err
}

// noMaintenance turns off a handshake that Redis itself does not know.
func noMaintenance() *maintnotifications.Config {
	return &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
}

// A failedConn is a connection that could not be made.
type failedConn struct{ err error }

func (c failedConn) Read([]byte) (int, error)       { return 0, c.err }
func (c failedConn) Write([]byte) (int, error)      { return 0, c.err }
func (failedConn) Close() error                     { return nil }
func (failedConn) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (failedConn) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (failedConn) SetDeadline(time.Time) error      { return nil }
func (failedConn) SetReadDeadline(time.Time) error  { return nil }
func (failedConn) SetWriteDeadline(time.Time) error { return nil }

// servers are those of a registry that were dialled or heard of. They may be used
// concurrently.
type servers struct {
	named []string // by URLs

	mu   sync.Mutex
	seen map[string]time.Time // when, by address
}

// add notes that there are such servers.
func (s *servers) add(addresses ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, address := range addresses {
		if _, known := s.seen[address]; known || len(s.seen) < maxLocated {
			s.seen[address] = time.Now()
		}
	}
}

// located returns the addresses of those that no URL names, sorted.
func (s *servers) located() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var addresses []string
	for address, at := range s.seen {
		switch {
		case time.Since(at) > locatedFor:
			delete(s.seen, address)
		case !slices.Contains(s.named, address):
			addresses = append(addresses, address)
		}
	}
	slices.Sort(addresses)
	return addresses
}
