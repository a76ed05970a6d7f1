package caddydiscovery

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/redis"
	backends "github.com/caddy-discovery/caddy-discovery/discovery/registries"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
	"github.com/caddy-discovery/caddy-discovery/internal/health"
)

func init() {
	httpcaddyfile.RegisterGlobalOption("registrar", parseRegistrar)
}

// UnmarshalCaddyfile sets up the source from Caddyfile tokens. Syntax:
//
//	dynamic discovery [<registry-url>...] {
//	    registry     <backend> [<url>...] {
//	        <backend options>
//	    }
//	    service      <name>
//	    where        <key> <value...>
//	    prefer       <key> <value...>
//	    scheme       auto|http|https
//	    pick         <n> [hash <placeholder>]
//	    subset       <n>
//	    proxy_id     <id>
//	    slow_start   <duration>
//	    health {
//	        uri      <path>
//	        tcp
//	        interval <duration>
//	        timeout  <duration>
//	        passes   <n>
//	        fails    <n>
//	        status   <code>|<class>
//	        port     <port>
//	        header   <name> <value>
//	    }
//	    allow        <cidr|private_ranges|host-glob...>
//	    deny         <cidr|private_ranges|host-glob...>
//	    sync_timeout <duration>
//	    max_stale    <duration>
//	}
//
// A registry URL goes behind the name or behind registry, not both.
func (u *Upstreams) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name
	raw, err := registryFromArgs(d, "dynamic discovery")
	if err != nil {
		return err
	}
	u.RegistryRaw = raw
	err = caddyblock.Block{
		What: "dynamic discovery",
		Options: caddyblock.Options{
			"registry":     registryOption(&u.RegistryRaw),
			"service":      caddyblock.Text("<name>", &u.Service),
			"where":        criterion(&u.Where),
			"prefer":       criterion(&u.Prefer),
			"scheme":       caddyblock.OneOf(&u.Scheme, schemeAuto, "http", "https"),
			"pick":         pick(&u.Pick),
			"subset":       caddyblock.Number(&u.Subset, 1, discovery.MaxNodes),
			"proxy_id":     caddyblock.Text("<id>", &u.ProxyID),
			"slow_start":   caddyblock.Duration(&u.SlowStart),
			"health":       healthOption(&u.Health),
			"allow":        access(&u.Allow),
			"deny":         access(&u.Deny),
			"sync_timeout": caddyblock.Duration(&u.SyncTimeout),
			"max_stale":    caddyblock.Duration(&u.MaxStale),
		},
		Check: caddyblock.Literals(u, (*Upstreams).checkLiterals, "registry", "service", "where", "prefer", "pick", "uri"),
	}.Parse(d)
	if err != nil {
		return err
	}
	if u.RegistryRaw == nil {
		return d.Err("dynamic discovery: the registry is missing; write its URL behind the name, or a line 'registry <backend> [<url>...]' into the block")
	}
	return nil
}

// parseRegistrar sets up the registrar app from the global option, which may be
// given several times, once for each endpoint. Syntax:
//
//	registrar [<registry-url>...] {
//	    registry   <backend> [<url>...] {
//	        <backend options>
//	    }
//	    node_id    <id>
//	    endpoint   <url>
//	    metadata   <key> <value>
//	    heartbeat  <duration>
//	    ttl        <duration>
//	    load       system|<placeholder>
//	    health_url <url>
//	    drain      <duration>
//	}
func parseRegistrar(d *caddyfile.Dispenser, existing any) (any, error) {
	d.Next() // consume the name
	var app Registrar
	if existing != nil {
		if err := json.Unmarshal(existing.(httpcaddyfile.App).Value, &app); err != nil {
			return nil, d.WrapErr(err)
		}
	}
	node := new(ProxyNode)
	raw, err := registryFromArgs(d, "registrar")
	if err != nil {
		return nil, err
	}
	node.RegistryRaw = raw
	err = caddyblock.Block{
		What: "registrar",
		Options: caddyblock.Options{
			"registry":   registryOption(&node.RegistryRaw),
			"node_id":    caddyblock.Text("<id>", &node.NodeID),
			"endpoint":   caddyblock.Text("<url>", &node.Endpoint),
			"metadata":   metadata(&node.Metadata),
			"heartbeat":  caddyblock.Duration(&node.Heartbeat),
			"ttl":        caddyblock.Duration(&node.TTL),
			"load":       caddyblock.Text("system|<placeholder>", &node.Load),
			"health_url": caddyblock.Text("<url>", &node.HealthURL),
			"drain":      caddyblock.OptionalDuration(&node.Drain),
		},
		Check: caddyblock.Literals(node, (*ProxyNode).checkLiterals, "registry", "load"),
	}.Parse(d)
	if err != nil {
		return nil, err
	}
	if node.RegistryRaw == nil {
		return nil, d.Err("registrar: the registry is missing; write its URL behind the name, or a line 'registry <backend> [<url>...]' into the block")
	}
	app.Nodes = append(app.Nodes, node)
	return httpcaddyfile.App{Name: "registrar", Value: caddyconfig.JSON(app, nil)}, nil
}

