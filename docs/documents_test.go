// Package docs holds the documents to what is there: each Caddyfile in them is adapted and
// provisioned, each command is parsed, each target, path and link exists.
package docs_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	plugin "github.com/caddy-discovery/caddy-discovery"
	_ "github.com/caddy-discovery/caddy-discovery/embedded"
)

// A document is one of those that people read.
type document struct {
	path   string // from the top of the checkout
	text   string
	blocks []block
}

// A block is code, fenced or indented.
type block struct {
	language string // "" where it is indented
	line     int
	text     string
}

// documents returns all that there are.
func documents(t *testing.T) []document {
	t.Helper()
	var all []document
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md", "examples/*/README.md", "integration/README.md"} {
		paths, err := filepath.Glob("../" + pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, document{strings.TrimPrefix(path, "../"), string(text), blocksOf(string(text))})
		}
	}
	return all
}

func blocksOf(text string) (blocks []block) {
	var open *block // the one that the line may belong to
	end := func() {
		if open != nil {
			blocks = append(blocks, *open)
			open = nil
		}
	}
	for i, line := range strings.Split(text, "\n") {
		fence, fenced := strings.CutPrefix(strings.TrimSpace(line), "```")
		indented, isIndented := strings.CutPrefix(line, "    ")
		switch {
		case open != nil && open.language != "":
			if fenced {
				end()
			} else {
				open.text += line + "\n"
			}
		case fenced:
			end()
			open = &block{language: fence + " ", line: i + 1}
		case isIndented:
			if open == nil {
				open = &block{line: i + 1}
			}
			open.text += indented + "\n"
		case strings.TrimSpace(line) != "":
			end()
		}
	}
	end()
	for i := range blocks {
		blocks[i].language = strings.TrimSpace(blocks[i].language)
	}
	return blocks
}

// grammar is what an overview of options has in place of values.
var grammar = regexp.MustCompile(`<[a-z]|\[<|…`)

// TestCaddyfiles holds that each Caddyfile in a document, and each part of one, is
// accepted. Overviews with <placeholders> are none.
func TestCaddyfiles(t *testing.T) {
	for name, content := range map[string]string{"REDIS_PASSWORD": "x", "NATS_PASSWORD": "x", "STICKY_SECRET": "x"} {
		t.Setenv(name, content)
	}
	found := 0
	for _, d := range documents(t) {
		for _, b := range d.blocks {
			if b.language != "caddyfile" || grammar.MatchString(b.text) {
				continue
			}
			found++
			if err := provision(whole(b.text)); err != nil {
				t.Errorf("%s:%d: %v", d.path, b.line, err)
			}
		}
	}
	if found < 2 {
		t.Errorf("%d Caddyfiles were found in the documents", found)
	}
	for _, pattern := range []string{"../Caddyfile.example", "../examples/*/Caddyfile"} {
		paths, err := filepath.Glob(pattern)
		if err != nil || len(paths) == 0 {
			t.Fatalf("%s: %v, %d files", pattern, err, len(paths))
		}
		for _, path := range paths {
			if path == "../examples/events/Caddyfile" {
				continue // it has a handler of its own, and a test beside it
			}
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := provision(string(text)); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
	}
}

// TestManifest holds the same of the Caddyfile in the manifests of Kubernetes.
func TestManifest(t *testing.T) {
	manifests, err := os.ReadFile("../examples/kubernetes/fleet.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(manifests), "Caddyfile: |\n")
	text, _, ends := strings.Cut(rest, "\n---")
	if !found || !ends {
		t.Fatal("there is no Caddyfile in the manifests")
	}
	if err := provision(strings.ReplaceAll("\n"+text, "\n    ", "\n")); err != nil {
		t.Error(err)
	}
}

// around is what a part of a Caddyfile stands in, by its first word.
var around = map[string][2]string{
	"dynamic":       {":80 {\nreverse_proxy {\n", "}\n}\n"},
	"reverse_proxy": {":80 {\n", "}\n"},
	"registrar":     {"{\n", "}\n"},
	"discovery":     {"{\n", "}\n"},
	"nats_server":   {"{\n", "}\n"},
	"on_demand_tls": {"{\n", "}\n"},
}

func whole(part string) string {
	for line := range strings.Lines(part) {
		word, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if word == "" || word[0] == '#' {
			continue
		}
		a := around[word]
		return a[0] + part + a[1]
	}
	return part
}

// provision adapts a Caddyfile and provisions what it says, without starting it.
func provision(text string) error {
	adapter := caddyfile.Adapter{ServerType: httpcaddyfile.ServerType{}}
	raw, _, err := adapter.Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return err
	}
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	var config caddy.Config
	if err := decoder.Decode(&config); err != nil {
		return err
	}
	return caddy.Validate(&config)
}

