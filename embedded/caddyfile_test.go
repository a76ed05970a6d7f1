package embedded

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
)

func adapt(caddyfile string) (string, error) {
	out, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Caddyfile"})
	return string(out), err
}

// Each file under testdata/adapt is a Caddyfile, a line of dashes and the JSON
// that it means.
func TestAdapt(t *testing.T) {
	files, err := filepath.Glob("testdata/adapt/*.caddyfiletest")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			in, want, ok := strings.Cut(string(data), "\n----------\n")
			if !ok {
				t.Fatal("there is no line of dashes")
			}
			out, err := adapt(in)
			if err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			if err := json.Indent(&got, []byte(out), "", "\t"); err != nil {
				t.Fatal(err)
			}
			if got.String() != strings.TrimSpace(want) {
				t.Errorf("adapted to\n%s\nwant\n%s", got.String(), want)
			}
		})
	}
}

func TestAdaptErrors(t *testing.T) {
	block := func(line string) string { return "{\n\tnats_server {\n\t\t" + line + "\n\t}\n}\n" }
	for _, c := range []struct {
		name, caddyfile string
		line            string
		parts           []string
	}{
		{"argument", "{\n\tnats_server 127.0.0.1:4222\n}\n", "2", []string{"nats_server", `"127.0.0.1:4222"`, "want a block"}},
		{"twice", "{\n\tnats_server\n\tnats_server\n}\n", "3", []string{"nats_server", "only once"}},
		{"unknown", block("port 4222"), "3", []string{`"port"`, "listen, max_store, store, tls, user"}},
		{"repeated", block("listen 127.0.0.1:1\n\t\tlisten 127.0.0.1:2"), "4", []string{"listen", "given twice"}},
		{"listen without", block("listen"), "3", []string{"listen <host:port>", "127.0.0.1:4222"}},
		{"listen nowhere", block("listen 127.0.0.1"), "3", []string{"listen", `"127.0.0.1"`, "127.0.0.1:4222"}},
		{"listen no port", block("listen 127.0.0.1:0"), "3", []string{"listen", "1 to 65535"}},
		{"listen to all", block("max_store 1MiB\n\t\tlisten :4222\n\t\tstore a"), "4", []string{"set a user and password"}},
		{"store two", block("store a b"), "3", []string{"store <dir>"}},
		{"size zero", block("max_store 0"), "3", []string{"max_store", `"0"`, "above 0"}},
		{"user one", block("user fleet"), "3", []string{"user <name> <password>"}},
		{"user three", block("user fleet secret more"), "3", []string{"user <name> <password>"}},
		{"user empty", block(`user fleet ""`), "3", []string{"user", "empty", "<name> <password>"}},
		{"tls one", block("tls cert.pem"), "3", []string{"tls <certificate> <key>"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := adapt(c.caddyfile)
			if err == nil {
				t.Fatal("it is accepted")
			}
			want(t, err, append(c.parts, "Caddyfile:"+c.line)...)
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("error %q tells the password", err)
			}
		})
	}
}
