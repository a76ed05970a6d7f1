package discovery

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
)

func testList(tb testing.TB) []byte {
	tb.Helper()
	at := time.Date(2025, 10, 10, 12, 0, 0, 0, time.UTC)
	m := savedList{Registry: "r", Written: at, Epoch: "e", Revision: 7, Overrides: at, overrides: map[string]Override{
		"orders-00001": {State: StateDraining}, "é.1": {State: StateUp, Until: at},
	}}
	for i := range 3 {
		n, err := ParseNode(benchRecord(2 - i))
		if err != nil {
			tb.Fatal(err)
		}
		m.nodes = append(m.nodes, savedNode{key: "node." + n.ID, heard: at.Add(-time.Second), node: n})
	}
	var b bytes.Buffer
	if err := m.encode(&b); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

func TestSavedListRoundTrip(t *testing.T) {
	data := testList(t)
	m, err := decodeList(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if len(m.nodes) != 3 || m.nodes[0].node.ID != "orders-00000" || m.nodes[0].key != "node.orders-00000" || m.Epoch != "e" || m.Revision != 7 {
		t.Errorf("read %+v", m)
	}
	if len(m.overrides) != 2 || m.overrides["orders-00001"].State != StateDraining || !m.overrides["é.1"].Until.Equal(m.Written) || !m.Overrides.Equal(m.Written) {
		t.Errorf("read the overrides %+v of %v", m.overrides, m.Overrides)
	}
	want, err := ParseNode(benchRecord(0))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(m.nodes[0].node, want) {
		t.Errorf("a node came back as %+v, want %+v", m.nodes[0].node, want)
	}
	var again bytes.Buffer
	if err := m.encode(&again); err != nil || !bytes.Equal(again.Bytes(), data) {
		t.Errorf("written again, it differs: %v", err)
	}
}

// What was saved by a clock that was years ahead holds a host, and counts as a new name, as if
// it were of now.
func TestSavedListOfAClockAhead(t *testing.T) {
	now := time.Now()
	past, ahead := now.Add(-time.Hour).UTC().Round(0), now.Add(100*365*24*time.Hour).UTC()
	l := savedList{
		hosts: []savedHost{{"a.example.com", "a", past, past}, {"b.example.com", "b", ahead, ahead}, {Host: "c.example.com"}},
		certificates: []Certificate{
			{Name: "a.example.com", First: past, Last: past}, {Name: "b.example.com", First: ahead, Last: ahead},
		},
	}
	var b bytes.Buffer
	if err := l.encode(&b); err != nil {
		t.Fatal(err)
	}
	got, err := decodeList(&b)
	if err != nil {
		t.Fatal(err)
	}
	if got.hosts[0] != l.hosts[0] || got.certificates[0] != l.certificates[0] || got.hosts[2] != l.hosts[2] {
		t.Errorf("what was of the past became %+v, %+v, %+v", got.hosts[0], got.certificates[0], got.hosts[2])
	}
	for _, is := range []time.Time{got.hosts[1].Since, got.hosts[1].Left, got.certificates[1].First, got.certificates[1].Last} {
		if is.Before(now.Round(0)) || is.After(time.Now()) {
			t.Errorf("what was of the future is of %v, want now, which is %v", is, now)
		}
	}
}

// An override that cannot be costs nobody else what was savedNode: it is not written,
// and where a file has it its line alone is lost.
func TestSavedListWithBadOverride(t *testing.T) {
	data := testList(t)
	m, err := decodeList(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", MaxID+1)
	if got := usable(map[string]Override{long: {State: StateDraining}, "a": {State: StateUp}, "b": {State: "odd"}}); len(got) != 1 || got["a"].State != StateUp {
		t.Errorf("of overrides that cannot be, %v are used", got)
	}
	m.overrides[long] = Override{State: StateDraining}
	var b bytes.Buffer
	if err := m.encode(&b); err != nil || !bytes.Equal(b.Bytes(), data) {
		t.Errorf("it is written: %v", err)
	}
	for _, line := range []string{`{"override":"` + long + `","record":{"state":"draining"}}`, `{"override":"b","record":{"state":"odd"}}`} {
		spoilt := bytes.Replace(data, []byte(`{"override":`), []byte(line+"\n"+`{"override":`), 1)
		if m, err := decodeList(bytes.NewReader(withSum(spoilt))); err != nil || len(m.nodes) != 3 || len(m.overrides) != 2 {
			t.Errorf("with %.40s it is read as %+v, %v", line, m, err)
		}
	}
}

// Any byte that is changed, and any that is missing, is noticed.
func TestSavedListIsChecked(t *testing.T) {
	data := testList(t)
	for i := range data {
		if _, err := decodeList(bytes.NewReader(data[:i])); !errors.Is(err, ErrInvalid) {
			t.Fatalf("cut off at %d: %v", i, err)
		}
		spoilt := bytes.Clone(data)
		spoilt[i] ^= 1
		if _, err := decodeList(bytes.NewReader(spoilt)); !errors.Is(err, ErrInvalid) {
			t.Fatalf("byte %d changed from %q: %v", i, data[i], err)
		}
	}
	for _, more := range []string{"\n", "{}\n", string(data)} {
		if _, err := decodeList(strings.NewReader(string(data) + more)); !errors.Is(err, ErrInvalid) {
			t.Errorf("with %q behind it: %v", more, err)
		}
	}
	if _, err := decodeList(strings.NewReader(strings.Repeat("x", 1<<20))); !errors.Is(err, ErrInvalid) {
		t.Errorf("a line without end: %v", err)
	}
}

// FuzzSavedList holds that whatever is read as a warm-start file holds valid nodes
// only, and is written and read again alike.
func FuzzSavedList(f *testing.F) {
	f.Add(testList(f))
	f.Add([]byte(`{"format":"caddy-discovery warm start 1"}` + "\n" + `{"sha256":""}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := decodeList(bytes.NewReader(data))
		if err != nil {
			// The interesting files have the right sum.
			if m, err = decodeList(bytes.NewReader(withSum(data))); err != nil {
				if !errors.Is(err, ErrInvalid) {
					t.Errorf("error %v is not ErrInvalid", err)
				}
				return
			}
		}
		for _, n := range m.nodes {
			if err := n.node.Validate(); err != nil {
				t.Error(err)
			}
		}
		for id, o := range m.overrides {
			if err := errors.Join(ValidateID(id), o.Validate()); err != nil {
				t.Error(err)
			}
		}
		var b bytes.Buffer
		if err := m.encode(&b); err != nil {
			return // a time that JSON cannot hold
		}
		again, err := decodeList(&b)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		if len(again.nodes) != len(m.nodes) || len(again.overrides) != len(m.overrides) || again.Registry != strings.ToValidUTF8(m.Registry, "\ufffd") {
			t.Errorf("read again: %+v, want %+v", again, m)
		}
	})
}

// withSum puts the right checksum behind the lines.
func withSum(data []byte) []byte {
	body := data
	if i := bytes.Index(data, []byte(`{"sha256":`)); i >= 0 {
		body = data[:i]
	}
	if len(body) > 0 && body[len(body)-1] != '\n' {
		body = append(bytes.Clone(body), '\n')
	}
	sum := sha256.Sum256(body)
	return append(bytes.Clone(body), `{"sha256":"`+hex.EncodeToString(sum[:])+`"}`+"\n"...)
}
