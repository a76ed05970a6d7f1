package caddydiscovery

import (
	"context"
	"errors"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// inForce are the announcements of the config that runs, as far as this process
// announces anything.
//
// A reload that changes an option of a registry, such as a rotated password, makes
// another announcement of the same id, on a connection of its own, which cannot be
// told from a move to another registry: one server may have several addresses. What
// the config in force announces owns the record, therefore. The announcement before
// it does not renew its own any more, and leaves when the new one stands: in the
// same registry there is nothing left that it may touch.
type inForce struct {
	app  *Registrar // nil while none is
	held []*announcement
	turn chan struct{} // closed when another config is
}

// put makes an app the one in force. The caller holds announcements.
func (f *inForce) put(app *Registrar) {
	if f.turn != nil {
		close(f.turn)
	}
	*f = inForce{app: app, turn: make(chan struct{})}
	if app != nil {
		f.held = app.held
	}
}

// successors returns the announcements of the config in force that have come after
// a and announce the same id, and what is closed when there may be others.
func (a *announcement) successors() (found []*announcement, turn <-chan struct{}) {
	announcements.Lock()
	defer announcements.Unlock()
	for _, b := range announcements.inForce.held {
		if b == a {
			found = nil
			break
		}
		if b.kind == a.kind && b.key.id == a.key.id && b.generation > a.generation {
			found = append(found, b)
		}
	}
	return found, announcements.inForce.turn
}

// giveWay waits until the successors are announced, for as long as the record that
// stands is good without being renewed, and leaves. A successor announces once more
// after that: whatever was under way has arrived by then.
func (a *announcement) giveWay(lease time.Duration) {
	patience := time.NewTimer(lease)
	defer patience.Stop()
	successors, turn := a.successors()
	for waiting := successors; len(waiting) > 0; {
		select {
		case <-waiting[0].announced:
			waiting = waiting[1:]
		case <-turn:
			successors, turn = a.successors()
			waiting = successors
		case <-patience.C:
			waiting = nil
		}
	}
	a.leave()
	for _, b := range successors {
		select {
		case b.renewal <- struct{}{}:
		default:
		}
	}
}

// ownRecord is the registry as an announcement writes to it.
type ownRecord struct {
	discovery.Registry
	a *announcement
}

// Announce renews nothing once there is a successor.
func (r ownRecord) Announce(ctx context.Context, n discovery.Node) error {
	if successors, _ := r.a.successors(); len(successors) > 0 {
		return nil
	}
	return r.Registry.Announce(ctx, n)
}

// Drain implements discovery.Announcer.
func (r ownRecord) Drain(ctx context.Context, n discovery.Node) (bool, error) {
	if r.replaced() {
		return false, nil
	}
	return r.Registry.Drain(ctx, n)
}

// Withdraw implements discovery.Announcer.
func (r ownRecord) Withdraw(ctx context.Context, n discovery.Node) error {
	if r.replaced() {
		return nil
	}
	return r.Registry.Withdraw(ctx, n)
}

// replaced reports whether a successor's record stands in this very registry for
// sure, so that nothing has to be said, nor heard by those who know no instances.
func (r ownRecord) replaced() bool {
	successors, _ := r.a.successors()
	for _, b := range successors {
		select {
		case <-b.announced:
			if b.registry.conn.String() == r.String() {
				return true
			}
		default:
		}
	}
	return false
}

// Record implements discovery.Reader.
func (r ownRecord) Record(ctx context.Context, id string) (discovery.Node, error) {
	reader, ok := r.Registry.(discovery.Reader)
	if !ok {
		return discovery.Node{}, errors.ErrUnsupported
	}
	if successors, _ := r.a.successors(); len(successors) > 0 {
		return discovery.Node{}, nil // theirs is no record of another process
	}
	return reader.Record(ctx, id)
}

var (
	_ discovery.Announcer = ownRecord{}
	_ discovery.Reader    = ownRecord{}
)
