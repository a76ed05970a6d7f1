package caddydiscovery

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/uuid"
)

// instanceIDs are those of data directories that have none on disk yet, by the path
// of the file where Caddy keeps it. A config that is only validated leaves no file
// behind: whoever validates is often root, and the service could not read it.
var instanceIDs = struct {
	sync.Mutex
	pending map[string]string
}{pending: make(map[string]string)}

func instanceFile() string { return filepath.Join(caddy.AppDataDir(), "instance.uuid") }

// instanceID is caddy.InstanceID, but writes nothing: keepInstanceID does.
func instanceID() (string, error) {
	file := instanceFile()
	content, err := os.ReadFile(file)
	if err == nil {
		id, err := uuid.ParseBytes(content)
		return id.String(), err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	instanceIDs.Lock()
	defer instanceIDs.Unlock()
	if instanceIDs.pending[file] == "" {
		instanceIDs.pending[file] = uuid.NewString()
	}
	return instanceIDs.pending[file], nil
}

// keepInstanceID writes an instance ID that was handed out to where Caddy keeps it,
// for a config that starts. A read-only file system is no reason not to run: the ID
// then stays as it is for as long as the process runs, and the next config tries again.
func keepInstanceID() {
	instanceIDs.Lock()
	defer instanceIDs.Unlock()
	file := instanceFile()
	id := instanceIDs.pending[file]
	if id == "" || os.MkdirAll(filepath.Dir(file), 0o700) != nil {
		return
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		if errors.Is(err, fs.ErrExist) {
			delete(instanceIDs.pending, file) // another process was first
		}
		return
	}
	_, err = f.WriteString(id)
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(file)
		return
	}
	delete(instanceIDs.pending, file)
}

// defaultNodeID is stable across restarts of one Caddy on one host, and tells it from
// others there: those that share a data directory have one instance ID, but not all
// of them can listen at one place.
func defaultNodeID(servers []listener) string {
	id, err := os.Hostname()
	if err != nil || id == "" {
		id = "caddy"
	}
	// A read-only file system is no reason not to be listed.
	if instance, err := instanceID(); err == nil {
		id += "-" + instance[:8]
	}
	if len(servers) == 0 {
		return id
	}
	if first := servers[0]; !first.wildcard() {
		id += "-" + strings.ReplaceAll(first.host, ":", ".")
	}
	return id + "-" + strconv.FormatUint(uint64(servers[0].port), 10)
}
