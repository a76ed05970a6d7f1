package embedded

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// errLocked is what tryLock returns when somebody else holds the lock.
var errLocked = errors.New("locked")

// lockStore makes sure that no other process uses the store, which the server
// itself does not: two servers on one store destroy it. Closing the file gives
// the lock back; so does the end of the process, however it comes.
func lockStore(store string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(store, "caddy.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("store %s is not writable: %w", store, err)
	}
	switch err := tryLock(f); {
	case errors.Is(err, errLocked):
		return nil, errors.Join(
			fmt.Errorf("store %s is in use by another process: give each Caddy a store of its own, or stop the other one", store), f.Close())
	case err != nil:
		return nil, errors.Join(fmt.Errorf("locking store %s: %w", store, err), f.Close())
	}
	return f, nil
}
