package discovery_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Whatever is wrong with a record has a word of its own, however often it is wrapped.
func TestFaultOf(t *testing.T) {
	records := map[discovery.Fault]string{
		discovery.FaultLoad:     `{"nodeId":"a","endpoint":"h:1","load":-1}`,
		discovery.FaultMetadata: `{"nodeId":"a","endpoint":"h:1","metadata":{"":"x"}}`,
		discovery.FaultID:       `{"nodeId":"","endpoint":"h:1"}`,
		discovery.FaultEndpoint: `{"nodeId":"a","endpoint":"h"}`,
		discovery.FaultRecord:   `[]`,
	}
	for want, record := range records {
		_, err := discovery.ParseNode([]byte(record))
		for range 3 {
			if got := discovery.FaultOf(err); got != want || !errors.Is(err, discovery.ErrInvalid) || !discovery.Explained(err) {
				t.Errorf("%s: fault %q of %v, want %q", record, got, err, want)
			}
			err = discovery.Forbid(fmt.Errorf("a bucket: %w", err))
		}
		if !errors.Is(err, discovery.ErrForbidden) || errors.Is(err, discovery.ErrBroken) {
			t.Errorf("%s: %v", record, err)
		}
	}
	samples, err := filepath.Glob("testdata/wire/invalid-*.json")
	if err != nil || len(samples) == 0 {
		t.Fatal("no samples", err)
	}
	for _, sample := range samples {
		data, err := os.ReadFile(sample)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = discovery.ParseNode(data); discovery.FaultOf(err) == discovery.FaultOther {
			t.Errorf("%s: %v has no word", sample, err)
		}
	}
	// What a text says decides nothing.
	for _, err := range []error{errors.New("invalid endpoint"), fmt.Errorf("%w endpoint", discovery.ErrInvalid)} {
		if got := discovery.FaultOf(err); got != discovery.FaultOther {
			t.Errorf("%v has the word %q", err, got)
		}
	}
	if err := discovery.Invalidf(discovery.FaultKey, "record: %w", io.EOF); err.Error() != "invalid record: EOF" || !errors.Is(err, io.EOF) {
		t.Errorf("made %v", err)
	}
	if !discovery.Explained(fmt.Errorf("%w: a test", discovery.ErrFull)) || discovery.Explained(io.EOF) || discovery.Explained(nil) {
		t.Error("what is explained is not known")
	}
	if got := fmt.Sprint(discovery.Faults()); got != "[endpoint full id key load metadata other record]" {
		t.Errorf("faults %s", got)
	}
}
