package caddydiscovery

import (
	"bytes"
	"encoding/json"
	"net/http"
	"reflect"
	"slices"
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
	session string // what has become of the client's session
	repl    *caddy.Replacer

	tried  []*discovery.Entry // where the handler sent the request so far, this node included
	inline [2]*discovery.Entry
}

// maxTried is how many nodes a request remembers: one that is tried again for minutes may
// have been at any number.
const maxTried = 50

// begin forgets what an earlier handler has chosen.
func (c *chosen) begin() {
	c.node, c.tried = nil, c.inline[:0]
}

// choose notes where the request goes next, which is no node if it is nil.
func (c *chosen) choose(node *discovery.Entry, address string) {
	c.node, c.address = node, address
	if node != nil && len(c.tried) < maxTried {
		c.tried = append(c.tried, node)
	}
}

// triedIDs returns the ids of the nodes that were tried, in their order.
func (c *chosen) triedIDs() string {
	var ids strings.Builder
	for i, e := range c.tried {
		if i > 0 {
			ids.WriteByte(',')
		}
		ids.WriteString(e.Node.ID)
	}
	if len(c.tried) == maxTried {
		ids.WriteString(",…")
	}
	return ids.String()
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
	} else if short == "tried" {
		return c.triedIDs(), true // also where the last upstream is a static one
	}
	if node == nil && (short == "host" || short == "port" || short == "hostport") {
		// A static upstream is dialled at what was configured.
		value, _ := c.repl.GetString(upstreamPlaceholder + short)
		return value, true
	}
	if node != nil && short == "session" {
		return c.session, true
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
	app := parentOf[*caddyhttp.App](ctx)
	switch {
	case mentioned(handler.Headers):
		return true
	case app == nil:
		return false
	}
	newestApp.Lock()
	defer newestApp.Unlock()
	if newestApp.app.Value() != app {
		newestApp.app, newestApp.mentions = weak.Make(app), routesMention(reflect.ValueOf(app), configDepth)
	}
	return newestApp.mentions
}

// configDepth is how deep routes are in the fields of the HTTP app, or of a handler.
const configDepth = 6

// routesMention looks for routes that mention a node, in whatever has some in its
// fields: the HTTP app, and handlers that are loaded, such as those of intercept and of
// handle_response. The JSON of those does not have their routes any more.
func routesMention(v reflect.Value, depth int) bool {
	if depth == 0 {
		return false
	}
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		return !v.IsNil() && routesMention(v.Elem(), depth)
	case reflect.Slice, reflect.Map:
		if k := v.Type().Elem().Kind(); k != reflect.Struct && k != reflect.Pointer {
			return false
		}
		for _, e := range v.Seq2() {
			if routesMention(e, depth-1) {
				return true
			}
		}
	case reflect.Struct:
		// A struct is copied to look at it as what it is. Others than routes may change
		// meanwhile: upstreams whose health is being checked.
		if v.Type() == reflect.TypeFor[caddyhttp.Route]() {
			route := v.Interface().(caddyhttp.Route)
			return slices.ContainsFunc(route.HandlersRaw, mentionedIn) || // it is not loaded yet
				slices.ContainsFunc(route.Handlers, func(h caddyhttp.MiddlewareHandler) bool {
					return mentioned(h) || routesMention(reflect.ValueOf(h), configDepth)
				})
		}
		for field, value := range v.Fields() {
			if field.IsExported() && field.Type.Kind() != reflect.Interface && routesMention(value, depth-1) {
				return true
			}
		}
	}
	return false
}

func mentioned(config any) bool {
	encoded, err := json.Marshal(config)
	return err == nil && mentionedIn(encoded)
}

func mentionedIn(config json.RawMessage) bool { return bytes.Contains(config, []byte(nodePlaceholder)) }
