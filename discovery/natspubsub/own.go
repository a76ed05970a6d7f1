package natspubsub

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

// ownRecords are the records that this process announces, by the node's id: queries
// are answered with them. It may be used concurrently.
type ownRecords struct {
	// publishing is held while a record changes and while it is published, so that
	// no answer to a query follows the leave message of its node. It is a channel and
	// not a mutex, so that nobody waits longer than his context.
	publishing chan struct{}

	mu   sync.Mutex // guards what follows; no I/O happens under it
	byID map[string]*record
}

func newOwnRecords() *ownRecords {
	return &ownRecords{publishing: make(chan struct{}, 1), byID: make(map[string]*record)}
}

// lock waits until nobody else publishes a record. The error is the context's cause.
func (o *ownRecords) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case o.publishing <- struct{}{}:
		return func() { <-o.publishing }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// A record is one of our own, as it was announced last.
type record struct {
	instance string
	data     []byte
	until    time.Time      // when its lease runs out
	joined   *natslink.Link // the connection on which the node has said that it joins
}

func newRecord(n discovery.Node, now time.Time) (*record, error) {
	data, err := discovery.AppendRecord(nil, n, now)
	if err != nil {
		return nil, err
	}
	// Whoever does not renew a record no longer answers with it.
	return &record{instance: n.Instance(), data: data, until: now.Add(n.LeaseOr(discovery.DefaultTTL))}, nil
}

// none reports whether there is nothing to answer with.
func (o *ownRecords) none() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.byID) == 0
}

// put puts a record and returns the one before it, nil if there was none.
func (o *ownRecords) put(id string, announced *record) (before *record) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if before = o.byID[id]; before != nil {
		announced.joined = before.joined
	}
	o.byID[id] = announced
	return before
}

// revert puts back what was there before a record that was refused, unless that was
// dropped or announced again meanwhile.
func (o *ownRecords) revert(id string, announced, before *record) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.byID[id] != announced:
	case before != nil:
		o.byID[id] = before
	default:
		delete(o.byID, id)
	}
}

// confirm notes that a record was published on a connection, unless it was dropped or
// announced again meanwhile.
func (o *ownRecords) confirm(id string, announced *record, link *natslink.Link) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byID[id] == announced {
		announced.joined = link
	}
}

// joined reports whether the node has said on this connection that it joins.
func (o *ownRecords) joined(id string, link *natslink.Link) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	own := o.byID[id]
	return own != nil && own.joined == link
}

// takenFrom reports whether the id is announced for another instance than this one.
func (o *ownRecords) takenFrom(id, instance string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.byID[id].takenFrom(instance)
}

func (own *record) takenFrom(instance string) bool {
	return own != nil && own.instance != instance && time.Now().Before(own.until)
}

// drop drops the record of the id, and reports false if it is another instance's.
func (o *ownRecords) drop(id, instance string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byID[id].takenFrom(instance) {
		return false
	}
	delete(o.byID, id)
	return true
}

// ids returns the ids of the records whose lease runs, sorted, and drops the others.
func (o *ownRecords) ids() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(o.byID, func(_ string, own *record) bool { return !now.Before(own.until) })
	return slices.Sorted(maps.Keys(o.byID))
}

// data returns the record of the id, nil if there is none.
func (o *ownRecords) data(id string) []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	if own := o.byID[id]; own != nil {
		return own.data
	}
	return nil
}
