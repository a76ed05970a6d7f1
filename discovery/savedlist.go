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
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	listFormat = "caddy-discovery warm start 1"
	// A file that is larger than this was not written here.
	maxListSize = 1 << 30
)

// savedList is what a warm-start file holds.
type savedList struct {
	Format   string    `json:"format"`
	Registry string    `json:"registry"`
	Written  time.Time `json:"written"` // when the list was known to be current
	Epoch    string    `json:"epoch,omitempty"`
	Revision uint64    `json:"revision,omitempty"`
	// Overrides is when the overrides were known to be current.
	Overrides time.Time `json:"overrides,omitzero"`

	nodes     []savedNode
	overrides map[string]Override
	hosts     []savedHost
	// Certificates, too, are remembered for longer than the nodes.
	certificates []Certificate
	outdated     bool // it is too old to say which nodes there are
}

// savedNode is a node in a warm-start file.
type savedNode struct {
	key   string
	heard time.Time
	node  Node
}

// savedHost is a host in a warm-start file, and whose it was.
type savedHost struct {
	Host    string    `json:"host,omitempty"`
	Service string    `json:"service,omitempty"`
	Since   time.Time `json:"since,omitzero"`
	Left    time.Time `json:"left,omitzero"`
}

// savedLine is one line of the file: a node; what operators have decided about one,
// which need not be among the nodes; a host; or a name that may have a certificate.
type savedLine struct {
	Override string          `json:"override,omitempty"` // the node's id
	Key      string          `json:"key,omitempty"`
	Heard    time.Time       `json:"heard,omitzero"`
	Record   json.RawMessage `json:"record,omitempty"`
	savedHost
	savedCertificate
}

// savedCertificate is a Certificate on a line of others.
type savedCertificate struct {
	Name  string    `json:"certificate,omitempty"`
	First time.Time `json:"first,omitzero"`
	Last  time.Time `json:"last,omitzero"`
	Had   bool      `json:"had,omitempty"`
}

// checksum is the last line of the file, over all lines before it.
type checksum struct {
	SHA256 string `json:"sha256"`
}

// encode writes the list, one JSON object a line: a header, the nodes, the overrides,
// the hosts, the certificates, and a checksum. Equal lists are written equally.
func (l *savedList) encode(w io.Writer) error {
	sum := sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(w, sum), 64<<10)
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	l.Format = listFormat
	if err := encoder.Encode(l); err != nil {
		return err
	}
	slices.SortFunc(l.nodes, func(a, b savedNode) int { return strings.Compare(a.node.ID, b.node.ID) })
	var record []byte
	for _, n := range l.nodes {
		var err error
		if record, err = AppendRecord(record[:0], n.node, n.node.LastSeen); err != nil {
			continue // it was accepted once, and it is only one node
		}
		if err := encoder.Encode(savedLine{Key: n.key, Heard: n.heard.UTC(), Record: record}); err != nil {
			return err
		}
	}
	overrides := usable(l.overrides)
	for _, id := range slices.Sorted(maps.Keys(overrides)) {
		var err error
		if record, err = AppendOverride(record[:0], overrides[id]); err != nil {
			return err
		}
		if err := encoder.Encode(savedLine{Override: id, Record: record}); err != nil {
			return err
		}
	}
	for _, h := range l.hosts {
		if err := encoder.Encode(h); err != nil {
			return err
		}
	}
	for _, c := range l.certificates {
		if err := encoder.Encode(c); err != nil {
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

// decodeList reads what encode wrote. Whatever stands in the file is checked as if
// a registry had said it.
func decodeList(r io.Reader) (*savedList, error) {
	in := bufio.NewReaderSize(io.LimitReader(r, maxListSize), 64<<10)
	sum := sha256.New()
	line, err := readLine(in)
	if err != nil {
		return nil, err
	}
	l := new(savedList)
	if err := json.Unmarshal(line, l); err != nil || l.Format != listFormat {
		return nil, fmt.Errorf("%w warm-start file: it does not begin as one", ErrInvalid)
	}
	sum.Write(line)
	for {
		if line, err = readLine(in); err != nil {
			return nil, err
		}
		if bytes.HasPrefix(line, []byte(`{"sha256":`)) {
			return l, checkSum(in, line, sum)
		}
		sum.Write(line)
		var n savedLine
		if err := json.Unmarshal(line, &n); err != nil {
			return nil, fmt.Errorf("%w warm-start file: node %d: %w", ErrInvalid, len(l.nodes)+1, err)
		}
		if n.Override != "" {
			l.addOverride(n.Override, n.Record)
			continue
		}
		if n.Host != "" {
			l.addHost(n.savedHost)
			continue
		}
		if n.Name != "" {
			l.addCertificate(Certificate(n.savedCertificate))
			continue
		}
		node, err := ParseNode(n.Record)
		if err != nil {
			return nil, fmt.Errorf("%w warm-start file: node %d: %w", ErrInvalid, len(l.nodes)+1, err)
		}
		if len(l.nodes) == MaxNodes {
			return nil, fmt.Errorf("%w warm-start file: more than %d nodes", ErrInvalid, MaxNodes)
		}
		l.nodes = append(l.nodes, savedNode{key: n.Key, heard: n.Heard, node: node})
	}
}

// addOverride takes up an override. One that cannot be read decides nothing, and costs
// nobody else what the file says of him.
func (l *savedList) addOverride(id string, record []byte) {
	o, err := ParseOverride(record)
	if err != nil || ValidateID(id) != nil || len(l.overrides) == MaxNodes {
		return
	}
	if l.overrides == nil {
		l.overrides = make(map[string]Override)
	}
	l.overrides[id] = o
}

// maxSavedHosts is more than a directory ever has.
const maxSavedHosts = maxHostsLeft + maxExcessRoutes + ordinaryRoutes*MaxNodes

// addHost takes up a host, if it is one in normal form.
func (l *savedList) addHost(h savedHost) {
	if name, err := parseHost(h.Host); err == nil && name == h.Host && len(l.hosts) < maxSavedHosts {
		notAhead(&h.Since, &h.Left)
		l.hosts = append(l.hosts, h)
	}
}

// addCertificate takes up a name that may have a certificate.
func (l *savedList) addCertificate(c Certificate) {
	if name, err := parseHost(c.Name); err == nil && name == c.Name && len(l.certificates) < maxCertificates {
		notAhead(&c.First, &c.Last)
		l.certificates = append(l.certificates, c)
	}
}

// notAhead brings times of a clock that was ahead then back to now: a host would be kept for
// a service that left, or a new name counted, until these times have come.
func notAhead(times ...*time.Time) {
	now := time.Now().UTC().Round(0)
	for _, t := range times {
		if t.After(now) {
			*t = now
		}
	}
}

// outdate leaves of a list what is not too old, and reports whether that is anything.
func (l *savedList) outdate() bool {
	l.nodes, l.overrides, l.Overrides, l.outdated = nil, nil, time.Time{}, true
	return len(l.hosts)+len(l.certificates) > 0
}

// readLine reads one line, with its end. A line is a record and a little more.
func readLine(in *bufio.Reader) ([]byte, error) {
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
