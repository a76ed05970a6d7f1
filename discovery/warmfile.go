package discovery

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
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

// How old a list may be, and how far ahead of the clock it may come from.
const maxWarmAge = 24 * time.Hour

const (
	warmFormat = "caddy-discovery warm start 1"
	// A file that is larger than this was not written here.
	maxWarmFile = 1 << 30
	// So many directories may keep a list of one registry on one machine.
	warmSlots = 16
)

// errForeign: the file is good, but not of this registry.
var errForeign = errors.New("it is of another registry")

// memento is what a warm-start file holds.
type memento struct {
	Format   string    `json:"format"`
	Registry string    `json:"registry"`
	Written  time.Time `json:"written"` // when the list was known to be current
	Epoch    string    `json:"epoch,omitempty"`
	Revision uint64    `json:"revision,omitempty"`
	// Overrides is when the overrides were known to be current.
	Overrides time.Time `json:"overrides,omitzero"`

	nodes     []remembered
	overrides map[string]Override
}

// remembered is a node in a warm-start file.
type remembered struct {
	key   string
	heard time.Time
	node  Node
}

// rememberedJSON is one line of the file: a node, or what operators have decided
// about one, which need not be among the nodes.
type rememberedJSON struct {
	Override string          `json:"override,omitempty"` // the node's id
	Key      string          `json:"key,omitempty"`
	Heard    time.Time       `json:"heard,omitzero"`
	Record   json.RawMessage `json:"record"`
}

// checksum is the last line of the file, over all lines before it.
type checksum struct {
	SHA256 string `json:"sha256"`
}

// write writes the file's contents: one JSON object a line, a header, the nodes,
// the overrides, and a checksum. Equal mementos are written equally.
func (m *memento) write(w io.Writer) error {
	sum := sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(w, sum), 64<<10)
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	m.Format = warmFormat
	if err := encoder.Encode(m); err != nil {
		return err
	}
	slices.SortFunc(m.nodes, func(a, b remembered) int { return strings.Compare(a.node.ID, b.node.ID) })
	var record []byte
	for _, n := range m.nodes {
		var err error
		if record, err = AppendRecord(record[:0], n.node, n.node.LastSeen); err != nil {
			continue // it was accepted once, and it is only one node
		}
		if err := encoder.Encode(rememberedJSON{Key: n.key, Heard: n.heard.UTC(), Record: record}); err != nil {
			return err
		}
	}
	for i, id := range slices.Sorted(maps.Keys(m.overrides)) {
		if i == MaxNodes {
			break
		}
		if ValidateID(id) != nil {
			continue
		}
		var err error
		if record, err = AppendOverride(record[:0], m.overrides[id]); err != nil {
			continue
		}
		if err := encoder.Encode(rememberedJSON{Override: id, Record: record}); err != nil {
			return err
		}
	}
	if err := out.Flush(); err != nil {
		return err
	}
	last, err := json.Marshal(checksum{hex.EncodeToString(sum.Sum(nil))})
	if err != nil {
		return err
	}
	_, err = w.Write(append(last, '\n'))
	return err
}

// readMemento reads what write wrote. Whatever stands in the file is checked as if
// a registry had said it.
func readMemento(r io.Reader) (*memento, error) {
	in := bufio.NewReaderSize(io.LimitReader(r, maxWarmFile), 64<<10)
	sum := sha256.New()
	line, err := warmLine(in)
	if err != nil {
		return nil, err
	}
	m := new(memento)
	if err := json.Unmarshal(line, m); err != nil || m.Format != warmFormat {
		return nil, fmt.Errorf("%w warm-start file: it does not begin as one", ErrInvalid)
	}
	sum.Write(line)
	for {
		if line, err = warmLine(in); err != nil {
			return nil, err
		}
		if bytes.HasPrefix(line, []byte(`{"sha256":`)) {
			return m, checkSum(in, line, sum)
		}
		sum.Write(line)
		var n rememberedJSON
		if err := json.Unmarshal(line, &n); err != nil {
			return nil, fmt.Errorf("%w warm-start file: node %d: %w", ErrInvalid, len(m.nodes)+1, err)
		}
		if n.Override != "" {
			m.decided(n.Override, n.Record)
			continue
		}
		node, err := ParseNode(n.Record)
		if err != nil {
			return nil, fmt.Errorf("%w warm-start file: node %d: %w", ErrInvalid, len(m.nodes)+1, err)
		}
		if len(m.nodes) == MaxNodes {
			return nil, fmt.Errorf("%w warm-start file: more than %d nodes", ErrInvalid, MaxNodes)
		}
		m.nodes = append(m.nodes, remembered{key: n.Key, heard: n.Heard, node: node})
	}
}

