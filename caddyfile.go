package caddydiscovery

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/dustin/go-humanize"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/redis"
	backends "github.com/caddy-discovery/caddy-discovery/discovery/registries"
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
	err = block{
		what: "dynamic discovery",
		options: map[string]option{
			"registry":     registryOption(&u.RegistryRaw),
			"service":      text("<name>", &u.Service),
			"where":        criterion(&u.Where),
			"prefer":       criterion(&u.Prefer),
			"scheme":       oneOf(&u.Scheme, schemeAuto, "http", "https"),
			"pick":         pick(&u.Pick),
			"subset":       number(&u.Subset, 1, discovery.MaxNodes),
			"proxy_id":     text("<id>", &u.ProxyID),
			"slow_start":   duration(&u.SlowStart),
			"health":       healthOption(&u.Health),
			"allow":        access(&u.Allow),
			"deny":         access(&u.Deny),
			"sync_timeout": duration(&u.SyncTimeout),
			"max_stale":    duration(&u.MaxStale),
		},
		check: func() error { return judge(u, (*Upstreams).checkLiterals) },
	}.parse(d)
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
	err = block{
		what: "registrar",
		options: map[string]option{
			"registry":   registryOption(&node.RegistryRaw),
			"node_id":    text("<id>", &node.NodeID),
			"endpoint":   text("<url>", &node.Endpoint),
			"metadata":   metadata(&node.Metadata),
			"heartbeat":  duration(&node.Heartbeat),
			"ttl":        duration(&node.TTL),
			"load":       text("system|<placeholder>", &node.Load),
			"health_url": text("<url>", &node.HealthURL),
			"drain":      optionalDuration(&node.Drain),
		},
		check: func() error { return judge(node, (*ProxyNode).checkLiterals) },
	}.parse(d)
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
	options := map[string]option{
		"bucket":     text("<name>", &n.Bucket),
		"key_prefix": text("<prefix>", &n.KeyPrefix),
		"create":     onOff(&n.Create),
		"bucket_ttl": duration(&n.BucketTTL),
		"history":    number(&n.History, 1, maxHistory),
		"max_bytes":  size(&n.MaxBytes),
		"storage":    oneOf(&n.Storage, "file", "memory"),
		"replicas":   number(&n.Replicas, 1, maxReplicas),
		"domain":     text("<name>", &n.Domain),
	}
	return block{what: "registry nats_kv", options: options, check: func() error { return judge(n, provisionAlone) }}.with(
		n.NATSConnection.options(), n.TLSClient.options(), n.DirectoryOptions.options(),
	).parse(d)
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
	return block{what: "registry nats", options: map[string]option{
		"subject_prefix": text("<prefix>", &n.SubjectPrefix),
	}, check: func() error { return judge(n, provisionAlone) }}.with(n.NATSConnection.options(), n.TLSClient.options(), n.DirectoryOptions.options()).parse(d)
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
	return block{what: "registry redis", options: map[string]option{
		"mode":              oneOf(&r.Mode, redis.ModeSingle, redis.ModeSentinel, redis.ModeCluster),
		"key":               text("<key>", &r.Key),
		"layout":            oneOf(&r.Layout, redis.LayoutSortedSet, redis.LayoutKeys),
		"poll":              duration(&r.Poll),
		"history":           number(&r.History, 1, maxRedisHistory),
		"username":          text("<name>", &r.Username),
		"password":          text("<password>", &r.Password),
		"db":                number(&r.DB, 0, math.MaxInt32),
		"sentinel_master":   text("<name>", &r.SentinelMaster),
		"sentinel_username": text("<name>", &r.SentinelUsername),
		"sentinel_password": text("<password>", &r.SentinelPassword),
		"sentinel_tls":      onOff(&r.SentinelTLS),
	}, check: func() error { return judge(r, provisionAlone) }}.with(r.TLSClient.options(), r.DirectoryOptions.options()).parse(d)
}

func (c *NATSConnection) options() map[string]option {
	return map[string]option{
		"credentials": text("<file>", &c.Credentials),
		"nkey":        text("<seed-file>", &c.NKey),
		"token":       text("<token>", &c.Token),
		"user":        texts("<name> <password>", &c.User, &c.Password),

		"inbox_prefix":        text("<prefix>", &c.InboxPrefix),
		"tls_handshake_first": switched(&c.TLSHandshakeFirst),
	}
}

