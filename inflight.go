package caddydiscovery

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"reflect"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"weak"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// requestsInFlight returns how many requests this process has under way to each address,
// through whatever handler, upgraded connections included.
//
// Caddy counts them for every request, and shows them in its admin API only, which is
// asked here as a package is: so that they are exact where no source has counted, and cost
// requests nothing.
func requestsInFlight() (map[string]int, error) {
	info, err := caddy.GetModule("admin.api.reverse_proxy")
	if err != nil {
		return nil, err
	}
	router, ok := info.New().(caddy.AdminRouter)
	if !ok {
		return nil, fmt.Errorf("%s has no routes", info.ID)
	}
	for _, route := range router.Routes() {
		if route.Pattern != "/reverse_proxy/upstreams" {
			continue
		}
		var answer buffered
		if err := route.Handler.ServeHTTP(&answer, &http.Request{Method: http.MethodGet}); err != nil {
			return nil, err
		}
		var upstreams []struct {
			Address  string `json:"address"`
			Requests int    `json:"num_requests"`
		}
		if err := json.Unmarshal(answer.Bytes(), &upstreams); err != nil {
			return nil, err
		}
		// An address may stand there twice: by its host, which Caddy forgets after an hour
		// without a new request, and by what is under way.
		all := make(map[string]int, len(upstreams))
		for _, u := range upstreams {
			all[u.Address] = max(all[u.Address], u.Requests)
		}
		return all, nil
	}
	return nil, errors.New("Caddy does not tell of its upstreams") //nolint:staticcheck // it is a name
}

// buffered is a response that is read here.
type buffered struct{ bytes.Buffer }

func (*buffered) Header() http.Header { return make(http.Header) }
func (*buffered) WriteHeader(int)     {}

// toNode returns how many of the requests in flight go to a node: to any address at which
// it may be dialled. Nodes that share an address share the number.
func toNode(e *discovery.Entry, requests map[string]int) (n int) {
	endpoint := e.Node.Endpoint
	if e.Named() {
		n = requests[endpoint.Address()]
	}
	for _, addr := range e.Addresses() {
		n += requests[net.JoinHostPort(addr.String(), strconv.Itoa(endpoint.Port()))]
	}
	return n
}

// ownWork are the connections to the HTTP servers of this process on which a request is
// under way, as far as their servers tell: over HTTP/1 and HTTP/2. What is under way over
// HTTP/3, and upgraded connections, counts where it goes to an upstream; see hasWork.
var ownWork activeConnections

type activeConnections struct {
	n     atomic.Int64
	conns sync.Map // net.Conn → struct{}
}

// track is told of the states of connections.
func (a *activeConnections) track(c net.Conn, state http.ConnState) {
	if !reflect.TypeOf(c).Comparable() {
		return // it cannot be told from others
	}
	switch state {
	case http.StateActive:
		if _, known := a.conns.LoadOrStore(c, struct{}{}); !known {
			a.n.Add(1)
		}
	case http.StateIdle, http.StateHijacked, http.StateClosed:
		if _, known := a.conns.LoadAndDelete(c); known {
			a.n.Add(-1)
		}
	}
}

// trackOwnWork has the servers of a config tell of their connections, once each.
func trackOwnWork(ctx caddy.Context) error {
	app, err := ctx.AppIfConfigured("http")
	switch {
	case errors.Is(err, caddy.ErrNotConfigured):
		return nil
	case err != nil:
		return err
	}
	servers := app.(*caddyhttp.App).Servers
	for _, s := range servers {
		if s == nil {
			continue // Caddy refuses it
		}
		if _, known := trackedServers.LoadOrStore(weak.Make(s), struct{}{}); !known {
			s.RegisterConnState(ownWork.track)
			runtime.AddCleanup(s, func(s weak.Pointer[caddyhttp.Server]) { trackedServers.Delete(s) }, weak.Make(s))
		}
	}
	return nil
}

// trackedServers are those of the configs that there are.
var trackedServers sync.Map // weak.Pointer[caddyhttp.Server] → struct{}

// hasWork reports whether this process answers a request, or has one under way to an
// upstream.
func hasWork() bool {
	if ownWork.n.Load() > 0 {
		return true
	}
	requests, err := requestsInFlight()
	for _, n := range requests {
		if n > 0 {
			return true
		}
	}
	return err != nil // nobody knows, and the longest drain is the safe one
}
