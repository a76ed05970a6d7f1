package caddydiscovery

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/google/uuid"
)

// instanceIDs are those of data directories that had none on disk, by the path of the file
// where Caddy keeps it. A config that is only validated leaves no file behind: whoever
// validates is often root, and the service could not read it.
var instanceIDs = struct {
	sync.Mutex
	handedOut map[string]*handedOutID
}{handedOut: make(map[string]*handedOutID)}

// A handedOutID is an instance ID by which this process is known already, and which is not
// sure to be on disk.
type handedOutID struct {
	id   string
	kept bool // it was written once
}

func instanceFile() string { return filepath.Join(caddy.AppDataDir(), "instance.uuid") }

// How often, and how long after each other, a file without content is read: Caddy makes it
// empty before it writes into it, and a crash between leaves it so.
const (
	emptyReads = 5
	emptyPause = 10 * time.Millisecond
)

// instanceID is caddy.InstanceID, but writes nothing: keepInstanceID does.
func instanceID() (string, error) {
	file := instanceFile()
	for range emptyReads {
		if id := handedOut(file); id != "" {
			return id, nil // whatever others have written since
		}
		content, err := os.ReadFile(file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return handOut(file), nil
		case err != nil:
			return "", err
		case len(content) > 0:
			id, err := uuid.ParseBytes(content)
			return id.String(), err
		}
		time.Sleep(emptyPause)
	}
	return handOut(file), nil
}

func handedOut(file string) string {
	instanceIDs.Lock()
	defer instanceIDs.Unlock()
	if h := instanceIDs.handedOut[file]; h != nil {
		return h.id
	}
	return ""
}

// handOut returns a new ID for a data directory, or the one that was handed out meanwhile.
func handOut(file string) string {
	instanceIDs.Lock()
	defer instanceIDs.Unlock()
	h := instanceIDs.handedOut[file]
	if h == nil {
		h = &handedOutID{id: uuid.NewString()}
		instanceIDs.handedOut[file] = h
	}
	return h.id
}

// keepInstanceID writes an instance ID that was handed out to where Caddy keeps it, for a
// config that starts. A read-only file system is no reason not to run: the ID then stays as
// it is for as long as the process runs, and the next config tries again.
//
// Caddy's TLS app makes an ID of its own up where it finds none, as soon as it starts and in
// the background, and uses it for a moment. The one that was handed out takes its place:
// after a restart the proxy would have another name.
func keepInstanceID() {
	instanceIDs.Lock()
	defer instanceIDs.Unlock()
	file := instanceFile()
	if h := instanceIDs.handedOut[file]; h != nil && writeInstanceID(file, h.id) == nil {
		h.kept = true
	}
}

// settleInstanceID is for a config that ends: what the TLS app may have written while the ID
// was being kept it has written by now. From here on the ID is what is on disk.
func settleInstanceID() {
	instanceIDs.Lock()
	defer instanceIDs.Unlock()
	file := instanceFile()
	if h := instanceIDs.handedOut[file]; h != nil && h.kept && writeInstanceID(file, h.id) == nil {
		delete(instanceIDs.handedOut, file)
	}
}

// writeInstanceID has the file hold the ID, and nobody see it without content.
func writeInstanceID(file, id string) error {
	if content, err := os.ReadFile(file); err == nil && string(content) == id {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*") // for its owner alone, as Caddy's
	if err != nil {
		return err
	}
	_, err = f.WriteString(id)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
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
