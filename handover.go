package caddydiscovery

import (
	"context"
	"errors"
	"slices"
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
//
// A config may fail after it came into force. Then the one below it is in force
// again, and announces anew what was overwritten.
type inForce struct {
	apps []*Registrar  // that run; the last one is in force
	turn chan struct{} // closed when another one is, or a record has come to stand
}

// tell wakes those who wait for a turn. The caller holds announcements.
func (f *inForce) tell() {
	if f.turn != nil {
		close(f.turn)
	}
	f.turn = make(chan struct{})
}

// put makes an app the one in force. The caller holds announcements.
func (f *inForce) put(app *Registrar) {
	f.apps = append(f.apps, app)
	f.tell()
}

// drop takes an app out. The caller holds announcements.
func (f *inForce) drop(app *Registrar) {
	i := slices.Index(f.apps, app)
	if i < 0 {
		return
	}
	f.apps = slices.Delete(f.apps, i, i+1)
	if i > 0 && i == len(f.apps) { // the one below is in force again
		for _, b := range f.apps[i-1].held {
			if slices.ContainsFunc(app.held, func(a *announcement) bool { return a != b && a.rivals(b) }) {
				b.stands.Store(false)
				b.renew()
			}
		}
	}
	f.tell()
}

// rivals reports whether both may write the same record.
func (a *announcement) rivals(b *announcement) bool { return a.kind == b.kind && a.key.id == b.key.id }

// successors returns the announcements of the config in force that announce the id
// of a in its place, and what is closed when there may be others.
func (a *announcement) successors() (found []*announcement, turn <-chan struct{}) {
	announcements.Lock()
	defer announcements.Unlock()
	f := &announcements.inForce
	if len(f.apps) > 0 {
		for _, b := range f.apps[len(f.apps)-1].held {
			if b == a {
				return nil, f.turn
			}
			if b.rivals(a) {
				found = append(found, b)
			}
		}
	}
	return found, f.turn
}

// renew makes it announce as it does, at once.
func (a *announcement) renew() {
	select {
	case a.renewal <- struct{}{}:
	default:
	}
}

// giveWay waits until the successors are announced, for as long as the record that
// stands is good without being renewed, and leaves. A successor announces once more
// after that: whatever was under way has arrived by then.
func (a *announcement) giveWay(lease time.Duration) {
	patience := time.NewTimer(lease)
	defer patience.Stop()
	successors, turn := a.successors()
	for waiting := true; waiting && slices.ContainsFunc(successors, func(b *announcement) bool { return !b.stands.Load() }); {
		select {
		case <-turn:
			successors, turn = a.successors()
		case <-patience.C:
			waiting = false
		}
	}
	a.leave()
	for _, b := range successors {
		b.renew()
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
	if err := r.Registry.Announce(ctx, n); err != nil {
		return err
	}
	if !r.a.stands.Swap(true) {
		announcements.Lock()
		defer announcements.Unlock()
		announcements.inForce.tell()
	}
	return nil
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
		if b.stands.Load() && b.registry.conn.String() == r.String() {
			return true
		}
	}
	return false
}

// Record implements discovery.Reader.
func (r ownRecord) Record(ctx context.Context, id string) (discovery.Node, error) {
	reader, ok := discovery.As[discovery.Reader](r.Registry)
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
