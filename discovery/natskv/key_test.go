package natskv

import (
	"slices"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func TestKey(t *testing.T) {
	t.Parallel()
	config := Config{KeyPrefix: DefaultKeyPrefix}
	for id, want := range map[string]string{
		"orders-1":               "node.orders-1",
		"a_B-9":                  "node.a_B-9",
		"a.b":                    "node.a=2Eb",
		"a=b":                    "node.a=3Db",
		"a/b c":                  "node.a=2Fb=20c",
		"*.>":                    "node.=2A=2E=3E",
		"é":                      "node.=C3=A9",
		strings.Repeat(".", 256): "node." + strings.Repeat("=2E", 256),
	} {
		key := config.key(id)
		if key != want {
			t.Errorf("key of %q is %q, want %q", id, key, want)
		}
		if got := config.idOf(key); got != id || !validKey(key) || !config.names(key, id) {
			t.Errorf("key %q names %q, want %q", key, got, id)
		}
	}
}

// What others write is read as it stands.
func TestForeignKey(t *testing.T) {
	t.Parallel()
	config := Config{KeyPrefix: DefaultKeyPrefix}
	for key, id := range map[string]string{
		"orders-1":     "orders-1", // bare
		"node.a.b":     "a.b",
		"a.b/c":        "a.b/c",
		"node.a=":      "a=",
		"node.a=2":     "a=2",
		"node.a=2e":    "a=2e",  // lower case is not ours
		"node.a=41":    "a=41",  // "A" would have been kept
		"node.a=FFb":   "a=FFb", // no UTF-8
		"node.a=0Ab":   "a=0Ab", // a control character
		"node.":        "node.",
		"nodes.a":      "nodes.a",
		"node.node.=2": "node.=2",
	} {
		if got := config.idOf(key); got != id {
			t.Errorf("key %q names %q, want %q", key, got, id)
		}
	}
	// A key that may be read in two ways fits both.
	for _, id := range []string{"a.b", "a=2Eb"} {
		if !config.names("node.a=2Eb", id) {
			t.Errorf("key node.a=2Eb does not fit %q", id)
		}
	}
}

func TestKeysOf(t *testing.T) {
	t.Parallel()
	config := Config{KeyPrefix: DefaultKeyPrefix}
	for id, want := range map[string][]string{
		"x":      {"node.x", "x"},
		"a.b":    {"node.a=2Eb", "node.a.b", "a=2Eb", "a.b"},
		"*":      {"node.=2A", "=2A"}, // no wildcard is ever a key
		"node.x": {"node.node=2Ex", "node.node.x", "node=2Ex", "node.x"},
	} {
		if got := config.keysOf(id); !slices.Equal(got, want) {
			t.Errorf("keys of %q are %q, want %q", id, got, want)
		}
	}
}

func FuzzKey(f *testing.F) {
	for _, id := range []string{"orders-1", "a.b", "a=2Eb", "*.>", "é", "=", "node.x", ""} {
		f.Add(id)
	}
	config := Config{KeyPrefix: DefaultKeyPrefix}
	f.Fuzz(func(t *testing.T, s string) {
		// As a key of whomever: some id, and that id names the key.
		if validKey(s) {
			if id := config.idOf(s); id == "" || !config.names(s, id) {
				t.Errorf("key %q names %q", s, id)
			}
		}
		// As an id of ours.
		if discovery.ValidateID(s) != nil {
			return
		}
		key := config.key(s)
		if !validKey(key) {
			t.Fatalf("id %q has the key %q, which no bucket takes", s, key)
		}
		if got := config.idOf(key); got != s {
			t.Errorf("id %q has the key %q, which names %q", s, key, got)
		}
		if !slices.Contains(config.keysOf(s), key) {
			t.Errorf("the keys of %q lack %q", s, key)
		}
	})
}
