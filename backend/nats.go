package backend

import (
	"cmp"
	"log/slog"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

// NATS is a registry of NATS subjects: nodes say that they join, live and leave,
// and nothing keeps what they said. It needs no JetStream. A proxy that starts
// asks the nodes to speak up; those that do not answer are known after their
// next heartbeat that names their endpoint.
type NATS struct {
	NATSConnection
	Options

	// What stands before ".join", ".heartbeat", ".leave" and ".query". It may
	// also be the path of a URL. Default: catga.nodes
	SubjectPrefix string `json:"subject_prefix,omitempty"`

	resolved natspubsub.Config
}

// CaddyModule returns the Caddy module information.
func (NATS) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "discovery.registries.nats",
		New: func() caddy.Module { return new(NATS) },
	}
}

// Provision expands placeholders and completes the options, so that two
// spellings of one registry become equal.
func (n *NATS) Provision(ctx caddy.Context) error {
	if err := cmp.Or(n.Options.Provision(ctx), n.NATSConnection.provision(), ReplaceGlobals(&n.SubjectPrefix)); err != nil {
		return err
	}
	resolved, err := natspubsub.Config{
		URLs:          n.URLs,
		Conn:          n.NATSConnection.conn(),
		SubjectPrefix: n.SubjectPrefix,
	}.Resolve()
	if err != nil {
		return err
	}
	n.URLs, n.SubjectPrefix = resolved.URLs, resolved.SubjectPrefix
	n.resolved = resolved
	return nil
}

// UnmarshalCaddyfile sets up the backend from Caddyfile tokens. Syntax:
//
//	registry nats [<url>...] {
//	    subject_prefix      <prefix>
//	    credentials         <file>
//	    nkey                <seed-file>
//	    token               <token>
//	    user                <name> <password>
//	    inbox_prefix        <prefix>
//	    tls_ca              <file>
//	    tls_client_auth     <certificate> <key>
//	    tls_server_name     <name>
//	    tls_handshake_first on|off
//	    ttl                 <duration>
//	    loss_guard          <percent>|off
//	    warm_start          on|off
//	}
func (n *NATS) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return unmarshalBlock(d, n, &n.URLs, caddyblock.Options{
		"subject_prefix": caddyblock.Text("<prefix>", &n.SubjectPrefix),
	}, n.NATSConnection.grammar(), n.Options.grammar())
}

// Open returns the registry, without connecting to it.
func (n *NATS) Open(*slog.Logger) (discovery.Registry, error) { return natspubsub.Open(n.resolved) }

// Addresses returns the servers' host:port.
func (n *NATS) Addresses() []string { return n.resolved.Addresses() }

// Interface guards
var (
	_ caddy.Provisioner     = (*NATS)(nil)
	_ Backend               = (*NATS)(nil)
	_ caddyfile.Unmarshaler = (*NATS)(nil)
)