// command is a call of caddy discovery, in code or in a sentence. What comes behind a
// comment, a pipe or another command is not of it.
var command = regexp.MustCompile("caddy discovery( [^`\n#|;&)]*)")

// TestCommands holds that each call of caddy discovery in a document is one: its command,
// flags and number of arguments.
func TestCommands(t *testing.T) {
	found := 0
	for _, d := range documents(t) {
		for _, m := range command.FindAllStringSubmatch(d.text, -1) {
			words := strings.Fields(m[1])
			if len(words) == 0 || !regexp.MustCompile(`^[a-z]+$`).MatchString(words[0]) || slices.Contains(words, "…") {
				continue // of the command as such
			}
			found++
			if err := parse(words); err != nil {
				t.Errorf("%s: caddy discovery%s: %v", d.path, m[1], err)
			}
		}
	}
	if found == 0 {
		t.Error("no command was found in the documents")
	}
}

// parse parses the words behind caddy discovery.
func parse(words []string) error {
	root := &cobra.Command{Use: "discovery"}
	caddycmd.Commands()["discovery"].CobraFunc(root)
	cmd, rest, err := root.Find(words)
	if err != nil {
		return err
	}
	if cmd == root {
		return errors.New("there is no such command")
	}
	if len(rest) == 0 {
		return nil // the command as such
	}
	if err := cmd.ParseFlags(rest); errors.Is(err, pflag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	return cmd.ValidateArgs(cmd.Flags().Args())
}

// TestTargetsAndPaths holds that each target of make and each path of the admin API that
// a document names is there.
func TestTargetsAndPaths(t *testing.T) {
	makefile, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	targets := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^([a-z/ -]+):`).FindAllStringSubmatch(string(makefile), -1) {
		for name := range strings.FieldsSeq(m[1]) {
			targets[name] = true
		}
	}
	routes := make(map[string]bool)
	for _, route := range new(plugin.Admin).Routes() {
		routes[strings.TrimSuffix(route.Pattern, "/")] = true
	}
	target := regexp.MustCompile("(?m)(?:`|^|=\\S+ )make ([a-z/-]+)")
	path := regexp.MustCompile("(?:GET |`|:2019)(/discovery/[a-z]+)")
	for _, d := range documents(t) {
		for _, m := range target.FindAllStringSubmatch(d.text, -1) {
			if !targets[m[1]] {
				t.Errorf("%s: make %s: there is no such target", d.path, m[1])
			}
		}
		for _, m := range path.FindAllStringSubmatch(d.text, -1) {
			if !routes[m[1]] {
				t.Errorf("%s: %s: the admin API has only %v", d.path, m[1], slices.Sorted(maps.Keys(routes)))
			}
		}
	}
}

// TestTestsNamed holds that each test and benchmark that a document names is there.
func TestTestsNamed(t *testing.T) {
	defined := make(map[string]bool)
	function := regexp.MustCompile(`(?m)^func ((?:Test|Benchmark|Fuzz)[A-Z]\w*)\(`)
	err := filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name := entry.Name(); entry.IsDir() && (name == "node_modules" || name != ".." && strings.HasPrefix(name, ".")) {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		source, err := os.ReadFile(path)
		for _, m := range function.FindAllStringSubmatch(string(source), -1) {
			defined[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range documents(t) {
		for _, m := range regexp.MustCompile("`((?:Test|Benchmark|Fuzz)[A-Z]\\w*)").FindAllStringSubmatch(d.text, -1) {
			if !defined[m[1]] {
				t.Errorf("%s names %s, which is nowhere", d.path, m[1])
			}
		}
	}
}

// TestLinks holds that what a document links to in this checkout is there, the heading
// too.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	anchors := make(map[string]map[string]bool)
	all := documents(t)
	for _, d := range all {
		anchors[d.path] = headings(d)
	}
	for _, d := range all {
		for _, m := range link.FindAllStringSubmatch(d.text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			file, anchor, _ := strings.Cut(m[1], "#")
			path := d.path
			if file != "" {
				path = filepath.Join(filepath.Dir(d.path), file)
			}
			if _, err := os.Stat(filepath.Join("..", path)); err != nil {
				t.Errorf("%s links to %s: %v", d.path, m[1], err)
			} else if anchor != "" && !anchors[path][anchor] {
				t.Errorf("%s links to %s: there is no such heading", d.path, m[1])
			}
		}
	}
}

// headings returns the anchors of a document's headings.
func headings(d document) map[string]bool {
	anchors := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^#+ (.+)$`).FindAllStringSubmatch(d.text, -1) {
		anchor := strings.ToLower(m[1])
		anchor = regexp.MustCompile(`[^\p{L}\p{N}\- _]`).ReplaceAllString(anchor, "")
		anchors[strings.ReplaceAll(anchor, " ", "-")] = true
	}
	return anchors
}
