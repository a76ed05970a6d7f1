package caddydiscovery

import (
	"bytes"
	"encoding/json"
	"net/http"
	"reflect"
	"strconv"
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
const (
	nodePlaceholder     = upstreamPlaceholder + "node."
	upstreamPlaceholder = "http.reverse_proxy.upstream." // Caddy's own
)

// chosen is the node that a request went to last.
type chosen struct {
	node    *discovery.Entry
	address string // at which it was dialled
	repl    *caddy.Replacer
}

// chosenKey is where a request's variables keep its node, of whichever handler.
const chosenKey = "discovery.chosen"

// chosenOf returns where to note a request's node. The first call of a request
// makes its placeholders known.
func chosenOf(vars map[string]any, r *http.Request) *chosen {
	if c, ok := vars[chosenKey].(*chosen); ok {
		return c
	}
	c := new(chosen)
	vars[chosenKey] = c
	if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		c.repl = repl
		repl.Map(c.replace)
	}
	return c
}

// replace returns what a placeholder of the chosen node stands for. If another handler
// has sent the request to a static upstream since, as after a forward_auth, there is
// no such node.
func (c *chosen) replace(name string) (any, bool) {
	short, ok := strings.CutPrefix(name, nodePlaceholder)
	if !ok {
		return nil, false
	}
	node := c.node
	if last, _ := c.repl.GetString(upstreamPlaceholder + "hostport"); last != c.address {
		node = nil
	}
	if node == nil && (short == "host" || short == "port" || short == "hostport") {
		// A static upstream is dialled at what was configured.
		value, _ := c.repl.GetString(upstreamPlaceholder + short)
		return value, true
	}
	return nodeValue(node, name)
}

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
	case "host":
		return node.Node.Endpoint.Host(), true
	case "port":
		return strconv.Itoa(node.Node.Endpoint.Port()), true
	case "hostport":
		return node.Node.Endpoint.Address(), true
	case "load":
		return node.Load(), true
	}
	if key, ok := strings.CutPrefix(name, "metadata."); ok {
		// A key that this node lacks is known, and empty.
		return node.Node.Metadata[key], true
	}
	return nil, false
}

// newestApp remembers whether the newest HTTP app mentions the placeholders: one look
// at it is enough for all its handlers, which share nothing else of ours.
var newestApp struct {
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
		newestApp.Lock()
		defer newestApp.Unlock()
		if newestApp.app.Value() != app {
			newestApp.app, newestApp.mentions = weak.Make(app), appMentionsNodes(app)
		}
		return newestApp.mentions
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
			} else if mentioned(h) || nestedMention(reflect.ValueOf(h), 4) {
				return true
			}
		}
	}
	return false
}

// nestedMention looks for routes in the fields of a handler that is loaded, such as
// those of intercept and of handle_response: its JSON does not have them any more.
func nestedMention(v reflect.Value, depth int) bool {
	if depth == 0 {
		return false
	}
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		return !v.IsNil() && nestedMention(v.Elem(), depth)
	case reflect.Slice:
		if routes, ok := v.Interface().(caddyhttp.RouteList); ok {
			return routesMentionNodes(routes)
		}
		if k := v.Type().Elem().Kind(); k != reflect.Struct && k != reflect.Pointer {
			return false
		}
		for i := range v.Len() {
			if nestedMention(v.Index(i), depth-1) {
				return true
			}
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() && f.Type.Kind() != reflect.Interface && nestedMention(v.Field(i), depth-1) {
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