func (t *TLSClient) options() map[string]option {
	return map[string]option{
		"tls_ca":          text("<file>", &t.TLSCA),
		"tls_client_auth": texts("<certificate> <key>", &t.TLSCertificate, &t.TLSKey),
		"tls_server_name": text("<name>", &t.TLSServerName),
	}
}

func (o *DirectoryOptions) options() map[string]option {
	return map[string]option{
		"ttl":        duration(&o.TTL),
		"loss_guard": percentOrOff(&o.LossGuard),
		"warm_start": onOff(&o.WarmStart),
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
				what, redactURL(d.Val()), strings.Join(backends.Schemes(), "://, ")+"://")
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
func registryOption(raw *json.RawMessage) option {
	return option{usage: "<backend> [<url>...] { <options> }", custom: func(d *caddyfile.Dispenser) error {
		if *raw != nil {
			return errors.New("the registry is given twice; write its URL in one place")
		}
		if !d.NextArg() {
			return errUsage
		}
		var err error
		*raw, err = unmarshalRegistry(d)
		return err
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
		return nil, d.Errf("registry: unknown backend %q, want one of %s", redactURL(backend), strings.Join(known, ", "))
	}
	module, err := caddyfile.UnmarshalModule(d, namespace+"."+backend)
	if err != nil {
		return nil, err
	}
	return caddyconfig.JSONModuleObject(module, "backend", backend, nil), nil
}

// redactURL is for messages that show what was written where a URL may stand: user
// info is left out, of which even the name may be a token, and so is a query.
func redactURL(s string) string {
	if end := strings.IndexAny(s, "?#"); end >= 0 && !strings.Contains(s[end:], "@") {
		s = s[:end] + s[end:end+1] + "…"
	}
	at := strings.LastIndexByte(s, '@')
	if at < 0 {
		return s
	}
	scheme, _, found := strings.Cut(s[:at], "://")
	if !found || strings.Trim(strings.ToLower(scheme), "abcdefghijklmnopqrstuvwxyz+") != "" {
		return "…" + s[at:]
	}
	return scheme + "://…" + s[at:]
}

// block is the grammar of one block of options. A table is shorter than a switch
// for each block, and gives every mistake the same clear message.
type block struct {
	what    string
	options map[string]option
	// check, where given, judges what all the options come to; see judge.
	check func() error
}

// with returns the block with further options, such as those that several
// backends have.
func (b block) with(more ...map[string]option) block {
	for _, options := range more {
		maps.Copy(b.options, options)
	}
	return b
}

// option is one line of a block.
type option struct {
	usage      string
	min, max   int  // how many arguments; max < 0: no limit
	repeatable bool // it may be given more than once
	set        func(args []string) error
	// custom, where given, reads the line itself, and its block.
	custom func(d *caddyfile.Dispenser) error
}

// errUsage is what a custom option returns when its arguments are missing.
var errUsage = errors.New("wrong arguments")

// parse reads the block behind d's current line, if there is one.
func (b block) parse(d *caddyfile.Dispenser) error {
	given := make(map[string]bool)
	// What is wrong with the whole is told of the line after which it was wrong.
	since := make(map[string]caddyfile.Dispenser)
	check := func(at caddyfile.Dispenser) error {
		if b.check == nil {
			return nil
		}
		err := b.check()
		if err == nil {
			return nil
		}
		if before, ok := since[err.Error()]; ok {
			at = before
		}
		since[err.Error()] = at
		return at.WrapErr(fmt.Errorf("%s: %w", b.what, err))
	}
	wrong := check(*d)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name, at := d.Val(), *d
		o, ok := b.options[name]
		if !ok {
			return d.Errf("%s: unknown option %q, want one of %s", b.what, redactURL(name),
				strings.Join(slices.Sorted(maps.Keys(b.options)), ", "))
		}
		if given[name] && !o.repeatable {
			return d.Errf("%s: option %s is given twice, want it once: %s %s", b.what, name, name, o.usage)
		}
		given[name] = true
		var err error
		if o.custom != nil {
			err = o.custom(d)
		} else {
			args := d.RemainingArgs()
			if len(args) < o.min || (o.max >= 0 && len(args) > o.max) {
				err = errUsage
			} else if err = o.set(args); err == nil && d.NextBlock(d.Nesting()) {
				return d.Errf("%s: option %s takes no block, want: %s %s", b.what, name, name, o.usage)
			}
		}
		switch {
		case errors.Is(err, errUsage):
			return d.Errf("%s: wrong number of arguments for option %s, want: %s %s", b.what, name, name, o.usage)
		case err != nil && strings.Contains(err.Error(), ", at "):
			return err // it names its place already
		case err != nil:
			return d.WrapErr(fmt.Errorf("%s: option %s: %w", b.what, name, err))
		}
		wrong = check(at)
	}
	return wrong
}

func text(usage string, to *string) option { return texts(usage, to) }

func texts(usage string, to ...*string) option {
	return option{usage: usage, min: len(to), max: len(to), set: func(args []string) error {
		for i, arg := range args {
			if arg == "" {
				return fmt.Errorf("an argument is empty, want %s", usage)
			}
			*to[i] = arg
		}
		return nil
	}}
}

func oneOf(to *string, accepted ...string) option {
	usage := strings.Join(accepted, "|")
	return option{usage: usage, min: 1, max: 1, set: func(args []string) error {
		if !slices.Contains(accepted, args[0]) {
			return fmt.Errorf("invalid value %q, want %s", args[0], usage)
		}
		*to = args[0]
		return nil
	}}
}

func onOff(to **bool) option {
	var word string
	o := oneOf(&word, "on", "off")
	check := o.set
	o.set = func(args []string) error {
		if err := check(args); err != nil {
			return err
		}
		on := word == "on"
		*to = &on
		return nil
	}
	return o
}

// switched is onOff where leaving it out is off.
func switched(to *bool) option {
	var on *bool
	o := onOff(&on)
	set := o.set
	o.set = func(args []string) error {
		if err := set(args); err != nil {
			return err
		}
		*to = *on
		return nil
	}
	return o
}

func duration(to *caddy.Duration) option {
	return option{usage: "<duration>", min: 1, max: 1, set: func(args []string) error {
		v, err := caddy.ParseDuration(args[0])
		if err != nil || v <= 0 {
			return fmt.Errorf("invalid duration %q, want one above 0 such as 500ms, 10s or 5m", args[0])
		}
		*to = caddy.Duration(v)
		return nil
	}}
}

// optionalDuration is a duration for which 0 has a meaning of its own.
func optionalDuration(to **caddy.Duration) option {
	return option{usage: "<duration>", min: 1, max: 1, set: func(args []string) error {
		v, err := caddy.ParseDuration(args[0])
		if err != nil || v < 0 {
			return fmt.Errorf("invalid duration %q, want 0s or one such as 500ms, 10s or 5m", args[0])
		}
		d := caddy.Duration(v)
		*to = &d
		return nil
	}}
}

func number(to *int, least, most int) option {
	return option{usage: "<n>", min: 1, max: 1, set: func(args []string) error {
		v, err := strconv.Atoi(args[0])
		if err != nil || v < least || v > most {
			return fmt.Errorf("invalid number %q, want %d to %d", args[0], least, most)
		}
		*to = v
		return nil
	}}
}

// percentOrOff is a percentage for which 0 means off.
func percentOrOff(to **int) option {
	return option{usage: "<percent>|off", min: 1, max: 1, set: func(args []string) error {
		v := 0
		if args[0] != "off" {
			var err error
			v, err = strconv.Atoi(strings.TrimSuffix(args[0], "%"))
			if err != nil || v < 1 || v > 100 {
				return fmt.Errorf("invalid percentage %q, want 1 to 100, or off", args[0])
			}
		}
		*to = &v
		return nil
	}}
}

func size(to *int64) option {
	return option{usage: "<size>", min: 1, max: 1, set: func(args []string) error {
		v, err := humanize.ParseBytes(args[0])
		if err != nil || v == 0 || v > 1<<62 {
			return fmt.Errorf("invalid size %q, want one above 0 such as 10MiB or 1GiB", args[0])
		}
		*to = int64(v)
		return nil
	}}
}

func criterion(to *[]Criterion) option {
	return option{usage: "<key> <value...>", min: 2, max: -1, repeatable: true, set: func(args []string) error {
		if args[0] == "" {
			return errors.New("the key is empty, want <key> <value...>")
		}
		*to = append(*to, Criterion{Key: args[0], Values: args[1:]})
		return nil
	}}
}

// pick is the option 'pick <n> [hash <placeholder>]'.
func pick(to **Pick) option {
	return option{usage: "<n> [hash <placeholder>]", min: 1, max: 3, set: func(args []string) error {
		p := new(Pick)
		if err := number(&p.Count, 1, maxPick).set(args[:1]); err != nil {
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
func healthOption(to **Health) option {
	return option{usage: "{ <options> }", custom: func(d *caddyfile.Dispenser) error {
		if d.NextArg() {
			return errUsage
		}
		h := new(Health)
		*to = h
		return block{what: "health", options: map[string]option{
			"uri":      text("<path>", &h.URI),
			"tcp":      present(&h.TCP),
			"interval": duration(&h.Interval),
			"timeout":  duration(&h.Timeout),
			"passes":   number(&h.Passes, 1, maxChecks),
			"fails":    number(&h.Fails, 1, maxChecks),
			"status":   status(&h.Status),
			"port":     number(&h.Port, 1, 65535),
			"header":   header(&h.Headers),
		}, check: func() error { return judge(h, (*Health).check) }}.parse(d)
	}}
}

// present is an option that is set by being there.
func present(to *bool) option {
	return option{usage: "(no arguments)", set: func([]string) error {
		*to = true
		return nil
	}}
}

func status(to *string) option {
	return option{usage: "<code>|<class>", min: 1, max: 1, set: func(args []string) error {
		*to = args[0]
		return checkStatus(args[0])
	}}
}

func header(to *http.Header) option {
	return option{usage: "<name> <value>", min: 2, max: 2, repeatable: true, set: func(args []string) error {
		if args[0] == "" {
			return errors.New("the name is empty, want <name> <value>")
		}
		if *to == nil {
			*to = make(http.Header)
		}
		to.Add(args[0], args[1])
		return nil
	}}
}

// access is a list of what allow and deny take.
func access(to *[]string) option {
	return option{usage: "<cidr|private_ranges|host-glob...>", min: 1, max: -1, repeatable: true, set: func(args []string) error {
		if _, err := discovery.NewRules(discovery.Access{Allow: args}); err != nil {
			// The option's name is said already.
			return errors.New(strings.TrimPrefix(err.Error(), "allow: "))
		}
		*to = append(*to, args...)
		return nil
	}}
}

// metadata is the option 'metadata <key> <value>', or a block of such pairs.
func metadata(to *map[string]string) option {
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
	return option{usage: "<key> <value>, or a block of such lines", repeatable: true, custom: func(d *caddyfile.Dispenser) error {
		if args := d.RemainingArgs(); len(args) == 2 {
			return set(args)
		} else if len(args) != 0 {
			return errUsage
		}
		pairs := 0
		for nesting := d.Nesting(); d.NextBlock(nesting); pairs++ {
			args := append([]string{d.Val()}, d.RemainingArgs()...)
			if len(args) != 2 {
				return errUsage
			}
			if err := set(args); err != nil {
				return err
			}
		}
		if pairs == 0 {
			return errUsage
		}
		return nil
	}}
}

// checkDuration is the check of a JSON configuration that duration is of a
// Caddyfile.
func checkDuration(name string, d caddy.Duration) error {
	if d < 0 {
		return fmt.Errorf("%s: invalid duration %v, want one above 0", name, time.Duration(d))
	}
	return nil
}

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*Upstreams)(nil)
	_ caddyfile.Unmarshaler = (*NATSKV)(nil)
	_ caddyfile.Unmarshaler = (*NATS)(nil)
	_ caddyfile.Unmarshaler = (*Redis)(nil)
)
