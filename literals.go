package caddydiscovery

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
)

// judge returns the error that a module will have for what a Caddyfile made of it,
// so that the parser can tell of which line it is. What placeholders will come to
// is not known yet: an error counts only if it is there whatever stands for them.
func judge[T any](module *T, check func(*T) error) error {
	encoded, err := json.Marshal(module)
	if err != nil {
		return err
	}
	var first error
	for _, s := range standIns {
		var tree any
		if err := json.Unmarshal(encoded, &tree); err != nil {
			return err
		}
		s.found = false
		tree = s.fill("", tree)
		filled, err := json.Marshal(tree)
		if err != nil {
			return err
		}
		candidate := new(T)
		if err := json.Unmarshal(filled, candidate); err != nil {
			return fmt.Errorf("reading what it came to: %w", err)
		}
		if err = check(candidate); err == nil {
			return nil
		}
		if first == nil {
			first = err
		}
		if !s.found {
			break // nothing depends on a placeholder
		}
	}
	return first
}

// provisionAlone provisions a backend, which needs nothing of a config for it.
func provisionAlone[T any](backend *T) error {
	return any(backend).(caddy.Provisioner).Provision(caddy.Context{})
}

// standIn is what may stand for placeholders.
type standIn struct {
	whole   string // for a text that begins with one
	part    string // for one inside of a text
	without bool   // instead, a text with one inside is left out
	url     string // for a URL that begins with one; none: it is left out

	found bool // there was one
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

// unexpanded are the fields in which loading a config replaces no placeholders that
// matter: those of requests and of each heartbeat, and where there are none.
var unexpanded = []string{"load", "registry", "service", "where", "prefer", "pick", "uri"}

// fill replaces the placeholders in a tree of JSON.
func (s *standIn) fill(field string, tree any) any {
	switch tree := tree.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(tree)) {
			if !slices.Contains(unexpanded, k) {
				tree[k] = s.fill(k, tree[k])
			}
		}
	case []any:
		filled := tree[:0]
		for _, v := range tree {
			if v = s.fill(field, v); field != "urls" || v != "" {
				filled = append(filled, v)
			}
		}
		return filled
	case string:
		return s.text(field, tree)
	}
	return tree
}

func (s *standIn) text(field, text string) string {
	repl, found := caddy.NewEmptyReplacer(), false
	value := s.part
	begins := strings.HasPrefix(text, "{")
	if begins {
		value = s.whole
	}
	repl.Map(func(key string) (any, bool) {
		if !isGlobal(key) {
			return nil, false
		}
		found = true
		return value, true
	})
	filled := repl.ReplaceKnown(text, "")
	switch {
	case !found:
		return text // as it is, with what may be escaped in it
	case field == "urls" && begins:
		filled = s.url
	case !begins && s.without:
		filled = ""
	}
	s.found = true
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

// checkLiterals is what Provision checks of the source itself.
func (u *Upstreams) checkLiterals() error {
	if u.ProxyID == "" {
		u.ProxyID = "1" // the default is made where it is needed
	}
	return u.checkOptions()
}

// checkLiterals is what Provision checks of the node itself.
func (n *ProxyNode) checkLiterals() error {
	if n.NodeID == "" {
		n.NodeID = "1"
	}
	if err := n.complete(); err != nil {
		return err
	}
	return n.checkNode()
}
