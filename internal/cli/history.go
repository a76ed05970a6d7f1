package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

func watchCommand() *cobra.Command {
	var flags registryFlags
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
	asJSON := cmd.Flags().Bool("json", false, "print JSON, one object a line")
	id := cmd.Flags().String("id", "", "only this `node`")
	return command(cmd, func(ctx context.Context, cmd *cobra.Command, _ []string) error {
		return flags.follow(ctx, func(ctx context.Context, f *fleet) error {
			fmt.Fprintf(cmd.ErrOrStderr(), "watching %s with %d nodes\n", f.registry, len(f.Snapshot().Nodes()))
			out, encoder := cmd.OutOrStdout(), json.NewEncoder(cmd.OutOrStdout())
			f.watch(ctx, *id, func(c discovery.Change) (err error) {
				if *asJSON {
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

// revisionView is a past record as the CLI shows it.
type revisionView struct {
	Revision uint64            `json:"revision"`
	Time     time.Time         `json:"time"`
	Type     string            `json:"type"`
	Endpoint string            `json:"endpoint,omitempty"`
	Load     float64           `json:"load"`
	Metadata map[string]string `json:"metadata,omitempty"`
	Reason   string            `json:"reason,omitempty"`
}

func historyCommand() *cobra.Command {
	var flags registryFlags
	cmd := &cobra.Command{
		Use:     "history <id> [--limit <n>] [--json]",
		Short:   "Shows the past records of a node",
		Long:    "\nShows what the registry remembers of a node, newest first.",
		Example: "  $ caddy discovery history orders-3 --limit 5",
		Args:    cobra.ExactArgs(1),
	}
	flags.add(cmd)
	asJSON := cmd.Flags().Bool("json", false, "print JSON")
	limit := cmd.Flags().Int("limit", 0, "at most so `many`; 0 means all there are")
	return command(cmd, func(ctx context.Context, cmd *cobra.Command, args []string) error {
		if *limit < 0 {
			return fmt.Errorf("--limit: invalid number %d, want 0 or more", *limit)
		}
		c, err := flags.open(ctx, false)
		if err != nil {
			return err
		}
		defer c.close()
		ctx, cancel := context.WithTimeout(ctx, flags.timeout)
		defer cancel()
		historian, ok := discovery.As[discovery.Historian](c.registry)
		if !ok {
			return fmt.Errorf("%s keeps no history: %w", c.registry, discovery.ErrUnsupported)
		}
		revisions, err := historian.History(ctx, args[0], *limit)
		if err != nil {
			return err
		}
		if len(revisions) == 0 {
			return fmt.Errorf("%w: %s has never heard of %q", errNoSuchNode, c.registry, args[0])
		}
		views := make([]revisionView, len(revisions))
		for i, r := range revisions {
			views[i] = revisionView{Revision: r.Number, Time: r.Time, Type: r.Type.String()}
			switch {
			case r.Type == discovery.Put:
				views[i].Endpoint, views[i].Load, views[i].Metadata = r.Node.Endpoint.String(), r.Node.Load, r.Node.Metadata
			case r.Err != nil:
				views[i].Reason = r.Err.Error()
			}
		}
		return printAll(cmd.OutOrStdout(), *asJSON, views, []string{"REVISION", "TIME", "TYPE", "ENDPOINT", "LOAD", "MORE"}, revisionView.row)
	})
}

func (v revisionView) row() []string {
	load := ""
	if v.Endpoint != "" {
		load = strconv.FormatFloat(v.Load, 'g', 3, 64)
	}
	return []string{strconv.FormatUint(v.Revision, 10), v.Time.Local().Format("2006-01-02 15:04:05.000"), v.Type, v.Endpoint, load,
		cmp.Or(v.Reason, pairs(v.Metadata, discovery.KeyInstance))}
}
