package redis

import (
	"errors"
	"fmt"
	"hash/fnv"
	"regexp"
	"strings"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A member is one of the set. Several may carry one id.
type member struct {
	foundMember
	id   string // of its node; or a name made up for a record that has none
	err  error  // why it is rejected
	look uint64 // the last look that found it
	seq  uint64 // of the entry of the stream that brought it, or 0
	node *discovery.Node

	unnamed *unnamed // of a record whose id cannot be read; else nil
}

// unnamed is what a record whose id cannot be read is called.
type unnamed struct {
	made  string // the name made up for it
	guess string // the id that its beginning names, if its node may stay by that; or ""

	changed bool // of the look that is being applied: the member, its score or its id is new
}

// nameless begins the names that are made up. No id may contain it.
const nameless = "\x00"

// parse reads the record. It is not kept longer than for one event: it would
// double what a large fleet takes.
func (m *member) parse(records *discovery.Parser) {
	var n discovery.Node
	var err error
	if m.long > 0 {
		err = tooLong(m.long)
	} else {
		n, err = records.Parse([]byte(m.text))
	}
	m.err, m.id, m.node = err, n.ID, nil
	if err == nil {
		m.node = &n
	}
	if n.ID == "" {
		h := fnv.New32a()
		_, _ = h.Write([]byte(m.text))
		m.unnamed = &unnamed{made: fmt.Sprintf("%s%08x", nameless, h.Sum32())}
		if guess := m.guess(); discovery.ValidateID(guess) == nil && !errors.Is(err, discovery.ErrForbidden) {
			m.unnamed.guess = guess
		}
		m.id = m.unnamed.made
	}
}

// guess returns the id that the beginning of a record names, to be shown, or "".
func (m *member) guess() string {
	if found := idAt.FindStringSubmatch(m.text[:min(len(m.text), 512)]); found != nil {
		return found[1]
	}
	return ""
}

// idAt finds the id in the beginning of a record that cannot be read.
var idAt = regexp.MustCompile(`(?i)"nodeId"\s*:\s*"([^"\\]{1,128})"`)

// A node is what a watch knows of one id.
type node struct {
	id      string
	current *member
	seq     uint64    // of the newest entry of the stream about it
	seen    uint64    // until where in the sequence its record is known to stand
	missing time.Time // since when looks have not found its record; zero: it is there

	// Of the look that is being applied: the member with the highest score, and
	// whether it or its score is new.
	look    uint64
	best    *member
	changed bool
}

// gone reports whether looks have not found the node's record for so long, by one that
// began then.
func (n *node) gone(at time.Time, absence time.Duration) bool {
	return !n.missing.IsZero() && at.Sub(n.missing) >= absence
}

// miss notes that a look at everything lacks the node's record.
func (n *node) miss() {
	if n.missing.IsZero() {
		n.missing = time.Now()
	}
}

// event returns an event about the node. A record without an id has a made-up key, to
// be told from others.
func (n *node) event(kind discovery.EventType) discovery.Event {
	if made, ok := strings.CutPrefix(n.id, nameless); ok {
		return discovery.Event{Type: kind, Key: "#" + made, ID: n.current.guess()}
	}
	return discovery.Event{Type: kind, ID: n.id}
}
