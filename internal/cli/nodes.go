package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

func nodesCommand() *cobra.Command {
	var flags registryFlags
	cmd := &cobra.Command{
		Use:   "nodes [--service <name>] [--state <state>] [--json]",
		Short: "Lists the nodes of a registry",
		Long: `
Lists the nodes that count as alive by their records, and the records that are
rejected, with the reason. Nobody is dialled: where most leases have run out, the
nodes are shown as held, and each proxy finds out whether they still serve. --json
prints what the admin API does.`,
		Example: `  $ caddy discovery nodes
  $ caddy discovery nodes --service orders --state draining
  $ caddy discovery nodes --json | jq -r '.[] | select(.load > 0.8) | .id'`,
		Args: cobra.NoArgs,
	}
	flags.add(cmd)
	asJSON := cmd.Flags().Bool("json", false, "print JSON")
	service := cmd.Flags().String("service", "", "only nodes of this `service`")
	state := cmd.Flags().String("state", "", "only nodes in this `state`")
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(view.States, cobra.ShellCompDirectiveNoFileComp))
	return command(cmd, func(ctx context.Context, cmd *cobra.Command, _ []string) error {
		if *state != "" && !slices.Contains(view.States, *state) {
			return fmt.Errorf("--state: unknown state %q, want one of %s", *state, strings.Join(view.States, ", "))
		}
		return flags.follow(ctx, func(_ context.Context, f *fleet) error {
			nodes := slices.DeleteFunc(f.nodes(*service), func(v view.Node) bool { return *state != "" && v.State != *state })
			if !*asJSON {
				printNodes(cmd.OutOrStdout(), nodes)
				return nil
			}
			a := view.NewArray(cmd.OutOrStdout())
			for _, v := range nodes {
				a.Add(v)
			}
			a.End()
			return nil
		})
	})
}

// nodes returns the nodes of a service, or all of them, and then the rejected records.
func (f *fleet) nodes(service string) (nodes []view.Node) {
	registry := f.registry.String()
	for _, e := range f.Snapshot().Nodes() {
		if service != "" && e.Node.Service() != service {
			continue
		}
		v := view.OfNode(registry, e, nil)
		if v.State == string(discovery.StateHeld) {
			v.Reason = "its lease ran out with that of many others; proxies ask it whether it still accepts connections"
		}
		if e.Named() {
			v.Address = e.Node.Endpoint.Address() // nobody looks it up
		}
		nodes = append(nodes, v)
	}
	if service == "" {
		for _, r := range f.Status().Rejections {
			nodes = append(nodes, view.OfRejection(registry, r))
		}
	}
	return nodes
}

func printNodes(w io.Writer, nodes []view.Node) {
	t := newTable(w, "ID", "SERVICE", "ENDPOINT", "STATE", "WEIGHT", "LOAD", "LEASE", "HEARD", "MORE")
	defer t.flush()
	for _, n := range nodes {
		if n.State == view.StateRejected {
			t.row(n.ID, "", "", n.State, "", "", "", "", n.Reason)
			continue
		}
		// What has a column of its own is not said again.
		more := cmp.Or(n.Reason, pairs(n.Metadata, discovery.KeyService, discovery.KeyWeight, discovery.KeyState, discovery.KeyInstance, discovery.KeyLease))
		t.row(n.ID, n.Service, n.Endpoint, n.State, strconv.FormatFloat(n.Weight, 'g', 3, 64), strconv.FormatFloat(n.Load, 'g', 3, 64),
			age(view.Duration(n.LeaseLeft)), age(time.Since(n.LastHeard))+" ago", more)
	}
}

// pairs returns metadata as text, but for those of the keys.
func pairs(metadata map[string]string, but ...string) string {
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(metadata)) {
		if !slices.Contains(but, k) {
			pairs = append(pairs, k+"="+metadata[k])
		}
	}
	return strings.Join(pairs, " ")
}

// age is how people read a duration that passes.
func age(d time.Duration) string {
	switch {
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < 10*time.Minute:
		return d.Round(time.Second).String()
	default:
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	}
}
