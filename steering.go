package caddydiscovery

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

func registerCommand() *cobra.Command {
	var (
		flags                 registryFlags
		metadata              []string
		service, load, health string
		heartbeat, ttl, drain time.Duration
	)
	cmd := &cobra.Command{
		Use:   "register <id> <endpoint> [--service <name>] [--metadata <key>=<value>]...",
		Short: "Lists a node for as long as the command runs",
		Long: `
Lists a node and renews its record until the command is interrupted, so that any
program can be found: start both, and end this one with the program. Then the node
is announced as draining for --drain, and its record is removed.

While the registry is away it retries and never gives up.`,
		Example: `  $ caddy discovery register pay-1 http://10.0.0.9:8080 --service pay
  $ caddy discovery register db-1 10.0.0.7:5432 --metadata service=db --metadata weight=2 --health http://127.0.0.1:9000/healthz`,
		Args: cobra.ExactArgs(2),
	}
	flags.add(cmd)
	cmd.Flags().StringVar(&service, "service", "", "the node's `service`")
	cmd.Flags().StringArrayVarP(&metadata, "metadata", "m", nil, "a `key=value` of the node's metadata")
	cmd.Flags().StringVar(&load, "load", "system", "the node's load: a `number`, or system for this machine's load average per core")
	cmd.Flags().StringVar(&health, "health", "", "list the node only while this `URL` answers 2xx")
	cmd.Flags().DurationVar(&heartbeat, "heartbeat", discovery.DefaultHeartbeat, "how often to renew the record")
	cmd.Flags().DurationVar(&ttl, "ttl", 0, "how long the node counts as live after it was last heard (default three heartbeats)")
	cmd.Flags().DurationVar(&drain, "drain", discovery.DefaultDrain, "how long to announce the node as draining before it leaves")
	return command(cmd, func(ctx context.Context, _ *cobra.Command, args []string) error {
		endpoint, err := discovery.ParseEndpoint(args[1])
		if err != nil {
			return err
		}
		node := discovery.Node{ID: args[0], Endpoint: endpoint, Metadata: make(map[string]string)}
		for _, pair := range metadata {
			k, v, found := strings.Cut(pair, "=")
			if !found || k == "" {
				return fmt.Errorf("--metadata: invalid pair %q, want key=value", pair)
			}
			node.Metadata[k] = v
		}
		if service != "" {
			node.Metadata[discovery.KeyService] = service
		}
		options := discovery.RegistrarOptions{
			Heartbeat: heartbeat, TTL: ttl, Drain: &drain, Load: discovery.SystemLoad,
			Logger: slogOf(caddy.Log().Named("registrar")),
		}
		switch {
		case heartbeat <= 0:
			return fmt.Errorf("--heartbeat: invalid duration %v, want one above 0", heartbeat)
		case drain < 0:
			return fmt.Errorf("--drain: invalid duration %v, want 0s or more", drain)
		}
		if load != "system" {
			if node.Load, err = strconv.ParseFloat(load, 64); err != nil {
				return fmt.Errorf("--load: invalid value %q, want system or a number", load)
			}
			options.Load = nil
		}
		if health != "" {
			if err := checkHealthURL("--health", health); err != nil {
				return err
			}
			options.Ready = healthCheck(health)
		}
		_, registry, closeAll, err := flags.open(ctx, true)
		if err != nil {
			return err
		}
		defer closeAll()
		options.Logger = options.Logger.With("registry", registry.String())
		registrar, err := discovery.NewRegistrar(registry, node, options)
		if err != nil {
			return err
		}
		return registrar.Run(ctx)
	})
}

func deregisterCommand() *cobra.Command {
	var flags registryFlags
	cmd := &cobra.Command{
		Use:   "deregister <id>",
		Short: "Removes the record of a node",
		Long: `
Removes the record of a node, whoever wrote it. A node that lives lists itself
again with its next heartbeat: to take it out of service, drain it.`,
		Example: "  $ caddy discovery deregister orders-3",
		Args:    cobra.ExactArgs(1),
	}
	flags.add(cmd)
	return command(cmd, func(ctx context.Context, cmd *cobra.Command, args []string) error {
		return flags.follow(ctx, func(ctx context.Context, registry discovery.Registry, d *discovery.Directory) error {
			e, err := findNode(registry, d, args[0])
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(ctx, flags.timeout)
			defer cancel()
			if err := registry.Withdraw(ctx, e.Node); err != nil {
				return err
			}
			if !awaitGone(ctx, d, args[0], min(flags.timeout, 3*time.Second)) {
				return fmt.Errorf("%s still lists %q: it stands under a key that is not the id's own, or listed itself again at once", registry, args[0])
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s left %s\n", discovery.PrintableLine(args[0]), registry)
			return nil
		})
	})
}

// awaitGone waits until the directory has no such node, and reports whether that
// came true.
func awaitGone(ctx context.Context, d *discovery.Directory, id string, patience time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		s := d.Snapshot()
		if s.Node(id) == nil {
			return true
		}
		select {
		case <-s.Superseded():
		case <-ctx.Done():
			return false
		}
	}
}

func findNode(registry discovery.Registry, d *discovery.Directory, id string) (*discovery.Entry, error) {
	if e := d.Snapshot().Node(id); e != nil {
		return e, nil
	}
	for _, r := range d.Status().Rejections {
		if r.ID == id {
			return nil, fmt.Errorf("%w: the record of %q in %s is rejected: %w", errNoSuchNode, id, registry, r.Err)
		}
	}
	return nil, fmt.Errorf("%w: %s does not list %q", errNoSuchNode, registry, id)
}

var errHealthURL = errors.New("want http://host[:port][/path] or https://…")

// checkHealthURL checks what an option that names a URL to ask says.
func checkHealthURL(option, value string) error {
	u, err := url.Parse(value)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return fmt.Errorf("%s: invalid URL %q, %w", option, caddyblock.RedactURL(value), errHealthURL)
	}
	return nil
}
