package discovery

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
	"unique"
)

// ParseNode reads a record. Writers in many languages make them, and what such a
// record can only mean is taken so: a scalar where a text is wanted by its JSON
// text, a number in quotes as the number, null as absent, a byte order mark as
// nothing, and a reserved metadata key in another case as the key itself where that
// is missing. A metadata value that is an object or an array is left out, see
// [Node].LeftOut. Names match without regard to case; of a name that stands twice the
// last one counts, and the pairs of two metadata add up.
//
// The error wraps [ErrInvalid] and says what is wrong with the record; it quotes no
// more than a few characters of it. Equal strings of many records are stored once.
func ParseNode(data []byte) (Node, error) {
	if len(data) > MaxRecord {
		return Node{}, Invalidf(FaultRecord, "record: %d bytes, want at most %d", len(data), MaxRecord)
	}
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	// Only an object is a record; null would parse into an empty one.
	if trimmed := bytes.TrimLeft(data, " \t\r\n"); len(trimmed) == 0 || trimmed[0] != '{' {
		return Node{}, Invalidf(FaultRecord, "record: want a JSON object")
	}
	if !utf8.Valid(data) {
		return Node{}, Invalidf(FaultRecord, "record: it is not UTF-8")
	}
	var w wireRecord
	// A metadata that is no object is the only value of which the decoder complains,
	// and it goes on after it.
	var mismatch *json.UnmarshalTypeError
	if err := json.Unmarshal(data, &w); err != nil && !errors.As(err, &mismatch) {
		return Node{}, Invalidf(FaultRecord, "record: it is no JSON: %w", err)
	}
	var n Node
	id, err := w.NodeID.scalar(FaultID, "node id")
	if err != nil {
		return Node{}, err
	}
	if err := ValidateID(id); err != nil {
		return Node{}, err
	}
	n.ID = strings.Clone(id)
	if mismatch != nil {
		return Node{ID: n.ID}, Invalidf(FaultMetadata, "metadata: have %s, want an object such as {\"service\":\"orders\"}", Clip(mismatch.Value))
	}
	if err := w.complete(&n); err != nil {
		return Node{ID: n.ID}, err
	}
	return n, nil
}

// wireRecord is a record as others write it: each value is judged only once the id
// of the node is known, so that a rejection can name it.
type wireRecord struct {
	NodeID   value            `json:"nodeId"`
	Endpoint value            `json:"endpoint"`
	LastSeen value            `json:"lastSeen"`
	Load     value            `json:"load"`
	Metadata map[string]value `json:"metadata"`
}

// complete fills in what a record says of a node beside its id.
func (w *wireRecord) complete(n *Node) error {
	endpoint, err := w.Endpoint.scalar(FaultEndpoint, "endpoint")
	if err != nil {
		return err
	}
	if n.Endpoint, err = ParseEndpoint(endpoint); err != nil {
		return err
	}
	if n.Load, err = w.Load.number(FaultLoad, "load"); err != nil {
		return err
	}
	n.LastSeen = parseTime(w.LastSeen.text)
	for k, v := range w.Metadata {
		switch v.kind {
		case kindAbsent:
		case kindObject, kindArray:
			n.LeftOut = append(n.LeftOut, Clip(visible(Clip(k))))
		default:
			if n.Metadata == nil {
				n.Metadata = make(map[string]string, len(w.Metadata))
			}
			n.Metadata[unique.Make(k).Value()] = unique.Make(v.text).Value()
		}
	}
	if err := n.Validate(); err != nil {
		return err
	}
	slices.Sort(n.LeftOut)
	// What is cut off is not kept in memory either.
	n.LeftOut = slices.Clone(n.LeftOut[:min(len(n.LeftOut), maxLeftOut)])
	addReserved(n.Metadata)
	return nil
}

// maxLeftOut is how many keys of a record that are left out are kept.
const maxLeftOut = 8

// reservedKeys are the metadata keys with a meaning of their own.
var reservedKeys = []string{KeyService, KeyZone, KeyVersion, KeyWeight, KeyState, KeyInstance, KeyLease, KeyRole, KeyHosts, KeyPaths, KeyCapacity}

// addReserved adds each reserved key that is missing and stands there in another
// case. Of several such spellings the first by its bytes counts. The pair stays under
// its own spelling, too, for filters that name that, unless there is no room for both.
func addReserved(pairs map[string]string) {
	var spelled map[string]string
	for k := range pairs {
		for _, reserved := range reservedKeys {
			if len(k) != len(reserved) || k == reserved || !strings.EqualFold(k, reserved) {
				continue
			}
			if first, ok := spelled[reserved]; !ok || k < first {
				if spelled == nil {
					spelled = make(map[string]string)
				}
				spelled[reserved] = k
			}
		}
	}
	for reserved, k := range spelled {
		if _, ok := pairs[reserved]; ok {
			continue
		}
		pairs[reserved] = pairs[k]
		if len(pairs) > MaxMetadata {
			delete(pairs, k)
		}
	}
}

// kind is what a JSON value is, in the words of a record.
type kind string

const (
	kindAbsent  kind = "" // or null
	kindString  kind = "a string"
	kindNumber  kind = "a number"
	kindBoolean kind = "true or false"
	kindObject  kind = "an object"
	kindArray   kind = "an array"
)

// A value is one value of a record. A null leaves it as it is.
type value struct {
	kind kind
	text string // of a scalar
}

// UnmarshalJSON reads the value, whatever it is.
func (v *value) UnmarshalJSON(data []byte) error {
	switch data[0] {
	case 'n':
		return nil
	case '{':
		*v = value{kind: kindObject}
	case '[':
		*v = value{kind: kindArray}
	case 't', 'f':
		*v = value{kindBoolean, string(data)}
	case '"':
		s := data[1 : len(data)-1]
		if bytes.IndexByte(s, '\\') >= 0 {
			v.kind = kindString
			return json.Unmarshal(data, &v.text)
		}
		*v = value{kindString, string(s)}
	default:
		*v = value{kindNumber, string(data)}
	}
	return nil
}

// scalar returns the text of a scalar, "" if it is absent.
func (v value) scalar(fault Fault, name string) (string, error) {
	if v.kind == kindObject || v.kind == kindArray {
		return "", Invalidf(fault, "%s: have %s, want a string", name, v.kind)
	}
	return v.text, nil
}

// number returns a number, also one in quotes, 0 if it is absent.
func (v value) number(fault Fault, name string) (float64, error) {
	const want = "want a finite number ≥ 0"
	switch v.kind {
	case kindAbsent:
		return 0, nil
	case kindNumber, kindString:
		number, err := strconv.ParseFloat(strings.TrimSpace(v.text), 64)
		if err != nil {
			return 0, Invalidf(fault, "%s %s: %s", name, strconv.Quote(Clip(v.text)), want)
		}
		return number, nil
	default:
		return 0, Invalidf(fault, "%s: have %s, %s", name, v.kind, want)
	}
}

// parseTime reads a writer's time of any usual form, zero if it is none.
func parseTime(s string) time.Time {
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC()
		}
	}
	return time.Time{}
}
