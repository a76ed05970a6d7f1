package caddydiscovery

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"weak"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// nodePlaceholder begins the placeholders of the node that a request goes to; the
// documentation of Upstreams lists them. They cost something for each request, so
// that they are there only if the HTTP configuration mentions one of them.
const nodePlaceholder = "http.reverse_proxy.upstream.node."

// choice is the node that a request went to last.
type choice struct{ node *discovery.Entry }

// choiceKey is where a request's variables keep its choice, of whichever handler.
const choiceKey = "discovery.choice"

// choiceOf returns where to note a request's node. The first call of a request
// makes its placeholders known.
func choiceOf(vars map[string]any, r *http.Request) *choice {
	if c, ok := vars[choiceKey].(*choice); ok {
		return c
	}
	c := new(choice)
	vars[choiceKey] = c
	if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		repl.Map(c.replace)
	}
	return c
}

func (c *choice) replace(name string) (any, bool) { return nodeValue(c.node, name) }

// nodeValue returns what a placeholder of a node stands for. Without a node it is
// empty.
func nodeValue(node *discovery.Entry, name string) (any, bool) {
	name, ok := strings.CutPrefix(name, nodePlaceholder)
	if !ok {
		return nil, false
	}
	if node == nil {
		return "", true // a static upstream, or none: known and empty
	}
	switch name {
	case "id":
		return node.Node.ID, true
	case "load":
		return node.Load(), true
	}
	if key, ok := strings.CutPrefix(name, "metadata."); ok {
		// A key that this node lacks is known, and empty.
		return node.Node.Metadata[key], true
	}
	return nil, false
}

// asked remembers whether the newest HTTP app mentions the placeholders: one look
// at it is enough for all its handlers.
var asked struct {
	sync.Mutex
	app      weak.Pointer[caddyhttp.App]
	mentions bool
}

// mentionsNodes reports whether anything in the HTTP configuration around the
// handler may ask for the chosen node.
func mentionsNodes(ctx caddy.Context, handler *reverseproxy.Handler) bool {
	if mentioned(handler.Headers) {
		return true
	}
	for _, m := range ctx.Modules() {
		app, ok := m.(*caddyhttp.App)
		if !ok {
			continue
		}
		asked.Lock()
		defer asked.Unlock()
		if asked.app.Value() != app {
			asked.app, asked.mentions = weak.Make(app), appMentionsNodes(app)
		}
		return asked.mentions
	}
	return false
}

func appMentionsNodes(app *caddyhttp.App) bool {
	for _, s := range app.Servers {
		if s == nil {
			continue
		}
		if routesMentionNodes(s.Routes) || s.Errors != nil && routesMentionNodes(s.Errors.Routes) {
			return true
		}
		for _, r := range s.NamedRoutes {
			if r != nil && routesMentionNodes(caddyhttp.RouteList{*r}) {
				return true
			}
		}
	}
	return false
}

// routesMentionNodes looks at routes of which some are loaded and have become
// handlers, and the others are JSON.
func routesMentionNodes(routes caddyhttp.RouteList) bool {
	for i := range routes {
		for _, raw := range routes[i].HandlersRaw {
			if bytes.Contains(raw, []byte(nodePlaceholder)) {
				return true
			}
		}
		for _, h := range routes[i].Handlers {
			if s, ok := h.(*caddyhttp.Subroute); ok {
				if routesMentionNodes(s.Routes) || s.Errors != nil && routesMentionNodes(s.Errors.Routes) {
					return true
				}
			} else if mentioned(h) {
				return true
			}
		}
	}
	return false
}

func mentioned(config any) bool {
	encoded, err := json.Marshal(config)
	return err == nil && bytes.Contains(encoded, []byte(nodePlaceholder))
}
