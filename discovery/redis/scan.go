package redis

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// How many keys of the database one SCAN goes past: a few tenths of a
	// millisecond of the server, and two for a listing that somebody waits for.
	scanCount     = 1000
	listScanCount = 5000
	// scanRestFactor bounds what scans take of the server beside the listing: after a
	// step that took d, the next waits 19 d, so that it is a twentieth of the time.
	scanRestFactor = 19
	// A pass that took no longer than this may be waited for.
	quickScan = 100 * time.Millisecond
	// How often to make a pass where the server tells of new keys.
	rareScan = 5 * time.Minute
	// The longest name of a key that is taken for one of ours. What is longer than
	// an id may be, but no more than this, is shown as rejected.
	maxSuffix = 4 * discovery.MaxID
)

// A scan is one pass through all keys of the database, or of a cluster's masters,
// for those that begin with the prefix.
type scan struct {
	layout *keysLayout
	count  int64 // of keys that one step goes past

	cursors map[string]uint64 // by the master's address; of those that are done 0
	done    bool              // with all of them
	took    time.Duration     // what the server was asked, altogether
	slowest time.Duration     // what one step took
}

// step asks all masters at once for the next part of the pass, and returns the keys
// that were found.
func (s *scan) step(ctx context.Context) ([]string, error) {
	began := time.Now()
	type page struct {
		keys   []string
		cursor uint64
	}
	was := s.cursors
	pages, err := ask(ctx, s.layout.client, func(ctx context.Context) (map[string]page, error) {
		var mu sync.Mutex
		pages := make(map[string]page)
		err := s.layout.client.eachMaster(ctx, func(ctx context.Context, master *goredis.Client) error {
			address := master.Options().Addr
			if was != nil && was[address] == 0 {
				return nil // done, or a master only since this pass began
			}
			keys, cursor, err := master.Scan(ctx, was[address], escapeGlob(s.layout.prefix)+"*", s.count).Result()
			mu.Lock()
			defer mu.Unlock()
			pages[address] = page{keys, cursor}
			return err
		})
		return pages, err
	})
	if err != nil {
		return nil, fmt.Errorf("looking for keys: %w", err)
	}
	var found []string
	s.cursors, s.done = make(map[string]uint64), true
	for address, p := range pages {
		s.cursors[address], s.done = p.cursor, s.done && p.cursor == 0
		for _, key := range p.keys {
			if len(key) <= len(s.layout.prefix)+maxSuffix {
				found = append(found, key)
			}
		}
	}
	took := time.Since(began)
	s.took += took
	s.slowest = max(s.slowest, took)
	return found, nil
}

// scanOn makes one pass after another until the watch ends, and asks the loop to look at
// keys that it does not know. It leaves the server in peace for most of the time. A
// failure is left to the looks: they break the watch if the server is ill.
func (v *keysView) scanOn(ctx context.Context, wait time.Duration) {
	var pass *scan
	var began time.Time
	for pause(ctx, wait) {
		step := time.Now()
		if pass == nil {
			pass, began = &scan{layout: v.keysLayout, count: scanCount}, step
		}
		keys, err := pass.step(ctx)
		if len(keys) > 0 && !v.feed.send(ctx, func() (request, error) { return v.unknown(keys), nil }) {
			return
		}
		if err != nil && !errors.Is(err, discovery.ErrUnreachable) {
			return // it will not be allowed the next time either
		}
		wait = scanRestFactor * time.Since(step)
		if err == nil && !pass.done {
			continue
		}
		if err == nil {
			v.scanned(pass.took)
		}
		wait = max(wait, v.scanInterval()-time.Since(began))
		pass = nil
	}
}

// scanInterval is how often a pass begins.
func (v *keysView) scanInterval() time.Duration {
	if v.subscribed {
		return rareScan
	}
	return v.client.config.Poll
}

// unknown asks for those of the keys that no look finds by itself.
func (v *keysView) unknown(keys []string) (q request) {
	for _, key := range keys {
		if v.keys[key] == nil && len(v.keys)+len(q.keys) < maxMembers {
			q.want(key)
		}
	}
	return q
}

// scanned notes what a whole pass took.
func (l *keysLayout) scanned(took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.scanTook, l.scannedAt = took, time.Now()
}

// quick reports whether a pass is known to take little time.
func (l *keysLayout) quick() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.scannedAt.IsZero() && l.scanTook <= quickScan
}
