package caddydiscovery

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
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
//	    route
//	    scheme       auto|http|https
//	    pick         <n> [hash <placeholder>]
//	    subset       <n>
//	    proxy_id     <id>
//	    slow_start   <duration>
//	    sticky       [<cookie> [<secret>]] {
//	        cookie  <name>
//	        secret  <secret>
//	        max_age <duration>
//	        lost    repick|<status>
//	    }
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
//	    outlier {
//	        errors      <n>
//	        rate        <percent> [<requests> [<window>]]
//	        eject       <duration>
//	        max_ejected <percent>
//	    }
//	    retry_budget <percent> [<n>]
//	    allow        <cidr|private_ranges|host-glob...>
//	    deny         <cidr|private_ranges|host-glob...>
//	    metrics      service|node [<max nodes>]
//	    sync_timeout <duration>
//	    max_stale    <duration>
//	}
//
// A registry URL goes behind the name or behind registry, not both.
func (u *Upstreams) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return unmarshalBlock(d, "dynamic discovery", &u.RegistryRaw, caddyblock.Options{
		"service":      caddyblock.Text("<name>", &u.Service),
		"where":        criterion(&u.Where),
		"prefer":       criterion(&u.Prefer),
		"route":        caddyblock.Present(&u.Route),
		"scheme":       caddyblock.OneOf(&u.Scheme, schemeAuto, "http", "https"),
		"pick":         pick(&u.Pick),
		"subset":       caddyblock.Number(&u.Subset, 1, discovery.MaxNodes),
		"proxy_id":     caddyblock.Text("<id>", &u.ProxyID),
		"slow_start":   caddyblock.Duration(&u.SlowStart),
		"sticky":       stickyOption(&u.Sticky),
		"health":       healthOption(&u.Health),
		"outlier":      outlierOption(&u.Outlier),
		"retry_budget": retryBudgetOption(&u.RetryBudget),
		"allow":        access(&u.Allow),
		"deny":         access(&u.Deny),
		"metrics":      metricsOption(&u.Metrics),
		"sync_timeout": caddyblock.Duration(&u.SyncTimeout),
		"max_stale":    caddyblock.Duration(&u.MaxStale),
	}, caddyblock.Literals(u, (*Upstreams).checkLiterals, "registry", "service", "where", "prefer", "pick", "uri", "sticky"))
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
//	    metadata {
//	        <key>  <value>
//	    }
//	    heartbeat  <duration>
//	    ttl        <duration>
//	    load       system|<placeholder>
//	    health_url <url>
//	    drain      <duration>|until_idle <max>
//	}
func parseRegistrar(d *caddyfile.Dispenser, existing any) (any, error) {
	var app Registrar
	if existing != nil {
		if err := json.Unmarshal(existing.(httpcaddyfile.App).Value, &app); err != nil {
			return nil, d.WrapErr(err)
		}
	}
	node := new(ProxyNode)
	if err := unmarshalBlock(d, "registrar", &node.RegistryRaw, caddyblock.Options{
		"node_id":    caddyblock.Text("<id>", &node.NodeID),
		"endpoint":   caddyblock.Text("<url>", &node.Endpoint),
		"metadata":   metadata(&node.Metadata),
		"heartbeat":  caddyblock.Duration(&node.Heartbeat),
		"ttl":        caddyblock.Duration(&node.TTL),
		"load":       caddyblock.Text("system|<placeholder>", &node.Load),
		"health_url": caddyblock.Text("<url>", &node.HealthURL),
		"drain":      drainOption(&node.Drain, &node.DrainUntilIdle),
	}, caddyblock.Literals(node, (*ProxyNode).checkLiterals, "registry", "load")); err != nil {
		return nil, err
	}
	app.Nodes = append(app.Nodes, node)
	return httpcaddyfile.App{Name: "registrar", Value: caddyconfig.JSON(app, nil)}, nil
}

