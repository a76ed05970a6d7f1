package caddydiscovery

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// The events that a source emits through Caddy's events app. Those about a node
// carry registry, id, endpoint, address, service, state, reason and time, and
// metadata.<key> for each pair; those about a registry carry registry, reason, time
// and nodes. What the first listing shows has not just happened, and is no event.
const (
	eventNodeJoined           = "node_joined"
	eventNodeLeft             = "node_left" // whether it left, lapsed, or was rejected: see type
	eventNodeUpdated          = "node_updated"
	eventNodeUnhealthy        = "node_unhealthy"
	eventNodeHealthy          = "node_healthy"
	eventRegistryConnected    = "registry_connected"
	eventRegistryDisconnected = "registry_disconnected"
)

// eventOf returns the name of the event that a change is, "" if it is none.
func eventOf(c *discovery.Change) string {
	switch c.Type {
	case discovery.ChangeConnected:
		return eventRegistryConnected
	case discovery.ChangeDisconnected:
		return eventRegistryDisconnected
	}
	if c.Listed || c.Entry == nil {
		return "" // a record that never was a node
	}
	switch c.Type {
	case discovery.ChangeSeen:
		return eventNodeJoined
	case discovery.ChangeUpdated:
		return eventNodeUpdated
	case discovery.ChangeLeft, discovery.ChangeLapsed, discovery.ChangeRejected:
		return eventNodeLeft
	case discovery.ChangeEjected:
		return eventNodeUnhealthy
	case discovery.ChangeRestored:
		if c.Entry.State() != stateRestored {
			return eventNodeHealthy
		}
	}
	return ""
}

// An emitter turns what becomes of the nodes of one directory into events of one
// config, for as long as the config runs. The handlers of events are called in its
// goroutine: they may take their time, and neither requests nor the directory
// notice.
type emitter struct {
	directory *sharedDirectory
	app       *caddyevents.App
	cancel    context.CancelFunc
	done      chan struct{}
}

// emission is how far the events of a directory have been emitted. It belongs to
// the directory, so that a reload neither repeats nor loses any.
type emission struct {
	mu       sync.Mutex
	emitters []*emitter    // of the running configs; the newest one, the last, emits
	changed  chan struct{} // closed when they change; nil while nobody waits
	emitted  uint64        // the number of the last change that became an event, or need not
}

// claim makes the change with the number the emitter's to emit, unless it is not
// the newest one's, or the change was emitted before. It returns how many changes
// before it were never claimed.
func (e *emission) claim(by *emitter, number uint64) (missed uint64, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.emitters[len(e.emitters)-1] != by || number <= e.emitted {
		return 0, false
	}
	missed = number - e.emitted - 1
	e.emitted = number
	return missed, true
}

// turn returns from where the emitter goes on, and whether it is its turn; if not,
// the channel is closed when that may have changed.
func (e *emission) turn(of *emitter) (from uint64, ok bool, changed <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.emitters[len(e.emitters)-1] == of {
		return e.emitted, true, nil
	}
	if e.changed == nil {
		e.changed = make(chan struct{})
	}
	return 0, false, e.changed
}

// join makes the emitter the newest, unless its config has one.
func (e *emission) join(m *emitter) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if slices.ContainsFunc(e.emitters, func(other *emitter) bool { return other.app == m.app }) {
		return false
	}
	e.emitters = append(e.emitters, m)
	return true
}

func (e *emission) leave(m *emitter) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.emitters = slices.DeleteFunc(e.emitters, func(other *emitter) bool { return other == m })
	if e.changed != nil {
		close(e.changed)
		e.changed = nil
	}
}

// emitEvents starts to emit the events of a directory for a config; it returns nil
// if another source of the same config does that already. The emitter is ended by
// stop.
func emitEvents(ctx caddy.Context, d *sharedDirectory, log *zap.Logger) (*emitter, error) {
	app, err := ctx.App("events")
	if err != nil {
		return nil, fmt.Errorf("getting the events app: %w", err)
	}
	m := &emitter{directory: d, app: app.(*caddyevents.App), done: make(chan struct{})}
	if !d.emission.join(m) {
		return nil, nil
	}
	ctx.Context, m.cancel = context.WithCancel(ctx.Context)
	go m.run(ctx, log)
	return m, nil
}

// stop ends the emitter, and returns when the last handler has.
func (m *emitter) stop() {
	m.cancel()
	<-m.done
	m.directory.emission.leave(m)
}

func (m *emitter) run(ctx caddy.Context, log *zap.Logger) {
	defer close(m.done)
	e := &m.directory.emission
	for {
		from, ours, wake := e.turn(m)
		if ours {
			var changes []discovery.Change
			changes, wake = m.directory.Journal().Since(from)
			for i := range changes {
				if ctx.Err() != nil {
					return
				}
				missed, ok := e.claim(m, changes[i].Number)
				if !ok {
					break // a newer config goes on
				}
				if missed > 0 {
					log.Warn("the handlers of events are too slow; some events were not emitted", zap.Uint64("changes", missed))
				}
				if name := eventOf(&changes[i]); name != "" && m.app.ShouldEmit(name) {
					m.app.Emit(ctx, name, m.data(&changes[i]))
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-wake:
		}
	}
}

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
