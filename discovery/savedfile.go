package discovery

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/gofrs/flock"
)

// A WarmStart says where a directory keeps its last known list, for a start while
// the registry is away. The file is readable for its owner alone, holds what the
// records hold and no secret, and is replaced as a whole.
type WarmStart struct {
	// Path is the file. While another directory has it, of this process or another
	// one, a file beside it is used, with a number before the extension. "" means
	// that nothing is kept.
	Path string
	// Registry tells registries apart: a file of another one is not used. It is
	// written into the file, so that it must not contain a secret.
	Registry string
}

// How old a list of nodes may be, and how far ahead of the clock it may come from. What it
// says of hosts and certificates has times of its own.
const maxListAge = 24 * time.Hour

// So many directories may keep a list of one registry on one machine.
const maxSavedFiles = 16

// errForeign: the file is good, but not of this registry.
var errForeign = errors.New("it is of another registry")

// savedFile is the warm-start file of one directory. One goroutine uses it at a
// time.
type savedFile struct {
	WarmStart
	log *slog.Logger

	own  string       // the file that is ours to write, "" if there is none
	lock *flock.Flock // what makes it ours
}

// slot returns the path with a number, none for the first.
func (s *savedFile) slot(n int) string {
	if n == 0 {
		return s.Path
	}
	ext := filepath.Ext(s.Path)
	return fmt.Sprintf("%s-%d%s", strings.TrimSuffix(s.Path, ext), n+1, ext)
}

// open takes the first file that nobody else has.
func (s *savedFile) open() error {
	if err := os.MkdirAll(filepath.Dir(s.Path), 0o700); err != nil {
		return fmt.Errorf("making the folder of the warm-start file: %w", err)
	}
	for n := range maxSavedFiles {
		path := s.slot(n)
		lock := flock.New(path+".lock", flock.SetFlag(os.O_RDWR|os.O_CREATE), flock.SetPermissions(0o600))
		locked, err := lock.TryLock()
		// Where there are no locks, two processes may overwrite each other's file,
		// which is whole all the same.
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return fmt.Errorf("locking the warm-start file: %w", err)
		}
		if locked || err != nil {
			s.own, s.lock = path, lock
			return nil
		}
	}
	return fmt.Errorf("%d directories keep a list of this registry already", maxSavedFiles)
}

func (s *savedFile) close() {
	if s.lock != nil {
		_ = s.lock.Close()
		s.lock = nil
	}
}

// load returns the newest list that can be used, nil if there is none. Those of
// others are read too: they are whole at any time, and newer than ours where ours
// is of the last start but one. Hosts are those of the newest one that has any, since
// others may not look at hosts, and certificates those of all. What is wrong with our own
// file is told, and the file set aside.
func (s *savedFile) load() *savedList {
	var newest, hosts *savedList
	var certificates []Certificate
	for n := range maxSavedFiles {
		path := s.slot(n)
		l, err := s.read(path)
		switch {
		case errors.Is(err, os.ErrNotExist):
		case err == nil:
			certificates = append(certificates, l.certificates...)
			if len(l.hosts) > 0 && (hosts == nil || l.Written.After(hosts.Written)) {
				hosts = l
			}
			if newest == nil || l.Written.After(newest.Written) {
				newest = l
			}
		case path == s.own:
			s.log.Warn("the list of nodes kept for a start without the registry cannot be used, and is set aside",
				"file", path, "as", path+".bad", "error", err)
			if err := os.Rename(path, path+".bad"); err != nil {
				s.log.Warn("cannot set the warm-start file aside; it will be overwritten", "error", err)
			}
		}
	}
	if newest != nil {
		newest.certificates = certificates
		if hosts != nil {
			newest.hosts = hosts.hosts
		}
	}
	return newest
}

func (s *savedFile) read(path string) (*savedList, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w warm-start file: it is no regular file", ErrInvalid)
	}
	l, err := decodeList(f)
	if err != nil {
		return nil, err
	}
	if l.Registry != s.Registry {
		return nil, errForeign
	}
	if age := time.Since(l.Written); age > maxListAge || age < -maxListAge {
		if l.outdate() {
			return l, nil
		}
		return nil, fmt.Errorf("it was written %v ago, want at most %v", age.Round(time.Second), maxListAge)
	}
	if age := time.Since(l.Overrides); age > maxListAge || age < -maxListAge {
		l.overrides, l.Overrides = nil, time.Time{}
	}
	return l, nil
}

// save replaces our file.
func (s *savedFile) save(l *savedList) error {
	if err := s.replace(l); err != nil {
		return fmt.Errorf("writing the warm-start file: %w", err)
	}
	if runtime.GOOS != "windows" {
		// That the rename itself survives a crash is nice to have: else the file
		// before does.
		if dir, err := os.Open(filepath.Dir(s.own)); err == nil {
			_ = dir.Sync()
			_ = dir.Close()
		}
	}
	return nil
}

func (s *savedFile) replace(l *savedList) error {
	l.Registry = s.Registry
	// The lock keeps others away from this name, too. What a crash left there is
	// overwritten; a link that somebody put there is not followed.
	temporary := s.own + ".tmp"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(temporary) }() // if it is still there
	if err := errors.Join(l.encode(f), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(temporary, s.own)
}