// UnmarshalCaddyfile sets up the backend from Caddyfile tokens. Syntax:
//
//	registry nats_kv [<url>...] {
//	    bucket          <name>
//	    key_prefix      <prefix>
//	    create          on|off
//	    bucket_ttl      <duration>
//	    history         <n>
//	    max_bytes       <size>
//	    storage         file|memory
//	    replicas        <n>
//	    domain          <name>
//	    credentials     <file>
//	    nkey            <seed-file>
//	    token           <token>
//	    user            <name> <password>
//	    tls_ca          <file>
//	    tls_client_auth <certificate> <key>
//	    tls_server_name <name>
//	    tls_handshake_first on|off
//	    inbox_prefix    <prefix>
//	    ttl             <duration>
//	    loss_guard      <percent>|off
//	    warm_start      on|off
//	}
func (n *NATSKV) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name
	n.URLs = d.RemainingArgs()
	return caddyblock.Block{What: "registry nats_kv", Options: caddyblock.Options{
		"bucket":     caddyblock.Text("<name>", &n.Bucket),
		"key_prefix": caddyblock.Text("<prefix>", &n.KeyPrefix),
		"create":     caddyblock.OptionalSwitch(&n.Create),
		"bucket_ttl": caddyblock.Duration(&n.BucketTTL),
		"history":    caddyblock.Number(&n.History, 1, maxHistory),
		"max_bytes":  caddyblock.Size(&n.MaxBytes),
		"storage":    caddyblock.OneOf(&n.Storage, "file", "memory"),
		"replicas":   caddyblock.Number(&n.Replicas, 1, maxReplicas),
		"domain":     caddyblock.Text("<name>", &n.Domain),
	}.With(n.NATSConnection.options(), n.TLSClient.options(), n.DirectoryOptions.options()), Check: caddyblock.Literals(n, provisionAlone)}.Parse(d)
}

// UnmarshalCaddyfile sets up the backend from Caddyfile tokens. Syntax:
//
//	registry nats [<url>...] {
//	    subject_prefix  <prefix>
//	    credentials     <file>
//	    nkey            <seed-file>
//	    token           <token>
//	    user            <name> <password>
//	    tls_ca          <file>
//	    tls_client_auth <certificate> <key>
//	    tls_server_name <name>
//	    tls_handshake_first on|off
//	    inbox_prefix    <prefix>
//	    ttl             <duration>
//	    loss_guard      <percent>|off
//	    warm_start      on|off
//	}
func (n *NATS) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name
	n.URLs = d.RemainingArgs()
	return caddyblock.Block{What: "registry nats", Options: caddyblock.Options{
		"subject_prefix": caddyblock.Text("<prefix>", &n.SubjectPrefix),
	}.With(n.NATSConnection.options(), n.TLSClient.options(), n.DirectoryOptions.options()), Check: caddyblock.Literals(n, provisionAlone)}.Parse(d)
}

// UnmarshalCaddyfile sets up the backend from Caddyfile tokens. Syntax:
//
//	registry redis [<url>...] {
//	    mode              single|sentinel|cluster
//	    key               <key>
//	    layout            sorted_set|keys
//	    poll              <duration>
//	    history           <n>
//	    username          <name>
//	    password          <password>
//	    db                <n>
//	    sentinel_master   <name>
//	    sentinel_username <name>
//	    sentinel_password <password>
//	    sentinel_tls      on|off
//	    tls_ca            <file>
//	    tls_client_auth   <certificate> <key>
//	    tls_server_name   <name>
//	    ttl               <duration>
//	    loss_guard        <percent>|off
//	    warm_start        on|off
//	}
func (r *Redis) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name
	r.URLs = d.RemainingArgs()
	return caddyblock.Block{What: "registry redis", Options: caddyblock.Options{
		"mode":              caddyblock.OneOf(&r.Mode, redis.ModeSingle, redis.ModeSentinel, redis.ModeCluster),
		"key":               caddyblock.Text("<key>", &r.Key),
		"layout":            caddyblock.OneOf(&r.Layout, redis.LayoutSortedSet, redis.LayoutKeys),
		"poll":              caddyblock.Duration(&r.Poll),
		"history":           caddyblock.Number(&r.History, 1, maxRedisHistory),
		"username":          caddyblock.Text("<name>", &r.Username),
		"password":          caddyblock.Text("<password>", &r.Password),
		"db":                caddyblock.Number(&r.DB, 0, math.MaxInt32),
		"sentinel_master":   caddyblock.Text("<name>", &r.SentinelMaster),
		"sentinel_username": caddyblock.Text("<name>", &r.SentinelUsername),
		"sentinel_password": caddyblock.Text("<password>", &r.SentinelPassword),
		"sentinel_tls":      caddyblock.OptionalSwitch(&r.SentinelTLS),
	}.With(r.TLSClient.options(), r.DirectoryOptions.options()), Check: caddyblock.Literals(r, provisionAlone)}.Parse(d)
}

