package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestNamedRegistry looks at a registry by the name that it has in a Caddyfile, and in the
// JSON which that comes to.
func TestNamedRegistry(t *testing.T) {
	t.Parallel()
	server := newKV(t).(*kv)
	server.put("a", camel("a", "http://127.0.0.1:80", `"service":"orders"`))
	file := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(file, []byte(`{
	discovery {
		registry main `+server.server.URL()+` {
			key_prefix node.
		}
		registry missing `+server.server.URL()+`/missing
	}
}
`), 0o600); err != nil {
		t.Fatal(err)
	}

	out, stderr, code := runCommand(t, nil, "nodes", "--json", "--config", file, "--registry", "main")
	var nodes []struct{ ID string }
	if err := json.Unmarshal([]byte(out), &nodes); err != nil || code != 0 || len(nodes) != 1 || nodes[0].ID != "a" {
		t.Errorf("nodes: %d %v %s%s", code, err, out, stderr)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--config", file}, "want one of main, missing"},
		{[]string{"--config", file, "--registry", "mian"}, `there is no registry "mian"; declared are main, missing`},
		{[]string{"--config", file, "--registry", "missing"}, "missing"}, // and is not created
		{[]string{"--config", file, "--registry", "nats://h"}, "or a URL without --config"},
		{[]string{"--config", file, "--registry", "main", "--user", "joe"}, "want no flags for them"},
		{[]string{"--config", file + "x", "--registry", "main"}, "no such file"},
		{[]string{"--registry", "main"}, "--config wants its file"},
	} {
		if out, stderr, code := runCommand(t, nil, append([]string{"nodes"}, c.args...)...); code != 1 || !strings.Contains(stderr, c.want) {
			t.Errorf("%q: %d %s%s, want %s", c.args, code, out, stderr, c.want)
		}
	}
}
