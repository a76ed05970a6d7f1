package redis

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/tlsfiles"
	goredis "github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

const (
	dialTimeout = 2 * time.Second
	// A list of 100,000 nodes is 30 MB; within this it arrives over a slow line.
	readTimeout = 3 * time.Second
	// A Sentinel answers from memory.
	sentinelTimeout = 500 * time.Millisecond
	// How often to ask the Sentinels whether the master is still the same. Only
	// a master that is cut off from them, but not from us, needs it: any other
	// failover closes our connections.
	masterInterval = time.Second
)

// files are those that secure the connections.
func (c Config) files() tlsfiles.Files {
	return tlsfiles.Files{CA: c.TLSCA, Cert: c.TLSCert, Key: c.TLSKey, ServerName: c.TLSServerName}
}

// checkFiles reports what is wrong with the files that a connection would need.
func (c Config) checkFiles() error {
	if !c.secure() && !c.sentinelsSecure() {
		return nil
	}
	if _, err := c.files().Config(""); err != nil {
		return fmt.Errorf("redis registry: %w", err)
	}
	return nil
}

// connector makes connections. Its dial functions never fail: they return a
// connection that does. A pool of the client library that failed to dial as
// often as it has places stops dialling for a second or more, logs a line for
// each try to a logger of its own, and leaves a goroutine behind when it is
// closed (internal/pool/pool.go, tryDial); and all of that comes from the
// dialler's error.
type connector struct {
	config    Config
	addresses []string

	sentinels []*goredis.SentinelClient // of mode sentinel

	mu      sync.Mutex
	located map[string]time.Time // when a server was dialled or named last
	master  string               // where the last dial went; mode sentinel
	checked time.Time            // when the Sentinels were asked last
	conns   map[*masterConn]struct{}
}

func newConnector(c Config) (*connector, error) {
	if err := c.checkFiles(); err != nil {
		return nil, err
	}
	d := &connector{config: c, addresses: c.Addresses(),
		located: make(map[string]time.Time), conns: make(map[*masterConn]struct{})}
	if c.Mode == ModeSentinel {
		for _, address := range d.addresses {
			d.sentinels = append(d.sentinels, goredis.NewSentinelClient(&goredis.Options{
				Addr: address, Dialer: d.dialSentinel,
				Username: c.SentinelUsername, Password: c.SentinelPassword,
				DialTimeout: sentinelTimeout, ReadTimeout: sentinelTimeout, DialerRetries: 1, MaxRetries: -1,
				PoolSize: 1, DisableIdentity: true, ContextTimeoutEnabled: true,
				MaintNotificationsConfig: noMaintenance(),
			}))
		}
	}
	return d, nil
}

func (d *connector) close() {
	for _, s := range d.sentinels {
		_ = s.Close()
	}
}

// options are those of every connection to a server. The pool has one place: a
// registry uses one connection for its commands.
func (d *connector) options(address string) *goredis.Options {
	o := &goredis.Options{
		Addr: address, Dialer: d.dial, Protocol: d.config.Protocol,
		Username: d.config.Username, Password: d.config.Password, DB: d.config.DB, ClientName: d.config.Name,
		// Retrying is the Directory's and the Registrar's.
		MaxRetries: -1, DialerRetries: 1,
		DialTimeout: dialTimeout, ReadTimeout: readTimeout, PoolTimeout: readTimeout,
		PoolSize: 1, PipelinePoolSize: -1,
		ContextTimeoutEnabled: true, DisableIdentity: true,
		MaintNotificationsConfig: noMaintenance(),
	}
	if d.config.Mode == ModeSentinel {
		o.Dialer = d.dialMaster
	}
	return o
}

// commands returns the client for everything but what blocks.
func (d *connector) commands() goredis.UniversalClient {
	if d.config.Mode != ModeCluster {
		return goredis.NewClient(d.options(d.addresses[0]))
	}
	o := d.options("")
	return goredis.NewClusterClient(&goredis.ClusterOptions{
		Addrs: d.addresses, Dialer: o.Dialer, Protocol: o.Protocol,
		Username: o.Username, Password: o.Password, ClientName: o.ClientName,
		MaxRetries: -1, DialerRetries: 1,
		DialTimeout: o.DialTimeout, ReadTimeout: o.ReadTimeout, PoolTimeout: o.PoolTimeout,
		PoolSize: 1, PipelinePoolSize: -1,
		ContextTimeoutEnabled: true, DisableIdentity: true,
		MaintNotificationsConfig: noMaintenance(),
		// With the default of a minute a client stayed with a dead master for 55 s.
		ClusterStateReloadInterval: time.Second,
	})
}

// connect opens a connection, with TLS or without.
func (d *connector) connect(ctx context.Context, network, address string, secured bool) (net.Conn, error) {
	d.locate(address)
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

// tlsConn is a connection that can say why the server closed it. One that refuses
// the client's certificate says so after the handshake, and a write that comes
// later learns only that the connection is gone.
type tlsConn struct{ *tls.Conn }

func (c tlsConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err != nil {
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		var said *net.OpError
		if _, e := c.Read(make([]byte, 1)); errors.As(e, &said) && said.Op == "remote error" {
			err = e
		}
	}
	return n, err
}

func (d *connector) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := d.connect(ctx, network, address, d.config.secure())
	if err != nil {
		return failed(err), nil
	}
	return conn, nil
}

func (d *connector) dialSentinel(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := d.connect(ctx, network, address, d.config.sentinelsSecure())
	if err != nil {
		return failed(err), nil
	}
	return conn, nil
}