func (c *NATSConnection) options() caddyblock.Options {
	return caddyblock.Options{
		"credentials": caddyblock.Text("<file>", &c.Credentials),
		"nkey":        caddyblock.Text("<seed-file>", &c.NKey),
		"token":       caddyblock.Text("<token>", &c.Token),
		"user":        caddyblock.Texts("<name> <password>", &c.User, &c.Password),

		"inbox_prefix":        caddyblock.Text("<prefix>", &c.InboxPrefix),
		"tls_handshake_first": caddyblock.Switch(&c.TLSHandshakeFirst),
	}
}

func (t *TLSClient) options() caddyblock.Options {
	return caddyblock.Options{
		"tls_ca":          caddyblock.Text("<file>", &t.TLSCA),
		"tls_client_auth": caddyblock.Texts("<certificate> <key>", &t.TLSCertificate, &t.TLSKey),
		"tls_server_name": caddyblock.Text("<name>", &t.TLSServerName),
	}
}

func (o *DirectoryOptions) options() caddyblock.Options {
	return caddyblock.Options{
		"ttl":        caddyblock.Duration(&o.TTL),
		"loss_guard": caddyblock.PercentOrOff(&o.LossGuard),
		"warm_start": caddyblock.OptionalSwitch(&o.WarmStart),
	}
}

// registryFromArgs builds the registry module from the URLs on the line, nil if
// there are none.
func registryFromArgs(d *caddyfile.Dispenser, what string) (json.RawMessage, error) {
	var backend string
	var tokens []caddyfile.Token
	for d.NextArg() {
		name, ok := backends.Backend(d.Val())
		switch {
		case !ok:
			return nil, d.Errf("%s: %s does not name a backend by its scheme, want one of %s; for anything else write a line 'registry <backend> <url>' into the block",
				what, caddyblock.RedactURL(d.Val()), strings.Join(backends.Schemes(), "://, ")+"://")
		case backend != "" && name != backend:
			return nil, d.Errf("%s: the URLs name two backends, %s and %s; want one", what, backend, name)
		}
		backend = name
		tokens = append(tokens, d.Token())
	}
	if backend == "" {
		return nil, nil
	}
	name := tokens[0]
	name.Text = backend
	inner := caddyfile.NewDispenser(append([]caddyfile.Token{name}, tokens...))
	inner.Next()
	return unmarshalRegistry(inner)
}

// registryOption is the option 'registry <backend> [<url>...] { … }'.
func registryOption(raw *json.RawMessage) caddyblock.Option {
	return caddyblock.Option{Usage: "<backend> [<url>...] { <options> }", Custom: func(d *caddyfile.Dispenser) error {
		if *raw != nil {
			return errors.New("the registry is given twice; write its URL in one place")
		}
		if !d.NextArg() {
			return caddyblock.ErrUsage
		}
		var err error
		if *raw, err = unmarshalRegistry(d); err != nil {
			return caddyblock.Placed(err)
		}
		return nil
	}}
}

// unmarshalRegistry reads the segment that starts with the backend's name.
func unmarshalRegistry(d *caddyfile.Dispenser) (json.RawMessage, error) {
	const namespace = "discovery.registries"
	backend := d.Val()
	var known []string
	for _, m := range caddy.GetModules(namespace) {
		known = append(known, m.ID.Name())
	}
	if !slices.Contains(known, backend) {
		return nil, d.Errf("registry: unknown backend %q, want one of %s", caddyblock.RedactURL(backend), strings.Join(known, ", "))
	}
	module, err := caddyfile.UnmarshalModule(d, namespace+"."+backend)
	if err != nil {
		return nil, err
	}
	return caddyconfig.JSONModuleObject(module, "backend", backend, nil), nil
}

func criterion(to *[]Criterion) caddyblock.Option {
	return caddyblock.Option{Usage: "<key> <value...>", Min: 2, Max: -1, Repeatable: true, Set: func(args []string) error {
		if args[0] == "" {
			return errors.New("the key is empty, want <key> <value...>")
		}
		*to = append(*to, Criterion{Key: args[0], Values: args[1:]})
		return nil
	}}
}

