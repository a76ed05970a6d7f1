package caddyblock

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// Literals returns a Block.Check for what a Caddyfile made of a module: the error that
// its own check will have when the config is loaded. What global placeholders will
// come to is not known yet, so that an error counts only if it is there whatever
// stands for them. Of the unexpanded fields the module replaces no placeholders then.
func Literals[T any](module *T, check func(*T) error, unexpanded ...string) func() error {
	return func() error {
		encoded, err := json.Marshal(module)
		if err != nil {
			return err
		}
		var first error
		for _, s := range standIns {
			s.unexpanded = unexpanded
			candidate, err := fill[T](&s, encoded)
			if err != nil {
				return err
			}
			if err = check(candidate); err == nil {
				return nil
			}
			first = cmp.Or(first, err)
			if !s.found {
				break // nothing depends on a placeholder
			}
		}
		return first
	}
}

// A standIn is what may stand for placeholders.
type standIn struct {
	whole   string // for a text that begins with one
	part    string // for one inside of a text
	without bool   // instead, a text with one inside is left out
	url     string // for a URL that begins with one; none: it is left out

	unexpanded []string
	found      bool // there was a placeholder
}

// standIns are tried one after the other. Where a number, a name or a part of a URL
// is wanted, "1" is one.
var standIns = func() (all []standIn) {
	for _, url := range []string{"", "redis+sentinel://1", "redis+cluster://1"} {
		for _, whole := range []string{"1", ""} {
			all = append(all,
				standIn{whole: whole, part: "1", url: url},
				standIn{whole: whole, part: "", url: url},
				standIn{whole: whole, without: true, url: url})
		}
	}
	return all
}()

// fill returns the module that encoded comes to with the stand-in.
func fill[T any](s *standIn, encoded []byte) (*T, error) {
	var tree any
	if err := json.Unmarshal(encoded, &tree); err != nil {
		return nil, err
	}
	filled, err := json.Marshal(s.tree("", tree))
	if err != nil {
		return nil, err
	}
	module := new(T)
	if err := json.Unmarshal(filled, module); err != nil {
		return nil, fmt.Errorf("reading what it came to: %w", err)
	}
	return module, nil
}

// tree replaces the placeholders in a tree of JSON.
func (s *standIn) tree(field string, tree any) any {
	switch tree := tree.(type) {
	case map[string]any:
		for k, v := range tree {
			if !slices.Contains(s.unexpanded, k) {
				tree[k] = s.tree(k, v)
			}
		}
	case []any:
		filled := tree[:0]
		for _, v := range tree {
			if v = s.tree(field, v); field != "urls" || v != "" {
				filled = append(filled, v)
			}
		}
		return filled
	case string:
		return s.text(field, tree)
	}
	return tree
}

// text replaces the placeholders in a text of a field.
func (s *standIn) text(field, text string) string {
	begins := strings.HasPrefix(text, "{")
	value, found := s.part, false
	if begins {
		value = s.whole
	}
	repl := caddy.NewEmptyReplacer()
	repl.Map(func(key string) (any, bool) {
		global := isGlobal(key)
		found = found || global
		return value, global
	})
	filled := repl.ReplaceKnown(text, "")
	s.found = s.found || found
	switch {
	case !found:
		return text // as it is, with what may be escaped in it
	case field == "urls" && begins:
		return s.url
	case !begins && s.without:
		return ""
	}
	return filled
}

// isGlobal reports whether a placeholder is replaced when a config is loaded.
func isGlobal(key string) bool {
	if strings.HasPrefix(key, "env.") || strings.HasPrefix(key, "file.") {
		return true
	}
	_, ok := caddy.NewReplacer().Get(key)
	return ok
}
