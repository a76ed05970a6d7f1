package caddydiscovery

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// An announcement keeps one node listed in one registry, across the configs that want
// it. One goroutine, run, follows what the newest of them says.
type announcement struct {
	key      announcementKey
	kind     string // of registry
	registry *sharedRegistry
	cancel   context.CancelFunc
	done     chan struct{}
	stands   atomic.Bool // the registry has taken the record

	changed chan struct{} // look at what is wanted; has room for one
	renewal chan struct{} // announce the node as it is, at once; has room for one
}

func newAnnouncement(key announcementKey, n *ProxyNode, registry *sharedRegistry) *announcement {
	return &announcement{
		key: key, kind: n.backend.CaddyModule().ID.Name(), registry: registry,
		done: make(chan struct{}), changed: make(chan struct{}, 1), renewal: make(chan struct{}, 1),
	}
}

// notify makes it look at what is wanted.
func (a *announcement) notify() { signal(a.changed) }

// renew makes it announce the node as it is, at once.
func (a *announcement) renew() { signal(a.renewal) }

func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// withdraw takes the node out of service, and returns when that is done. It may be
// called more than once.
func (a *announcement) withdraw() {
	a.cancel()
	<-a.done
}

// run announces the node as wanted says, which may return nil, from the first notify
// until ctx ends. It writes to the registry through to.
func (a *announcement) run(ctx context.Context, wanted func() *ProxyNode, to discovery.Registry) {
	defer close(a.done)
	defer a.registry.release() //nolint:errcheck // the node has left, and nobody waits for more
	stats := acquireStats(to.String(), nil)
	defer stats.release(nil)
	r := nodeRegistrar{
		registry: to,
		log:      processLogger("registrar").With("registry", to.String()),
		count:    func(err error) { stats.heartbeats.count(err == nil) },
	}
	defer r.wait()
	look := time.NewTimer(0) // for the endpoint
	look.Stop()
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.renewal:
			r.renew()
			continue
		case <-a.changed:
		case <-look.C:
		}
		if again := r.follow(ctx, wanted()); again > 0 {
			look.Reset(again)
		}
	}
}

// A nodeRegistrar runs the registrar of one node, and changes it with the config and
// the machine's address. It belongs to one goroutine.
type nodeRegistrar struct {
	registry discovery.Registry
	log      *slog.Logger
	count    func(error) // is told how each heartbeat went

	config     *ProxyNode // as which the node is announced; nil before it is
	node       discovery.Node
	options    discovery.RegistrarOptions
	registrar  *discovery.Registrar
	running    sync.WaitGroup
	unresolved string // why there is no endpoint, as it was told last
}

// resolveRetry is how long to wait before an endpoint is looked for again, up to
// twice as long.
const resolveRetry = 500 * time.Millisecond

// follow announces the node as n says, if that is not how it is announced, and returns
// when to look for its endpoint again, 0 for never.
func (r *nodeRegistrar) follow(ctx context.Context, n *ProxyNode) time.Duration {
	if n == nil || n.announcesAs(r.config) && !n.follows() {
		return 0
	}
	endpoint, err := n.resolve(ctx)
	if ctx.Err() != nil {
		return 0
	}
	if err != nil {
		// At the start of a machine the network may come up after us, and later
		// it may be away for a while.
		if err.Error() != r.unresolved {
			r.log.Warn("cannot find the endpoint; retrying", "node", n.NodeID, "error", err)
		}
		r.unresolved = err.Error()
		return resolveRetry + rand.N(resolveRetry)
	}
	r.unresolved = ""
	switch {
	case !n.announcesAs(r.config):
		r.announce(ctx, n, endpoint)
	case endpoint != r.node.Endpoint:
		r.log.Info("the endpoint has changed", "node", n.NodeID,
			"before", r.node.Endpoint.String(), "endpoint", endpoint.String())
		r.announce(ctx, n, endpoint)
	}
	if n.follows() {
		return time.Duration(n.Heartbeat) // the machine may have another address by then
	}
	return 0
}

// announce puts the node in place of what is announced.
func (r *nodeRegistrar) announce(ctx context.Context, n *ProxyNode, endpoint discovery.Endpoint) {
	r.config, r.node, r.options = n, n.node(endpoint), n.options()
	r.options.Logger = r.log
	r.options.OnHeartbeat = r.count
	var err error
	if r.registrar != nil {
		err = r.registrar.Update(r.node, r.options)
	} else if r.registrar, err = discovery.NewRegistrar(r.registry, r.node, r.options); err == nil {
		instances.Store(r.registrar.Instance(), struct{}{})
		r.running.Go(func() {
			if err := r.registrar.Run(ctx); err != nil {
				r.log.Warn("cannot leave", "error", err)
			}
		})
	}
	if err != nil {
		r.log.Error("cannot announce", "node", n.NodeID, "error", err)
	}
}

// renew announces the node once more, if it is announced.
func (r *nodeRegistrar) renew() {
	if r.registrar != nil {
		_ = r.registrar.Update(r.node, r.options) // they were good before
	}
}

// wait returns when the registrar has ended, with the context that it runs under.
func (r *nodeRegistrar) wait() {
	r.running.Wait()
	if r.registrar != nil {
		instances.Delete(r.registrar.Instance())
	}
}

// instances are the tokens of this process's own records.
var instances sync.Map

// announcedHere reports whether a record with the token was written by this
// process.
func announcedHere(instance string) bool {
	_, ok := instances.Load(instance)
	return ok
}
