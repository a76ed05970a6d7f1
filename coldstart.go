package caddydiscovery

import (
	"cmp"
	"context"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/health"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// A coldStart is the wait of requests for what a source lacks when it has just begun:
//
//  1. Until the registry is listed they wait, for sync_timeout at most, which counts
//     from when the directory was opened.
//  2. When half of that has passed without a listing, the directory uses the list that
//     it saved. A request goes on as soon as a node of it can serve.
//  3. With health checks a node gets no request before its first check. Where no other
//     node can serve, requests wait for it, again for sync_timeout at most; then nodes
//     serve unchecked.
//
// A request that waits is served although its config is replaced meanwhile: see
// Upstreams.leave.
type coldStart struct {
	directory *discovery.Directory
	timeout   time.Duration // sync_timeout
	checks    checks        // nil without health checks

	opened  time.Time // the directory was
	restore *time.Timer
}

// checks are what a cold start asks a [health.Checker].
type checks interface {
	Of(e *discovery.Entry) (state health.State, since time.Time)
	Superseded() <-chan struct{}
}

// begin has the saved list used when its time comes. Nothing is awaited before.
func (c *coldStart) begin(opened time.Time) {
	c.opened = opened
	c.restore = time.AfterFunc(time.Until(c.restoresAt()), c.directory.Restore)
}

// end is called when nobody calls begin any more.
func (c *coldStart) end() {
	if c.restore != nil {
		c.restore.Stop()
	}
}

func (c *coldStart) restoresAt() time.Time { return c.opened.Add(c.timeout / 2) }

// awaitListing returns the directory's snapshot when the registry is listed, the saved list
// is enough, or the time is over.
func (c *coldStart) awaitListing(ctx context.Context, enough func(*discovery.Snapshot) bool) *discovery.Snapshot {
	if time.Since(c.opened) >= c.timeout {
		return c.directory.Snapshot()
	}
	ctx, cancel := context.WithDeadline(ctx, c.opened.Add(c.timeout))
	defer cancel()
	half := time.NewTimer(time.Until(c.restoresAt()))
	defer half.Stop()
	var superseded <-chan struct{} // nil, which blocks, before half the time has passed
	for {
		select {
		case <-c.directory.Synced():
			return c.directory.Snapshot()
		case <-ctx.Done():
			return c.directory.Snapshot()
		case <-half.C:
		case <-superseded:
		}
		snapshot := c.directory.Snapshot()
		if snapshot.Number > 0 && enough(snapshot) {
			return snapshot
		}
		superseded = snapshot.Superseded()
	}
}

// awaitChecks returns the picker as soon as it has a node, or none is awaited any
// more.
func (c *coldStart) awaitChecks(ctx context.Context, pick func(*discovery.Snapshot) *picker.Picker) *picker.Picker {
	for {
		changed := c.checks.Superseded()
		p := pick(c.directory.Snapshot())
		if !p.Empty() || p.Retry().IsZero() {
			return p
		}
		wait, cancel := context.WithDeadline(ctx, p.Retry())
		select {
		case <-changed:
		case <-wait.Done():
		}
		cancel()
		if ctx.Err() != nil {
			return p
		}
	}
}

// unchecked returns those nodes that have waited for their first check for as long as
// the timeout, and otherwise when the first of them will have. Where some are known to
// be ill the others do not serve without a check, and are awaited for the timeout after
// the checks began only: not each time that one joins.
func (c *coldStart) unchecked(eligible []*discovery.Entry) ([]*discovery.Entry, time.Time) {
	now := time.Now()
	var nodes []*discovery.Entry
	var next, began time.Time // began: the first check of one that is known
	for _, e := range eligible {
		state, since := c.checks.Of(e)
		// Since the zero time: the checks are about to begin.
		switch until := cmp.Or(since, now).Add(c.timeout); {
		case state.Known():
			began = earlier(began, since)
		case state != health.Unchecked:
		case until.After(now):
			next = earlier(next, until)
		default:
			nodes = append(nodes, e)
		}
	}
	if !began.IsZero() {
		nodes = nil
		if until := began.Add(c.timeout); !until.After(now) {
			next = time.Time{}
		} else if !next.IsZero() {
			next = earlier(next, until)
		}
	}
	if len(nodes) > 0 {
		next = time.Time{}
	}
	return nodes, next
}

// earlier returns the earlier time; the zero time is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}
