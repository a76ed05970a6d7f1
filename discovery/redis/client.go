package redis

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// How often to ask which servers there are beside those that were dialled.
const locateInterval = 10 * time.Second

// A client calls the servers of a registry. All its methods but close may be called
// concurrently.
type client struct {
	config    Config // resolved
	connector *connector
	commands  goredis.UniversalClient // for everything but what blocks

	closing chan struct{} // closed by close

	mu      sync.Mutex // guards closed, and that nothing is added to running then
	closed  bool
	running sync.WaitGroup // calls of the client library that may outlive their caller
}

func newClient(c Config) *client {
	d := newConnector(c)
	return &client{config: c, connector: d, commands: d.commands(), closing: make(chan struct{})}
}

// close ends the calls that are under way and closes the connections.
func (c *client) close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	close(c.closing)
	c.mu.Unlock()
	err := c.commands.Close()
	c.connector.sentinels.close()
	c.running.Wait()
	return err
}

var errClosed = &failure{discovery.ErrUnreachable, "the registry was closed here"}

// do calls the client library, and returns as soon as the context ends, which
// the library does not: it goes by the context's deadline only, and would keep a
// caller for as long as the server may take to answer. That something is not there is
// no error.
func (c *client) do(ctx context.Context, call func(context.Context) error) error {
	if err := ctx.Err(); err != nil {
		return explain(err)
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return errClosed
	}
	c.running.Add(1)
	c.mu.Unlock()
	done := make(chan error, 1)
	go func() {
		defer c.running.Done()
		c.connector.sentinels.followMaster(ctx)
		err := call(ctx)
		if errors.Is(err, goredis.Nil) {
			err = nil
		}
		done <- err
	}()
	select {
	case err := <-done:
		if deadline, ok := ctx.Deadline(); ok && isTimeout(err) && time.Until(deadline) < 10*time.Millisecond {
			// The socket's deadline is the context's, but it goes by a clock
			// that the library reads now and then only.
			err = context.DeadlineExceeded
		}
		return explain(err)
	case <-ctx.Done():
		return explain(ctx.Err())
	case <-c.closing:
		return errClosed
	}
}

// ask is do for a call that answers something. With an error the answer is zero: a
// call may outlive its caller.
func ask[T any](ctx context.Context, c *client, call func(context.Context) (T, error)) (answer T, err error) {
	answers := make(chan T, 1)
	err = c.do(ctx, func(ctx context.Context) error {
		a, err := call(ctx)
		answers <- a
		return err
	})
	if err == nil {
		answer = <-answers
	}
	return answer, err
}

// mark returns the epoch of the data, after having proposed one if there is
// none: only what somebody wrote can be seen to be gone. It returns "" where the
// server does not let it.
func (c *client) mark(ctx context.Context) (epoch, error) {
	meta := c.config.side("meta")
	mark, err := ask(ctx, c, func(ctx context.Context) (string, error) {
		if err := c.commands.HSetNX(ctx, meta, "epoch", rand.Text()).Err(); err != nil {
			return "", err
		}
		return c.commands.HGet(ctx, meta, "epoch").Result()
	})
	if is[*failure](err) && !errors.Is(err, discovery.ErrUnreachable) {
		return "", nil
	}
	return epoch(mark), err
}

// An epoch is the mark of the data that a watch follows, "" while there is none.
type epoch string

// follow compares the epoch with the one that a look has found. Another one is an
// error that wraps [discovery.ErrBroken].
func (e *epoch) follow(found epoch) error {
	if *e != "" && *e != found {
		return fmt.Errorf("%w: the registry was emptied or replaced", discovery.ErrBroken)
	}
	*e = found // somebody left the mark that we may not leave
	return nil
}

// pause waits, and reports false if the context ends first.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// offered tells a server that does not offer something from one that is ill: a
// watch must not do without for ever because of a moment.
func offered(err error) (bool, error) {
	if errors.Is(err, discovery.ErrPermission) || errors.Is(err, discovery.ErrUnsupported) {
		return false, nil
	}
	return err == nil, err
}

// owner returns a client of its own of the server that has a key, for what blocks.
func (c *client) owner(ctx context.Context, key string) (*goredis.Client, error) {
	cluster, ok := c.commands.(*goredis.ClusterClient)
	if !ok {
		return c.connector.server(c.connector.addresses[0]), nil
	}
	master, err := ask(ctx, c, func(ctx context.Context) (*goredis.Client, error) { return cluster.MasterForKey(ctx, key) })
	if err != nil {
		return nil, err
	}
	return c.connector.server(master.Options().Addr), nil
}

// masters returns the addresses of a cluster's masters, sorted, and nil where
// there is no cluster.
func (c *client) masters(ctx context.Context) ([]string, error) {
	if c.config.Mode != ModeCluster {
		return nil, nil
	}
	return ask(ctx, c, func(ctx context.Context) (addresses []string, err error) {
		var mu sync.Mutex
		err = c.eachMaster(ctx, func(_ context.Context, master *goredis.Client) error {
			mu.Lock()
			defer mu.Unlock()
			addresses = append(addresses, master.Options().Addr)
			return nil
		})
		slices.Sort(addresses)
		return addresses, err
	})
}

// eachMaster calls f with every master, concurrently. It is for use within do.
func (c *client) eachMaster(ctx context.Context, f func(context.Context, *goredis.Client) error) error {
	if cluster, ok := c.commands.(*goredis.ClusterClient); ok {
		return cluster.ForEachMaster(ctx, f)
	}
	return f(ctx, c.commands.(*goredis.Client))
}

// locate learns of servers until the watch ends. What goes wrong there is left alone:
// not every user may ask, and what is dialled is known anyway.
func (c *client) locate(ctx context.Context) {
	servers := &c.connector.servers
	for again := true; again; again = pause(ctx, locateInterval) {
		_ = c.do(ctx, func(ctx context.Context) error {
			if cluster, ok := c.commands.(*goredis.ClusterClient); ok {
				return cluster.ForEachShard(ctx, func(_ context.Context, shard *goredis.Client) error {
					servers.add(shard.Options().Addr)
					return nil
				})
			}
			servers.add(c.connector.sentinels.askServers(ctx)...)
			return nil
		})
	}
}