// pick is the option 'pick <n> [hash <placeholder>]'.
func pick(to **Pick) caddyblock.Option {
	return caddyblock.Option{Usage: "<n> [hash <placeholder>]", Min: 1, Max: 3, Set: func(args []string) error {
		p := new(Pick)
		if err := caddyblock.Number(&p.Count, 1, maxPick).Set(args[:1]); err != nil {
			return err
		}
		if len(args) > 1 {
			if args[1] != "hash" {
				return fmt.Errorf("invalid word %q, want hash <placeholder> or nothing", args[1])
			}
			if len(args) < 3 || args[2] == "" {
				return errors.New("hash needs a placeholder, such as {client_ip} or {header.X-Tenant}")
			}
			p.Hash = args[2]
		}
		*to = p
		return p.check(nil) // with which policy, the handler knows
	}}
}

// healthOption is the option 'health { … }'.
func healthOption(to **Health) caddyblock.Option {
	return caddyblock.Option{Usage: "{ <options> }", Custom: func(d *caddyfile.Dispenser) error {
		if d.NextArg() {
			return caddyblock.ErrUsage
		}
		h := new(Health)
		*to = h
		return caddyblock.Block{What: "health", Options: caddyblock.Options{
			"uri":      caddyblock.Text("<path>", &h.URI),
			"tcp":      caddyblock.Present(&h.TCP),
			"interval": caddyblock.Duration(&h.Interval),
			"timeout":  caddyblock.Duration(&h.Timeout),
			"passes":   caddyblock.Number(&h.Passes, 1, maxChecks),
			"fails":    caddyblock.Number(&h.Fails, 1, maxChecks),
			"status":   status(&h.Status),
			"port":     caddyblock.Number(&h.Port, 1, 65535),
			"header":   caddyblock.Header(&h.Headers),
		}, Check: caddyblock.Literals(h, (*Health).check, "uri")}.Parse(d)
	}}
}

func status(to *string) caddyblock.Option {
	return caddyblock.Option{Usage: "<code>|<class>", Min: 1, Max: 1, Set: func(args []string) error {
		*to = args[0]
		return health.CheckStatus(args[0])
	}}
}

// access is a list of what allow and deny take.
func access(to *[]string) caddyblock.Option {
	return caddyblock.Option{Usage: "<cidr|private_ranges|host-glob...>", Min: 1, Max: -1, Repeatable: true, Set: func(args []string) error {
		if _, err := discovery.NewRules(discovery.Access{Allow: args}); err != nil {
			// The option's name is said already.
			return errors.New(strings.TrimPrefix(err.Error(), "allow: "))
		}
		*to = append(*to, args...)
		return nil
	}}
}

// metadata is the option 'metadata <key> <value>', or a block of such pairs.
func metadata(to *map[string]string) caddyblock.Option {
	set := func(args []string) error {
		if _, ok := (*to)[args[0]]; ok {
			return fmt.Errorf("the key %q is given twice, want it once", args[0])
		}
		if args[0] == "" {
			return errors.New("the key is empty, want <key> <value>")
		}
		if *to == nil {
			*to = make(map[string]string)
		}
		(*to)[args[0]] = args[1]
		return nil
	}
	return caddyblock.Option{Usage: "<key> <value>, or a block of such lines", Repeatable: true, Custom: func(d *caddyfile.Dispenser) error {
		if args := d.RemainingArgs(); len(args) == 2 {
			return set(args)
		} else if len(args) != 0 {
			return caddyblock.ErrUsage
		}
		pairs := 0
		for nesting := d.Nesting(); d.NextBlock(nesting); pairs++ {
			args := append([]string{d.Val()}, d.RemainingArgs()...)
			if len(args) != 2 {
				return caddyblock.ErrUsage
			}
			if err := set(args); err != nil {
				return err
			}
		}
		if pairs == 0 {
			return caddyblock.ErrUsage
		}
		return nil
	}}
}

// checkLiterals is what Provision checks of the source itself.
func (u *Upstreams) checkLiterals() error {
	if u.ProxyID == "" {
		u.ProxyID = "1" // the default is made where it is needed
	}
	return u.checkOptions()
}

// checkLiterals is what Provision checks of the node itself.
func (n *ProxyNode) checkLiterals() error {
	if n.NodeID == "" {
		n.NodeID = "1"
	}
	if err := n.complete(); err != nil {
		return err
	}
	return n.checkNode()
}

// provisionAlone provisions a backend, which needs nothing of a config for it.
func provisionAlone[T any](backend *T) error {
	return any(backend).(caddy.Provisioner).Provision(caddy.Context{})
}

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*Upstreams)(nil)
	_ caddyfile.Unmarshaler = (*NATSKV)(nil)
	_ caddyfile.Unmarshaler = (*NATS)(nil)
	_ caddyfile.Unmarshaler = (*Redis)(nil)
)