// dialMaster dials the master of the moment. The library's own client for
// Sentinel would do so too, but its dialler's errors stop its pool (see
// connector), and it keeps two connections to a Sentinel for each client.
func (d *connector) dialMaster(ctx context.Context, network, _ string) (net.Conn, error) {
	address, err := d.askMaster(ctx)
	if err != nil {
		return failed(err), nil
	}
	conn, err := d.connect(ctx, network, address, d.config.secure())
	if err != nil {
		return failed(err), nil
	}
	m := &masterConn{Conn: conn, address: address, owner: d}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.master, d.checked = address, time.Now()
	d.conns[m] = struct{}{}
	if raw, ok := conn.(syscall.Conn); ok {
		// The pool looks through it whether an idle connection was closed.
		return struct {
			*masterConn
			syscall.Conn
		}{m, raw}, nil
	}
	return m, nil
}

// askMaster returns the address of the master, by the first Sentinel that
// knows.
func (d *connector) askMaster(ctx context.Context) (string, error) {
	var errs []error
	for i, s := range d.sentinels {
		answer, err := s.GetMasterAddrByName(ctx, d.config.SentinelMaster).Result()
		switch {
		case err == nil && len(answer) == 2:
			return net.JoinHostPort(answer[0], answer[1]), nil
		case err == nil, errors.Is(err, goredis.Nil):
			errs = append(errs, &failure{discovery.ErrNotFound, fmt.Sprintf("the Sentinel at %s knows no master %q", d.addresses[i], d.config.SentinelMaster)})
		case ctx.Err() != nil:
			return "", ctx.Err()
		default:
			err = explain(err)
			kind := discovery.ErrUnreachable
			if errors.Is(err, discovery.ErrCredentials) {
				kind = discovery.ErrCredentials
			}
			errs = append(errs, &failure{kind, fmt.Sprintf("the Sentinel at %s: %v", d.addresses[i], err)})
		}
	}
	// What a Sentinel said is more telling than that another is away.
	for _, err := range errs {
		if !errors.Is(err, discovery.ErrUnreachable) {
			return "", err
		}
	}
	return "", errs[0]
}

// followMaster closes the connections to a server that is the master no more.
// It does nothing but in mode sentinel, and there not more often than once an
// interval. What Sentinels cannot say is no reason to leave a master that
// answers.
func (d *connector) followMaster(ctx context.Context) {
	if len(d.sentinels) == 0 {
		return
	}
	d.mu.Lock()
	due := time.Since(d.checked) >= masterInterval
	if due {
		d.checked = time.Now()
	}
	d.mu.Unlock()
	if !due {
		return
	}
	address, err := d.askMaster(ctx)
	if err != nil {
		return
	}
	var old []*masterConn
	d.mu.Lock()
	for c := range d.conns {
		if c.address != address {
			old = append(old, c)
		}
	}
	d.mu.Unlock()
	for _, c := range old {
		_ = c.Close()
	}
}

// masterConn is a connection to what was the master when it was dialled.
type masterConn struct {
	net.Conn
	address string
	owner   *connector
}

func (c *masterConn) Close() error {
	c.owner.mu.Lock()
	delete(c.owner.conns, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}

// noMaintenance turns off a handshake that Redis itself does not know.
func noMaintenance() *maintnotifications.Config {
	return &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
}

// failedConn is a connection that could not be made.
type failedConn struct{ err error }

// failed wraps the reason once more: the client library unwraps the error of a
// handshake (redis.go, initConn), which would leave of a net.OpError only what
// the system said.
func failed(err error) failedConn { return failedConn{fmt.Errorf("%w", err)} }

func (c failedConn) Read([]byte) (int, error)       { return 0, c.err }
func (c failedConn) Write([]byte) (int, error)      { return 0, c.err }
func (failedConn) Close() error                     { return nil }
func (failedConn) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (failedConn) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (failedConn) SetDeadline(time.Time) error      { return nil }
func (failedConn) SetReadDeadline(time.Time) error  { return nil }
func (failedConn) SetWriteDeadline(time.Time) error { return nil }

// ownerOptions are the options of a connection to the server that has a key.
func (r *Registry) ownerOptions(ctx context.Context, key string) (*goredis.Options, error) {
	cluster, ok := r.commands.(*goredis.ClusterClient)
	if !ok {
		return r.connector.options(r.connector.addresses[0]), nil
	}
	var address string
	err := r.do(ctx, func(ctx context.Context) error {
		master, err := cluster.MasterForKey(ctx, key)
		if err == nil {
			address = master.Options().Addr
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return r.connector.options(address), nil
}

// masters returns the addresses of a cluster's masters, sorted, and nil where
// there is no cluster.
func (r *Registry) masters(ctx context.Context) ([]string, error) {
	cluster, ok := r.commands.(*goredis.ClusterClient)
	if !ok {
		return nil, nil
	}
	var (
		mu        sync.Mutex
		addresses []string
	)
	err := r.do(ctx, func(ctx context.Context) error {
		return cluster.ForEachMaster(ctx, func(_ context.Context, client *goredis.Client) error {
			mu.Lock()
			defer mu.Unlock()
			addresses = append(addresses, client.Options().Addr)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(addresses)
	return addresses, nil
}

// eachMaster calls f with every master, concurrently. It is for use within do.
func (r *Registry) eachMaster(ctx context.Context, f func(context.Context, *goredis.Client) error) error {
	if cluster, ok := r.commands.(*goredis.ClusterClient); ok {
		return cluster.ForEachMaster(ctx, f)
	}
	return f(ctx, r.commands.(*goredis.Client))
}
