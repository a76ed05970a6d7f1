package caddydiscovery

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// provisionAccess makes the rules by which the source decides where an endpoint
// may point.
func (u *Upstreams) provisionAccess(ctx caddy.Context, b backend.Backend) error {
	loopback, err := onlyOnLoopback(ctx, b.Addresses())
	if err != nil {
		return err
	}
	u.rules, err = discovery.NewRules(discovery.Access{
		Allow:      u.Allow,
		Deny:       u.Deny,
		Loopback:   loopback,
		LocalPorts: adminPorts(ctx),
		Listeners:  ownSockets(ctx),
	})
	if err != nil {
		return err
	}
	login, ok := b.(backend.LoginReporter)
	u.unguarded = loopback && len(u.Allow) == 0 && ok && !login.HasLogin()
	return nil
}

// tellUnguarded logs once a registry that nodes on this machine are used although
// anybody on it may list one: what keeps others from the registry is its address alone.
func (u *Upstreams) tellUnguarded(s *discovery.Snapshot) {
	if !u.unguarded || u.directory.told.Load() {
		return
	}
	i := slices.IndexFunc(s.Nodes(), func(e *discovery.Entry) bool {
		address, err := netip.ParseAddrPort(e.Address())
		return err == nil && address.Addr().IsLoopback() && u.wants(e)
	})
	if i < 0 || u.directory.told.Swap(true) {
		return
	}
	u.logger.Info("endpoints on loopback are accepted because the registry is on loopback, too, and it asks for no login: "+
		"whatever runs on this machine may have requests sent to any of its ports; "+
		"give the registry a login, or name what may be reached: allow 127.0.0.0/8 ::1 and the ranges of your other nodes",
		zap.String("node", s.Nodes()[i].Node.ID), zap.String("address", s.Nodes()[i].Address()))
}

// meetTransport learns how far the transport verifies whom it reaches.
func (u *Upstreams) meetTransport(transport any) {
	if t, ok := transport.(reverseproxy.TLSTransport); ok {
		u.https = t.TLSEnabled()
	}
	if t, ok := transport.(*reverseproxy.HTTPTransport); ok && t.TLS != nil {
		u.insecure = t.TLS.InsecureSkipVerify
	}
}

// denied returns why the node's endpoint may not be used, "" if it may.
func (u *Upstreams) denied(e *discovery.Entry) picker.Reason {
	if reason := u.rules.Check(e, u.directory.RegistryAddresses()); reason != "" {
		return picker.Reason(reason)
	}
	// A name over TLS is resolved again when it is dialled. It is the certificate
	// that says who is there then, or nothing does.
	if u.https && u.insecure && e.Named() && !u.rules.AllowsName(e.Node.Endpoint.Host()) {
		return "denied: name without verification of its certificate"
	}
	return ""
}

// dial returns the address at which a node is dialled. Over plain HTTP that is the
// address that was checked; over TLS the name is kept, for its certificate.
func (u *Upstreams) dial(e *discovery.Entry) string { return e.DialAddress(u.https) }

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
	listen, remote := caddy.DefaultAdminListen, ""
	if config := reflect.ValueOf(ctx).FieldByName("cfg"); config.IsValid() && config.Kind() == reflect.Pointer && !config.IsNil() {
		if admin := config.Elem().FieldByName("Admin"); admin.IsValid() && admin.Kind() == reflect.Pointer && !admin.IsNil() {
			if off := admin.Elem().FieldByName("Disabled"); off.IsValid() && off.Kind() == reflect.Bool && off.Bool() {
				listen = ""
			} else if l := admin.Elem().FieldByName("Listen"); l.IsValid() && l.Kind() == reflect.String && l.String() != "" {
				listen = l.String()
			}
			if r := admin.Elem().FieldByName("Remote"); r.IsValid() && r.Kind() == reflect.Pointer && !r.IsNil() {
				remote = caddy.DefaultRemoteAdminListen
				if l := r.Elem().FieldByName("Listen"); l.IsValid() && l.Kind() == reflect.String && l.String() != "" {
					remote = l.String()
				}
			}
		}
	}
	// An address in the environment overrides nothing, but a server that is about
	// to be replaced may still listen there.
	var ports []uint16
	for _, address := range []string{listen, remote, os.Getenv("CADDY_ADMIN")} {
		address, err := caddy.NewReplacer().ReplaceOrErr(address, true, true)
		if err != nil || address == "" {
			continue
		}
		if parsed, err := caddy.ParseNetworkAddress(address); err == nil && !parsed.IsUnixNetwork() && !parsed.IsFdNetwork() {
			for port := parsed.StartPort; port <= parsed.EndPort; port++ {
				ports = append(ports, uint16(port))
			}
		}
	}
	return ports
}

// ownSockets returns the sockets on which the HTTP servers of the configuration listen.
func ownSockets(ctx caddy.Context) (sockets []netip.AddrPort) {
	app := parentOf[*caddyhttp.App](ctx)
	if app == nil {
		return nil
	}
	for _, server := range app.Servers {
		if server == nil {
			continue // Caddy refuses it
		}
		for _, listen := range server.Listen {
			sockets = append(sockets, socketsOf(listen)...)
		}
	}
	return sockets
}

// socketsOf returns the sockets of a server's address. The name of a host or an
// interface is left out: looking it up would make loading a configuration depend on
// the network, and to take it for every address would take those of other servers on
// this machine for its own. What goes round through it ends by its hops.
func socketsOf(listen string) (sockets []netip.AddrPort) {
	// Those of servers that are provisioned later have their placeholders.
	listen, err := caddy.NewReplacer().ReplaceOrErr(listen, true, true)
	if err != nil {
		return nil // Caddy refuses it
	}
	address, err := caddy.ParseNetworkAddress(listen)
	if err != nil || address.IsUnixNetwork() || address.IsFdNetwork() {
		return nil
	}
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
