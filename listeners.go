package caddydiscovery

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-discovery/caddy-discovery/backend"
)

// listener is where an HTTP server of this config listens.
type listener struct {
	scheme, host string
	port         uint
}

// wildcard reports whether it listens on every address of the machine.
func (l listener) wildcard() bool {
	ip := net.ParseIP(l.host)
	return l.host == "" || ip != nil && ip.IsUnspecified()
}

// listeners returns where the HTTP app's servers listen, in the order of their
// names. Its provisioning has decided by then which of them speak TLS.
func listeners(ctx caddy.Context) ([]listener, error) {
	missing := errors.New("there is no HTTP server whose address could be the endpoint; want the option endpoint <url>")
	app, err := ctx.AppIfConfigured("http")
	switch {
	case errors.Is(err, caddy.ErrNotConfigured):
		return nil, missing
	case err != nil:
		return nil, err
	}
	found := listenersOf(app.(*caddyhttp.App))
	if len(found) == 0 {
		return nil, missing
	}
	return found, nil
}

// listenersOf is listeners for those who have the app, which need not have been
// provisioned: then nothing is known of TLS.
func listenersOf(app *caddyhttp.App) (found []listener) {
	for name, a := range listenAddresses(app) {
		if name == "remaining_auto_https_redirects" || a.StartPort == 0 {
			continue // the first is Caddy's own, and nothing to proxy to
		}
		scheme := "http"
		if len(app.Servers[name].TLSConnPolicies) > 0 && a.StartPort != uint(cmp.Or(app.HTTPPort, caddyhttp.DefaultHTTPPort)) {
			scheme = "https"
		}
		found = append(found, listener{scheme, a.Host, a.StartPort})
	}
	return found
}

// listenAddresses yields where the servers of an app listen, with their names, by
// which they are sorted, as far as a network leads there.
func listenAddresses(app *caddyhttp.App) iter.Seq2[string, caddy.NetworkAddress] {
	return func(yield func(string, caddy.NetworkAddress) bool) {
		for _, name := range slices.Sorted(maps.Keys(app.Servers)) {
			if app.Servers[name] == nil {
				continue // Caddy refuses it
			}
			for _, listen := range app.Servers[name].Listen {
				if a, ok := networkAddress(listen); ok && !yield(name, a) {
					return
				}
			}
		}
	}
}

// localAddress returns the local address from which the registry is reached. No
// packet is sent: connecting a UDP socket only asks the routing table. While that
// knows no way, or the registry's name does not resolve, there is no answer: a
// guess would be listed for the whole fleet.
func localAddress(ctx context.Context, registry []string) (string, error) {
	if len(registry) == 0 {
		return "127.0.0.1", nil // it is reached by other means than a network
	}
	var err error
	for _, address := range registry {
		var conn net.Conn
		if conn, err = new(net.Dialer).DialContext(ctx, "udp", address); err == nil {
			_ = conn.Close()
			return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap().String(), nil
		}
	}
	return "", fmt.Errorf("finding the local address that reaches the registry: %w; the option endpoint <url> makes that unnecessary", err)
}

// onlyOnLoopback reports whether nobody but this machine's own processes can write
// to the registry, as far as the configuration shows: all its addresses are
// loopback, and so is that of the server in the box, if there is one.
func onlyOnLoopback(ctx caddy.Context, addresses []string) (bool, error) {
	for _, address := range addresses {
		host, _, err := net.SplitHostPort(address)
		if err != nil || !isLoopback(host) {
			return false, nil //nolint:nilerr // what cannot be read is not known to be loopback
		}
	}
	if len(addresses) == 0 {
		return false, nil
	}
	// The package of the app is not linked into every build; what it can tell is.
	app, err := ctx.AppIfConfigured("nats_server")
	switch server, ok := app.(interface{ LoopbackOnly() bool }); {
	case errors.Is(err, caddy.ErrNotConfigured):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("asking the app nats_server where it listens: %w", err)
	default:
		return ok && server.LoopbackOnly(), nil
	}
}

func isLoopback(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}

// adminPorts returns the ports of Caddy's admin endpoints. Caddy does not let
// modules see them, so they are read by reflection; where a version of Caddy does
// not have them there, the default has to do.
func adminPorts(ctx caddy.Context) []uint16 {
	admin := func(path ...string) reflect.Value {
		return fieldOf(reflect.ValueOf(ctx), append([]string{"cfg", "Admin"}, path...)...)
	}
	address := func(path ...string) string {
		if v := admin(path...); v.Kind() == reflect.String {
			return v.String()
		}
		return ""
	}
	listen, remote := cmp.Or(address("Listen"), caddy.DefaultAdminListen), ""
	if off := admin("Disabled"); off.Kind() == reflect.Bool && off.Bool() {
		listen = ""
	}
	if r := admin("Remote"); r.Kind() == reflect.Pointer && !r.IsNil() {
		remote = cmp.Or(address("Remote", "Listen"), caddy.DefaultRemoteAdminListen)
	}
	// An address in the environment overrides nothing, but a server that is about
	// to be replaced may still listen there.
	var ports []uint16
	for _, listen := range []string{listen, remote, os.Getenv("CADDY_ADMIN")} {
		if a, ok := networkAddress(listen); ok && listen != "" {
			for port := a.StartPort; port <= a.EndPort; port++ {
				ports = append(ports, uint16(port))
			}
		}
	}
	return ports
}

// fieldOf returns a field of a field of a struct, and so on, through pointers; the zero
// Value if it is not there.
func fieldOf(v reflect.Value, path ...string) reflect.Value {
	for _, name := range path {
		if v = reflect.Indirect(v); v.Kind() != reflect.Struct {
			return reflect.Value{}
		}
		v = v.FieldByName(name)
	}
	return v
}

// ownSockets returns the sockets on which the HTTP servers of the configuration listen.
func ownSockets(ctx caddy.Context) (sockets []netip.AddrPort) {
	if app := parentOf[*caddyhttp.App](ctx); app != nil {
		for _, a := range listenAddresses(app) {
			sockets = append(sockets, socketsOf(a)...)
		}
	}
	return sockets
}

// socketsOf returns the sockets of a server's address. The name of a host or an
// interface is left out: looking it up would make loading a configuration depend on
// the network, and to take it for every address would take those of other servers on
// this machine for its own. What goes round through it ends by its hops.
func socketsOf(address caddy.NetworkAddress) (sockets []netip.AddrPort) {
	var hosts []netip.Addr
	if addr, err := netip.ParseAddr(address.Host); err == nil {
		hosts = []netip.Addr{addr}
	} else if isLoopback(address.Host) {
		hosts = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	} else if address.Host == "" {
		hosts = []netip.Addr{netip.IPv6Unspecified()}
	}
	for port := address.StartPort; port <= address.EndPort; port++ {
		for _, host := range hosts {
			sockets = append(sockets, netip.AddrPortFrom(host, uint16(port)))
		}
	}
	return sockets
}

// networkAddress reads an address on which a server listens, and reports whether a
// network leads there. Those of servers that are provisioned later have their
// placeholders; what cannot be read, Caddy refuses.
func networkAddress(listen string) (caddy.NetworkAddress, bool) {
	if backend.ReplaceGlobals(&listen) != nil {
		return caddy.NetworkAddress{}, false
	}
	a, err := caddy.ParseNetworkAddress(listen)
	return a, err == nil && !a.IsUnixNetwork() && !a.IsFdNetwork()
}
