package redis

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"sync"
	"syscall"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// A Sentinel answers from memory.
	sentinelTimeout = 500 * time.Millisecond
	// How often to ask the Sentinels whether the master is still the same. Only
	// a master that is cut off from them, but not from us, needs it: any other
	// failover closes our connections.
	masterInterval = time.Second
)

// sentinels are the Sentinels of a registry, which say what server is the master. They
// may be used concurrently once they were added.
type sentinels struct {
	master    string // its name
	addresses []string
	clients   []*goredis.SentinelClient

	mu      sync.Mutex
	checked time.Time // when they were asked last
	conns   map[*masterConn]struct{}
}

// add adds a client for each Sentinel.
func (s *sentinels) add(c Config, addresses []string, dial dialer) {
	s.master, s.addresses, s.conns = c.SentinelMaster, addresses, make(map[*masterConn]struct{})
	for _, address := range addresses {
		s.clients = append(s.clients, goredis.NewSentinelClient(&goredis.Options{
			Addr: address, Dialer: neverFailing(dial),
			Username: c.SentinelUsername, Password: c.SentinelPassword,
			DialTimeout: sentinelTimeout, ReadTimeout: sentinelTimeout, DialerRetries: 1, MaxRetries: -1,
			PoolSize: 1, DisableIdentity: true, ContextTimeoutEnabled: true,
			MaintNotificationsConfig: noMaintenance(),
		}))
	}
}

func (s *sentinels) close() {
	for _, c := range s.clients {
		_ = c.Close()
	}
}

// dialer returns what dials the master of the moment. The library's own client for
// Sentinel would do so too, but its dialler's errors stop its pool (see
// connector), and it keeps two connections to a Sentinel for each client.
func (s *sentinels) dialer(dial dialer) dialer {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		address, err := s.ask(ctx)
		if err != nil {
			return nil, err
		}
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		m := &masterConn{Conn: conn, address: address, owner: s}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.checked = time.Now()
		s.conns[m] = struct{}{}
		if raw, ok := conn.(syscall.Conn); ok {
			// The pool looks through it whether an idle connection was closed.
			return struct {
				*masterConn
				syscall.Conn
			}{m, raw}, nil
		}
		return m, nil
	}
}

// ask returns the address of the master, by the first Sentinel that
// knows.
func (s *sentinels) ask(ctx context.Context) (string, error) {
	var errs []error
	for i, c := range s.clients {
		answer, err := c.GetMasterAddrByName(ctx, s.master).Result()
		switch {
		case err == nil && len(answer) == 2:
			return net.JoinHostPort(answer[0], answer[1]), nil
		case err == nil, errors.Is(err, goredis.Nil):
			errs = append(errs, &failure{discovery.ErrNotFound, fmt.Sprintf("the Sentinel at %s knows no master %q", s.addresses[i], s.master)})
		case ctx.Err() != nil:
			return "", ctx.Err()
		default:
			err = explain(err)
			kind := discovery.ErrUnreachable
			if errors.Is(err, discovery.ErrCredentials) {
				kind = discovery.ErrCredentials
			}
			errs = append(errs, &failure{kind, fmt.Sprintf("the Sentinel at %s: %v", s.addresses[i], err)})
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

// followMaster closes the connections to a server that is the master no more, but not
// more often than once an interval. What Sentinels cannot say is no reason to leave a
// master that answers.
func (s *sentinels) followMaster(ctx context.Context) {
	s.mu.Lock()
	due := len(s.clients) > 0 && time.Since(s.checked) >= masterInterval
	if due {
		s.checked = time.Now()
	}
	s.mu.Unlock()
	if !due {
		return
	}
	address, err := s.ask(ctx)
	if err != nil {
		return
	}
	s.mu.Lock()
	conns := maps.Clone(s.conns)
	s.mu.Unlock()
	for c := range conns {
		if c.address != address {
			_ = c.Close()
		}
	}
}

// askServers returns the replicas of the master and the other Sentinels, by the first
// Sentinel that answers.
func (s *sentinels) askServers(ctx context.Context) (addresses []string) {
	for _, c := range s.clients {
		replicas, err := c.Replicas(ctx, s.master).Result()
		if err != nil {
			continue
		}
		others, _ := c.Sentinels(ctx, s.master).Result()
		for _, server := range append(replicas, others...) {
			if server["ip"] != "" && server["port"] != "" {
				addresses = append(addresses, net.JoinHostPort(server["ip"], server["port"]))
			}
		}
		break
	}
	return addresses
}

// A masterConn is a connection to what was the master when it was dialled.
type masterConn struct {
	net.Conn
	address string
	owner   *sentinels
}

// Close closes the connection, which needs to be closed on a failover no more.
func (c *masterConn) Close() error {
	c.owner.mu.Lock()
	delete(c.owner.conns, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}
