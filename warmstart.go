package caddydiscovery

import (
	"time"
)

// scheduleRestore has the last known list used when half of sync_timeout has passed
// without a listing.
func (u *Upstreams) scheduleRestore() {
	u.restoring.Do(func() {
		u.restore = time.AfterFunc(time.Until(u.restoresAt()), u.directory.Restore)
	})
}

// restoresAt is when the last known list is used, unless the registry was listed.
func (u *Upstreams) restoresAt() time.Time {
	return time.Unix(0, u.directory.opened.Load()).Add(time.Duration(u.SyncTimeout) / 2)
}

// stopRestore ends what scheduleRestore began. Nobody calls that any more.
func (u *Upstreams) stopRestore() {
	u.restoring.Do(func() {})
	if u.restore != nil {
		u.restore.Stop()
	}
}
