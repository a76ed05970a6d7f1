package backend

import (
	"cmp"
	"log/slog"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

// Bounds of the server for what the options may say.
const (
	maxHistory  = 64
	maxReplicas = 5
)

// NATSKV is a registry in a NATS JetStream key-value bucket. Every node is one
// key; changes are pushed, never polled.
type NATSKV struct {
	NATSConnection
	Options

	// The bucket. It may also be the path of a URL. Default: catga_nodes
	Bucket string `json:"bucket,omitempty"`

	// What stands before the node's id in a key. Keys without it are read as
	// bare ids. Default: "node."
	KeyPrefix string `json:"key_prefix,omitempty"`

	// Whether to create the bucket if it is missing. Default: true
	Create *bool `json:"create,omitempty"`

	// How long the bucket keeps a record that nobody renews. This and the
	// following options are used only when the bucket is created. Default: 5m
	BucketTTL caddy.Duration `json:"bucket_ttl,omitempty"`

	// How many revisions of a record the bucket keeps, at most 64. Default: 10
	History int `json:"history,omitempty"`

	// How many bytes the bucket may hold: about nodes × record × history.
	// Default: 10485760 (10 MiB)
	MaxBytes int64 `json:"max_bytes,omitempty"`

	// Where the bucket is kept: "file" or "memory". Default: file
	Storage string `json:"storage,omitempty"`

	// On how many servers of a cluster the bucket is kept, at most 5. Default: 1, or
	// the least that the account allows
	Replicas int `json:"replicas,omitempty"`

	// The JetStream domain: of a hub that the server is a leaf of, or the name under
	// which the account imports the JetStream of another ($JS.API.> as
	// $JS.<name>.API.>, $KV.> as $JS.<name>.API.$KV.>). Default: none
	Domain string `json:"domain,omitempty"`

	resolved natskv.Config
}

// CaddyModule returns the Caddy module information.
func (NATSKV) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "discovery.registries.nats_kv",
		New: func() caddy.Module { return new(NATSKV) },
	}
}

// Provision expands placeholders and completes the options, so that two
// spellings of one registry become equal.
func (n *NATSKV) Provision(ctx caddy.Context) error {
	if err := cmp.Or(
		n.Options.Provision(ctx),
		n.NATSConnection.provision(),
		ReplaceGlobals(&n.Bucket, &n.KeyPrefix, &n.Domain),
		caddyblock.CheckDuration("bucket_ttl", n.BucketTTL),
	); err != nil {
		return err
	}
	resolved, err := natskv.Config{
		URLs:      n.URLs,
		Conn:      n.NATSConnection.conn(),
		Bucket:    n.Bucket,
		KeyPrefix: n.KeyPrefix,
		Domain:    n.Domain,
		NoCreate:  n.Create != nil && !*n.Create,
		BucketTTL: time.Duration(n.BucketTTL),
		History:   n.History,
		MaxBytes:  n.MaxBytes,
		Storage:   n.Storage,
		Replicas:  n.Replicas,
	}.Resolve()
	if err != nil {
		return err
	}
	create := !resolved.NoCreate
	n.URLs = resolved.URLs
	n.Bucket, n.KeyPrefix, n.Create = resolved.Bucket, resolved.KeyPrefix, &create
	n.BucketTTL, n.History, n.MaxBytes = caddy.Duration(resolved.BucketTTL), resolved.History, resolved.MaxBytes
	n.Storage, n.Replicas = resolved.Storage, resolved.Replicas
	n.resolved = resolved
	return nil
}

// UnmarshalCaddyfile sets up the backend from Caddyfile tokens. Syntax:
//
//	registry nats_kv [<url>...] {
//	    bucket              <name>
//	    key_prefix          <prefix>
//	    create              on|off
//	    bucket_ttl          <duration>
//	    history             <n>
//	    max_bytes           <size>
//	    storage             file|memory
//	    replicas            <n>
//	    domain              <name>
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
func (n *NATSKV) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return unmarshalBlock(d, n, &n.URLs, caddyblock.Options{
		"bucket":     caddyblock.Text("<name>", &n.Bucket),
		"key_prefix": caddyblock.Text("<prefix>", &n.KeyPrefix),
		"create":     caddyblock.OptionalSwitch(&n.Create),
		"bucket_ttl": caddyblock.Duration(&n.BucketTTL),
		"history":    caddyblock.Number(&n.History, 1, maxHistory),
		"max_bytes":  caddyblock.Size(&n.MaxBytes),
		"storage":    caddyblock.OneOf(&n.Storage, "file", "memory"),
		"replicas":   caddyblock.Number(&n.Replicas, 1, maxReplicas),
		"domain":     caddyblock.Text("<name>", &n.Domain),
	}, n.NATSConnection.grammar(), n.Options.grammar())
}

// Open returns the registry, without connecting to it.
func (n *NATSKV) Open(*slog.Logger) (discovery.Registry, error) { return natskv.Open(n.resolved) }

// Addresses returns the servers' host:port.
func (n *NATSKV) Addresses() []string { return n.resolved.Addresses() }

// Interface guards
var (
	_ caddy.Provisioner     = (*NATSKV)(nil)
	_ Backend               = (*NATSKV)(nil)
	_ caddyfile.Unmarshaler = (*NATSKV)(nil)
)
