package discovery

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// heartbeat fills in the time and the load of a record.
func heartbeat(record string, i int) string {
	at := time.Date(2026, 1, 2, 3, 4, i, 5, time.UTC).Format("2006-01-02T15:04:05.0000000Z")
	return strings.NewReplacer("<time>", at, "<load>", fmt.Sprint(float64(i)/4)).Replace(record)
}

// TestParser has records come again and again: however they are built, the Parser
// says what ParseNode says.
func TestParser(t *testing.T) {
	for name, test := range map[string]struct {
		record string
		fast   bool // it is not read again
	}{
		"usual":               {`{"nodeId":"a","endpoint":"http://h:1","lastSeen":"<time>","load":<load>,"metadata":{"zone":"x"},"isOnline":true}`, true},
		"Pascal":              {`{"NodeId":"a","Endpoint":"http://h:1","LastSeen":"<time>","Load":<load>,"Metadata":null}`, true},
		"spaces":              {`{ "nodeId" : "a", "load" : <load> , "endpoint" : "h:1", "lastSeen" : "<time>" }`, true},
		"pub/sub":             {`{"nodeId":"a","endpoint":"h:1","lastSeen":"<time>","load":<load>,"timestamp":"<time>"}`, true},
		"no load":             {`{"nodeId":"a","endpoint":"h:1","lastSeen":"<time>"}`, true},
		"no time":             {`{"nodeId":"a","endpoint":"h:1","load":<load>}`, true},
		"time is a number":    {`{"nodeId":"a","endpoint":"h:1","lastSeen":<load>}`, false},
		"load comes twice":    {`{"nodeId":"a","endpoint":"h:1","load":<load>,"load":3}`, false},
		"and in other case":   {`{"nodeId":"a","endpoint":"h:1","load":<load>,"LOAD":3}`, false},
		"and in disguise":     {`{"nodeId":"a","endpoint":"h:1","load":<load>,"l\u006fad":3}`, false},
		"load of another":     {`{"x":{"load":<load>},"nodeId":"a","endpoint":"h:1","load":7}`, false},
		"load in metadata":    {`{"nodeId":"a","endpoint":"h:1","metadata":{"load":"<load>"},"load":7}`, false},
		"time in metadata":    {`{"nodeId":"a","endpoint":"h:1","metadata":{"lastSeen":"<time>"},"lastSeen":"2020-01-01T00:00:00Z"}`, false},
		"only there":          {`{"nodeId":"a","endpoint":"h:1","metadata":{"timestamp":"<time>"}}`, false},
		"load is a value":     {`{"nodeId":"a","endpoint":"h:1","metadata":{"kind":"load"},"load":<load>}`, false},
		"load in an id":       {`{"nodeId":"\"load\":1","endpoint":"h:1","load":<load>}`, true},
		"load is a text":      {`{"nodeId":"a","endpoint":"h:1","load":"<load>"}`, false},
		"load is negative":    {`{"nodeId":"a","endpoint":"h:1","load":-<load>1}`, false},
		"load has two points": {`{"nodeId":"a","endpoint":"h:1","load":<load>.1.1}`, false},
		"not closed":          {`{"nodeId":"a","endpoint":"h:1","load":<load>`, false},
		"not UTF-8":           {"{\"nodeId\":\"a\",\"endpoint\":\"h:1\",\"lastSeen\":\"\xff\",\"load\":<load>}", false},
	} {
		t.Run(name, func(t *testing.T) {
			var p Parser
			var last *pattern
			for i := range 6 {
				data := []byte(heartbeat(test.record, i))
				want, wantErr := ParseNode(data)
				got, err := p.Parse(data)
				if fmt.Sprint(err) != fmt.Sprint(wantErr) || !reflect.DeepEqual(got, want) {
					t.Fatalf("%s:\ngot  %+v, %v\nwant %+v, %v", data, got, err, want, wantErr)
				}
				last = p.young[findVariables(data).fingerprint(data)]
			}
			if fast := last != nil && last.fit; fast != test.fast {
				t.Errorf("read once for all: %v, want %v", fast, test.fast)
			}
		})
	}
}

