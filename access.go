package caddydiscovery

import (
	"net/netip"
	"slices"

	"github.com/caddyserver/caddy/v2"
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
func (u *Upstreams) tellUnguarded(nodes []*discovery.Entry) {
	if !u.unguarded || u.directory.told.Load() {
		return
	}
	i := slices.IndexFunc(nodes, func(e *discovery.Entry) bool {
		address, err := netip.ParseAddrPort(e.Address())
		return err == nil && address.Addr().IsLoopback() && u.mayServe(e)
	})
	if i < 0 || u.directory.told.Swap(true) {
		return
	}
	u.logger.Info("endpoints on loopback are accepted because the registry is on loopback, too, and it asks for no login: "+
		"whatever runs on this machine may have requests sent to any of its ports; "+
		"give the registry a login, or name what may be reached: allow 127.0.0.0/8 ::1 and the ranges of your other nodes",
		zap.String("node", nodes[i].Node.ID), zap.String("address", nodes[i].Address()))
}

// inspectTransport learns how far the transport verifies whom it reaches.
func (u *Upstreams) inspectTransport(transport any) {
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