// unmarshalBlock reads what has a registry: its URLs on the line of the name that d
// stands before, or a line of the block, beside the options.
func unmarshalBlock(d *caddyfile.Dispenser, what string, registry *json.RawMessage, options caddyblock.Options, check func() error) (err error) {
	d.Next() // consume the name
	if *registry, err = backend.UnmarshalURLs(d, what); err != nil {
		return err
	}
	options["registry"] = registryOption(registry)
	if err := (caddyblock.Block{What: what, Options: options, Check: check}).Parse(d); err != nil {
		return err
	}
	if *registry == nil {
		*registry, err = backend.OnlyDeclared(d)
	}
	return err
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
		if *raw, err = backend.Unmarshal(d); err != nil {
			return caddyblock.Placed(err)
		}
		return nil
	}}
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
			"status":   caddyblock.Value("<code>|<class>", &h.Status, func(arg string) (string, error) { return arg, health.CheckStatus(arg) }),
			"port":     caddyblock.Number(&h.Port, 1, 65535),
			"header":   caddyblock.Header(&h.Headers),
		}, Check: caddyblock.Literals(h, (*Health).check, "uri")}.Parse(d)
	}}
}

// drainOption is the option 'drain <duration>|until_idle <max>'.
func drainOption(to **caddy.Duration, untilIdle *bool) caddyblock.Option {
	return caddyblock.Option{Usage: "<duration>|until_idle <max>", Min: 1, Max: 2, Set: func(args []string) error {
		switch {
		case args[0] == "until_idle" && len(args) == 2:
			*untilIdle, *to = true, new(caddy.Duration)
			return caddyblock.Duration(*to).Set(args[1:])
		case args[0] == "until_idle":
			return errors.New("until_idle needs a duration behind it, for how long at most, such as 30s")
		case len(args) == 2:
			return caddyblock.ErrUsage
		}
		return caddyblock.OptionalDuration(to).Set(args)
	}}
}

// access is a list of what allow and deny take.
func access(to *[]string) caddyblock.Option {
	return caddyblock.Option{Usage: "<cidr|private_ranges|host-glob...>", Min: 1, Max: -1, Repeatable: true, Set: func(args []string) error {
		if err := discovery.ValidatePatterns(args); err != nil {
			return err
		}
		*to = append(*to, args...)
		return nil
	}}
}

// metadata is the option 'metadata <key> <value>', or a block of such pairs.
func metadata(to *map[string]string) caddyblock.Option {
	add := func(pair ...string) error {
		if len(pair) != 2 {
			return caddyblock.ErrUsage
		}
		if _, ok := (*to)[pair[0]]; ok {
			return fmt.Errorf("the key %q is given twice, want it once", pair[0])
		}
		if pair[0] == "" {
			return errors.New("the key is empty, want <key> <value>")
		}
		if *to == nil {
			*to = make(map[string]string)
		}
		(*to)[pair[0]] = pair[1]
		return nil
	}
	return caddyblock.Option{Usage: "<key> <value>, or a block of such lines", Repeatable: true, Custom: func(d *caddyfile.Dispenser) error {
		if args := d.RemainingArgs(); len(args) > 0 {
			return add(args...)
		}
		err := caddyblock.ErrUsage // of an empty block
		for nesting := d.Nesting(); d.NextBlock(nesting); {
			if err = add(append([]string{d.Val()}, d.RemainingArgs()...)...); err != nil {
				break
			}
		}
		return err
	}}
}

// checkLiterals is what Provision checks of the source itself.
func (u *Upstreams) checkLiterals() error {
	u.ProxyID = cmp.Or(u.ProxyID, "1") // the default is made where it is needed
	return u.checkOptions()
}

// checkLiterals is what Provision checks of the node itself.
func (n *ProxyNode) checkLiterals() error {
	n.NodeID = cmp.Or(n.NodeID, "1")
	if err := n.complete(); err != nil {
		return err
	}
	return n.checkNode()
}

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*Upstreams)(nil)
)
