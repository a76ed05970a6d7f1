package embedded

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/gofrs/flock"
)

// lockStore makes sure that no other process uses the store, which the server
// itself does not: two servers on one store destroy it. Closing gives the lock
// back; so does the end of the process, however it comes. On a system without
// locks the listen address, which two servers cannot share either, has to do.
func lockStore(store string) (*flock.Flock, error) {
	lock := flock.New(filepath.Join(store, "caddy.lock"), flock.SetFlag(os.O_RDWR|os.O_CREATE), flock.SetPermissions(0o600))
	locked, err := lock.TryLock()
	switch {
	case errors.Is(err, errors.ErrUnsupported), locked:
		return lock, nil
	case err != nil:
		return nil, fmt.Errorf("locking store %s: %w", store, err)
	}
	return nil, fmt.Errorf("store %s is in use by another process: give each Caddy a store of its own, or stop the other one", store)
}
