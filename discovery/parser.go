package discovery

import (
	"bytes"
	"encoding/json"
	"hash/maphash"
	"strconv"
	"time"
)

const (
	// patternsAge is how long a Parser remembers what it did not read again, at
	// least; at most twice as long.
	patternsAge = 2 * time.Minute
	// maxPatterns is how many bytes, about, may become old at most: those of a
	// hundred thousand usual records.
	maxPatterns = 32 << 20
)

// A Parser reads records as [ParseNode] does, and the many that repeat one in all
// but the time and the load in a fraction of the time: a heartbeat is such a
// record. It must not be used by more than one goroutine at a time. The zero
// Parser is ready for use.
type Parser struct {
	// What is known of records without their time and load: nil if they came once.
	young, old map[fingerprint]*pattern
	size       int       // of what is young
	rotated    time.Time // when what was young became old
}

// A fingerprint stands for a record without its time and load. No writer can know
// the seeds, and so none can make two records that share one.
type fingerprint [2]uint64

var fingerprintSeeds = [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()}

// A pattern is a record without its time and load.
type pattern struct {
	fit  bool // time and load are where they seem to be
	node Node
	size int // of the record
}

func (p *pattern) bytes() int {
	const entry = 64
	if p == nil {
		return entry
	}
	return entry + p.size
}

// Parse is [ParseNode]. The nodes that it returns share their metadata.
func (p *Parser) Parse(data []byte) (Node, error) {
	if len(data) > MaxRecord {
		return ParseNode(data)
	}
	v := findVariables(data)
	print := v.fingerprint(data)
	known, found := p.lookUp(print)
	if known != nil && known.fit {
		if n := known.node; v.fill(&n, data) {
			return n, nil
		}
	}
	n, err := ParseNode(data)
	switch {
	case err != nil:
	case !found:
		p.store(print, nil)
	case known == nil:
		known = &pattern{node: n, fit: v.prove(data, n), size: len(data)}
		known.node.Load, known.node.LastSeen = 0, time.Time{}
		p.store(print, known)
	}
	return n, err
}

func (p *Parser) store(print fingerprint, known *pattern) {
	p.young[print] = known
	p.size += known.bytes()
}

// lookUp returns what is known of a record, and forgets what did not come for
// long.
func (p *Parser) lookUp(print fingerprint) (known *pattern, found bool) {
	if p.young == nil || p.size > maxPatterns || time.Since(p.rotated) > patternsAge {
		p.young, p.old = make(map[fingerprint]*pattern), p.young
		p.size, p.rotated = 0, time.Now()
	}
	if known, found = p.young[print]; found {
		return known, true
	}
	if known, found = p.old[print]; found {
		p.store(print, known)
	}
	return known, found
}

// variables are the places in a record of what differs from one heartbeat to the
// next, as far as it has them in the usual form: the first of each name.
type variables struct {
	load, lastSeen, timestamp span
}

// A span is a part of a record, from and up to; empty if there is none.
type span struct{ from, to int }

func (s span) of(data []byte) []byte { return data[s.from:s.to] }

func findVariables(data []byte) variables {
	return variables{
		load:      number(data, after(data, `"load"`, `"Load"`)),
		lastSeen:  text(data, after(data, `"lastSeen"`, `"LastSeen"`)),
		timestamp: text(data, after(data, `"timestamp"`, `"Timestamp"`)),
	}
}

// after returns where the value of a name begins, 0 if there is none.
func after(data []byte, names ...string) int {
	for _, name := range names {
		i := bytes.Index(data, []byte(name))
		if i < 0 {
			continue
		}
		i = skipSpace(data, i+len(name))
		if i == len(data) || data[i] != ':' {
			return 0
		}
		return skipSpace(data, i+1)
	}
	return 0
}

func skipSpace(data []byte, i int) int {
	for i < len(data) && (data[i] == ' ' || data[i] == '\t' || data[i] == '\r' || data[i] == '\n') {
		i++
	}
	return i
}

// number returns the number that begins at i.
func number(data []byte, i int) span {
	if i == 0 {
		return span{}
	}
	end := i
	for end < len(data) && (data[end] >= '0' && data[end] <= '9' || bytes.IndexByte([]byte("+-.eE"), data[end]) >= 0) {
		end++
	}
	return span{i, end}
}

// text returns what is between the quotes that begin at i: a time, without an
// escape.
func text(data []byte, i int) span {
	if i == 0 || i == len(data) || data[i] != '"' {
		return span{}
	}
	end := i + 1
	for end < len(data) && (data[end] >= '0' && data[end] <= '9' || data[end] >= 'A' && data[end] <= 'Z' ||
		bytes.IndexByte([]byte(":.+-"), data[end]) >= 0) {
		end++
	}
	if end == len(data) || data[end] != '"' {
		return span{}
	}
	return span{i + 1, end}
}

// inOrder returns the spans as they follow each other.
func (v variables) inOrder() [3]span {
	s := [3]span{v.load, v.lastSeen, v.timestamp}
	for _, swap := range [3]int{0, 1, 0} {
		if s[swap].from > s[swap+1].from {
			s[swap], s[swap+1] = s[swap+1], s[swap]
		}
	}
	return s
}

// fingerprint returns that of the record without its variables.
func (v variables) fingerprint(data []byte) fingerprint {
	var print fingerprint
	for i, seed := range fingerprintSeeds {
		var h maphash.Hash
		h.SetSeed(seed)
		at := 0
		for _, s := range v.inOrder() {
			if s.to == 0 {
				_ = h.WriteByte(0)
				continue
			}
			_ = h.WriteByte(1)
			_, _ = h.Write(data[at:s.from])
			_ = h.WriteByte(0xff) // which is in no record
			at = s.to
		}
		_, _ = h.Write(data[at:])
		print[i] = h.Sum64()
	}
	return print
}

// fill completes the node of a pattern. It reports false where the values are not
// what they should be.
func (v variables) fill(n *Node, data []byte) bool {
	if v.load.to > 0 {
		number := v.load.of(data)
		load, err := strconv.ParseFloat(string(number), 64)
		if err != nil || load < 0 || !json.Valid(number) {
			return false
		}
		n.Load = load
	}
	if v.lastSeen.to > 0 {
		n.LastSeen = parseTime(string(v.lastSeen.of(data)))
	}
	return true
}

// prove reports whether the variables of a record that parses to n are what decides
// about the node's load and time, and nothing else does: with others in their place
// it is the same node with those. What is within quotes, or within a number, has no
// part in how a record is built, so that this holds for every record of the pattern.
func (v variables) prove(data []byte, n Node) bool {
	const load, lastSeen = "98765.25", "2001-02-03T04:05:06Z"
	other := make([]byte, 0, len(data)+64)
	at := 0
	for _, s := range v.inOrder() {
		if s.to == 0 {
			continue
		}
		other = append(other, data[at:s.from]...)
		if s == v.load {
			other = append(other, load...)
		} else {
			other = append(other, lastSeen...)
		}
		at = s.to
	}
	other = append(other, data[at:]...)
	got, err := ParseNode(other)
	if err != nil || got.ID != n.ID || !sameRecord(&got, &n) {
		return false
	}
	want := n
	found := findVariables(other)
	return found.fill(&want, other) && got.Load == want.Load && got.LastSeen.Equal(want.LastSeen) &&
		(v.load.to > 0 || n.Load == 0) && (v.lastSeen.to > 0 || n.LastSeen.IsZero())
}
