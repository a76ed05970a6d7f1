package filebackend

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/discovery/registries"
)

// TestConformance holds the registry against the suite that every backend passes.
func TestConformance(t *testing.T) {
	discoverytest.Run(t, func(t *testing.T) discoverytest.Harness {
		h := harness{filepath.Join(t.TempDir(), "fleet")}
		if err := os.Mkdir(h.folder, 0o700); err != nil {
			t.Fatal(err)
		}
		return h
	})
}

// A harness is a registry in a folder that may be taken away.
type harness struct{ folder string }

func (h harness) url() string { return "file://" + filepath.Join(h.folder, "nodes.json") }

func (h harness) Open(t *testing.T) discovery.Registry {
	t.Helper()
	r, err := Open(h.url(), 5*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (h harness) Break(t *testing.T)   { h.rename(t, h.folder, h.folder+"-away") }
func (h harness) Restore(t *testing.T) { h.rename(t, h.folder+"-away", h.folder) }

func (h harness) rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func (h harness) Write(t *testing.T, id, record string) {
	t.Helper()
	if err := h.Open(t).(*Registry).change(t.Context(), func(c *contents) bool {
		return c.put(id, json.RawMessage(record))
	}); err != nil {
		t.Fatal(err)
	}
}

func TestOpen(t *testing.T) {
	r, err := registries.Open("FILE:///run/fleet/../fleet/nodes.json")
	if err != nil || r.String() != "file:///run/fleet/nodes.json" {
		t.Errorf("%v, %v", r, err)
	}
	for _, url := range []string{"", "file://", "file://nodes.json", "http:///nodes.json", "/nodes.json"} {
		if _, err := Open(url, 0); !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("%q: %v", url, err)
		}
	}
}

// TestHostileFile holds that whatever stands in the file, the registry says so, and
// panics neither on reading nor on writing.
func TestHostileFile(t *testing.T) {
	h := harness{t.TempDir()}
	node := discovery.Node{ID: "a", Endpoint: endpoint(t, "http://10.0.0.7:5001")}
	for content, want := range map[string]error{
		"":                                  discovery.ErrInvalid,
		"null":                              nil,
		"[]":                                discovery.ErrInvalid,
		`{"epoch":1}`:                       discovery.ErrInvalid,
		`{"records":null,"overrides":null}`: nil,
		`{"records":{"a":{}},"overrides":{"a":{"state":"elsewhere"}}}`: nil,
		strings.Repeat(" ", maxSize+1):                                 discovery.ErrFull,
	} {
		if err := os.WriteFile(filepath.Join(h.folder, "nodes.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		r := h.Open(t).(*Registry)
		overrides, err := r.Overrides(t.Context())
		if !errors.Is(err, want) || len(overrides) != 0 {
			t.Errorf("%.40q: %v, %v, want %v", content, overrides, err, want)
		}
		if err := r.Announce(t.Context(), node); !errors.Is(err, want) {
			t.Errorf("%.40q: announcing: %v, want %v", content, err, want)
		}
	}
}

// TestKeyOfAnotherNode holds that a record speaks for no node but its own.
func TestKeyOfAnotherNode(t *testing.T) {
	h := harness{t.TempDir()}
	h.Write(t, "a", `{"nodeId":"b","endpoint":"http://10.0.0.7:5001"}`)
	ctx, cancel := context.WithCancel(t.Context())
	var rejected error
	_ = h.Open(t).Watch(ctx, func(e discovery.Event) {
		switch e.Type {
		case discovery.Rejected:
			rejected = e.Err
		case discovery.Put:
			t.Errorf("node %q was listed", e.ID)
		case discovery.Synced:
			cancel()
		}
	})
	if !errors.Is(rejected, discovery.ErrForbidden) {
		t.Errorf("the record was rejected with %v", rejected)
	}
}

// TestExpiry holds that the file does not grow by records that nobody renews.
func TestExpiry(t *testing.T) {
	h := harness{t.TempDir()}
	r := h.Open(t).(*Registry)
	if err := r.change(t.Context(), func(c *contents) bool {
		c.put("old", json.RawMessage(`{}`))
		old := c.Records["old"]
		old.Written = old.Written.Add(-expiry - time.Second)
		c.Records["old"] = old
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if err := r.Announce(t.Context(), discovery.Node{ID: "new", Endpoint: endpoint(t, "http://10.0.0.7:5001")}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(r.path)
	if err != nil || strings.Contains(string(data), "old") || !strings.Contains(string(data), "new") {
		t.Errorf("the file holds %s: %v", data, err)
	}
}

func endpoint(t *testing.T, url string) discovery.Endpoint {
	t.Helper()
	e, err := discovery.ParseEndpoint(url)
	if err != nil {
		t.Fatal(err)
	}
	return e
}