// decided takes up an override. One that cannot be read decides nothing, and costs
// nobody else what the file says of him.
func (m *memento) decided(id string, record []byte) {
	o, err := ParseOverride(record)
	if err != nil || ValidateID(id) != nil || len(m.overrides) == MaxNodes {
		return
	}
	if m.overrides == nil {
		m.overrides = make(map[string]Override)
	}
	m.overrides[id] = o
}

// warmLine reads one line, with its end. A line is a record and a little more.
func warmLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > 2*MaxRecord:
			return nil, fmt.Errorf("%w warm-start file: a line is too long", ErrInvalid)
		case err == nil:
			return line, nil
		case errors.Is(err, io.EOF):
			return nil, fmt.Errorf("%w warm-start file: it is cut off", ErrInvalid)
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

func checkSum(in *bufio.Reader, line []byte, sum hash.Hash) error {
	var last checksum
	if err := json.Unmarshal(line, &last); err != nil || last.SHA256 != hex.EncodeToString(sum.Sum(nil)) {
		return fmt.Errorf("%w warm-start file: the checksum does not match", ErrInvalid)
	}
	if _, err := in.ReadByte(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w warm-start file: something follows its end", ErrInvalid)
	}
	return nil
}

// warmStore is the warm-start file of one directory. One goroutine uses it at a
// time.
type warmStore struct {
	WarmStart
	log *slog.Logger

	own  string       // the file that is ours to write, "" if there is none
	lock *flock.Flock // what makes it ours
}

// slot returns the path with a number, none for the first.
func (s *warmStore) slot(n int) string {
	if n == 0 {
		return s.Path
	}
	ext := filepath.Ext(s.Path)
	return fmt.Sprintf("%s-%d%s", strings.TrimSuffix(s.Path, ext), n+1, ext)
}

// open takes the first file that nobody else has.
func (s *warmStore) open() error {
	if err := os.MkdirAll(filepath.Dir(s.Path), 0o700); err != nil {
		return fmt.Errorf("making the folder of the warm-start file: %w", err)
	}
	for n := range warmSlots {
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
	return fmt.Errorf("%d directories keep a list of this registry already", warmSlots)
}

func (s *warmStore) close() {
	if s.lock != nil {
		_ = s.lock.Close()
		s.lock = nil
	}
}

// load returns the newest list that can be used, nil if there is none. Those of
// others are read too: they are whole at any time, and newer than ours where ours
// is of the last start but one. What is wrong with our own file is told, and the
// file set aside.
func (s *warmStore) load() *memento {
	var newest *memento
	for n := range warmSlots {
		path := s.slot(n)
		m, err := s.read(path)
		switch {
		case errors.Is(err, os.ErrNotExist):
		case err == nil:
			if newest == nil || m.Written.After(newest.Written) {
				newest = m
			}
		case path == s.own:
			s.log.Warn("the list of nodes kept for a start without the registry cannot be used, and is set aside",
				"file", path, "as", path+".bad", "error", err)
			if err := os.Rename(path, path+".bad"); err != nil {
				s.log.Warn("cannot set the warm-start file aside; it will be overwritten", "error", err)
			}
		}
	}
	return newest
}

func (s *warmStore) read(path string) (*memento, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w warm-start file: it is no regular file", ErrInvalid)
	}
	m, err := readMemento(f)
	if err != nil {
		return nil, err
	}
	if m.Registry != s.Registry {
		return nil, errForeign
	}
	if age := time.Since(m.Written); age > maxWarmAge || age < -maxWarmAge {
		return nil, fmt.Errorf("it was written %v ago, want at most %v", age.Round(time.Second), maxWarmAge)
	}
	if age := time.Since(m.Overrides); age > maxWarmAge || age < -maxWarmAge {
		m.overrides, m.Overrides = nil, time.Time{}
	}
	return m, nil
}

// save replaces our file.
func (s *warmStore) save(m *memento) (err error) {
	m.Registry = s.Registry
	// The lock keeps others away from this name, too. What a crash left there is
	// overwritten; a link that somebody put there is not followed.
	temporary := s.own + ".tmp"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("writing the warm-start file: %w", err)
	}
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("writing the warm-start file: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(temporary)
		}
	}()
	err = errors.Join(m.write(f), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(temporary, s.own)
	}
	if err != nil {
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
