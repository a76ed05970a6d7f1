package caddydiscovery

import (
	"github.com/caddyserver/caddy/v2"
	"log/slog"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
)

// NATS is a registry of NATS subjects: nodes say that they join, live and leave,
// and nothing keeps what they said. It needs no JetStream. A proxy that starts
// asks the nodes to speak up; those that do not answer are known after their
// next heartbeat that names their endpoint.
type NATS struct {
	NATSConnection
	DirectoryOptions

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
func (n *NATS) Provision(caddy.Context) error {
	if err := n.DirectoryOptions.provision(); err != nil {
		return err
	}
	if err := n.NATSConnection.provision(); err != nil {
		return err
	}
	if err := replaceGlobals(&n.SubjectPrefix); err != nil {
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

// Open returns the registry, without connecting to it.
func (n *NATS) Open(*slog.Logger) (discovery.Registry, error) { return natspubsub.Open(n.resolved) }

// Addresses returns the servers' host:port.
func (n *NATS) Addresses() []string { return n.resolved.Addresses() }

// Interface guards
var (
	_ caddy.Provisioner = (*NATS)(nil)
	_ Backend           = (*NATS)(nil)
)
