package caddydiscovery

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

// eventNames are the events that a source emits through Caddy's events app, by what
// became of a node or the registry. Those about a node carry registry, type, id,
// endpoint, address, service, state, reason and time, and metadata.<key> for each
// pair; those about a registry carry registry, type, reason, time and nodes.
var eventNames = map[discovery.ChangeType]string{
	discovery.ChangeSeen:         "node_joined",
	discovery.ChangeUpdated:      "node_updated",
	discovery.ChangeLeft:         "node_left",
	discovery.ChangeLapsed:       "node_left",
	discovery.ChangeRejected:     "node_left",
	discovery.ChangeEjected:      "node_unhealthy",
	discovery.ChangeRestored:     "node_healthy",
	discovery.ChangeConnected:    "registry_connected",
	discovery.ChangeDisconnected: "registry_disconnected",
}

// eventOf returns the name of the event that a change is, "" if it is none: what the
// first listing or the saved list shows has not just happened, and a rejected record
// may never have been a node.
func eventOf(c *discovery.Change) string {
	if view.AboutNode(c.Type) && (c.Listed || c.Entry == nil || c.Type == discovery.ChangeRestored && c.Entry.State() == discovery.StateRestored) {
		return ""
	}
	return eventNames[c.Type]
}

// eventCursor is how far the changes of a directory have become events. It belongs to
// the directory, so that a reload neither repeats nor loses any.
type eventCursor struct {
	mu      sync.Mutex
	owners  []any         // one of each running config; the newest, the last, emits
	changed chan struct{} // closed when an owner leaves; nil while nobody waits
	number  uint64        // of the last change that became an event, or need not
}

// join makes the owner the newest, unless it is one already.
func (c *eventCursor) join(owner any) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if slices.Contains(c.owners, owner) {
		return false
	}
	c.owners = append(c.owners, owner)
	return true
}

func (c *eventCursor) leave(owner any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.owners = slices.DeleteFunc(c.owners, func(other any) bool { return other == owner })
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// newest reports whether the owner is the one that emits. The caller has the lock.
func (c *eventCursor) newest(owner any) bool {
	return len(c.owners) > 0 && c.owners[len(c.owners)-1] == owner
}

// position returns from where the owner goes on, if it is the one that emits; if not,
// the channel is closed when that may have changed.
func (c *eventCursor) position(owner any) (number uint64, emits bool, changed <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.newest(owner) {
		return c.number, true, nil
	}
	if c.changed == nil {
		c.changed = make(chan struct{})
	}
	return 0, false, c.changed
}

// advance makes the change with the number the owner's to emit, unless another one
// emits, or the change was emitted before. It returns how many changes were passed over.
func (c *eventCursor) advance(owner any, number uint64) (missed uint64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.newest(owner) || number <= c.number {
		return 0, false
	}
	missed = number - c.number - 1
	c.number = number
	return missed, true
}

// An emitter turns what becomes of the nodes of one directory into events of one
// config, for as long as the config runs. The handlers of events are called in its
// goroutine: they may take their time, and neither requests nor the directory
// notice, nor does a reload or the exit wait for them longer than handlerGrace.
type emitter struct {
	directory *sharedDirectory
	app       *caddyevents.App // also what owns the directory's cursor
	log       *zap.Logger
	end       context.CancelFunc // no further event is emitted
	interrupt context.CancelFunc // cancels the handler that is under way
	done      chan struct{}
}

// emitEvents starts to emit the events of a directory for a config; it returns nil
// if another source of the same config does that already. The emitter is ended by
// stop.
func emitEvents(ctx caddy.Context, d *sharedDirectory, log *zap.Logger) (*emitter, error) {
	app, err := ctx.App("events")
	if err != nil {
		return nil, fmt.Errorf("getting the events app: %w", err)
	}
	m := &emitter{directory: d, app: app.(*caddyevents.App), log: log, done: make(chan struct{})}
	if !d.events.join(m.app) {
		return nil, nil
	}
	// The context of the config ends before anything of it is cleaned up. A handler
	// that it interrupted could not even finish the reload that it asked for.
	ctx.Context, m.interrupt = context.WithCancel(context.WithoutCancel(ctx.Context))
	ending, end := context.WithCancel(context.Background())
	m.end = end
	go m.run(ending, ctx)
	return m, nil
}

// stop ends the emitter without waiting for the handler that is under way: that
// one may wait for the very reload that stops it.
func (m *emitter) stop() {
	m.end()
	m.directory.events.leave(m.app)
	lateHandlers.add(m)
}

// run emits until ending is over; ctx is for the handlers.
func (m *emitter) run(ending context.Context, ctx caddy.Context) {
	defer close(m.done)
	defer m.interrupt()
	for {
		from, emits, wake := m.directory.events.position(m.app)
		if emits {
			var changes []discovery.Change
			changes, wake = m.directory.Journal().Since(from)
			for i := range changes {
				if !m.emit(ending, ctx, &changes[i]) {
					break
				}
			}
		}
		select {
		case <-ending.Done():
			return
		case <-wake:
		}
	}
}

// emit makes an event of a change that is one, and reports whether the next change is
// this emitter's, too.
func (m *emitter) emit(ending context.Context, ctx caddy.Context, c *discovery.Change) bool {
	if ending.Err() != nil {
		return false
	}
	name := eventOf(c)
	heard := name != "" && m.app.ShouldEmit(name)
	if heard && !lateHandlers.wait(ending, m.log) {
		return false
	}
	missed, ok := m.directory.events.advance(m.app, c.Number)
	if !ok {
		return false // a newer config goes on
	}
	// What a listing showed is no event, so that none is missing before one.
	if missed > 0 && !c.Listed && m.observed() {
		m.log.Warn("the handlers of events are too slow; some events were not emitted", zap.Uint64("changes", missed))
	}
	if heard {
		m.app.Emit(ctx, name, m.data(c))
	}
	return true
}

// observed reports whether a handler may miss an event.
func (m *emitter) observed() bool {
	return slices.ContainsFunc(slices.Collect(maps.Values(eventNames)), m.app.ShouldEmit)
}

const (
	// handlerGrace is how long a handler may go on that is under way when its config
	// ends or Caddy exits. It is not waited for by a reload, and by an exit no longer.
	handlerGrace = 2 * time.Second
	// interruptGrace is how long an exit waits for the handlers that it interrupted,
	// so that they can end what they started.
	interruptGrace = 250 * time.Millisecond
	// maxLateHandlers is how many handlers may be left behind before no further one
	// is called: one that ignores its context never ends.
	maxLateHandlers = 8
)

// lateHandlers are the handlers that were still under way when their config ended.
var lateHandlers = lateEmitters{late: make(map[*emitter]struct{})}

func init() { caddy.OnExit(func(context.Context) { lateHandlers.exit() }) }

// lateEmitters keeps account of emitters that were stopped while a handler ran.
type lateEmitters struct {
	mu    sync.Mutex
	late  map[*emitter]struct{}
	fewer chan struct{} // closed when one has ended; nil while nobody waits
}

// add watches over a stopped emitter until its goroutine has ended.
func (l *lateEmitters) add(m *emitter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.late[m] = struct{}{}
	go func() {
		timer := time.AfterFunc(handlerGrace, m.interrupt)
		<-m.done
		timer.Stop()
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.late, m)
		if l.fewer != nil {
			close(l.fewer)
			l.fewer = nil
		}
	}()
}

