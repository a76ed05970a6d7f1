package discovery_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A board is a registry in memory: the least that a backend has to do. It keeps the
// records, and what happened to them since it was made.
type board struct {
	mu      sync.Mutex
	records map[string]discovery.Node
	events  []discovery.Event
	grown   chan struct{} // closed when there are more events
}

func newBoard() *board {
	return &board{records: make(map[string]discovery.Node), grown: make(chan struct{})}
}

func (*board) String() string { return "board" }

func (*board) Close() error { return nil }

// Watch emits what is listed, then Synced, then what happens, until ctx ends.
func (b *board) Watch(ctx context.Context, emit func(discovery.Event)) error {
	b.mu.Lock()
	listed, next := maps.Clone(b.records), len(b.events)
	b.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(listed)) {
		emit(discovery.Event{Type: discovery.Put, ID: id, Node: listed[id]})
	}
	emit(discovery.Event{Type: discovery.Synced})
	for {
		b.mu.Lock()
		news, grown := b.events[next:], b.grown
		b.mu.Unlock()
		for _, e := range news {
			emit(e)
		}
		next += len(news)
		if len(news) > 0 {
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-grown:
		}
	}
}

// Announce writes the record, whoever wrote the one before.
func (b *board) Announce(_ context.Context, n discovery.Node) error {
	data, err := discovery.AppendRecord(nil, n, time.Now())
	if err != nil {
		return err
	}
	if n, err = discovery.ParseNode(data); err != nil { // what the wire would give
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.put(n)
	return nil
}

// Drain writes the record, and Withdraw removes it, if the one that stands is the
// caller's own. To compare and to write is one step.
func (b *board) Drain(_ context.Context, n discovery.Node) (own bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if own = b.owns(n); own {
		b.put(n)
	}
	return own, nil
}

func (b *board) Withdraw(_ context.Context, n discovery.Node) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.owns(n) {
		delete(b.records, n.ID)
		b.happened(discovery.Event{Type: discovery.Left, ID: n.ID, Instance: n.Instance()})
	}
	return nil
}

func (b *board) owns(n discovery.Node) bool {
	stands, ok := b.records[n.ID]
	return ok && stands.Instance() == n.Instance()
}

func (b *board) put(n discovery.Node) {
	b.records[n.ID] = n
	b.happened(discovery.Event{Type: discovery.Put, ID: n.ID, Node: n})
}

func (b *board) happened(e discovery.Event) {
	b.events = append(b.events, e)
	close(b.grown)
	b.grown = make(chan struct{})
}

// A backend translates, and leaves the rest to a Directory and a Registrar. One for a
// registry of your own is done when it passes the suite in package discoverytest.
func Example_backend() {
	registry := newBoard()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var running sync.WaitGroup
	directory := discovery.NewDirectory(registry, discovery.Options{})
	running.Go(func() { _ = directory.Run(ctx) })
	<-directory.Synced()

	endpoint, _ := discovery.ParseEndpoint("10.0.0.7:5001")
	registrar, err := discovery.NewRegistrar(registry, discovery.Node{ID: "a", Endpoint: endpoint}, discovery.RegistrarOptions{Drain: new(10 * time.Millisecond)})
	if err != nil {
		fmt.Println(err)
		return
	}
	service, leave := context.WithCancel(ctx)
	defer leave()
	running.Go(func() { fmt.Println("the registrar ended:", registrar.Run(service)) })

	listed := false
	for s := directory.Snapshot(); ; s = directory.Snapshot() {
		e := s.Node("a")
		if e != nil && !listed {
			fmt.Println("listed:", e.Node.ID, e.Address())
			leave()
		}
		if listed = listed || e != nil; listed && e == nil {
			break
		}
		<-s.Superseded()
	}
	stop()
	running.Wait()
	// Output:
	// listed: a 10.0.0.7:5001
	// the registrar ended: <nil>
}
