package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

func watchCommand() *cobra.Command {
	var (
		flags  registryFlags
		asJSON bool
		id     string
	)
	cmd := &cobra.Command{
		Use:   "watch [--id <id>] [--json]",
		Short: "Shows what becomes of the nodes, as it happens",
		Long: `
Shows one line for each change of a node's standing, as it happens, until it is
interrupted, and one when the registry is lost or found.`,
		Example: `  $ caddy discovery watch
  $ caddy discovery watch --json | jq -r 'select(.type == "lapsed") | .id'`,
		Args: cobra.NoArgs,
	}
	flags.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, one object a line")
	cmd.Flags().StringVar(&id, "id", "", "only this `node`")
	return command(cmd, func(ctx context.Context, cmd *cobra.Command, _ []string) error {
		return flags.follow(ctx, func(ctx context.Context, f *fleet) error {
			fmt.Fprintf(cmd.ErrOrStderr(), "watching %s with %d nodes\n", f.registry, len(f.Snapshot().Nodes()))
			out, encoder := cmd.OutOrStdout(), json.NewEncoder(cmd.OutOrStdout())
			f.watch(ctx, id, func(c discovery.Change) (err error) {
				if asJSON {
					return encoder.Encode(view.OfChange(f.registry.String(), c))
				}
				_, err = fmt.Fprintln(out, changeLine(c))
				return err
			})
			return nil
		})
	})
}

// watch prints what becomes of the registry, and of the node with the id, or of all
// nodes if that is empty. It returns when ctx ends, or when whoever read what is
// printed has gone, as head does.
func (f *fleet) watch(ctx context.Context, id string, print func(discovery.Change) error) {
	began := false
	for number := uint64(0); ; {
		changes, more := f.Journal().Since(number)
		for _, c := range changes {
			number = c.Number
			switch {
			case c.Type == discovery.ChangeConnected && !began:
				began = true // that is how it got here
			case c.Listed, id != "" && c.ID != id && view.AboutNode(c.Type):
			case print(c) != nil:
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-more:
		}
	}
}

// changeLine returns a change as a line to read.
func changeLine(c discovery.Change) string {
	parts := []string{c.Time.Local().Format("15:04:05.000"), fmt.Sprintf("%-12s", c.Type)}
	if c.ID != "" {
		parts = append(parts, c.ID)
	}
	if c.Entry != nil {
		parts = append(parts, c.Entry.Node.Endpoint.String())
		if s := c.Entry.Node.Service(); s != "" {
			parts = append(parts, "service="+s)
		}
		if s := c.Entry.State(); s != discovery.StateUp {
			parts = append(parts, "state="+string(s))
		}
	}
	if c.Reason != "" {
		parts = append(parts, "("+c.Reason+")")
	}
	return discovery.PrintableLine(strings.Join(parts, "  "))
}