// wait returns true when a further handler may be called, and false when the
// context ends before.
func (l *lateEmitters) wait(ctx context.Context, log *zap.Logger) bool {
	for told := false; ; told = true {
		l.mu.Lock()
		if len(l.late) < maxLateHandlers {
			l.mu.Unlock()
			return true
		}
		if l.fewer == nil {
			l.fewer = make(chan struct{})
		}
		fewer := l.fewer
		l.mu.Unlock()
		if !told {
			log.Error("handlers of events that earlier configs called do not end; no further one is called until one of them does",
				zap.Int("handlers", maxLateHandlers))
		}
		select {
		case <-fewer:
		case <-ctx.Done():
			return false
		}
	}
}

// exit gives the handlers their time, in which those that take longer are
// interrupted, and leaves behind those that do not end then.
func (l *lateEmitters) exit() {
	l.mu.Lock()
	late := slices.Collect(maps.Keys(l.late))
	l.mu.Unlock()
	over := time.After(handlerGrace + interruptGrace)
	for _, m := range late {
		select {
		case <-m.done:
		case <-over:
			return
		}
	}
}

// data returns what the event of a change carries.
func (m *emitter) data(c *discovery.Change) map[string]any {
	data := map[string]any{
		"registry": m.directory.name(),
		"type":     string(c.Type),
		"reason":   c.Reason,
		"time":     c.Time.Format("2006-01-02T15:04:05.000Z07:00"),
	}
	if c.Entry == nil {
		data["nodes"] = len(m.directory.Snapshot().Nodes())
		return data
	}
	n := &c.Entry.Node
	data["id"] = n.ID
	data["endpoint"] = n.Endpoint.String()
	data["address"] = n.Endpoint.Address()
	data["service"] = n.Service()
	data["state"] = string(c.Entry.State())
	for k, v := range n.Metadata {
		data["metadata."+k] = v
	}
	return data
}