// TestParserTellsApart: what differs in more than time and load is another record.
func TestParserTellsApart(t *testing.T) {
	var p Parser
	for i := range 20 {
		for _, record := range []string{
			`{"nodeId":"a","endpoint":"h:1","load":<load>,"metadata":{"state":"up"}}`,
			`{"nodeId":"a","endpoint":"h:1","load":<load>,"metadata":{"state":"draining"}}`,
			`{"nodeId":"b","endpoint":"h:1","load":<load>,"metadata":{"state":"up"}}`,
			`{"nodeId":"a","endpoint":"h:2","load":<load>,"metadata":{"state":"up"}}`,
		} {
			data := []byte(heartbeat(record, i))
			want, _ := ParseNode(data)
			if got, err := p.Parse(data); err != nil || !reflect.DeepEqual(got, want) {
				t.Fatalf("%s: %+v, %v", data, got, err)
			}
		}
	}
}

// TestParserForgets: what does not come any more is not kept, and what comes is.
func TestParserForgets(t *testing.T) {
	var p Parser
	parse := func(id, i int) {
		t.Helper()
		data := heartbeat(fmt.Sprintf(`{"nodeId":"n%d","endpoint":"h:1","load":<load>,"metadata":{"pad":%q}}`, id, strings.Repeat("x", 1000)), i)
		if _, err := p.Parse([]byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	const ids = 100
	for id := range ids {
		parse(id, 0)
		parse(id, 1)
		parse(id, 2)
	}
	if len(p.young) != ids || p.size < ids*1000 || p.size > ids*1500 {
		t.Fatalf("%d records of %d bytes are kept", len(p.young), p.size)
	}
	for why, turn := range map[string]func(){
		"they are too many": func() { p.size = maxPatterns + 1 },
		"time has passed":   func() { p.rotated = time.Now().Add(-patternsAge - time.Second) },
	} {
		turn()
		parse(0, 3)
		turn()
		parse(0, 4)
		if len(p.young) != 1 || len(p.old) != 1 || p.size > 1500 {
			t.Errorf("%s: %d and %d records of %d bytes are kept, want the one that comes", why, len(p.young), len(p.old), p.size)
		}
		for _, known := range p.young {
			if known == nil || !known.fit {
				t.Errorf("%s: a record that comes all the time is read again", why)
			}
		}
	}
}

// FuzzParser holds the Parser against ParseNode: one record, and then another that
// has other values where a usual one has time and load.
func FuzzParser(f *testing.F) {
	files, err := filepath.Glob("testdata/wire/*.json")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(data), "1.5", "2020-01-01T00:00:00Z")
	}
	f.Add(`{"nodeId":"a","endpoint":"h:1","load":1,"metadata":{"load":"2"},"lastSeen":"x","lastſeen":"y"}`, "1e999", `x","load":"1`)
	f.Fuzz(func(t *testing.T, record, load, at string) {
		var p Parser
		parse := func(data string) {
			want, wantErr := ParseNode([]byte(data))
			got, err := p.Parse([]byte(data))
			if fmt.Sprint(err) != fmt.Sprint(wantErr) || !reflect.DeepEqual(got, want) {
				t.Fatalf("%s:\ngot  %+v, %v\nwant %+v, %v", data, got, err, want, wantErr)
			}
		}
		parse(record)
		parse(record)
		parse(record)
		v := findVariables([]byte(record))
		other, from := "", 0
		for _, s := range v.inOrder() {
			if s.to > 0 {
				value := at
				if s == v.load {
					value = load
				}
				other, from = other+record[from:s.from]+value, s.to
			}
		}
		parse(other + record[from:])
	})
}
