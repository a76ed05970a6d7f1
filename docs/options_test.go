package docs_test

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the tables of options.md anew")

// TestOptions holds that the tables of options.md are what the Go documentation of the
// modules says, which is also the manual on Caddy's site, and that none is missing.
func TestOptions(t *testing.T) {
	modules := make(map[string]module)
	for _, folder := range []string{"..", "../backend", "../embedded"} {
		parseModules(t, folder, modules)
	}
	page, err := os.ReadFile("options.md")
	if err != nil {
		t.Fatal(err)
	}
	marked := regexp.MustCompile(`(?s)<!-- options of (\w+) -->\n.*?<!-- end -->`)
	shown := make(map[string]bool)
	written := marked.ReplaceAllStringFunc(string(page), func(part string) string {
		name := marked.FindStringSubmatch(part)[1]
		if modules[name] == nil {
			t.Errorf("options.md: there is no module %s", name)
			return part
		}
		shown[name] = true
		return fmt.Sprintf("<!-- options of %s -->\n%s<!-- end -->", name, modules[name].table())
	})
	for name, m := range modules {
		if !shown[name] && len(m) > 0 {
			t.Errorf("options.md has no table of %s", name)
		}
	}
	switch {
	case written == string(page):
	case *update:
		if err := os.WriteFile("options.md", []byte(written), 0o600); err != nil {
			t.Fatal(err)
		}
	default:
		t.Error("options.md is not what the Go documentation says: make docs writes it anew")
	}
}

// A module has the options of a type that people configure, but for those that it embeds.
type module []option

type option struct{ name, meaning, fallback string }

// parseModules adds the exported types of a package that have fields in JSON, and that
// can be part of a configuration.
func parseModules(t *testing.T, folder string, modules map[string]module) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			decl, ok := d.(*ast.GenDecl)
			if !ok {
				continue
			}
			for _, s := range decl.Specs {
				spec, ok := s.(*ast.TypeSpec)
				if !ok || !spec.Name.IsExported() {
					continue
				}
				if fields, ok := spec.Type.(*ast.StructType); ok {
					modules[spec.Name.Name] = moduleOf(fields)
				}
			}
		}
	}
}

func moduleOf(s *ast.StructType) (m module) {
	for _, field := range s.Fields.List {
		if field.Tag == nil {
			continue
		}
		tag, _ := strconv.Unquote(field.Tag.Value)
		name, _, _ := strings.Cut(reflect.StructTag(tag).Get("json"), ",")
		if name == "" || name == "-" {
			continue
		}
		m = append(m, optionOf(name, field.Doc.Text()))
	}
	return m
}

// optionOf splits what is said of an option from its default, which comes last.
func optionOf(name, doc string) option {
	text := inline(doc)
	if meaning, fallback, ok := cutLast(text, "Default: "); ok {
		return option{name, meaning, strings.TrimSuffix(fallback, ".")}
	}
	if meaning, ok := strings.CutSuffix(text, " Required."); ok {
		return option{name, meaning, "required"}
	}
	return option{name: name, meaning: text}
}

func cutLast(s, separator string) (before, after string, found bool) {
	if i := strings.LastIndex(s, separator); i >= 0 {
		return strings.TrimSpace(s[:i]), s[i+len(separator):], true
	}
	return s, "", false
}

// inline makes one line of Markdown of a doc comment.
func inline(doc string) string {
	text := strings.Join(strings.Fields(doc), " ")
	return strings.NewReplacer("|", `\|`, "*", `\*`, "<", `\<`).Replace(text)
}

// table writes the options of a module.
func (m module) table() string {
	var b strings.Builder
	b.WriteString("| option | meaning | default |\n|---|---|---|\n")
	for _, o := range m {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", o.name, o.meaning, o.fallback)
	}
	return b.String()
}
