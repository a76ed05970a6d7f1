package cli

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/systemload"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
	"github.com/caddy-discovery/caddy-discovery/internal/health"
)

// registerFlags are the flags that say what a node's record is to be.
type registerFlags struct {
	registryFlags
	metadata               []string
	service, load, ask     string
	heartbeat, ttl, drains time.Duration
}

func (f *registerFlags) add(cmd *cobra.Command) {
	f.registryFlags.add(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.service, "service", "", "the node's `service`")
	flags.StringArrayVarP(&f.metadata, "metadata", "m", nil, "a `key=value` of the node's metadata")
	flags.StringVar(&f.load, "load", "system", "the node's load: a `number`, or system for this machine's load average per core")
	flags.StringVar(&f.ask, "health", "", "list the node only while this `URL` answers 2xx")
	flags.DurationVar(&f.heartbeat, "heartbeat", discovery.DefaultHeartbeat, "how often to renew the record")
	flags.DurationVar(&f.ttl, "ttl", 0, "how long the node counts as live after it was last heard (default three heartbeats)")
	flags.DurationVar(&f.drains, "drain", discovery.DefaultDrain, "how long to announce the node as draining before it leaves")
}

// node returns the node that is to be listed.
func (f *registerFlags) node(id, url string) (discovery.Node, error) {
	endpoint, err := discovery.ParseEndpoint(url)
	if err != nil {
		return discovery.Node{}, err
	}
	n := discovery.Node{ID: id, Endpoint: endpoint, Metadata: make(map[string]string)}
	for _, pair := range f.metadata {
		k, v, found := strings.Cut(pair, "=")
		if !found || k == "" {
			return discovery.Node{}, fmt.Errorf("--metadata: invalid pair %q, want key=value", pair)
		}
		n.Metadata[k] = v
	}
	if f.service != "" {
		n.Metadata[discovery.KeyService] = f.service
	}
	return n, nil
}

// registrar returns how the node is to be listed, and sets its load where that stays
// the same.
func (f *registerFlags) registrar(n *discovery.Node) (discovery.RegistrarOptions, error) {
	o := discovery.RegistrarOptions{Heartbeat: f.heartbeat, TTL: f.ttl, Drain: &f.drains, Load: systemload.PerCore}
	switch {
	case f.heartbeat <= 0:
		return o, fmt.Errorf("--heartbeat: invalid duration %v, want one above 0", f.heartbeat)
	case f.drains < 0:
		return o, fmt.Errorf("--drain: invalid duration %v, want 0s or more", f.drains)
	}
	if f.load != "system" {
		var err error
		if n.Load, err = strconv.ParseFloat(f.load, 64); err != nil {
			return o, fmt.Errorf("--load: invalid value %q, want system or a number", f.load)
		}
		o.Load = nil
	}
	if f.ask != "" {
		if err := caddyblock.CheckURL("--health", f.ask); err != nil {
			return o, err
		}
		o.Ready = health.URL(f.ask)
	}
	return o, nil
}

func registerCommand(log *slog.Logger) *cobra.Command {
	var flags registerFlags
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
	return command(cmd, func(ctx context.Context, _ *cobra.Command, args []string) error {
		node, err := flags.node(args[0], args[1])
		if err != nil {
			return err
		}
		options, err := flags.registrar(&node)
		if err != nil {
			return err
		}
		c, err := flags.open(ctx, true)
		if err != nil {
			return err
		}
		defer c.close()
		options.Logger = log.With("registry", c.registry.String())
		registrar, err := discovery.NewRegistrar(c.registry, node, options)
		if err != nil {
			return err
		}
		return registrar.Run(ctx)
	})
}

// goneWithin is how long a record that was removed may still show.
const goneWithin = 3 * time.Second

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
		return flags.follow(ctx, func(ctx context.Context, f *fleet) error {
			id := args[0]
			e, err := f.node(id)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(ctx, flags.timeout)
			defer cancel()
			if err := f.registry.Withdraw(ctx, e.Node); err != nil {
				return err
			}
			ctx, cancel = context.WithTimeout(ctx, goneWithin)
			defer cancel()
			if f.await(ctx, func(s *discovery.Snapshot) bool { return s.Node(id) == nil }) != nil {
				return fmt.Errorf("%s still lists %q: it stands under a key that is not the id's own, or listed itself again at once", f.registry, id)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s left %s\n", discovery.PrintableLine(id), f.registry)
			return nil
		})
	})
}
