package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A member is a process of a fleet: a service, and the registrar that lists it.
type member struct {
	id        string
	service   *service // its id, with which it answers, names the process
	line      *line
	registrar *discovery.Registrar
	beats     atomic.Int64 // heartbeats that the registry took
	leave     context.CancelFunc
	ended     chan struct{} // closed when the registrar is done
	state     discovery.State
}

// enlist starts the registrar of a service that is up.
func enlist(t *testing.T, a discovery.Announcer, id, kind string, s *service, lease time.Duration) *member {
	t.Helper()
	m := &member{id: id, service: s, line: &line{announcer: a}, ended: make(chan struct{}), state: discovery.StateUp}
	var err error
	if m.registrar, err = discovery.NewRegistrar(m.line, m.node(t, kind), m.options(lease)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	m.leave = cancel
	go func() {
		defer close(m.ended)
		_ = m.registrar.Run(ctx) // a record that could not be removed lapses
	}()
	t.Cleanup(func() {
		m.line.mute.Store(true)
		m.leave()
		<-m.ended
	})
	return m
}

func (m *member) node(t *testing.T, kind string) discovery.Node {
	t.Helper()
	endpoint, err := discovery.ParseEndpoint("http://" + m.service.address)
	if err != nil {
		t.Fatal(err)
	}
	return discovery.Node{ID: m.id, Endpoint: endpoint, Metadata: map[string]string{
		discovery.KeyService: kind, discovery.KeyState: string(m.state),
	}}
}

func (m *member) options(lease time.Duration) discovery.RegistrarOptions {
	return discovery.RegistrarOptions{
		Heartbeat: lease / 3, TTL: lease, Drain: new(lease / 6),
		Load: rand.Float64,
		OnHeartbeat: func(err error) {
			if err == nil {
				m.beats.Add(1)
			}
		},
	}
}

// crash ends the process without a word: connections break, nothing is said.
func (m *member) crash() {
	m.line.mute.Store(true)
	m.leave()
	m.service.close()
}

// A line is a member's way to its registry.
type line struct {
	announcer discovery.Announcer
	mute      atomic.Bool  // nothing is said any more
	busy      atomic.Int32 // calls under way
}

var errMute = errors.New("the line is mute")

func (l *line) call(f func() error) error {
	l.busy.Add(1)
	defer l.busy.Add(-1)
	if l.mute.Load() {
		return errMute
	}
	return f()
}

func (l *line) Announce(ctx context.Context, n discovery.Node) error {
	return l.call(func() error { return l.announcer.Announce(ctx, n) })
}

func (l *line) Withdraw(ctx context.Context, n discovery.Node) error {
	return l.call(func() error { return l.announcer.Withdraw(ctx, n) })
}

func (l *line) Drain(ctx context.Context, n discovery.Node) (own bool, err error) {
	err = l.call(func() error {
		own, err = l.announcer.Drain(ctx, n)
		return err
	})
	return own, err
}

// A wildWriter announces as the fleets in the wild do, who know nothing of
// instances.
type wildWriter struct{ faultyRegistry }

func (w wildWriter) Announce(_ context.Context, n discovery.Node) error {
	var metadata []string
	for _, key := range slices.Sorted(maps.Keys(n.Metadata)) {
		if key != discovery.KeyInstance {
			metadata = append(metadata, fmt.Sprintf("%q:%q", key, n.Metadata[key]))
		}
	}
	record := camel(n.ID, n.Endpoint.String(), strings.Join(metadata, ","))
	return w.put(n.ID, strings.Replace(record, `"load":0.35`, fmt.Sprintf(`"load":%.3f`, n.Load), 1))
}

// Drain covers whatever stands there, as those fleets do.
func (w wildWriter) Drain(ctx context.Context, n discovery.Node) (own bool, err error) {
	err = w.Announce(ctx, n)
	return err == nil, err
}

func (w wildWriter) Withdraw(_ context.Context, n discovery.Node) error { return w.remove(n.ID) }

// standing is what a record says about where a node is and whether it serves.
func standing(n discovery.Node) string { return n.Endpoint.String() + " " + string(n.State()) }

// live returns how the nodes stand that were heard within a lease, by the
// registry's own clock.
func (r *faultyKV) live(lease time.Duration) (map[string]string, error) {
	nodes := make(map[string]string)
	err := r.do(func(ctx context.Context, kv jetstream.KeyValue) error {
		w, err := kv.WatchAll(ctx, jetstream.IgnoreDeletes())
		if err != nil {
			return err
		}
		defer func() { _ = w.Stop() }()
		for {
			e, ok := <-w.Updates()
			switch {
			case !ok:
				return errors.New("the listing broke off")
			case e == nil:
				return nil
			case time.Since(e.Created()) < lease:
				n, err := discovery.ParseNode(e.Value())
				if err != nil {
					return err
				}
				nodes[n.ID] = standing(n)
			}
		}
	})
	return nodes, err
}

func (r *faultyRedis) live(lease time.Duration) (map[string]string, error) {
	ctx, cancel := shortContext()
	defer cancel()
	nodes := make(map[string]string)
	if r.layout == "keys" {
		keys, err := r.client.Keys(ctx, setKey+":*").Result()
		for _, key := range keys {
			record, err := r.client.Get(ctx, key).Result()
			if errors.Is(err, goredis.Nil) {
				continue
			}
			if err != nil {
				return nil, err
			}
			n, err := discovery.ParseNode([]byte(record))
			if err != nil {
				return nil, err
			}
			nodes[n.ID] = standing(n)
		}
		return nodes, err
	}
	now, err := r.client.Time(ctx).Result()
	if err != nil {
		return nil, err
	}
	// Of two members of one node the later one counts.
	members, err := r.client.ZRangeArgs(ctx, goredis.ZRangeArgs{
		Key: setKey, ByScore: true, Start: now.Add(-lease).UnixMilli(), Stop: "+inf",
	}).Result()
	for _, member := range members {
		n, err := discovery.ParseNode([]byte(member))
		if err != nil {
			return nil, err
		}
		nodes[n.ID] = standing(n)
	}
	return nodes, err
}

// view returns how the nodes stand that Caddy knows.
func (rig *testRig) view() map[string]string {
	rig.t.Helper()
	var known []struct{ ID, Endpoint, State string }
	if err := json.Unmarshal(rig.ask("/discovery/nodes"), &known); err != nil {
		rig.t.Fatal(err)
	}
	nodes := make(map[string]string, len(known))
	for _, n := range known {
		nodes[n.ID] = n.Endpoint + " " + n.State
	}
	return nodes
}
